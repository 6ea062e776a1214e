"""How before and after are measured."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from schemas.config.options import Option, describe, one_of, refuse_unread
from schemas.config.section import Section

SCORERS = {
    "source": Option(
        "the source's own verifier (reasoning-gym's, full marks only), equality where it has none", ("extract",)
    ),
    "equality": Option("the answer is the one that the same extraction finds in the reference", ("extract",)),
}
"""What `evaluate.scorer` takes beside functions of one's own; `pipeline.measure.scorers.SCORERS` makes them."""


class Evaluate(Section):
    """How before and after are measured."""

    split: Literal["test", "dev"] = Field("test", description="held-out split")
    kl_items: int | None = Field(
        None,
        ge=0,
        description="prompts of it on which the on-policy reverse KL is measured, which takes the teacher; null: 100, or "
        "all where it holds fewer, or 0 with `reuse`",
    )
    scorer: Annotated[str, AfterValidator(one_of(SCORERS, own_code=True))] = Field(
        "source",
        description="what says whether a response is right. "
        + describe(SCORERS)
        + " | `module:function` of your own, called with (response, reference answer or None, what templates know of the "
        "prompt), which gives True, False or, where it can't tell, None",
    )
    extract: Literal["last_number", "whole"] = Field(
        "last_number", description="what of the response is the answer; a scorer of your own reads all of it"
    )

    @model_validator(mode="after")
    def _keys_mean_something(self) -> "Evaluate":
        refuse_unread(self, "scorer", SCORERS)
        return self
