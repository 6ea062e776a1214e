"""Every objective, each a small pure function of log-probs at aligned units. Nothing here knows models or files.

Shapes: U units, K candidate slots (padded with -inf on the teacher's side and masked out). Log-probs are in nats, natural
log. Gradients flow through the student only; the teacher's tensors come from disk and carry none.
"""

from typing import Literal

import torch


def clipped_sampled_path(student_logp: torch.Tensor, teacher_logp: torch.Tensor, clip: float) -> torch.Tensor:
    """Policy-gradient surrogate of reverse KL on the sampled unit: -sg[clamp(log p_T - log p_S)] * log p_S.

    Lightning OPD (arXiv 2604.13010) and Thinking Machines' on-policy distillation. (U,) x (U,) -> (U,).
    """
    advantage = (teacher_logp - student_logp.detach()).clamp(-clip, clip)
    return -advantage * student_logp


def support_kl(
    student_score: torch.Tensor,
    teacher_score: torch.Tensor,
    direction: Literal["reverse", "forward"] = "reverse",
) -> torch.Tensor:
    """KL of the two score rows renormalised over one support: softmax_U, SimCT eq. 9 (arXiv 2605.07711).

    Args:
        student_score, teacher_score: (U, K); -inf in both marks a slot outside the support.
        direction: reverse is KL(q_S || q_T), forward KL(q_T || q_S).
    Returns:
        (U,).
    """
    q_s, q_t = torch.log_softmax(student_score, -1), torch.log_softmax(teacher_score, -1)
    p, q = (q_s, q_t) if direction == "reverse" else (q_t, q_s)
    return _kl(p, q)


def bucket_kl(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    direction: Literal["reverse", "forward"] = "reverse",
) -> torch.Tensor:
    """KL over K candidates and one more class for all else: a lower bound of full-vocabulary KL (log-sum inequality).

    (U, K) x (U, K) -> (U,); slots outside the support are -inf in both.
    """
    q_s, q_t = (torch.cat([logp, _rest(logp)], -1) for logp in (student_logp, teacher_logp))
    p, q = (q_s, q_t) if direction == "reverse" else (q_t, q_s)
    return _kl(p, q)


def _rest(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - sum exp logp) over the last axis, kept finite: (U, K) -> (U, 1)."""
    return torch.log1p(-logp.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of exp(p) (p - q) where p has mass."""
    inside = p > -torch.inf
    # Both wheres are needed: a masked -inf would still send NaN through the backward pass.
    p_safe, q_safe = p.masked_fill(~inside, 0.0), q.masked_fill(~inside, 0.0)
    return (p_safe.exp() * (p_safe - q_safe)).masked_fill(~inside, 0.0).sum(-1)
