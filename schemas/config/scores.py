"""What is kept of the teacher, how it is audited, and what a round must reach to be trained on."""

from typing import Literal

from pydantic import Field

from schemas.config.section import Section


class Scores(Section):
    """What is kept of the teacher."""

    support: Literal["teacher", "student", "union"] = Field(
        "teacher",
        description="whose likeliest tokens are the candidates; `student` and `union` need `rollouts.top_k`",
    )
    min_p: float = Field(0.0005, ge=0, lt=1, description="candidates are kept that are at least so likely,")
    mass: float = Field(1.0, gt=0, le=1, description="until they hold this much of the mass,")
    k_max: int = Field(128, ge=1, description="but never more than this many")
    log_z: bool = Field(
        False,
        description="keep the teacher's log Z at each token too, 4 bytes: what `objective.recipe: simct_released` needs beside "
        "log-probs",
    )
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per forward pass")


class Audit(Section):
    """Some of the scores are computed again when a shard of them is made; differences are kept in its manifest."""

    responses: int = Field(4, ge=0, description="responses per shard that are scored again, one by one; 0: none")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="precision of the audit; the teacher's own where it doesn't fit into memory, or the teacher is quantised",
    )
    required: bool = Field(
        True, description="train on no scores that could not be audited for want of memory; false: train on them too"
    )
    max_delta: float = Field(5.0, gt=0, description="nats; a log-prob that differs by more stops the run")
    max_mean_delta: float = Field(0.3, gt=0, description="nats; differences that are larger on average stop the run")


class Coverage(Section):
    """What a round must reach before anything is trained on it; shares of student tokens."""

    min_compared: float = Field(0.5, ge=0, le=1, description="tokens in units that carry loss (not masked), at least")
    min_one_to_one: float = Field(0.3, ge=0, le=1, description="tokens in 1:1 units and stops, at least")
    min_shared_mass: float = Field(
        0.9, ge=0, le=1, description="share of the teacher's kept mass that has a student id, at least"
    )
