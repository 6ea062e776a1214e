"""Streams rollouts, units and weights in step, or rollouts alone, a few row groups at a time, as batches of tensors.

Memory is constant: of the responses that a few row groups hold, a rank keeps its own.

Any step can be had without those before it: its responses follow from seed and number (`order`), and only the row groups of
its windows are read. So the number of steps done is all that a resumed run needs to know.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.align.units import KINDS, STOP, UNCOMPARED
from pipeline.store.shards import Shard
from schemas.errors import OpdError
from train.batch import Batch, Response, collate
from train.order import WINDOW, Order, cut, epoch_order, share

AHEAD = 8
"""Micro-batches that workers may have ready: enough to get over a slow read, few enough to hold."""


@dataclass(frozen=True)
class Step:
    """What a rank does of an optimiser step.

    Attributes:
        parts: its micro-batches, each to be had once and made when it is asked for or shortly before, so that few are in memory
            (what nobody has had when the next step is asked for is made then); none when the step has fewer responses than
            there are ranks.
        units: units that are not masked in the whole step, over all ranks: what the loss is divided by.
        passes: of `parts`, those that have such units.
        waits: seconds that were waited for each of `parts` that was had.
    """

    parts: Iterable[Batch]
    units: int
    passes: int
    waits: list[float] = field(default_factory=list)


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
    whatever the steps before it, the number of workers, and (responses and units) the number of ranks. Every rank reads how
    long all responses are, and all else of those row groups only that hold some of its share.

    Args:
        size: responses in a step, over all ranks.
        tokens: padded tokens of prompts and responses in a micro-batch, at most, unless one response alone has more.
        steps: which ones.
        rank, ranks: which share of each step.
        workers: threads that build up to AHEAD micro-batches in advance, and read the next window's row groups bit by bit as
            the current one is used up; 0: nothing is done before it is asked for. Close the iterator to stop them early.
    Raises:
        OpdError: tables are not in step.

    Shards of nothing but `collate`'s example have one step an epoch, whose loss is divided by its three units:

    >>> for step in batches(shards, size=16, tokens=4096, seed=1, steps=range(2)):
    ...     print(step.units, [(part.responses, part.targets) for part in step.parts])
    3 [(('r',), tensor([ 1,  2, -1]))]
    3 [(('r',), tensor([ 1,  2, -1]))]
    """
    pool = ThreadPoolExecutor(workers, "stream") if workers else _AtOnce()
    made = _Made(shards, size, tokens, seed, steps, (rank, ranks), pool).parts()
    ahead: deque[_Plan | Future[Batch]] = deque()

    def taken() -> Any:
        while len(ahead) <= (AHEAD if workers else 0) and (one := next(made, None)):
            ahead.append(one)
        return ahead.popleft() if ahead else None

    def end() -> None:
        made.close()
        ahead.clear()
        pool.shutdown(cancel_futures=True)

    def parts(plan: _Plan, waits: list[float]) -> Iterator[Batch]:
        for _ in plan.pieces:
            asked = time.perf_counter()
            try:
                part = taken().result()
            except BaseException:
                end()  # the iterator of steps, which waits for its next one to be asked for, doesn't hear of it
                raise
            waits.append(time.perf_counter() - asked)
            yield part
            del part

    try:
        while plan := taken():
            waits: list[float] = []
            mine, kept = parts(plan, waits), list[Batch]()
            yield Step(chain(mine, kept), plan.units, plan.passes, waits)
            kept.extend(mine)
    finally:
        end()


