"""The trainer's stream: an order that only seed and epoch decide, any step at once, shares, budgets, threads that end."""

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align.units import UNCOMPARED
from pipeline.store.shards import open_shard, open_writer, read_manifest
from pipeline.weights.phase import Part, compute
from schemas.config import Weights, parse_config
from schemas.errors import OpdError
from schemas.tables import STOP_ID, arrow_schema
from train import stream
from train.batch import Batch, collate
from train.loop import train_step
from train.optimiser import MasterAdamW
from train.order import WINDOW, cut, epoch_order, share
from train.stream import AHEAD, Step, Triple, batches, count_steps

SIZE, TOKENS, SEED = 6, 40, 1
PER_EPOCH = 7
ALL = [f"s{s}-r{r}" for s in range(2) for r in range(20)]

sizes_of_groups = st.lists(st.integers(0, 5), min_size=1, max_size=14).filter(any)
lengths_of_step = st.lists(st.integers(1, 30), max_size=20).map(lambda x: np.array(x, np.int64))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Triple]:
    """40 responses in 20 row groups: five windows of eight responses."""
    return tiny.shards(tmp_path_factory.mktemp("shards"), group=2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream")]


def steps_of(shards: Sequence[Triple], steps: range = range(PER_EPOCH), seed: int = SEED, **options: Any) -> list[Step]:
    """With all of their micro-batches."""
    found = batches(shards, SIZE, TOKENS, seed, steps, **options)
    return [replace(step, parts=list(step.parts)) for step in found]


def names(steps: Sequence[Step]) -> list[list[str]]:
    return [[name for part in step.parts for name in part.responses] for step in steps]


def same(a: Sequence[Step], b: Sequence[Step]) -> bool:
    """Every tensor of every micro-batch."""
    parts = [[list(step.parts) for step in steps] for steps in (a, b)]

    def equal(one: Batch, other: Batch) -> bool:
        pairs = zip(vars(one).values(), vars(other).values(), strict=True)
        return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)

    return len(a) == len(b) and all(
        x.units == y.units and len(one) == len(other) and all(map(equal, one, other))
        for x, y, one, other in zip(a, b, *parts, strict=True)
    )


