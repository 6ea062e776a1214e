"""Recipes: which objective applies to which unit. The functions themselves are in `objectives`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from schemas.config import Objective
from train import objectives
from train.policy import UnitLogps
from train.stream import Batch


@dataclass(frozen=True)
class Scored:
    """Per-unit losses (U,) and which units they were defined for (bool (U,)); others carry 0."""

    loss: torch.Tensor
    used: torch.Tensor


def losses(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """The unweighted loss of every unit under the configured recipe."""
    return RECIPES[config.recipe](student, batch, config)


def _hybrid(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """KL where both sides have one token (stops included), the sampled path where units are longer."""
    one = one_to_one(batch)
    kl = candidate_kl(student, batch, config, one)
    path = objectives.clipped_sampled_path(student.unit, batch.teacher_logp, config.clip)
    return Scored(torch.where(one, kl, path), torch.ones_like(one))


def _simct(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """KL over shared tokens and the realised unit at every unit (SimCT)."""
    every = torch.ones_like(one_to_one(batch))
    return Scored(candidate_kl(student, batch, config, every), every)


def _strict(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """KL on 1:1 units and stops, nothing elsewhere: the baseline to beat."""
    one = one_to_one(batch)
    kl = candidate_kl(student, batch, config, one)
    return Scored(torch.where(one, kl, 0.0), one)


def _sampled(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """The sampled path at every unit (Lightning OPD)."""
    path = objectives.clipped_sampled_path(student.unit, batch.teacher_logp, config.clip)
    return Scored(path, torch.ones_like(one_to_one(batch)))


RECIPES: dict[str, Callable[[UnitLogps, Batch, Objective], Scored]] = {
    "hybrid": _hybrid,
    "simct": _simct,
    "strict_1to1": _strict,
    "sampled": _sampled,
}


def one_to_one(batch: Batch) -> torch.Tensor:
    """bool (U,): units of one token on both sides, stops among them."""
    return (batch.s_len == 1) & (batch.t_len == 1)


def candidate_kl(student: UnitLogps, batch: Batch, config: Objective, where: torch.Tensor) -> torch.Tensor:
    """KL over the teacher's candidates and the realised unit; meaningful at `where`."""
    scale_s, scale_t = (batch.s_len, batch.t_len) if config.unit_score == "mean" else (1, 1)
    # The realised unit joins the support unless it is a single token that is a candidate already.
    listed = ((batch.cand_id == _first_target(batch)[:, None]) & (batch.cand_logp > -torch.inf)).any(1)
    outside = ~(listed & one_to_one(batch))
    unused = batch.cand_logp == -torch.inf
    s_score = torch.cat([student.cand.masked_fill(unused, -torch.inf), (student.unit / scale_s)[:, None]], 1)
    t_score = torch.cat([batch.cand_logp, (batch.teacher_logp / scale_t)[:, None]], 1)
    drop = torch.cat([torch.zeros_like(unused), ~outside[:, None]], 1) | ~where[:, None] & torch.cat(
        [torch.ones_like(unused), torch.zeros_like(outside[:, None])], 1
    )
    s_score, t_score = s_score.masked_fill(drop, -torch.inf), t_score.masked_fill(drop, -torch.inf)
    kl = objectives.support_kl if config.support == "renormalise" else objectives.bucket_kl
    return kl(s_score, t_score, config.direction)


def _first_target(batch: Batch) -> torch.Tensor:
    return batch.targets[batch.unit_row]
