"""Which responses a phase has."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.prepared import PromptRows, PromptTable
from schemas.config import Config
from schemas.errors import OpdError


@dataclass(frozen=True)
class Wanted:
    """A response to be sampled: its id, its prompt's row, and which of the prompt's samples it is."""

    rollout_id: str
    prompt: dict[str, Any]
    sample: int


def prompts_of_round(config: Config, prompts: PromptTable, number: int) -> PromptRows:
    """The prompts of a round; rounds walk through `train`, starting over at its end."""
    train, count = prompts.split("train"), config.rollouts.prompts
    return train[(number * count + np.arange(count)) % len(train)]


def responses_of_round(config: Config, prompts: PromptTable, number: int, part: slice = slice(None)) -> list[Wanted]:
    """The responses of a round, or some of them."""
    samples = config.rollouts.samples
    every = range(config.rollouts.prompts * samples)[part]
    rows = prompts_of_round(config, prompts, number)[np.array(every, np.int64) // samples]
    return [_wanted(f"r{number}", row, n % samples) for n, row in zip(every, rows, strict=True)]


def answers_of_teacher(config: Config, prompts: PromptTable, part: slice = slice(None)) -> list[Wanted]:
    """The answers that the teacher gives for `sft`, or some of them, to the first prompts of `train`."""
    samples = config.sft.samples
    every = range(config.sft.prompts * samples)[part]
    rows = prompts.split("train")[np.array(every, np.int64) // samples]
    return [_wanted("t", row, n % samples) for n, row in zip(every, rows, strict=True)]


def responses_of_evaluation(
    config: Config, prompts: PromptTable, checkpoint: str, items: int, part: slice = slice(None)
) -> list[Wanted]:
    """One response to each of the first `items` held-out prompts, or some. Raises OpdError when there are fewer."""
    held_out = prompts.split(config.evaluate.split)
    if len(held_out) < items:
        raise OpdError(
            f"{prompts.shard.path}: holds {len(held_out)} prompts of split {config.evaluate.split}, but the config's "
            f"evaluation takes {items}; run `python -m stages.prompts` again"
        )
    return [_wanted(f"e{checkpoint}", row, 0) for row in held_out[:items][part]]


def _wanted(of: str, row: dict[str, Any], sample: int) -> Wanted:
    return Wanted(f"{of}-{row['prompt_id']}-{sample}", row, sample)
