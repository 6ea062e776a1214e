"""What makes a credit or a weight of units: an expression, and what it needs of other responses and of the tables.

`pipeline.weights.credit` runs all of them alike: it adds columns (`prepare`), sums them over shards (`by_position`, `sums`),
adds what the sums say of each unit (`estimate`), and computes the expression (`value`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import polars as pl

from pipeline.weights.cross_fitting import Sums
from schemas.config import RatioClipped, Recipe, SampledPath, Weights


@dataclass(frozen=True)
class Loss:
    """What weights and credit take of the loss that they are for.

    Attributes:
        clip: nats, `objective.clip` of a loss that reads credit; inf: advantages aren't clipped.
        corrected: kinds of unit whose loss is an estimate from what was sampled there, and has no importance ratio of its own
            (`objective.ratio_clip`).
    """

    clip: float = inf
    corrected: tuple[str, ...] = ()

    @classmethod
    def of(cls, objective: Recipe) -> "Loss":
        """Of a recipe's section."""
        has_ratio = isinstance(objective, RatioClipped) and objective.ratio_clip is not None
        clip = objective.clip if isinstance(objective, SampledPath) else inf
        return cls(clip, () if has_ratio else objective.sampled)

    def identity(self) -> dict[str, Any]:
        """What of it determines the weights."""
        return {"loss": {"clip": None if self.clip == inf else self.clip, "corrected": list(self.corrected)}}


PLAIN = Loss()
"""A loss that neither clips what credit is formed of nor is corrected."""


@dataclass(frozen=True)
class Estimator:
    """A credit or a weight of each unit.

    Attributes:
        value: the expression, given the config's section; reads what `credit.advantages` gives and the columns below.
            To a credit `advantage` is clipped (`Loss.clip`), to a weight it is not.
        prepare: `units` of a shard with more columns, of (units, rollouts, options); None: there are none.
        by_position: columns of these whose sums over all responses that have a unit at the same index it reads, as `count`
            and `<column>_sum`.
        sums: any other sums of a shard, by kinds that no other estimator has; what `cross_fitting.sums_by` gives.
        estimate: a column made of a shard and the sums of all of them.
        units, rollouts: columns of these tables that it reads beside those of every estimator (`phase.UNIT_COLUMNS`;
            rollout_id, behavior_logp, policy_logp).
    """

    value: Callable[[Weights], pl.Expr]
    prepare: Callable[[pl.DataFrame, pl.DataFrame, Weights], pl.DataFrame] | None = None
    by_position: tuple[str, ...] = ()
    sums: Callable[[pl.DataFrame], Sums] | None = None
    estimate: Callable[[pl.DataFrame, Sums], pl.Series] | None = None
    units: tuple[str, ...] = ()
    rollouts: tuple[str, ...] = ()

    @property
    def compares_responses(self) -> bool:
        """Whether a unit's value depends on other responses than its own."""
        return bool(self.by_position or self.sums)
