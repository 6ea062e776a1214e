"""Streams rollouts, units and weights in step, a few row groups at a time, as batches of tensors. Constant memory.

Any step can be had without those before it: its responses follow from seed and number (`order`), and only the row groups of
its windows are read. So the number of steps done is all that a resumed run needs to know.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.align.units import KINDS, MASKED
from pipeline.store.rounding import rescaled
from pipeline.store.shards import Shard
from schemas.errors import OpdError
from schemas.tables import STOP_ID
from train.order import WINDOW, cut, epoch_order, share

AHEAD = 4
"""Steps that workers may have ready: enough to get over a slow read, few enough to hold."""


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
        teacher_entropy: float32 (U,), nats, at the unit's start.
        t_log_z: float32 (U,), nats, see schema `units`; NaN where the scores lack `log_z`.
        behavior_logp: float32 (U,), nats, log-prob under the policy that sampled the response (the weights' student_logp less
            log is_ratio, so up to that ratio's clip).
        policy_logp: float32 (U,), nats, under the policy that the weights were made with, which the round starts from.
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
    teacher_entropy: torch.Tensor
    t_log_z: torch.Tensor
    behavior_logp: torch.Tensor
    policy_logp: torch.Tensor
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


@dataclass(frozen=True)
class Step:
    """What a rank does of an optimiser step.

    Attributes:
        parts: its micro-batches; none when the step has fewer responses than there are ranks.
        units: units that are not masked in the whole step, over all ranks: what the loss is divided by.
    """

    parts: list[Batch]
    units: int


Triple = tuple[Shard, Shard, Shard]
"""Rollouts, units and weights of the same responses in the same row groups."""


def count_steps(shards: Sequence[Triple], size: int) -> int:
    """How many steps of `size` responses one epoch has; the last one may be smaller."""
    return -(-sum(rollouts.rows for rollouts, _, _ in shards) // size)


def batches(
    shards: Sequence[Triple],
    size: int,
    tokens: int,
    seed: int,
    steps: range,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Generator[Step, None, None]:
    """Some consecutive steps of a run over shards; step k belongs to epoch k // `count_steps`.

    Seed and epoch alone determine the order, and a step's responses, units and, for one rank, micro-batches are the same
    whatever the steps before it, the number of workers, and (responses and units) the number of ranks. Every rank reads all
    row groups, and makes tensors of its share only.

    Args:
        size: responses in a step, over all ranks.
        tokens: padded tokens of prompts and responses in a micro-batch, at most, unless one response alone has more.
        steps: which ones.
        rank, ranks: which share of each step.
        workers: threads that read and build up to AHEAD steps in advance, and the next window's row groups bit by bit as the
            current one is used up; 0: nothing is done before it is asked for. Close the iterator to stop them early.
    Raises:
        OpdError: tables are not in step.
    """
    places = [(triple, group) for triple in shards for group in range(triple[0].manifest.row_groups)]
    sizes = np.array([n for rollouts, _, _ in shards for n in rollouts.row_group_sizes()], np.int64)
    responses, per_epoch = int(sizes.sum()), count_steps(shards, size)
    order_of = lru_cache(2)(partial(epoch_order, sizes, seed))
    # Places count on from epoch to epoch, so that reading ahead needn't stop at the end of one.
    loaded: dict[int, Future[_Group]] = {}
    waiting: deque[Future[Step]] = deque()
    pool = ThreadPoolExecutor(workers, "stream") if workers else _AtOnce()
    try:
        read = 0
        for number in steps:
            epoch, at = divmod(number, per_epoch)
            start, stop = at * size, min((at + 1) * size, responses)
            order, before = order_of(epoch), epoch * len(places)
            windows = order.windows(start, stop)
            first, last = (before + min(window * WINDOW, len(places)) for window in (windows.start, windows.stop))
            for place in [place for place in loaded if place < first]:
                del loaded[place]
            if workers:  # as much of the next window as there has been of this one
                a, b = order.bounds[windows.stop - 1 : windows.stop + 1]
                last = min(last + int(WINDOW * (stop - a) / (b - a)), (1 + steps[-1] // per_epoch) * len(places))
            for place in range(max(read, first), last):
                triple, group = places[order_of(place // len(places)).groups[place % len(places)]]
                loaded[place] = pool.submit(_decode, triple, group)
            read = max(read, last)
            picked, rows = order.pick(start, stop)
            groups = [loaded[before + int(place)] for place in picked]
            waiting.append(pool.submit(_step, groups, rows, tokens, rank, ranks))
            if len(waiting) > (AHEAD if workers else 0):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _AtOnce(Executor):
    """Does what is submitted there and then, without a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


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


_READ = (
    ["rollout_id", "prompt_ids", "response_ids", "finish_reason"],
    [
        *("rollout_id", "unit", "kind", "s_start", "s_len", "t_len", "teacher_logp", "t_log_z"),
        *("teacher_entropy", "cand_id", "cand_logp", "tail_logp", "dropped_logp"),
    ],
    ["rollout_id", "unit", "student_logp", "advantage", "credit", "weight", "is_ratio"],
)
"""Columns of rollouts, units and weights that batches are made of."""


