"""What a round of training ended with: `round-<r>/train/result.json`, which the next round reads for its budget."""

from typing import Literal

from pydantic import Field

from schemas.config import Section
from schemas.manifest import Signed


class Outcome(Section, Signed):
    """A round's steps, and why it took no more."""

    budget: int = Field(description="optimiser steps that the round was allowed, with what earlier rounds left")
    steps: int = Field(description="optimiser steps that it took")
    ended: Literal["budget", "min_ess"] = Field(
        description="budget: all were taken | min_ess: the policy had moved too far from the one that sampled"
    )
    ess: float | None = Field(
        description="effective sample size over units of the policy in training over the one that the round started from, "
        "a share, mean of the last steps; null: none was taken"
    )

    metrics: str | None = Field(default=None, description="sha256 of the `metrics.jsonl` beside it")

    @property
    def unspent(self) -> int:
        """Steps that the next round may take beside its own."""
        return self.budget - self.steps