class Reads:
    """Watches which row groups are decoded, and how many are in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        self._alive: list[list[weakref.ref[Any]]] = []
        decode, load = stream._decode, stream._load

        def decoded(triple: Triple, group: int) -> Any:
            self.done.append((str(triple[0].path), group))
            return decode(triple, group)

        def loaded(triple: Triple, group: int, rows: Sequence[int]) -> Any:
            found = load(triple, group, rows)
            self._alive.append([weakref.ref(one) for one in found.values()])
            return found

        monkeypatch.setattr(stream, "_decode", decoded)
        monkeypatch.setattr(stream, "_load", loaded)

    @property
    def responses(self) -> int:
        """Responses in memory, each a view of its row group or a copy."""
        return sum(ref() is not None for refs in self._alive for ref in refs)

    @property
    def alive(self) -> int:
        """Row groups that some of them are of."""
        return sum(any(ref() is not None for ref in refs) for refs in self._alive)


def test_every_response_comes_once_an_epoch_in_an_order_of_seed_and_epoch(shards: list[Triple]) -> None:
    assert count_steps(shards, SIZE) == PER_EPOCH
    two = names(steps_of(shards, range(2 * PER_EPOCH)))
    first, second = ([name for step in half for name in step] for half in (two[:PER_EPOCH], two[PER_EPOCH:]))
    assert sorted(first) == sorted(second) == sorted(ALL)
    assert [len(step) for step in two] == 2 * ([SIZE] * 6 + [4])
    other = [name for step in names(steps_of(shards, seed=2)) for name in step]
    assert len({tuple(first), tuple(second), tuple(other)}) == 3
    assert {frozenset(step) for step in two[:6]} != {frozenset(step) for step in two[PER_EPOCH:-1]}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_a_start_in_the_middle_change_nothing(shards: list[Triple], workers: int) -> None:
    whole = steps_of(shards, range(2 * PER_EPOCH))
    for first in range(2 * PER_EPOCH):
        assert same(steps_of(shards, range(first, 2 * PER_EPOCH), workers=workers), whole[first:])


def still_needed(steps: range) -> list[int]:
    """Places, counted on from epoch to epoch, of the row groups that hold a response of these steps."""
    found: set[int] = set()
    for number in steps:
        epoch, at = divmod(number, PER_EPOCH)
        places, _ = epoch_order(np.full(20, 2), SEED, epoch).pick(at * SIZE, min(40, (at + 1) * SIZE))
        found |= {20 * epoch + int(place) for place in places}
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_row_groups_are_read_once_and_none_before_the_first_step(
    shards: list[Triple], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    places = [(str(triple[0].path), group) for triple in shards for group in range(10)]
    order = [places[i] for epoch in range(2) for i in epoch_order(np.full(20, 2), SEED, epoch).groups]
    for first in range(2 * PER_EPOCH):
        reads = Reads(monkeypatch)
        steps_of(shards, range(first, 2 * PER_EPOCH), workers=workers)
        needed = still_needed(range(first, 2 * PER_EPOCH))
        assert sorted(reads.done) == sorted(order[place] for place in needed)
        if workers < 2:
            assert reads.done == [order[place] for place in needed]
        monkeypatch.undo()


def test_one_step_reads_its_windows_only(shards: list[Triple], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(PER_EPOCH):
        reads = Reads(monkeypatch)
        next(batches(shards, SIZE, TOKENS, SEED, range(number, 1000)))
        last = min(number * SIZE + SIZE, 40) - 1
        end = WINDOW * (last // (2 * WINDOW) + 1)
        assert len(reads.done) == sum(place < end for place in still_needed(range(number, 2 * PER_EPOCH)))
        monkeypatch.undo()


@pytest.mark.parametrize(("workers", "windows"), [(0, 1), (2, 3)])
def test_a_bounded_number_of_row_groups_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, windows: int
) -> None:
    """30 row groups of 8 responses, and four responses a step, so a step lies in one window."""
    shards, reads = tiny.shards(tmp_path, responses=120, group=8), Reads(monkeypatch)
    most = 0
    for step in batches(shards, 4, TOKENS, SEED, range(60), workers=workers):
        for part in step.parts:
            most = max(most, reads.alive)
            assert part.responses
    assert len(reads.done) == 30 and WINDOW <= most <= windows * WINDOW
    del step
    assert reads.alive == 0


def test_a_few_micro_batches_of_a_step_are_in_memory(shards: list[Triple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forty, each a response; what is not had in time is kept."""
    made: list[weakref.ref[Batch]] = []

    def collated(responses: Any) -> Batch:
        found = collate(responses)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(stream, "collate", collated)
    for workers, most in ((0, 2), (1, AHEAD + 3)):
        made.clear()
        for step in batches(shards, 40, 1, SEED, range(2), workers=workers):
            assert step.passes <= 40
            for _ in step.parts:
                assert sum(ref() is not None for ref in made) <= most
            assert len(step.waits) == 40
        assert len(made) == 80
    (step,) = batches(shards, 40, 1, SEED, range(1))
    assert sorted(name for part in step.parts for name in part.responses) == sorted(ALL)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_reads_and_holds_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Of 16 row groups of two responses each of eight ranks reads those that hold its own four."""
    shards = tiny.shards(tmp_path, responses=16, group=2)
    group_of = {
        name: (str(rollouts.path), number)
        for rollouts, *_ in shards
        for number, group in enumerate(rollouts.row_groups(["rollout_id"]))
        for name in group["rollout_id"].to_pylist()
    }
    for rank in (0, 5):
        reads, mine, most = Reads(monkeypatch), list[str](), 0
        for step in batches(shards, 8, TOKENS, SEED, range(4), rank=rank, ranks=8, workers=workers):
            for part in step.parts:
                most = max(most, reads.responses)
                mine += part.responses
        assert sorted(reads.done) == sorted({group_of[name] for name in mine}) and len(reads.done) <= len(mine) == 4
        assert most <= (1 if workers == 0 else AHEAD)
        monkeypatch.undo()


def test_responses_of_a_part_of_a_row_group_do_not_keep_the_rest(shards: list[Triple]) -> None:
    whole, some = stream._load(shards[0], 0, [0, 1]), stream._load(shards[0], 0, [1])
    for name, value in vars(whole[1]).items():
        pairs = [(value, getattr(some[1], name))]
        if isinstance(value, dict):
            pairs = [(column, some[1].units[key]) for key, column in value.items()]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
            assert not isinstance(other, np.ndarray) or other.base is None


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_each_step(shards: list[Triple], ranks: int) -> None:
    """The last step has four responses: fewer than five ranks."""
    alone = steps_of(shards)
    shares = [steps_of(shards, rank=rank, ranks=ranks, workers=rank % 2) for rank in range(ranks)]
    for number, step in enumerate(alone):
        parts = [names([share[number]])[0] for share in shares]
        assert sorted(name for part in parts for name in part) == sorted(names([step])[0])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert {share[number].units for share in shares} == {step.units}
        assert sum(len(part.unit_row) for share in shares for part in share[number].parts) == step.units
    assert any(not share[-1].parts for share in shares) == (ranks == 5)
    assert all(step.passes == sum(len(part.unit_row) > 0 for part in step.parts) for share in shares for step in share)


def test_losses_of_ranks_add_up(shards: list[Triple]) -> None:
    models = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    config = parse_config(models | {"prompts": {"source": "x"}}, "test")
    stop = torch.from_numpy(tiny.STOP.astype("int64"))

    def loss(step: Step) -> float:
        model = tiny.model()
        return train_step(model, stop, step, MasterAdamW(model, config.train), 0.0, config)["loss"]

    for number in (0, PER_EPOCH - 1):
        only = range(number, number + 1)
        shares = [steps_of(shards, only, rank=rank, ranks=3)[0] for rank in range(3)]
        assert sum(map(loss, shares)) == pytest.approx(loss(steps_of(shards, only)[0]), rel=1e-5)


@given(sizes_of_groups, st.integers(0, 3), st.data())
def test_any_stretch_of_an_epoch_can_be_had_alone(sizes: list[int], epoch: int, data: st.DataObject) -> None:
    order, total = epoch_order(np.array(sizes), SEED, epoch), sum(sizes)
    places, rows = order.pick(0, total)
    assert sorted(order.groups) == list(range(len(sizes)))
    whole = [(int(order.groups[place]), int(row)) for place, row in zip(places, rows, strict=True)]
    assert sorted(whole) == [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    assert (np.diff(places // WINDOW) >= 0).all()  # a window is used up before the next one
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    some = order.pick(start, stop)
    assert np.array_equal(some[0], places[start:stop]) and np.array_equal(some[1], rows[start:stop])
    assert {int(place) // WINDOW for place in some[0]} <= set(order.windows(start, stop))


def test_a_window_is_shuffled_evenly() -> None:
    """Where the response that lies first on disk ends up among 8, over 4000 epochs: a chi-squared of 7 degrees of freedom."""
    counts = np.zeros(8)
    for epoch in range(4000):
        order = epoch_order(np.full(4, 2), SEED, epoch)
        places, rows = order.pick(0, 8)
        counts[np.flatnonzero((order.groups[places] == 0) & (rows == 0))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # 0.999 quantile


@given(lengths_of_step, st.integers(1, 7))
def test_shares_are_disjoint_and_alike(lengths: np.ndarray, ranks: int) -> None:
    shares = [share(lengths, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
    counts, tokens = [len(part) for part in shares], [int(lengths[part].sum()) for part in shares]
    assert max(counts) - min(counts) <= 1
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert all((np.diff(lengths[part]) <= 0).all() for part in shares)


@given(lengths_of_step, st.integers(1, 100))
def test_micro_batches_keep_to_the_budget_and_fill_it(lengths: np.ndarray, tokens: int) -> None:
    falling = -np.sort(-lengths)
    pieces = [falling[piece] for piece in cut(falling, tokens)]
    assert np.array_equal(np.concatenate([*pieces, lengths[:0]]), falling)
    for i, piece in enumerate(pieces):
        assert len(piece) == 1 or len(piece) * piece[0] <= tokens
        assert i + 1 == len(pieces) or (len(piece) + 1) * piece[0] > tokens


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 120))
def test_padded_tokens_are_within_the_budget(shards: list[Triple], tokens: int) -> None:
    parts = [part for step in batches(shards, SIZE, tokens, SEED, range(PER_EPOCH)) for part in step.parts]
    assert all(part.ids.numel() <= tokens or len(part.ids) == 1 for part in parts)
    assert sum(len(part.responses) for part in parts) == 40


def test_batches_hold_what_the_tables_say(shards: list[Triple]) -> None:
    """Against the tables as Python objects, response by response and unit by unit."""
    tables = [[row for triple in shards for row in triple[i].read().to_pylist()] for i in range(3)]
    rollouts = {row["rollout_id"]: row for row in tables[0]}
    units: dict[str, list[dict[str, Any]]] = {name: [] for name in rollouts}
    for unit, weight in zip(tables[1], tables[2], strict=True):
        units[unit["rollout_id"]].append({**unit, **weight})
    for part in (part for step in steps_of(shards) for part in step.parts):
        tokens = unit_number = 0
        for i, name in enumerate(part.responses):
            row = rollouts[name]
            prompt, response = row["prompt_ids"], row["response_ids"]
            inputs = prompt + response[:-1]
            assert part.ids[i].tolist() == inputs + [0] * (part.ids.shape[1] - len(inputs))
            assert part.mask[i].sum() == len(inputs) and part.mask[i, : len(inputs)].all()
            targets = [*response[:-1], STOP_ID] if row["finish_reason"] == "stop" else response
            mine = slice(tokens, tokens + len(response))
            assert part.targets[mine].tolist() == targets
            sampled = row["behavior_logp"] if row["sampler_logp"] is None else row["sampler_logp"]
            assert part.token_behavior_logp[mine].tolist() == sampled
            first = i * part.ids.shape[1] + len(prompt) - 1
            assert part.rows[mine].tolist() == list(range(first, first + len(response)))
            for unit in units[name]:
                at = slice(tokens + unit["s_start"], tokens + unit["s_start"] + unit["s_len"])
                if unit["kind"] == "masked":
                    assert (part.token_unit[at] == len(part.unit_row)).all()
                    continue
                assert (part.token_unit[at] == unit_number).all()
                _check_unit(part, unit_number, unit)
                assert part.response_of_unit[unit_number] == i
                assert part.unit_row[unit_number] == at.start
                unit_number += 1
            tokens += len(response)
        assert (tokens, unit_number) == (len(part.rows), len(part.unit_row))


def _check_unit(part: Batch, at: int, unit: dict[str, Any]) -> None:
    count = len(unit["cand_id"])
    assert part.cand_id[at, :count].tolist() == unit["cand_id"]
    assert (part.cand_id[at, count:] == 0).all() and (part.cand_logp[at, count:] == -math.inf).all()
    left = 1 - math.exp(unit["tail_logp"]) - math.exp(unit["dropped_logp"])
    held = sum(map(math.exp, unit["cand_logp"]))
    expected = [logp + math.log(left / held) for logp in unit["cand_logp"]]
    np.testing.assert_allclose(part.cand_logp[at, :count], expected, rtol=1e-5, atol=1e-6)
    assert part.s_len[at] == unit["s_len"] and part.t_len[at] == max(1, unit["t_len"])
    for name in ("teacher_logp", "teacher_entropy", "t_log_z"):
        assert getattr(part, name)[at] == np.float32(unit[name])
    assert part.weight[at] == np.float32(unit["weight"])
    assert part.credit_shift[at] == np.float32(unit["credit"] - unit["advantage"])
    behavior = unit["student_logp"] - math.log(unit["is_ratio"])
    assert float(part.behavior_logp[at]) == pytest.approx(behavior, rel=1e-6)


def test_responses_are_views_of_what_arrow_read(shards: list[Triple]) -> None:
    group = stream._decode(shards[0], 0)
    for column in (group.prompt, group.response, group.cand_id, group.cand_logp):
        assert not any(array.flags.owndata or array.flags.writeable for array in column)
    one = group.row(1)
    for view, (whole, _) in ((one.prompt, group.prompt), (one.response, group.response), (one.cand_id, group.cand_id)):
        assert len(view) and np.shares_memory(view, whole)
    for name, column in one.units.items():
        assert np.shares_memory(column, group.units[name])


def test_leaving_early_ends_the_threads_and_frees_the_row_groups(
    shards: list[Triple], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    for leave in ("close", "forget", "raise"):
        left = batches(shards, SIZE, TOKENS, SEED, range(1000), workers=3)
        next(left)
        assert threads()
        if leave == "close":
            left.close()
        elif leave == "raise":
            with pytest.raises(ZeroDivisionError):
                left.throw(ZeroDivisionError())
        del left
        assert not threads() and reads.alive == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_errors_of_workers_arrive_as_they_are(
    shards: list[Triple], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    (a, b) = shards
    with pytest.raises(OpdError, match="run the weights stage again"):
        steps_of([(a[0], a[1], b[2])], range(4), workers=workers)
    with pytest.raises(OpdError, match="run the units stage again"):
        steps_of([(a[0], b[1], b[2])], range(4), workers=workers)
    decode, failure = stream._decode, OSError(5, "no medium")
    broken = (str(a[0].path), int(epoch_order(np.full(10, 2), SEED, 0).groups[WINDOW]))

    def failing(triple: Triple, group: int) -> Any:
        if (str(triple[0].path), group) == broken:
            raise failure
        return decode(triple, group)

    monkeypatch.setattr(stream, "_decode", failing)
    seen = []
    with pytest.raises(OSError, match="no medium") as raised:
        seen.extend(iter(batches([a], SIZE, TOKENS, SEED, range(4), workers=workers)))
    assert raised.value is failure and not threads()


def test_responses_without_tokens_have_no_units_and_no_loss(tmp_path: Path) -> None:
    """What neither side can say, which reused rollouts may hold: beside others in a row group, and as all of one."""
    (made,) = tiny.shards(tmp_path, responses=7, group=2, count=1)
    empty = {"s0-r1", "s0-r4", "s0-r5"}
    nothing = {"response_ids": [], "behavior_logp": [], "finish_reason": "length"}
    paths = [tmp_path / "told" / shard.path.parent.name / shard.path.name for shard in made]
    inputs: dict[str, str] = {}
    for shard, path in zip(made[:2], paths, strict=False):
        kind = shard.manifest.kind
        with open_writer(path, kind, {}, dict(inputs)) as writer:
            for rows in (group.to_pylist() for group in shard.row_groups()):
                told = [row | nothing if row["rollout_id"] in empty else row for row in rows]
                if kind == "units":
                    told = [row for row in rows if row["rollout_id"] not in empty]
                writer.write(pa.Table.from_pylist(told, schema=arrow_schema(kind)))
        inputs[kind] = read_manifest(path).sha256
    figures = compute([Part(*paths[:2], None, paths[2])], Weights())
    assert (figures.responses, figures.incomparable) == (7, 3)
    (full,) = tiny.open_shards(tmp_path / "told")
    compared = dict.fromkeys(empty, 0)
    for row in full[1].read().to_pylist():
        compared[row["rollout_id"]] = compared.get(row["rollout_id"], 0) + (row["kind"] not in UNCOMPARED)
    config = parse_config({"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}}, "test")
    model, stop = tiny.model(), torch.from_numpy(tiny.STOP.astype("int64"))
    optimiser = MasterAdamW(model, config.train)
    for size in (1, 7):
        steps = [
            replace(step, parts=list(step.parts)) for step in batches([full], size, TOKENS, SEED, range(7 // size))
        ]
        for step, of in zip(steps, names(steps), strict=True):
            assert len(of) == size and step.units == sum(compared[name] for name in of)
            for part in step.parts:
                count = torch.bincount(part.response_of_unit, minlength=len(part.responses))
                assert count.tolist() == [compared[name] for name in part.responses]
            assert train_step(model, stop, step, optimiser, 0.0, config)["units"] == step.units


def test_empty_row_groups_are_nothing(tmp_path: Path) -> None:
    (made,) = tiny.shards(tmp_path, responses=5, group=2, count=1)
    (full,) = tiny.shards(tmp_path / "b", responses=5, group=2, count=1)
    tables = [[shard.row_group(i, shard.read().column_names) for i in range(3)] for shard in made]
    triple = []
    for shard, groups in zip(full, tables, strict=True):
        with open_writer(shard.path, shard.manifest.kind, {}, {}) as writer:
            for group in (groups[0], groups[0].slice(0, 0), *groups[1:]):
                writer.write(group)
        triple.append(open_shard(shard.path, shard.manifest.kind))
    assert triple[0].row_group_sizes() == [2, 0, 2, 1]
    found = names(list(batches([tuple(triple)], 2, TOKENS, SEED, range(3), workers=1)))  # type: ignore[list-item]
    assert sorted(name for step in found for name in step) == [f"s0-r{i}" for i in range(5)]
