"""Every objective, each a small pure function of log-probs at aligned units. Nothing here knows models or files.

Shapes: U units, K candidate slots (padded with -inf on the teacher's side and masked out), R student tokens. Log-probs are in
nats, natural log. Gradients flow through the student only; the teacher's tensors come from disk and carry none.
"""

from math import log, log1p
from typing import Literal

import torch

from train.staleness import MAX_LOG_RATIO

KLDirection = Literal["reverse", "forward"]

SMALLEST_SUM = 1e-8
"""nats; the multiplicative credit of a unit that the student is surer of than this would divide by nothing."""


def clipped_sampled_path(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, clip: float, credit_shift: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Policy-gradient surrogate of reverse KL on the sampled unit: -sg[clamp(log p_T - log p_S) + shift] * log p_S.

    Lightning OPD (arXiv 2604.13010; there clip is 10, of a unit's own advantage) and Thinking Machines' on-policy distillation.
    The clip bounds what one unit can say. What credit adds, `credit_shift` (U,), is a sum over other units, clipped each when
    it was formed; clipping the sum again would leave only the sign of a long response's.

    Args:
        student_logp, teacher_logp: (U,), of the realised unit.
    Returns:
        (U,).
    """
    return -(_clipped(student_logp, teacher_logp, clip) + credit_shift) * student_logp


def _clipped(student_logp: torch.Tensor, teacher_logp: torch.Tensor, clip: float) -> torch.Tensor:
    """A = clamp(log p_T - log p_S), a constant to the gradient."""
    return (teacher_logp - student_logp.detach()).clamp(-clip, clip)


def ratio_clipped(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    behavior_logp: torch.Tensor,
    clip: float,
    low: float,
    high: float,
    credit_shift: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """PPO's surrogate of the sampled path: -min(r A, clamp(r, 1 - low, 1 + high) A), r = p_S / p_sampler of the unit.

    PPO eq. 7 (arXiv 1707.06347); two bounds as in the code of DPCA (arXiv 2606.09456; low .2, high .28). A is
    `clipped_sampled_path`'s with its `credit_shift`, and detached. Without bounds the gradient is r times that one's; a unit
    with A > 0 has none once r > 1 + high, one with A < 0 none once r < 1 - low: what was gained since the sampling is enough.
    Only MAX_LOG_RATIO bounds the loss of a unit with A < 0 that has become likelier; `outside_trust_region` leaves it out.

    Args:
        student_logp, teacher_logp, behavior_logp: (U,), of the realised unit; the last under what it was sampled from.
    Returns:
        (U,).
    """
    advantage = _clipped(student_logp, teacher_logp, clip) + credit_shift
    return ppo(advantage, student_logp, behavior_logp, low, high)


def ppo(
    advantage: torch.Tensor, student_logp: torch.Tensor, behavior_logp: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """PPO's surrogate of given advantages: -min(r A, clamp(r, 1 - low, 1 + high) A), r = p_S / p_behavior; see `ratio_clipped`.

    All of units (U,), or of tokens (R,), of which r is that of the token alone.
    """
    ratio = (student_logp - behavior_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def outside_trust_region(student_logp: torch.Tensor, behavior_logp: torch.Tensor, radius: float) -> torch.Tensor:
    """Units whose |log p_S - log p_sampler| is above `radius` nats: a trust region by masking. (U,) x (U,) -> bool (U,)."""
    return (student_logp.detach() - behavior_logp).abs() > radius


def squared_ratio(student_logp: torch.Tensor, reference_logp: torch.Tensor) -> torch.Tensor:
    """(log p_S - log p_ref)^2 / 2 of the realised unit, at least 0: (U,) x (U,) -> (U,).

    The k2 estimate of KL(p_S || p_ref): its expected gradient on policy, of (log p_S - log p_ref) grad log p_S, is KL's own,
    as its value is not. Wherever the unit was sampled it is least where the two agree.
    """
    return (student_logp - reference_logp).square() / 2


def extrapolated(teacher_logp: torch.Tensor, reference_logp: torch.Tensor, scale: float) -> torch.Tensor:
    """What the sampled path is drawn to instead of log p_T: log p_ref + scale (log p_T - log p_ref). (U,) x (U,) -> (U,).

    G-OPD (arXiv 2602.12125), which maximises scale * log(p_T / p_ref) under a KL to p_ref: its policy is p_ref times
    (p_T / p_ref)^scale, normalised, whose constant is the same for all that may be sampled at a place and adds nothing to the
    expected gradient. The advantage is scale (log p_T - log p_ref) - (log p_S - log p_ref). Above 1 it is ExOPD, 1 is
    distillation, 0 stays at p_ref.
    """
    return torch.lerp(reference_logp, teacher_logp, scale)


def vopd(student_logp: torch.Tensor, teacher_logp: torch.Tensor, kl: torch.Tensor, clip: float) -> torch.Tensor:
    """The sampled path less a baseline, the policy's own value -KL: -sg[clamp(A + KL(p_S || p_T))] * log p_S.

    vOPD (arXiv 2605.07865). The baseline depends on the history only, so the expected gradient stays what it is wherever the
    clip doesn't bite, also when `kl` is only a bound or that of a unit's first token.

    Args:
        student_logp, teacher_logp: (U,), of the realised unit.
        kl: (U,), nats, reverse KL at the unit's start.
    Returns:
        (U,).
    """
    advantage = (teacher_logp - student_logp + kl).detach().clamp(-clip, clip)
    return -advantage * student_logp


def cr_opd(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    student_cand: torch.Tensor,
    teacher_cand: torch.Tensor,
    others: torch.Tensor,
    clip: float,
    alpha: float = 0.5,
    eps: float = 1e-3,
) -> torch.Tensor:
    """The sampled path, and what a unit with A < 0 gives up goes to candidates that both models find likely.

    |A| (log p_S(y) - sum_C q log p_S), C = candidates other than y with p_S >= eps, q ~ p_T^alpha p_S^(1 - alpha) on C; A
    (clipped) and q are detached. Where A >= 0 or C is empty it is the sampled path. CR-OPD is a hypothesis of the survey
    arXiv 2606.22793, which has no experiments on it.

    Args:
        student_logp, teacher_logp: (U,), of the realised unit.
        student_cand, teacher_cand: (U, K), of the tokens that may start it; -inf in the teacher's unused slots.
        others: bool (U, K), candidates that don't start the realised unit.
    Returns:
        (U,).
    """
    advantage = _clipped(student_logp, teacher_logp, clip)
    policy = student_cand.detach()
    inside = others & (teacher_cand > -torch.inf) & (policy.exp() >= eps)
    score = (alpha * teacher_cand + (1 - alpha) * policy).masked_fill(~inside, -torch.inf)
    # An empty C makes its row NaN; the mask takes that away as well.
    q = score.softmax(-1).masked_fill(~inside, 0.0)
    routed = (q * student_cand.masked_fill(~inside, 0.0)).sum(-1)
    return -advantage * student_logp + advantage.clamp(max=0.0) * routed


def dpca_additive(
    token_logp: torch.Tensor, student_logp: torch.Tensor, teacher_logp: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Credit of each token of a unit, the same for all: A_i = (L_T - L_S) / m, which sums to L_T - L_S.

    Additive solution of DPCA (arXiv 2606.09456).

    Args:
        token_logp: (R,), the student's log-probs.
        student_logp, teacher_logp: (R,), the sums L_S and L_T of the unit that each token belongs to.
        tokens: (R,), how many student tokens m that unit has.
    Returns:
        (R,), nats; constants to the gradient.
    """
    return ((teacher_logp - student_logp) / tokens).detach().expand_as(token_logp)


def dpca_multiplicative(
    token_logp: torch.Tensor, student_logp: torch.Tensor, teacher_logp: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Credit of each token of a unit by its surprisal: A_i = (L_T / L_S - 1) log p_i, which sums to L_T - L_S.

    Multiplicative solution of DPCA, the one its paper trains with (arXiv 2606.09456); additive where |L_S| < 1e-8.
    Arguments and result as `dpca_additive`.
    """
    nothing = student_logp.abs() < SMALLEST_SUM
    scaled = (teacher_logp / student_logp.masked_fill(nothing, 1.0) - 1) * token_logp
    return torch.where(nothing, dpca_additive(token_logp, student_logp, teacher_logp, tokens), scaled).detach()


def support_kl(
    student_score: torch.Tensor, teacher_score: torch.Tensor, direction: KLDirection = "reverse", tau: float = 1.0
) -> torch.Tensor:
    """KL of the two score rows renormalised over one support: softmax_U, SimCT eq. 9 (arXiv 2605.07711).

    Args:
        student_score, teacher_score: (U, K); -inf in both marks a slot outside the support.
        direction: reverse is KL(q_S || q_T), forward KL(q_T || q_S).
        tau: temperature of both sides, see `renormalised`.
    Returns:
        (U,).
    """
    return _directed(renormalised(student_score, tau), renormalised(teacher_score, tau), direction)


def bucket_kl(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, direction: KLDirection = "reverse"
) -> torch.Tensor:
    """KL over K candidates and one more class for all else: a lower bound of full-vocabulary KL (log-sum inequality).

    (U, K) x (U, K) -> (U,); slots outside the support are -inf in both.
    """
    return _directed(with_rest(student_logp), with_rest(teacher_logp), direction)


def sampled_rest(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    student_cand: torch.Tensor,
    teacher_cand: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """What `bucket_kl` (reverse) lacks to full reverse KL, from a sampled token that is none of the candidates.

    With R for all else, KL(p_S || p_T) is `bucket_kl` and p_S(R) KL(p_S(.|R) || p_T(.|R)). The gradient of the latter is the
    expectation over y ~ p_S, where y is in R, of a(y) times that of log p_S(y), a(y) = log p_S(y|R) - log p_T(y|R): so
    sg[clamp(a)] log p_S(y), which is this, makes the whole gradient unbiased on policy up to the clip. It is a
    Rao-Blackwellised sampled path: what the candidates say exactly isn't sampled.

    Args:
        student_logp, teacher_logp: (U,), of the sampled token.
        student_cand, teacher_cand: (U, K), of the candidates; -inf in both marks a slot outside the support.
        clip: nats.
    Returns:
        (U,), meaningful where the sampled token is none of the candidates.
    """
    own, other = with_rest(student_cand)[:, -1], with_rest(teacher_cand)[:, -1]
    above = (student_logp - own) - (teacher_logp - other)
    return above.detach().clamp(-clip, clip) * student_logp


def jsd(student_logp: torch.Tensor, teacher_logp: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.

    GKD eq. 1 (arXiv 2306.13649). It goes to 0 at both ends of beta; divided by beta it goes to KL(p_T || p_S) as beta -> 0,
    divided by 1 - beta to KL(p_S || p_T) as beta -> 1.

    Args:
        student_logp, teacher_logp: (U, K), of the same classes and normalised (`renormalised`, `with_rest`); -inf in both marks
            a slot outside the support.
        beta: in (0, 1).
    Returns:
        (U,), at most the entropy of (beta, 1 - beta).
    """
    outside = (student_logp == -torch.inf) & (teacher_logp == -torch.inf)
    # logaddexp of two -inf has no gradient but NaN.
    s, t = student_logp.masked_fill(outside, 0.0), teacher_logp.masked_fill(outside, 0.0)
    mixture = torch.logaddexp(t + log(beta), s + log1p(-beta)).masked_fill(outside, -torch.inf)
    return beta * _kl(teacher_logp, mixture) + (1 - beta) * _kl(student_logp, mixture)


def entropy_gate(
    forward: torch.Tensor, reverse: torch.Tensor, teacher_entropy: torch.Tensor, threshold: float = 0.8
) -> torch.Tensor:
    """Forward KL where the teacher's entropy is over `threshold` nats, reverse KL elsewhere; all (U,).

    After Entropy-Aware OPD (arXiv 2603.07079), whose abstract adds the forward KL there; here it takes the reverse one's place.
    """
    return torch.where(teacher_entropy > threshold, forward, reverse)


def soft_or(student_logp: torch.Tensor, teacher_logp: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """How much there is to learn at a unit: h + d - h d, of the student's entropy h and its reverse KL d to the teacher.

    TIP (arXiv 2604.14084): 0 where neither is there, 1 where one is as large as anywhere in the response, so that units where
    the student is sure and wrong count as much as those where it is unsure. Each is over its largest in the response; how the
    paper scales them is not stated where we could read it. Entropy and KL are of `with_rest`, and so lower bounds.

    Args:
        student_logp, teacher_logp: (U, K), of the candidates; -inf in both marks an unused slot.
        response: int64 (U,), which response a unit is of.
    Returns:
        (U,), in [0, 1]; a constant to the gradient.
    """
    student, teacher = student_logp.detach(), teacher_logp.detach()
    h, d = (_of_largest(x, response) for x in (entropy(student), bucket_kl(student, teacher)))
    return h + d - h * d


def entropy(logp: torch.Tensor) -> torch.Tensor:
    """Entropy over K candidates and one class for all else, a lower bound of that over the vocabulary. (U, K) -> (U,), nats."""
    whole = with_rest(logp)
    return -(whole.exp() * whole.masked_fill(whole == -torch.inf, 0.0)).sum(-1)


def _of_largest(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Values >= 0 as shares of the largest one of their group; 0 where all are 0."""
    groups = int(group.max()) + 1 if len(group) else 0
    largest = value.new_zeros(groups).scatter_reduce(0, group, value, "amax")[group]
    return value.clamp(min=0.0) / largest.masked_fill(largest <= 0, 1.0)


def top_share(score: torch.Tensor, group: torch.Tensor, share: float) -> torch.Tensor:
    """The units of the highest scores in each group: rank r of n, from 0, is in where r / n < share, so at least one is.

    Of equal scores the first ones are in. It depends on no other group, so that how responses are batched changes nothing.
    (U,), int64 (U,) -> bool (U,).
    """
    falling = score.argsort(descending=True, stable=True)
    falling = falling[group[falling].argsort(stable=True)]
    count = group.bincount()
    first = count.cumsum(0) - count
    rank = torch.empty_like(group)
    rank[falling] = torch.arange(len(group), device=group.device) - first[group[falling]]
    # A division that is correctly rounded keeps r / n = share exact where share * n is not.
    return rank.double() / count[group] < share


def renormalised(score: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Log-probs over the support alone at temperature tau: log softmax(score / tau). (U, K) -> (U, K).

    Of candidates this is exactly the tempered distribution given that one of them is drawn: log Z cancels. The loss isn't
    scaled by tau^2 as Hinton's is, so a higher tau also means smaller gradients.
    """
    return torch.log_softmax(score / tau, -1)


def with_rest(logp: torch.Tensor) -> torch.Tensor:
    """Log-probs and, as one more class, that of everything else, at least about 1e-6: (U, K) -> (U, K + 1)."""
    return torch.cat([logp, torch.log1p(-logp.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))], -1)


def _directed(q_s: torch.Tensor, q_t: torch.Tensor, direction: KLDirection) -> torch.Tensor:
    return _kl(q_s, q_t) if direction == "reverse" else _kl(q_t, q_s)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of exp(p) (p - q) where p has mass."""
    inside = p > -torch.inf
    # Both wheres are needed: a masked -inf would still send NaN through the backward pass.
    p_safe, q_safe = p.masked_fill(~inside, 0.0), q.masked_fill(~inside, 0.0)
    return (p_safe.exp() * (p_safe - q_safe)).masked_fill(~inside, 0.0).sum(-1)
