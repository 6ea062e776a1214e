"""Losses that `gradient.py` and `trained.py` compare and no recipe has, as `objective.recipe: variants:<name>`."""

from typing import Any

import torch

from schemas.config.objective import RaoBlackwell
from train import objectives, recipes
from train.batch import Batch
from train.policy import UnitLogps


def at_start(student: UnitLogps, batch: Batch, _: Any) -> torch.Tensor:
    """Candidates and one class for the rest at the start of every unit, longer ones too; no loss reads what was sampled."""
    return objectives.bucket_kl(student.cand.masked_fill(batch.cand_logp == -torch.inf, -torch.inf), batch.cand_logp)


def at_start_sampled(student: UnitLogps, batch: Batch, options: Any) -> torch.Tensor:
    """`at_start`, and at units of one token the sampled part of the rest."""
    one, exact = recipes.one_to_one(batch), RaoBlackwell()
    single = recipes.parts_of(exact).single(student, batch, exact, one)
    return torch.where(one, single, at_start(student, batch, options))


def longer_per_token(student: UnitLogps, batch: Batch, _: Any) -> torch.Tensor:
    """Candidates and one class for the rest at 1:1 units; longer ones by the sampled path, over their student tokens."""
    one = recipes.one_to_one(batch)
    longer = objectives.clipped_sampled_path(student.unit, batch.teacher_logp, 5.0) / batch.s_len
    return torch.where(one, at_start(student, batch, None), longer)
