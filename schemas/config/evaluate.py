"""How before and after are measured."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from schemas.config.options import Option, describe, one_of, refuse_unread
from schemas.config.prompts import PromptSource, Splits
from schemas.config.section import Section

SCORERS = {
    "source": Option(
        "the source's own verifier (reasoning-gym's, full marks only), equality where it has none", ("extract",)
    ),
    "equality": Option("the answer is the one that the same extraction finds in the reference", ("extract",)),
}
"""What `evaluate.scorer` takes beside functions of one's own; `pipeline.measure.scorers.SCORERS` makes them."""


class Judged(Section):
    """Which responses are right."""

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
    def _keys_mean_something(self) -> Self:
        refuse_unread(self, "scorer", SCORERS)
        return self


class HeldOut(Judged, PromptSource):
    """Prompts of another kind, which nothing is trained on."""

    count: int = Field(100, ge=1, description="how many of its different prompts, drawn by `seed`")


class Evaluate(Judged):
    """How before and after are measured."""

    split: Literal["test", "dev"] = Field("test", description="held-out split")
    kl_items: int | None = Field(
        None,
        ge=0,
        description="prompts of it on which the on-policy reverse KL is measured, which takes the teacher; null: 100, or "
        "all where it holds fewer, or 0 with `reuse`",
    )
    samples: int = Field(
        1,
        ge=1,
        description="responses per held-out prompt. 1: the greedy one; more: sampled ones, for their mean accuracy (avg@n) and "
        "the share of prompts that k of them solve (pass@k)",
    )
    temperature: float = Field(
        0.6,
        ge=0.01,
        le=100,
        description="of `samples` above 1; 0.6 with `top_p: 0.95` is how reasoning models are commonly evaluated (DeepSeek-R1, "
        "Qwen3), 1 and 1 is the policy itself",
    )
    top_p: float = Field(0.95, gt=0, le=1, description="likewise, nucleus mass")
    also: dict[str, HeldOut] = Field(
        {},
        description="other held-out sets by name, to see what is forgotten: their prompts are answered before and after too, "
        "each through the student's own `prompt`",
    )

    @model_validator(mode="after")
    def _greedy_has_no_temperature(self) -> Self:
        for key in ("temperature", "top_p"):
            value = getattr(self, key)
            if self.samples == 1 and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"`{key}: {value:g}` means nothing to the one greedy answer of `samples: 1`; sample more, or leave it out"
                )
        return self

    @field_validator("also")
    @classmethod
    def _names_of_their_own(cls, sets: dict[str, HeldOut]) -> dict[str, HeldOut]:
        for name in sets:
            if not re.fullmatch(r"[\w.-]+", name) or name in Splits.model_fields:
                raise ValueError(
                    f"names a set {name!r}; a name has letters, digits, `_`, `.` and `-`, and is none of the splits' "
                    f"{', '.join(Splits.model_fields)}"
                )
        return sets
