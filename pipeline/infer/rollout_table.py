"""The table of what was sampled."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.align.segments import told
from pipeline.infer.engines import Sampler
from pipeline.infer.sample import Response, seed_of
from pipeline.infer.wanted import Wanted
from pipeline.prepared import PreparedModel
from pipeline.rendering import Renderer
from schemas.tables import arrow_schema

ROW_GROUP = 256
"""Responses per row group at most."""
ROW_GROUP_TOKENS = 1 << 16
"""Their tokens, unless one response alone has more: later stages hold a row group, or a few, in memory at once."""


def sampled_by(policy: PreparedModel, renderer: Renderer) -> dict[str, Any]:
    """What of a model determines what it samples: its files, engine, dtype, prompts, roles and stops."""
    return {
        "policy": policy.ref.identity(),
        "engine": policy.config.engine,
        "dtype": policy.dtype,
        "prompt": renderer.identity,
        "roles": policy.roles.identity,
        "stop_ids": policy.stop.tolist(),
    }


def asked_digest(wanted: Sequence[Wanted], prompts: Sequence[np.ndarray]) -> str:
    """sha256 of what is asked: names of the responses, which their random streams follow from, reference answers and prompts.

    Args:
        prompts: token ids of each response's prompt.
    """
    running = hashlib.sha256()
    for one, prompt in zip(wanted, prompts, strict=True):
        told = f"{one.rollout_id}\0{one.prompt['answer']!r}\0{len(prompt)}\0"
        running.update(told.encode() + prompt.tobytes())
    return running.hexdigest()


def row_groups(lengths: Sequence[int]) -> list[slice]:
    """How responses of so many tokens are cut into row groups, in their order: as many in each as both limits let in.

    All tables of a shard have the same, so it is here that the memory of later stages is decided.
    """
    found, start, tokens = [], 0, 0
    for at, length in enumerate(lengths):
        if at > start and (at - start == ROW_GROUP or tokens + length > ROW_GROUP_TOKENS):
            found.append(slice(start, at))
            start, tokens = at, 0
        tokens += length
    return [*found, slice(start, len(lengths))] if lengths else []


def sampled_tables(
    sampler: Sampler,
    policy: PreparedModel,
    wanted: Sequence[Wanted],
    number: int,
    prompts: Sequence[np.ndarray],
    seed: int,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[pa.Table]:
    """Row groups of schema `rollouts`, sampled one after the other, each response from a stream of its own.

    Args:
        sampler: `policy`, opened.
        number: of its checkpoint, see `rollout_table`.
        prompts: token ids of each response's prompt.
        batch_size: responses that the sampler has under way at once; a call has no fewer, however small a row group is.
        advance: called with the number of finished responses.
    """
    warped = temperature != 1 or top_p != 1
    size = max(ROW_GROUP, batch_size)
    for start in range(0, len(wanted), size):
        group = slice(start, start + size)
        seeds = [seed_of(seed, one.rollout_id) for one in wanted[group]]
        responses = sampler.sample(prompts[group], seeds, max_new_tokens, temperature, top_p, top_k, advance=advance)
        for cut in row_groups([len(response.ids) for response in responses]):
            yield rollout_table(wanted[group][cut], number, prompts[group][cut], responses[cut], policy, warped)


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
        say
        | {
            "rollout_id": one.rollout_id,
            "prompt_id": one.prompt["prompt_id"],
            "sample": one.sample,
            "round": number,
            "prompt_ids": prompt,
            "response_ids": response.ids,
            "behavior_logp": response.behavior_logp,
            "sampler_logp": response.sampler_logp if warped else None,
            "top_id": list(response.top_id) if response.top_id.size else None,
            "finish_reason": "stop" if response.stopped else "length",
            "answer": one.prompt["answer"],
        }
        for one, prompt, response, say in zip(wanted, prompts, responses, texts(policy, responses), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema("rollouts"))


def texts(policy: PreparedModel, responses: Sequence[Response]) -> list[dict[str, Any]]:
    """What each response says, the final stop left out: columns `response`, `segments` and `broken` of schema `rollouts`."""
    ids = [response.ids[: len(response.ids) - response.stopped] for response in responses]
    offsets = np.cumsum([0, *map(len, ids)])
    return list(told(np.concatenate([np.zeros(0, np.int32), *ids]), offsets, policy.vocabulary, policy.roles))
