"""Streams rollouts, units and weights in step, or rollouts alone, a few row groups at a time, as batches of tensors.

Memory is constant.

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

from pipeline.align.units import KINDS, STOP, UNCOMPARED
from pipeline.store.shards import Shard
from schemas.errors import OpdError
from train.batch import Batch, Response, collate
from train.order import WINDOW, cut, epoch_order, share

AHEAD = 4
"""Steps that workers may have ready: enough to get over a slow read, few enough to hold."""


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
Tables = Triple | tuple[Shard]
"""These, or rollouts alone, for a loss that asks no teacher: then each response token is a unit of weight 1."""


def count_steps(shards: Sequence[Tables], size: int) -> int:
    """How many steps of `size` responses one epoch has; the last one may be smaller."""
    return -(-sum(rollouts.rows for rollouts, *_ in shards) // size)


def batches(
    shards: Sequence[Tables],
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

    Shards of nothing but `collate`'s example have one step an epoch, whose loss is divided by its three units:

    >>> for step in batches(shards, size=16, tokens=4096, seed=1, steps=range(2)):
    ...     print(step.units, [part.responses for part in step.parts], step.parts[0].targets)
    3 [('r',)] tensor([ 1,  2, -1])
    3 [('r',)] tensor([ 1,  2, -1])
    """
    places = [(tables, group) for tables in shards for group in range(tables[0].manifest.row_groups)]
    sizes = np.array([n for rollouts, *_ in shards for n in rollouts.row_group_sizes()], np.int64)
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
                tables, group = places[order_of(place // len(places)).groups[place % len(places)]]
                loaded[place] = pool.submit(_decode, tables, group)
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


_READ = (
    ["rollout_id", "prompt_ids", "response_ids", "behavior_logp", "sampler_logp"],
    [
        *("rollout_id", "unit", "kind", "s_start", "s_len", "t_len", "teacher_logp", "t_log_z"),
        *("teacher_entropy", "cand_id", "cand_logp", "tail_logp", "dropped_logp"),
    ],
    ["rollout_id", "unit", "student_logp", "advantage", "credit", "weight", "is_ratio", "reward", "reference_logp"],
)
"""Columns of rollouts, units and weights that batches are made of."""


@dataclass(frozen=True)
class _Group:
    """A row group of B responses, U units: views of what Arrow read, but for columns with nulls and flags.

    Attributes:
        lengths: int64 (B,), tokens that each response's forward pass takes: prompt and response without its last.
        compared: int64 (B,), units that are not masked.
        prompt, response, behavior_logp, cand_id, cand_logp: flat values and where each row's begin, with one more for the end.
        unit_at: int64 (B + 1,), where each response's units begin.
        units: (U,) by column.
    """

    names: list[str]
    lengths: np.ndarray
    compared: np.ndarray
    prompt: tuple[np.ndarray, np.ndarray]
    response: tuple[np.ndarray, np.ndarray]
    behavior_logp: tuple[np.ndarray, np.ndarray]
    unit_at: np.ndarray
    units: dict[str, np.ndarray]
    cand_id: tuple[np.ndarray, np.ndarray]
    cand_logp: tuple[np.ndarray, np.ndarray]

    def row(self, i: int) -> Response:
        """One response."""
        a, b = self.unit_at[i], self.unit_at[i + 1]
        return Response(
            self.names[i],
            _between(self.prompt, i, i + 1),
            _between(self.response, i, i + 1),
            _between(self.behavior_logp, i, i + 1),
            {name: column[a:b] for name, column in self.units.items()},
            np.diff(self.cand_id[1][a : b + 1]),
            _between(self.cand_id, a, b),
            _between(self.cand_logp, a, b),
        )


def _between(ragged: tuple[np.ndarray, np.ndarray], a: int, b: int) -> np.ndarray:
    values, at = ragged
    return values[at[a] : at[b]]


def _decode(shards: Tables, group: int) -> _Group:
    """Read a row group of the tables. Raises OpdError when they are not in step."""
    if len(shards) == 1:
        return _of_tokens(shards[0].row_group(group, [*_READ[0], "finish_reason"]))
    rollouts, units, weights = (shard.row_group(group, columns) for shard, columns in zip(shards, _READ, strict=True))
    number = _array(units, "unit")
    unit_at = np.append(np.flatnonzero(number.to_numpy() == 0), len(number))
    if not (number.equals(_array(weights, "unit")) and _names(weights, unit_at) == _names(units, unit_at)):
        raise OpdError(f"{shards[2].path}: its rows are not those of {shards[1].path}; run the weights stage again")
    names = rollouts["rollout_id"].to_pylist()
    if _names(units, unit_at) != names:
        raise OpdError(f"{shards[1].path}: its responses are not those of {shards[0].path}; run the units stage again")
    _check_spans(rollouts, units, unit_at, str(shards[1].path))
    columns = {
        name: _array(table, name).to_numpy(zero_copy_only=False)
        for table in (units, weights)
        for name in table.column_names
        if name not in ("rollout_id", "unit", "kind", "cand_id", "cand_logp")
    }
    # What credit adds is to the advantages that it was formed of, which were clipped as the weights' manifest says.
    clip = shards[2].manifest.identity.get("loss", {}).get("clip")
    if clip is not None:
        columns["advantage"] = columns["advantage"].clip(-clip, clip)
    kind = _array(units, "kind").cast(pa.string())
    columns["comparable"] = pc.invert(pc.is_in(kind, pa.array(UNCOMPARED))).to_numpy(zero_copy_only=False)
    columns["stops"] = pc.equal(kind, KINDS[STOP]).to_numpy(zero_copy_only=False)
    return _group(rollouts, unit_at, columns, _ragged(units, "cand_id"), _ragged(units, "cand_logp"))


def _check_spans(rollouts: pa.Table, units: pa.Table, unit_at: np.ndarray, path: str) -> None:
    """Raise OpdError where units don't hold every token of their responses once, in order, or candidates lack a log-prob."""
    start, length = (_array(units, name).to_numpy().astype(np.int64) for name in ("s_start", "s_len"))
    at = np.diff(_ragged(rollouts, "response_ids")[1].astype(np.int64))
    before = np.append(0, np.cumsum(length))
    if not np.array_equal(np.diff(before[unit_at]), at):
        raise OpdError(
            f"{path}: column `s_len` doesn't add up to the tokens of the responses; run the units stage again"
        )
    if not np.array_equal(start, before[:-1] - np.repeat(before[unit_at[:-1]], np.diff(unit_at))):
        raise OpdError(f"{path}: column `s_start` is not where the units before it end; run the units stage again")
    if not np.array_equal(np.diff(_ragged(units, "cand_id")[1]), np.diff(_ragged(units, "cand_logp")[1])):
        raise OpdError(
            f"{path}: columns `cand_id` and `cand_logp` have lists of different lengths; run the units stage again"
        )


def _of_tokens(rollouts: pa.Table) -> _Group:
    """A row group of rollouts alone. Each token is a unit, of whose log-prob nobody but the sampling model itself tells."""
    response, logp = _ragged(rollouts, "response_ids"), _ragged(rollouts, "behavior_logp")[0]
    at = response[1].astype(np.int64)
    count = len(logp)
    ones, zeros, unknown = np.ones(count, np.int32), np.zeros(count, np.float32), np.full(count, np.nan, np.float32)
    columns = {
        "comparable": np.ones(count, bool),
        "stops": np.zeros(count, bool),
        "s_start": np.arange(count) - np.repeat(at[:-1], np.diff(at)),
        **{"s_len": ones, "t_len": ones, "teacher_logp": logp, "student_logp": logp},
        **dict.fromkeys(("teacher_entropy", "t_log_z", "tail_logp", "dropped_logp", "reference_logp"), unknown),
        **{"advantage": zeros, "credit": zeros, "weight": zeros + 1, "is_ratio": zeros + 1, "reward": zeros},
    }
    columns["stops"][at[1:][pc.equal(rollouts["finish_reason"], "stop").to_numpy()] - 1] = True
    none = np.zeros(count + 1, np.int32)
    cand_id, cand_logp = (np.zeros(0, np.int32), none), (np.zeros(0, np.float32), none)
    return _group(rollouts, at, columns, cand_id, cand_logp)


def _group(
    rollouts: pa.Table,
    unit_at: np.ndarray,
    columns: dict[str, np.ndarray],
    cand_id: tuple[np.ndarray, np.ndarray],
    cand_logp: tuple[np.ndarray, np.ndarray],
) -> _Group:
    """Rollouts with their units, which are decoded; see `_Group`."""
    compared = np.append(0, np.cumsum(columns["comparable"]))
    prompt, response = _ragged(rollouts, "prompt_ids"), _ragged(rollouts, "response_ids")
    sampled = pa.table({"logp": pc.coalesce(rollouts["sampler_logp"], rollouts["behavior_logp"])})
    return _Group(
        names=rollouts["rollout_id"].to_pylist(),
        lengths=np.diff(prompt[1]) + np.maximum(np.diff(response[1]) - 1, 0),
        compared=np.diff(compared[unit_at]),
        prompt=prompt,
        response=response,
        behavior_logp=_ragged(sampled, "logp"),
        unit_at=unit_at,
        units=columns,
        cand_id=cand_id,
        cand_logp=cand_logp,
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