class _AtOnce(Executor):
    """Does what is submitted there and then, without a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@dataclass(frozen=True)
class _Lengths:
    """How long a row group's B responses are.

    Attributes:
        tokens: int64 (B,), that each response's forward pass takes: prompt and response without its last.
        compared: int64 (B,), units that are not masked.
    """

    tokens: np.ndarray
    compared: np.ndarray


@dataclass(frozen=True)
class _Plan:
    """What a rank does of a step: its n responses, longest first.

    Attributes:
        units, passes: see `Step`.
        places, rows: int64 (n,), where each lies: its place, counted on from epoch to epoch, and its row there.
        pieces: which of them share a micro-batch.
    """

    units: int
    passes: int
    places: np.ndarray
    rows: np.ndarray
    pieces: list[slice]


class _Made:
    """Submits what makes the steps' micro-batches: lengths are read, steps planned, row groups read, parts collated.

    Places count on from epoch to epoch, so that reading ahead needn't stop at the end of one. Workers take up work in the
    order in which it was submitted, and what something waits for is submitted before it: nobody waits in vain.
    """

    def __init__(
        self,
        shards: Sequence[Tables],
        size: int,
        tokens: int,
        seed: int,
        steps: range,
        place: tuple[int, int],
        pool: Executor,
    ) -> None:
        """As `batches` has them; `place`: rank and ranks."""
        self._groups = [(tables, group) for tables in shards for group in range(tables[0].manifest.row_groups)]
        sizes = np.array([n for rollouts, *_ in shards for n in rollouts.row_group_sizes()], np.int64)
        self._responses, self._per_epoch = int(sizes.sum()), count_steps(shards, size)
        self._order = lru_cache(2)(partial(epoch_order, sizes, seed))
        self._size, self._tokens, self._steps, self._rank, self._pool = size, tokens, steps, place, pool
        self._in_advance = not isinstance(pool, _AtOnce)
        self._end = len(self._groups) * -(-steps.stop // max(1, self._per_epoch))
        self._lengths: dict[int, Future[_Lengths]] = {}
        self._plans: dict[int, Future[_Plan]] = {}
        self._loaded: dict[int, Future[dict[int, Response]]] = {}

    def parts(self) -> Generator[_Plan | Future[Batch], None, None]:
        """Of each step its plan, then its micro-batches."""
        read = 0
        for number in self._steps:
            first, last = self._needed(number)
            for found in (self._lengths, self._loaded):
                for place in [place for place in found if place < first]:
                    del found[place]
            for place in range(max(read, first), last):
                self._load(place, number)
            read = max(read, last)
            plan = self._plan(number).result()
            del self._plans[number]
            yield plan
            if self._in_advance and read < self._end:
                for later in self._steps_of(read, number):  # when it is read, they are planned already
                    self._plan(later)
            for piece in plan.pieces:
                yield self._part(plan, piece)

    def _stretch(self, number: int) -> tuple[Order, int, int, int]:
        """The order of a step's epoch, the places before that, and from where to where the step's responses lie in it."""
        epoch, at = divmod(number, self._per_epoch)
        start, stop = at * self._size, min((at + 1) * self._size, self._responses)
        return self._order(epoch), epoch * len(self._groups), start, stop

    def _needed(self, number: int) -> tuple[int, int]:
        """The first place of a step's windows, and where those end that are to be read by then: of these windows, and with
        workers as much of the next one as there has been of the last one."""
        order, before, start, stop = self._stretch(number)
        windows = order.windows(start, stop)
        first, last = (before + min(window * WINDOW, len(self._groups)) for window in (windows.start, windows.stop))
        if self._in_advance:
            a, b = order.bounds[windows.stop - 1 : windows.stop + 1]
            last = min(last + int(WINDOW * (stop - a) / (b - a)), self._end)
        return first, last

    def _steps_of(self, place: int, number: int) -> range:
        """The steps from this one on that take responses of a place's window."""
        epoch, at = divmod(place, len(self._groups))
        a, b = self._order(epoch).bounds[at // WINDOW : at // WINDOW + 2].tolist()
        before = epoch * self._per_epoch
        return range(max(number, before + a // self._size), min(self._steps.stop, before - -b // self._size))

    def _plan(self, number: int) -> Future[_Plan]:
        if number not in self._plans:
            order, before, start, stop = self._stretch(number)
            picked, rows = order.pick(start, stop)
            lengths = [self._lengths_of(place) for place in (before + picked).tolist()]
            self._plans[number] = self._pool.submit(_plan, lengths, before + picked, rows, self._tokens, *self._rank)
        return self._plans[number]

    def _lengths_of(self, place: int) -> Future[_Lengths]:
        if place not in self._lengths:
            self._lengths[place] = self._pool.submit(_lengths, *self._at(place))
        return self._lengths[place]

    def _load(self, place: int, number: int) -> None:
        """Read what this rank has in a row group from this step on, if anything."""
        plans = [self._plan(each).result() for each in self._steps_of(place, number)]
        if rows := sorted(row for plan in plans for row in plan.rows[plan.places == place].tolist()):
            self._loaded[place] = self._pool.submit(_load, *self._at(place), rows)

    def _at(self, place: int) -> tuple[Tables, int]:
        epoch, at = divmod(place, len(self._groups))
        return self._groups[self._order(epoch).groups[at]]

    def _part(self, plan: _Plan, piece: slice) -> Future[Batch]:
        groups = [self._loaded[place] for place in plan.places[piece].tolist()]
        return self._pool.submit(_part, groups, plan.rows[piece].tolist())


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
        prompt, response, behavior_logp, cand_id, cand_logp: flat values and where each row's begin, with one more for the end.
        unit_at: int64 (B + 1,), where each response's units begin.
        units: (U,) by column.
    """

    names: list[str]
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


def _lengths(shards: Tables, group: int) -> _Lengths:
    """Of a row group, from what of it decides who takes what: a fiftieth of its bytes where units have 78 candidates."""
    lists = ["prompt_ids", "response_ids"]
    rollouts = shards[0].row_group(group, ["rollout_id", *lists])
    prompt, response = (np.diff(_ragged(rollouts, name)[1].astype(np.int64)) for name in lists)
    compared = response
    if len(shards) > 1:
        units = shards[1].row_group(group, ["rollout_id", "kind"])
        unit_at = _starts(rollouts, units)
        if unit_at is None:
            raise _not_of(shards)
        compared = np.diff(np.append(0, np.cumsum(_comparable(units)))[unit_at])
    return _Lengths(prompt + np.maximum(response - 1, 0), compared)


def _starts(rollouts: pa.Table, table: pa.Table) -> np.ndarray | None:
    """int64 (B + 1,), where each response's rows of units or weights begin; None where some are not of these responses, in
    their order. A response without tokens on either side has none.
    """
    named = _array(table, "rollout_id")
    places = pc.index_in(named.dictionary, value_set=_array(rollouts, "rollout_id").cast(pa.string()))
    row = places.fill_null(-1).to_numpy()[named.indices.to_numpy()]
    if (row < 0).any() or (np.diff(row) < 0).any():
        return None
    return np.searchsorted(row, np.arange(len(rollouts) + 1))


def _comparable(units: pa.Table) -> np.ndarray:
    """bool (U,), whether a unit is not masked."""
    kind = _array(units, "kind").cast(pa.string())
    found: np.ndarray = pc.invert(pc.is_in(kind, pa.array(UNCOMPARED))).to_numpy(zero_copy_only=False)
    return found


def _not_of(shards: Tables) -> OpdError:
    rollouts, units, *_ = (shard.path for shard in shards)
    return OpdError(f"{units}: its responses are not those of {rollouts}; run the units stage again")


def _decode(shards: Tables, group: int) -> _Group:
    """Read a row group of the tables. Raises OpdError when they are not in step."""
    if len(shards) == 1:
        return _of_tokens(shards[0].row_group(group, [*_READ[0], "finish_reason"]))
    rollouts, units, weights = (shard.row_group(group, columns) for shard, columns in zip(shards, _READ, strict=True))
    unit_at, weight_at = (_starts(rollouts, table) for table in (units, weights))
    if unit_at is None:
        raise _not_of(shards)
    same_rows = weight_at is not None and np.array_equal(unit_at, weight_at)
    if not (same_rows and _array(units, "unit").equals(_array(weights, "unit"))):
        raise OpdError(f"{shards[2].path}: its rows are not those of {shards[1].path}; run the weights stage again")
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
    columns["comparable"] = _comparable(units)
    columns["stops"] = pc.equal(_array(units, "kind").cast(pa.string()), KINDS[STOP]).to_numpy(zero_copy_only=False)
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
    prompt, response = _ragged(rollouts, "prompt_ids"), _ragged(rollouts, "response_ids")
    sampled = pa.table({"logp": pc.coalesce(rollouts["sampler_logp"], rollouts["behavior_logp"])})
    return _Group(
        names=rollouts["rollout_id"].to_pylist(),
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


def _plan(
    found: Sequence[Future[_Lengths]], places: np.ndarray, rows: np.ndarray, tokens: int, rank: int, ranks: int
) -> _Plan:
    """A rank's share of the step that consists of these rows of these places."""
    of = [(each.result(), row) for each, row in zip(found, rows.tolist(), strict=True)]
    lengths = np.array([each.tokens[row] for each, row in of], np.int64)
    compared = np.array([each.compared[row] for each, row in of], np.int64)
    mine = share(lengths, rank, ranks)
    pieces = cut(lengths[mine], tokens)
    passes = sum(bool(compared[mine[piece]].any()) for piece in pieces)
    return _Plan(int(compared.sum()), passes, places[mine], rows[mine], pieces)


def _load(shards: Tables, group: int, rows: Sequence[int]) -> dict[int, Response]:
    """Some rows of a row group, by number: views if they are all of it, else copies, which don't keep the others in memory."""
    decoded = _decode(shards, group)
    found = {row: decoded.row(row) for row in rows}
    return found if len(found) == len(decoded.names) else {row: one.copy() for row, one in found.items()}


def _part(groups: Sequence[Future[dict[int, Response]]], rows: Sequence[int]) -> Batch:
    """A micro-batch of these rows of these row groups."""
    return collate([group.result()[row] for group, row in zip(groups, rows, strict=True)])
