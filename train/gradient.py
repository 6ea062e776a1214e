"""How near the gradient of a loss made from shards is to that of exact reverse KL over the whole vocabulary."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Gradient:
    """Of a loss summed over micro-batches.

    Attributes:
        loss: nats.
        hidden: float32 (n,), in the last hidden states of all positions.
        parameters: float32 (m,), in all parameters; None where not asked for.
    """

    loss: float
    hidden: torch.Tensor
    parameters: torch.Tensor | None

    def cosines(self, exact: "Gradient") -> tuple[float, float | None]:
        """Cosine with another one, in the hidden states and in the parameters."""
        both = self.parameters is not None and exact.parameters is not None
        return _cosine(self.hidden, exact.hidden), _cosine(self.parameters, exact.parameters) if both else None  # type: ignore[arg-type]

    @property
    def norm(self) -> float:
        """Of the parameters' part where there is one, else of the hidden states'."""
        return float((self.hidden if self.parameters is None else self.parameters).double().norm())


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def gradient(model: Any, losses: Iterable[Callable[[], torch.Tensor]], parameters: bool = True) -> Gradient:
    """The gradient of a sum of losses, each of which runs `model.base_model` once.

    Without `parameters` nothing is kept for a backward pass through the layers, which are most of the work.
    """
    found: list[torch.Tensor] = []

    def catch(_: Any, __: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden if parameters else hidden.detach().requires_grad_()
        if parameters:
            output.last_hidden_state.retain_grad()
        found.append(output.last_hidden_state)
        return output

    handle = model.base_model.register_forward_hook(catch)
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameters)
    total, hidden = 0.0, []
    try:
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
            hidden.append(found.pop().grad.float().flatten())  # type: ignore[union-attr]
    finally:
        handle.remove()
    whole = None
    if parameters:
        whole = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    return Gradient(total, torch.cat(hidden), whole)


def exact_reverse_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    pairs: np.ndarray,
    student_stop: torch.Tensor,
    teacher_stop: torch.Tensor,
) -> torch.Tensor:
    """KL(student || teacher) over all tokens that both have, stopping, and one class for what either has alone: (U,), nats.

    Args:
        student, teacher: float32 (U, student's and teacher's vocabulary), logits at the same places of a text.
        pairs: int (teacher's vocabulary,), teacher id -> student id, -1 where there is none (`vocabularies.pair_ids`).
        student_stop, teacher_stop: int64, the two stop sets.
    Returns:
        inf where the teacher has no token of its own and the student does: that class has no mass to be compared with.
    """
    theirs = torch.from_numpy(np.flatnonzero(pairs >= 0)).to(teacher.device)
    ours = torch.from_numpy(pairs[pairs >= 0].astype(np.int64)).to(student.device)
    speak = ~(torch.isin(theirs, teacher_stop) | torch.isin(ours, student_stop))
    sides = [
        _classes(logits, ids[speak], stop)
        for logits, ids, stop in ((student, ours, student_stop), (teacher, theirs, teacher_stop))
    ]
    own, other = sides
    none = own == -torch.inf  # no class of what the student alone can say
    return torch.where(none, 0.0, own.exp() * (own.masked_fill(none, 0.0) - other.masked_fill(none, 0.0))).sum(1)


def _classes(logits: torch.Tensor, shared: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Log-probs of shared tokens, of stopping and of all else, (U, shared + 2)."""
    logp = logits.float().log_softmax(1)
    known = torch.cat([logp[:, shared], logp[:, stop].logsumexp(1, keepdim=True)], 1)
    # Summed, not 1 less the others: a small rest would be lost in that difference.
    alone = torch.ones(logp.shape[1], dtype=torch.bool, device=logp.device)
    alone[shared], alone[stop] = False, False
    return torch.cat([known, logp[:, alone].logsumexp(1, keepdim=True)], 1)
