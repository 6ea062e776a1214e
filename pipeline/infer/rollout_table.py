"""Which responses a phase has, and the table of what was sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.align.texts import valid_prefix
from pipeline.infer.sample import Response
from pipeline.prepared import PreparedModel, PromptTable
from schemas.config import Config
from schemas.errors import OpdError
from schemas.tables import arrow_schema

ROW_GROUP = 256
"""Responses per row group: what later stages hold in memory at once."""


@dataclass(frozen=True)
class Wanted:
    """A response to be sampled: its id, its prompt's row, and which of the prompt's samples it is."""

    rollout_id: str
    prompt: dict[str, Any]
    sample: int


def responses_of_round(config: Config, prompts: PromptTable, number: int) -> list[Wanted]:
    """Every response of a round; rounds walk through `train`, starting over at its end."""
    train = prompts.split("train")
    first = number * config.rollouts.prompts
    chosen = [train[(first + i) % len(train)] for i in range(config.rollouts.prompts)]
    return [_wanted(f"r{number}", row, n) for row in chosen for n in range(config.rollouts.samples)]


def answers_of_teacher(config: Config, prompts: PromptTable) -> list[Wanted]:
    """Every answer that the teacher gives for `sft`, to the first prompts of `train`."""
    chosen = prompts.split("train")[: config.sft.prompts]
    return [_wanted("t", row, n) for row in chosen for n in range(config.sft.samples)]


def responses_of_evaluation(config: Config, prompts: PromptTable, checkpoint: str, items: int) -> list[Wanted]:
    """One response to each of the first `items` held-out prompts. Raises OpdError when there are fewer."""
    held_out = prompts.split(config.evaluate.split)
    if len(held_out) < items:
        raise OpdError(
            f"{prompts.shard.path}: holds {len(held_out)} prompts of split {config.evaluate.split}, but the config's "
            f"evaluation takes {items}; run `python -m stages.prompts` again"
        )
    return [_wanted(f"e{checkpoint}", row, 0) for row in held_out[:items]]


def _wanted(of: str, row: dict[str, Any], sample: int) -> Wanted:
    return Wanted(f"{of}-{row['prompt_id']}-{sample}", row, sample)


def rollout_table(
    wanted: Sequence[Wanted],
    number: int,
    prompts: Sequence[np.ndarray],
    responses: Sequence[Response],
    policy: PreparedModel,
    warped: bool,
) -> pa.Table:
    """Rows of schema `rollouts`.

    Args:
        number: of the checkpoint that was sampled; -1 of the teacher, and of the student as given where `sft` is before 0.
        prompts: token ids of the rendered prompts.
        policy: what sampled.
        warped: whether temperature or top_p made the sampler's distribution another one than the model's.
    """
    rows = [
        {
            "rollout_id": one.rollout_id,
            "prompt_id": one.prompt["prompt_id"],
            "sample": one.sample,
            "round": number,
            "prompt_ids": prompt,
            "response_ids": response.ids,
            "response": response_text(policy, response),
            "behavior_logp": response.behavior_logp,
            "sampler_logp": response.sampler_logp if warped else None,
            "top_id": list(response.top_id) if response.top_id.size else None,
            "finish_reason": "stop" if response.stopped else "length",
            "answer": one.prompt["answer"],
        }
        for one, prompt, response in zip(wanted, prompts, responses, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema("rollouts"))


def response_text(policy: PreparedModel, response: Response) -> str:
    """The longest valid UTF-8 prefix of the response's bytes, up to the first special token."""
    ids = response.ids[: len(response.ids) - response.stopped]
    without_bytes = ~policy.vocabulary.has_bytes[ids]
    text_ids = ids[: int(without_bytes.argmax())] if without_bytes.any() else ids
    return valid_prefix(policy.vocabulary.concatenate(text_ids)[0].tobytes())
