"""How before and after are measured."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from schemas.config.options import Option, describe, one_of, refuse_unread
from schemas.config.prompts import PromptSource, Splits
from schemas.config.section import Section, Text

SCORERS = {
    "source": Option(
        "the source's own verifier (reasoning-gym's, full marks only), equality where it has none", ("extract",)
    ),
    "equality": Option("the answer is the one that the same extraction finds in the reference", ("extract",)),
    "exact": Option("all of the answer is the reference, but for space", ("ignore_case",)),
    "regex": Option(
        "what `pattern` finds last is what it finds last in the reference, or all of the reference where it finds nothing "
        "there",
        ("pattern",),
    ),
    "choice": Option(
        "the letter chosen (boxed, `the answer is (B)`, the last that stands alone) is the reference's, which is a letter, an "
        "option's text, or its index; options are the row's `choices` or `options`, or lines `B) ...` of the prompt"
    ),
    "math": Option(
        "the same value, by math-verify (`pip install 'offline-opd[math]'`): fractions, sets, intervals, LaTeX"
    ),
    "reasoning-gym": Option(
        "full marks of the reasoning-gym task that the row names (`source_dataset`, also in its `metadata`)",
        ("extract",),
    ),
    "code": Option(
        "the last fenced block passes the reference's tests in a sandbox: Python with assert statements, a list of such, or "
        "JSON of what to print for which input, `[{input: ..., output: ...}]`, `{inputs: [...], outputs: [...]}` or "
        "`{input: output}`",
        ("code_seconds", "code_memory_mb"),
    ),
}
"""What `evaluate.scorer` takes beside functions of one's own; `pipeline.measure.scorers.SCORERS` makes them."""


class Judged(Section):
    """Which responses are right."""

    scorer: Annotated[str, AfterValidator(one_of(SCORERS, own_code=True))] = Field(
        "source",
        description="what says whether a response is right, judged by what follows its thinking. "
        + describe(SCORERS)
        + " | `module:function` of your own, called with (response, reference answer or None, what templates know of the "
        "prompt), which gives True, False or, where it can't tell, None. Without a reference, or one that can't be read, a "
        "response is not measured",
    )
    extract: Literal["last_number", "whole"] = Field(
        "last_number",
        description="what of the response is the answer: `last_number` is for references that are whole or decimal numbers "
        "(for others use `math`); a scorer of your own reads all of it",
    )
    ignore_case: bool = Field(False, description="of scorer exact: capitals and small letters are the same")
    pattern: Text | None = Field(
        None,
        description="of scorer regex: a regular expression (Python's); the answer is its first group, else all of it",
    )
    code_seconds: float = Field(
        10, gt=0, description="of scorer code: seconds for all asserts of a response, or for each input"
    )
    code_memory_mb: int = Field(
        512, ge=64, description="of scorer code: memory that each of its processes may have, in MB"
    )

    @model_validator(mode="after")
    def _keys_mean_something(self) -> Self:
        refuse_unread(self, "scorer", SCORERS)
        return self

    @model_validator(mode="after")
    def _there_is_a_pattern(self) -> Self:
        if self.scorer == "regex":
            if self.pattern is None:
                raise ValueError("`scorer: regex` needs `pattern`, the expression that finds the answer")
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern: {self.pattern}` is no regular expression: {error}") from error
        return self


class HeldOut(Judged, PromptSource):
    """Prompts of another kind, which nothing is trained on."""

    count: int = Field(100, ge=1, description="how many of its different prompts, drawn by `seed`")


class Evaluate(Judged):
    """How before and after are measured."""

    split: Literal["test", "dev"] = Field("test", description="held-out split")
    every_round: bool = Field(
        False, description="measure what each round made, not only what the last one did: a curve of accuracy and KL"
    )
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