@dataclass(frozen=True)
class _Group:
    """A row group of B responses, U units: views of what Arrow read, but for columns with nulls and flags.

    Attributes:
        lengths: int64 (B,), tokens that each response's forward pass takes: prompt and response without its last.
        compared: int64 (B,), units that are not masked.
        prompt, response, cand_id, cand_logp: flat values and where each row's begin, with one more for the end.
        unit_at: int64 (B + 1,), where each response's units begin.
        units: (U,) by column.
    """

    names: list[str]
    stopped: np.ndarray
    lengths: np.ndarray
    compared: np.ndarray
    prompt: tuple[np.ndarray, np.ndarray]
    response: tuple[np.ndarray, np.ndarray]
    unit_at: np.ndarray
    units: dict[str, np.ndarray]
    cand_id: tuple[np.ndarray, np.ndarray]
    cand_logp: tuple[np.ndarray, np.ndarray]

    def row(self, i: int) -> _Response:
        """One response."""
        a, b = self.unit_at[i], self.unit_at[i + 1]
        return _Response(
            self.names[i],
            _between(self.prompt, i, i + 1),
            _between(self.response, i, i + 1),
            bool(self.stopped[i]),
            {name: column[a:b] for name, column in self.units.items()},
            np.diff(self.cand_id[1][a : b + 1]),
            _between(self.cand_id, a, b),
            _between(self.cand_logp, a, b),
        )


def _between(ragged: tuple[np.ndarray, np.ndarray], a: int, b: int) -> np.ndarray:
    values, at = ragged
    return values[at[a] : at[b]]


def _decode(shards: Triple, group: int) -> _Group:
    """Read a row group of the three tables. Raises OpdError when they are not in step."""
    rollouts, units, weights = (shard.row_group(group, columns) for shard, columns in zip(shards, _READ, strict=True))
    number = _array(units, "unit")
    unit_at = np.append(np.flatnonzero(number.to_numpy() == 0), len(number))
    if not (number.equals(_array(weights, "unit")) and _names(weights, unit_at) == _names(units, unit_at)):
        raise OpdError(f"{shards[2].path}: its rows are not those of {shards[1].path}; run the weights stage again")
    names = rollouts["rollout_id"].to_pylist()
    if _names(units, unit_at) != names:
        raise OpdError(f"{shards[1].path}: its responses are not those of {shards[0].path}; run the units stage again")
    columns = {
        name: _array(table, name).to_numpy(zero_copy_only=False)
        for table in (units, weights)
        for name in table.column_names
        if name not in ("rollout_id", "unit", "kind", "cand_id", "cand_logp")
    }
    columns["comparable"] = pc.not_equal(units["kind"], KINDS[MASKED]).to_numpy()
    compared = np.append(0, np.cumsum(columns["comparable"]))
    prompt, response = _ragged(rollouts, "prompt_ids"), _ragged(rollouts, "response_ids")
    return _Group(
        names=names,
        stopped=pc.equal(rollouts["finish_reason"], "stop").to_numpy(),
        lengths=np.diff(prompt[1]) + np.maximum(np.diff(response[1]) - 1, 0),
        compared=np.diff(compared[unit_at]),
        prompt=prompt,
        response=response,
        unit_at=unit_at,
        units=columns,
        cand_id=_ragged(units, "cand_id"),
        cand_logp=_ragged(units, "cand_logp"),
    )


def _array(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece, as it was read if it was (`combine_chunks` copies also a single one)."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


def _ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat values of a list column, and int32 (rows + 1,) where each row's begin."""
    array = _array(table, name)
    return array.values.to_numpy(), array.offsets.to_numpy()


def _names(table: pa.Table, at: np.ndarray) -> list[str] | None:
    """The response that the rows from each of `at` to the next one name; None when they name several."""
    column = _array(table, "rollout_id")
    codes = column.indices.to_numpy()
    first = codes[at[:-1]]
    if not np.array_equal(codes, np.repeat(first, np.diff(at))):
        return None
    names: list[str] = column.dictionary.take(pa.array(first)).to_pylist()
    return names


def _step(groups: Sequence[Future[_Group]], rows: np.ndarray, tokens: int, rank: int, ranks: int) -> Step:
    """A rank's share of the step that consists of these rows of these row groups."""
    # Workers take up work in the order it was submitted, row groups before the steps that need them: nobody waits in vain.
    picked = [(group.result(), int(row)) for group, row in zip(groups, rows, strict=True)]
    lengths = np.array([group.lengths[row] for group, row in picked], np.int64)
    mine = share(lengths, rank, ranks)
    parts = [
        collate([group.row(row) for group, row in (picked[i] for i in mine[piece])])
        for piece in cut(lengths[mine], tokens)
    ]
    return Step(parts, sum(int(group.compared[row]) for group, row in picked))


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
    rest = np.exp(units["tail_logp"]) + np.exp(units["dropped_logp"])
    cand_logp[used] = rescaled(np.concatenate([r.cand_logp for r in responses]), counts, rest)
    shift = units["credit"] - units["advantage"]
    behavior = units["student_logp"] - np.log(units["is_ratio"])
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
        "teacher_entropy": units["teacher_entropy"][keep].astype(np.float32),
        "t_log_z": units["t_log_z"][keep].astype(np.float32),
        "behavior_logp": behavior[keep].astype(np.float32),
        "policy_logp": units["student_logp"][keep].astype(np.float32),
        "weight": units["weight"][keep].astype(np.float32),
        "credit_shift": shift[keep].astype(np.float32),
        "cand_id": cand_id[keep],
        "cand_logp": cand_logp[keep],
    }
    return Batch(**{k: torch.from_numpy(v) for k, v in arrays.items()}, responses=tuple(r.name for r in responses))
