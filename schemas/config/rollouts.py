"""Sampling from the student."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from schemas.config.section import Section


class Rollouts(Section):
    """Sampling from the student."""

    rounds: int = Field(2, ge=1, description="rounds of sample, score, train; each starts from the last checkpoint")
    replay: int = Field(
        0,
        ge=0,
        description="rounds before it whose rollouts a round trains on too; their weights are made anew with the policy that "
        "the round starts from. `weights.truncate` or `objective.ratio_clip` corrects for their age",
    )
    prompts: int = Field(128, ge=1, description="train prompts per round")
    samples: int = Field(1, ge=1, description="responses per prompt")
    max_new_tokens: int | tuple[int, ...] = Field(
        16,
        description="tokens per response at most; or a list with one number a round, such as [16, 32, 64], whose last stands "
        "for all later rounds: what is cut off is not sampled, scored or trained on (short horizons first, TOPD, arXiv "
        "2605.31490). Evaluation always has the largest",
    )
    temperature: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="sampling temperature; where it or `top_p` isn't 1, every importance ratio is to what was sampled from, "
        "and the sampled path is corrected by it (`weights.truncate`)",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus mass; below 1 no ratio brings back what was never sampled: the loss is that of the nucleus",
    )
    top_k: int = Field(
        0, ge=0, description="the student's likeliest ids to record at each position, for `scores.support`"
    )
    shard_size: int = Field(1024, ge=1, description="responses per shard at most; a shard is one job")
    shard_tokens: int = Field(
        1 << 22,
        ge=1,
        description="tokens per shard at most, at `max_new_tokens` a response: the number of shards is known before any is "
        "sampled. From 4097 tokens a response on a shard of the default size has fewer responses; one at least",
    )
    batch_size: int = Field(128, ge=1, description="responses generated at once")

    @field_validator("max_new_tokens", mode="before")
    @classmethod
    def _one_or_one_a_round(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError("takes a number of tokens, or a list with one for each round, each at least 1")
        return value

    @model_validator(mode="after")
    def _no_more_horizons_than_rounds(self) -> "Rollouts":
        if len(self.horizons) > self.rounds:
            raise ValueError(
                f"`max_new_tokens: {list(self.horizons)}` has {len(self.horizons)} entries, one a round, but the run has "
                f"`rounds: {self.rounds}`: drop some, or add rounds"
            )
        return self

    @property
    def horizons(self) -> tuple[int, ...]:
        """Tokens per response at most, by round; the last stands for all later rounds."""
        return (self.max_new_tokens,) if isinstance(self.max_new_tokens, int) else self.max_new_tokens

    @property
    def longest(self) -> int:
        """Tokens per response at most in any phase; of the phase at work in what a stage sees (`schemas.decides`)."""
        return max(self.horizons)

    @property
    def shard_responses(self) -> int:
        """Responses of a shard, all but the last of a phase: within `shard_size` and `shard_tokens`."""
        return max(1, min(self.shard_size, self.shard_tokens // self.longest))

    def horizon(self, round_index: int) -> int:
        """Tokens per response at most in a round."""
        return self.horizons[min(round_index, len(self.horizons) - 1)]
