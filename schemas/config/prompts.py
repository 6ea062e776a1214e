"""Where prompts come from."""

from typing import Any, Self

from pydantic import Field, model_validator

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
        description="`reasoning-gym:<dataset>`, a .jsonl, .json (a list, or lines) or .csv file, each plain, .gz or .zst, a "
        ".parquet file, a folder of `datasets.save_to_disk`, a dataset id of the hub, or `module:function` of your own, called "
        "with (options, seed, how many different prompts are wanted), which gives rows as dicts and ends; all of them are "
        "shuffled"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the generator, of `datasets.load_dataset` (name, split, ..., or streaming: then rows are taken "
        "from a shuffled stream until there are enough), `split` of a saved folder, or those of your own function",
    )
    prompt_field: Text = Field(
        "prompt",
        description="field of the source that holds the question: text, or a conversation, a list of messages (`role` and "
        "`content`, or ShareGPT's `from` and `value`), tool calls and results among them; where there is no field `prompt`, "
        "`messages` or `conversations` is taken. An assistant's message at the end is left out. A null in a message or a tool "
        "counts as absent",
    )
    tools_field: Text | None = Field(
        "tools",
        description="field that holds the tools that may be called, a list of JSON schemas or its text; null: none",
    )
    answer_field: Text | None = Field(
        "answer",
        description="field that holds the reference answer; where a conversation has none, the assistant's message left out "
        "at its end is it. null: there is none, and accuracy is not measured",
    )

    @model_validator(mode="after")
    def _fields_differ(self) -> Self:
        named = [field for field in (self.prompt_field, self.answer_field, self.tools_field) if field is not None]
        if len(set(named)) < len(named):
            raise ValueError(f"`prompt_field`, `answer_field` and `tools_field` must differ, found {', '.join(named)}")
        return self


class Prompts(PromptSource):
    """Where prompts come from."""

    splits: Splits = Field(Splits(), description="how many rows go where")
