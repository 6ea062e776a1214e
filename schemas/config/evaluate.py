"""How before and after are measured."""

from typing import Literal

from pydantic import Field

from schemas.config.section import Section


class Evaluate(Section):
    """How before and after are measured."""

    split: Literal["test", "dev"] = Field("test", description="held-out split")
    kl_items: int | None = Field(
        None,
        ge=0,
        description="prompts of it on which the on-policy reverse KL is measured, which takes the teacher; null: 100, or "
        "all where it holds fewer, or 0 with `reuse`",
    )
    extract: Literal["last_number", "whole"] = Field("last_number", description="what of the response is the answer")
