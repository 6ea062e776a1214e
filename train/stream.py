"""Streams rollouts, units and weights in step, one row group at a time, as batches of tensors. Constant memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.compact import rescaled
from pipeline.shards import Shard
from pipeline.units import KINDS, MASKED
from schemas.errors import OpdError
from schemas.tables import STOP_ID


@dataclass(frozen=True)
class Batch:
    """Some responses and their units as tensors. B responses, R response tokens in all, U units that are not masked.

    Attributes:
        ids, mask: int64 (B, T), prompt and response without its last token, right-padded with 0; 1 at real ids.
        rows: int64 (R,), flat index into (B * T) of the position that predicts each response token.
        targets: int64 (R,), the response tokens; STOP_ID at a sampled stop.
        unit_row: int64 (U,), the unit's first token as an index into R.
        response_of_unit: int64 (U,), the unit's response as an index into B.
        token_unit: int64 (R,), the unit each token belongs to; U for tokens of masked units.
        s_len, t_len: int64 (U,), tokens of the unit on either side; a stop counts one.
        teacher_logp, weight: float32 (U,).
        credit_shift: float32 (U,), credit less advantage as the weights stage saw them; 0 where credit is immediate.
        cand_id: int64 (U, K), student ids, STOP_ID for the stop candidate; 0 in unused slots.
        cand_logp: float32 (U, K), -inf in unused slots.
        responses: names of the responses.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    unit_row: torch.Tensor
    response_of_unit: torch.Tensor
    token_unit: torch.Tensor
    s_len: torch.Tensor
    t_len: torch.Tensor
    teacher_logp: torch.Tensor
    weight: torch.Tensor
    credit_shift: torch.Tensor
    cand_id: torch.Tensor
    cand_logp: torch.Tensor
    responses: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }
        return Batch(**moved)


Triple = tuple[Shard, Shard, Shard]


def batches(
    shards: Sequence[Triple], size: int, micro_size: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1
) -> Iterator[list[Batch]]:
    """Batches of `size` responses (the last one may be smaller) in an order that only seed and epoch determine.

    Row groups come in shuffled order and their responses are shuffled within; a batch may span two row groups.
    Each batch comes as micro-batches of at most `micro_size` responses of similar length; a rank gets its share of each.
    """
    rng = np.random.default_rng((seed, epoch))
    places = [(i, g) for i, (rollouts, _, _) in enumerate(shards) for g in range(rollouts.manifest.row_groups)]
    waiting: list[_Response] = []
    for place in rng.permutation(len(places)):
        index, group = places[place]
        responses = _row_group(shards[index], group)
        waiting += [responses[i] for i in rng.permutation(len(responses))]
        while len(waiting) >= size:
            yield _micro_batches(waiting[:size], micro_size, rank, ranks)
            waiting = waiting[size:]
    if waiting:
        yield _micro_batches(waiting, micro_size, rank, ranks)


