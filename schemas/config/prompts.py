"""Where prompts come from."""

from typing import Any

from pydantic import Field

from schemas.config.section import Section, Text


class Splits(Section):
    """How many source rows go where; the splits share no prompt."""

    examples: int = Field(4, ge=0, description="worked examples that templates can show a model")
    train: int = Field(320, ge=1, description="prompts that rollouts are sampled for, taken in order over the rounds")
    dev: int = Field(0, ge=0, description="prompts to choose settings on")
    test: int = Field(300, ge=0, description="held-out prompts that the report's figures come from")


class PromptSource(Section):
    """Rows of prompts, and which of their fields is what."""

    source: Text = Field(
        description="`reasoning-gym:<dataset>`, a .jsonl, .jsonl.zst or .parquet file, a dataset id of the hub, or "
        "`module:function` of your own, called with (options, seed, how many different prompts are wanted), which gives "
        "rows as dicts and ends; all of them are shuffled"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the generator, of `datasets.load_dataset` (name, split, ...) or of your own function",
    )
    prompt_field: Text = Field("prompt", description="field of the source that holds the question")
    answer_field: Text | None = Field(
        "answer",
        description="field that holds the reference answer; null: there is none, and accuracy is not measured",
    )


class Prompts(PromptSource):
    """Where prompts come from."""

    splits: Splits = Field(Splits(), description="how many rows go where")
