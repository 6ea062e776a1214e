"""Sampling from the student."""

from pydantic import Field

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
    max_new_tokens: int = Field(16, ge=1, description="tokens per response at most")
    temperature: float = Field(
        1.0,
        gt=0,
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
    shard_size: int = Field(1024, ge=1, description="responses per shard; a shard is one job")
    batch_size: int = Field(128, ge=1, description="responses generated at once")