def _micro_batches(responses: Sequence["_Response"], size: int, rank: int, ranks: int) -> list[Batch]:
    ordered = sorted(responses, key=lambda r: len(r.prompt) + len(r.response))[rank::ranks]
    return [collate(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def count_batches(shards: Sequence[Triple], size: int) -> int:
    """How many batches one epoch has."""
    return -(-sum(rollouts.rows for rollouts, _, _ in shards) // size)


@dataclass(frozen=True)
class _Response:
    """Views into a row group's arrays."""

    name: str
    prompt: np.ndarray
    response: np.ndarray
    stopped: bool
    units: dict[str, np.ndarray]
    cand_count: np.ndarray
    cand_id: np.ndarray
    cand_logp: np.ndarray


def _row_group(shards: Triple, group: int) -> list[_Response]:
    rollouts, units, weights = (shard.row_group(group) for shard in shards)
    if not (units["rollout_id"].equals(weights["rollout_id"]) and units["unit"].equals(weights["unit"])):
        raise OpdError(f"{shards[2].path}: its rows are not those of {shards[1].path}; run the weights stage again")
    names = rollouts["rollout_id"].to_pylist()
    starts = np.flatnonzero(units["unit"].to_numpy() == 0)
    if units["rollout_id"].take(pa.array(starts)).to_pylist() != names:
        raise OpdError(f"{shards[1].path}: its responses are not those of {shards[0].path}; run the units stage again")
    bounds = np.append(starts, len(units))
    prompt, prompt_at = _ragged(rollouts["prompt_ids"])
    response, response_at = _ragged(rollouts["response_ids"])
    cand_id, cand_at = _ragged(units["cand_id"])
    rest = sum(np.exp(units[name].to_numpy()) for name in ("tail_logp", "dropped_logp"))
    cand_logp = rescaled(_ragged(units["cand_logp"])[0], np.diff(cand_at), rest)
    stopped = [reason == "stop" for reason in rollouts["finish_reason"].to_pylist()]
    columns = {name: units[name].to_numpy() for name in ("s_start", "s_len", "t_len", "teacher_logp")}
    columns["weight"] = weights["weight"].to_numpy()
    columns["credit_shift"] = weights["credit"].to_numpy() - weights["advantage"].to_numpy()
    columns["comparable"] = units["kind"].combine_chunks().to_numpy(zero_copy_only=False) != KINDS[MASKED]
    return [
        _Response(
            name,
            prompt[prompt_at[i] : prompt_at[i + 1]],
            response[response_at[i] : response_at[i + 1]],
            stopped[i],
            {key: values[bounds[i] : bounds[i + 1]] for key, values in columns.items()},
            np.diff(cand_at[bounds[i] : bounds[i + 1] + 1]),
            cand_id[cand_at[bounds[i]] : cand_at[bounds[i + 1]]],
            cand_logp[cand_at[bounds[i]] : cand_at[bounds[i + 1]]],
        )
        for i, name in enumerate(names)
    ]


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and int64 (rows + 1,) offsets of a list column."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.flatten().to_numpy(), offsets - offsets[0]


def collate(responses: Sequence[_Response]) -> Batch:
    """Tensors of some responses; see `Batch`."""
    lengths = np.array([len(r.response) for r in responses])
    inputs = [np.concatenate([r.prompt, r.response[:-1]]) for r in responses]
    width = max(map(len, inputs))
    ids = np.zeros((len(responses), width), np.int64)
    for i, row in enumerate(inputs):
        ids[i, : len(row)] = row
    mask = np.arange(width) < np.array([len(row) for row in inputs])[:, None]
    first = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(first, lengths)
    rows = np.repeat([i * width + len(r.prompt) - 1 for i, r in enumerate(responses)], lengths) + within
    targets = np.concatenate([r.response for r in responses]).astype(np.int64)
    targets[[f + n - 1 for f, n, r in zip(first, lengths, responses, strict=True) if r.stopped]] = STOP_ID

    units = {key: np.concatenate([r.units[key] for r in responses]) for key in responses[0].units}
    keep = units["comparable"]
    response_of_unit = np.repeat(np.arange(len(responses)), [len(r.cand_count) for r in responses])
    unit_row = first[response_of_unit] + units["s_start"]
    s_len = units["s_len"].astype(np.int64)
    number = np.where(keep, np.cumsum(keep) - 1, keep.sum())
    token_unit = np.repeat(number, s_len)  # units cover every token once, in order
    counts = np.concatenate([r.cand_count for r in responses])
    slots = max(1, int(counts.max(initial=0)))
    used = np.arange(slots) < counts[:, None]
    cand_id = np.zeros(used.shape, np.int64)
    cand_logp = np.full(used.shape, -np.inf, np.float32)
    cand_id[used] = np.concatenate([r.cand_id for r in responses])
    cand_logp[used] = np.concatenate([r.cand_logp for r in responses])
    arrays: dict[str, Any] = {
        "ids": ids,
        "mask": mask.astype(np.int64),
        "rows": rows,
        "targets": targets,
        "unit_row": unit_row[keep].astype(np.int64),
        "response_of_unit": response_of_unit[keep],
        "token_unit": token_unit,
        "s_len": s_len[keep],
        "t_len": np.maximum(units["t_len"], 1)[keep].astype(np.int64),
        "teacher_logp": units["teacher_logp"][keep].astype(np.float32),
        "weight": units["weight"][keep].astype(np.float32),
        "credit_shift": units["credit_shift"][keep].astype(np.float32),
        "cand_id": cand_id[keep],
        "cand_logp": cand_logp[keep],
    }
    return Batch(**{k: torch.from_numpy(v) for k, v in arrays.items()}, responses=tuple(r.name for r in responses))
