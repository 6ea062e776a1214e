"""Losses that `gradient.py` and `trained.py` compare and no recipe has, as `objective.recipe: variants:<name>`."""

from typing import Any

import torch

from train import objectives, recipes
from train.batch import Batch
from train.policy import UnitLogps


def at_start(student: UnitLogps, batch: Batch, _: Any) -> torch.Tensor:
    """Candidates and one class for the rest at the start of every unit, longer ones too; no loss reads what was sampled."""
    return objectives.bucket_kl(student.cand.masked_fill(batch.cand_logp == -torch.inf, -torch.inf), batch.cand_logp)


def at_start_sampled(student: UnitLogps, batch: Batch, options: Any) -> torch.Tensor:
    """`at_start`, and at units of one token the sampled part of the rest."""
    one = recipes.one_to_one(batch)
    listed = ((batch.cand_id == batch.targets[batch.unit_row][:, None]) & (batch.cand_logp > -torch.inf)).any(1)
    unused = batch.cand_logp == -torch.inf
    rest = objectives.sampled_rest(
        student.unit, batch.teacher_logp, student.cand.masked_fill(unused, -torch.inf), batch.cand_logp, 5.0
    )
    return at_start(student, batch, options) + torch.where(one & ~listed, rest, 0.0)


def longer_per_token(student: UnitLogps, batch: Batch, _: Any) -> torch.Tensor:
    """Candidates and one class for the rest at 1:1 units; longer ones by the sampled path, over their student tokens."""
    one = recipes.one_to_one(batch)
    longer = objectives.clipped_sampled_path(student.unit, batch.teacher_logp, 5.0) / batch.s_len
    return torch.where(one, at_start(student, batch, None), longer)
