"""Disagreement tables against plain loops over responses, and why units are masked by hand."""

from collections import defaultdict
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tiny
from test_token_view import STUDENT, said

from pipeline.measure import disagreement
from pipeline.measure.disagreement import (
    AFTER_END,
    NO_ROLE,
    NOT_UTF8,
    SPELLING,
    change,
    instead,
    masked_because,
    ranked,
)
from pipeline.measure.token_view import STOP_TEXT
from schemas.tables import arrow_schema

NO_STOP = np.array([], np.int32)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[pl.DataFrame, ...]]:
    """Row groups of random responses over four letters, a byte a token."""
    rng = np.random.default_rng(7)
    found = []
    for rollouts, units, _ in tiny.shards(tmp_path_factory.mktemp("disagreement"), responses=30, group=8):
        for first, second in zip(rollouts.row_groups(), units.row_groups(), strict=True):
            table = pl.DataFrame(first)
            texts = ["".join(rng.choice(list("abcd"), len(ids))) for ids in table["response_ids"]]
            scores = pl.DataFrame(pa.Table.from_pylist([], schema=arrow_schema("scores")))
            found.append((table.with_columns(response=pl.Series(texts)), scores, pl.DataFrame(second)))
    return found


@pytest.fixture(scope="module")
def tables(groups: list[Any]) -> disagreement.Tables:
    """All tables of all groups."""
    return disagreement.measure(groups, NO_STOP)


def loops(groups: list[tuple[pl.DataFrame, ...]]) -> list[dict[str, Any]]:
    """Every unit with what the tables are made of."""
    found = []
    for rollouts, _, units in groups:
        own: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for unit in units.to_dicts():
            own[unit["rollout_id"]].append(unit)
        for rollout in rollouts.to_dicts():
            before = None
            rows = own[rollout["rollout_id"]]
            for at, unit in enumerate(rows):
                stop = unit["kind"] == "stop"
                # tiny.shards counts a byte a token, the stop's too, which the text lacks only where it is asked for.
                text = rollout["response"][unit["byte_start"] : unit["byte_end"]] or STOP_TEXT * stop
                student = sum(rollout["behavior_logp"][unit["s_start"] : unit["s_start"] + unit["s_len"]])
                found.append(unit | {"text": text, "before": before, "student": student, "tenth": at * 10 // len(rows)})
                before = text
    return found


@pytest.mark.parametrize("name", disagreement.KEYS)
def test_tables_are_sums_of_loops(groups: list[Any], tables: disagreement.Tables, name: str) -> None:
    expected: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0] * 5)
    for unit in loops(groups):
        masked = unit["kind"] == "masked"
        if (name == "masked" and not masked) or (masked and name not in ("masked", "kinds")):
            continue
        key = tuple({"because": SPELLING, **unit}[column] for column in disagreement.KEYS[name])
        nats = [0.0] * 3 if masked else [unit["student"] - unit["teacher_logp"], unit["student"], unit["teacher_logp"]]
        expected[key] = [a + b for a, b in zip(expected[key], [1, unit["s_len"], *nats], strict=True)]
    table = tables[name]
    keys = disagreement.KEYS[name]
    found = {tuple(row[key] for key in keys): [row[column] for column in disagreement.SUMS] for row in table.to_dicts()}
    assert found.keys() == expected.keys() and len(found) > 3 * (name != "masked")
    for key, sums in expected.items():
        assert found[key] == pytest.approx(sums, abs=1e-4), key


def test_shares_of_all_tables_add_up_to_the_sampled_kl(groups: list[Any], tables: disagreement.Tables) -> None:
    total = sum(unit["student"] - unit["teacher_logp"] for unit in loops(groups) if unit["kind"] != "masked")
    for name in ("texts", "contexts", "kinds", "tenths", "responses"):
        assert tables[name]["lost"].sum() == pytest.approx(total, rel=1e-5), name
    every = ranked(tables, "texts", 1000)
    losing = tables["texts"].filter(pl.col("lost") > 0)
    assert len(every) == len(losing) and every["lost"].is_sorted(descending=True)
    assert every["share"].sum() == pytest.approx(losing["lost"].sum() / total)
    first = every.to_dicts()[0]
    assert first["student_mean"] - first["teacher_mean"] == pytest.approx(first["lost"] / first["count"])
    assert ranked(tables, "texts", 2).equals(every.head(2))


def test_of_more_texts_than_are_kept_those_that_move_most_stay(groups: list[Any]) -> None:
    every = disagreement.measure(groups[:1], NO_STOP)["contexts"]
    found = disagreement.measure(groups[:1] * 2, NO_STOP, keep=5)
    kept = found["contexts"]
    assert len(kept) == 5 < len(every)
    most = every.top_k(5, by=pl.col("lost").abs())
    assert set(kept["lost"].round(3)) == set((2 * most["lost"]).round(3))
    # Shares are of all that is lost all the same.
    total = 2 * every["lost"].sum()
    assert abs(kept["lost"].sum() - total) > 1e-3
    rows = ranked(found, "contexts", 5)
    assert rows["share"].to_list() == pytest.approx((rows["lost"] / total).to_list(), rel=1e-9) and len(rows)
    none = {name: table.clear() for name, table in found.items()}
    changed = change(none, found, (1, 4), 9)
    assert changed["share"].to_list() == pytest.approx((changed["change"] / (total / 4)).to_list(), rel=1e-9)


def test_what_the_teacher_would_have_said_is_its_mean_probability(
    groups: list[Any], tables: disagreement.Tables
) -> None:
    for name in ("texts", "contexts"):
        chosen = ranked(tables, name, 4)
        keys = [key for key in disagreement.KEYS["contexts"] if key in chosen.columns]
        found = {
            tuple(row[key] for key in keys): row["candidates"] for row in instead(groups, chosen, STUDENT).to_dicts()
        }
        for row in chosen.to_dicts():
            key = tuple(row[name] for name in keys)
            masses: dict[int, float] = defaultdict(float)
            for unit in loops(groups):
                if tuple(unit[name] for name in keys) == key:
                    for index, logp in zip(unit["cand_id"], unit["cand_logp"], strict=True):
                        masses[index] += np.exp(logp) / row["count"]
            best = sorted(masses.items(), key=lambda pair: -pair[1])[: disagreement.CANDIDATES]
            assert [one["text"] for one in found[key]] == [said(index) for index, _ in best]
            assert [one["share"] for one in found[key]] == pytest.approx([share for _, share in best], rel=1e-5)


def test_a_change_is_told_by_text() -> None:
    def table(**rows: tuple[int, float]) -> disagreement.Tables:
        texts = [{"text": text, "kind": "1:1", "count": n, "lost": lost} for text, (n, lost) in rows.items()]
        return {"texts": pl.DataFrame(texts), "kinds": pl.DataFrame({"lost": [sum(row["lost"] for row in texts)]})}

    before, after = table(To=(5, 40.0), a=(10, 10.0)), table(a=(20, 4.0), b=(4, 12.0))
    found = change(before, after, (10, 20), 2).to_dicts()
    assert [row["text"] for row in found] == ["To", "a"]
    assert found[0] == {"text": "To", "kind": "1:1", "times": 50, "lost": 4.0, "times_after": 0, "lost_after": 0.0} | {
        "change": -4.0,
        "share": pytest.approx(-4.0 / (-4.0 - 0.8 + 0.6)),
    }
    assert (found[1]["times"], found[1]["times_after"], found[1]["lost_after"]) == (100, 100, 0.2)
    assert change(before, before, (1, 1), 9)["share"].to_list() == [None, None]


def test_why_units_are_masked() -> None:
    """In one response each: a broken byte, a role, a text past the teacher's end, and a tail without common border."""
    role = [
        {"role": None, "tokens": 2, "bytes": 2, "text": True, "loss": True},
        {"role": "think", "tokens": 1, "bytes": 7, "text": False, "loss": True},
        {"role": None, "tokens": 1, "bytes": 1, "text": True, "loss": True},
    ]
    rows = {"broken": ("a\ufffdb", None, [{"byte": 1, "raw": 1}]), "role": ("ab<think>c", role, None)}
    rows |= {name: ("abcd", None, None) for name in ("ended", "tail")}
    columns = ["rollout_id", "response", "segments", "broken"]
    schema = pl.DataFrame(arrow_schema("rollouts").empty_table()).select(columns).schema
    rollouts = pl.DataFrame([(name, *row) for name, row in rows.items()], schema, orient="row")
    units = pl.DataFrame(
        [
            ("broken", "1:1", 0, 0, 0, 1, None),
            ("broken", "masked", 1, 1, 1, 4, NOT_UTF8),
            ("broken", "1:1", 2, 2, 4, 5, None),
            ("role", "1:1", 0, 0, 0, 2, None),
            ("role", "masked", 2, 1, 2, 9, NO_ROLE),
            ("role", "1:1", 3, 1, 9, 10, None),
            ("ended", "1:1", 0, 0, 0, 1, None),
            ("ended", "1:1", 1, 1, 1, 2, None),  # what ends the teacher's answer is itself compared
            ("ended", "masked", 2, 2, 2, 3, AFTER_END),
            ("ended", "masked", 3, 3, 3, 4, AFTER_END),
            ("tail", "1:1", 0, 0, 0, 1, None),
            ("tail", "masked", 1, 1, 1, 4, SPELLING),
        ],
        ["rollout_id", "kind", "s_start", "t_start", "byte_start", "byte_end", "because"],
        orient="row",
    )
    ends = [("broken", 2, 1), ("role", 1, 9), ("ended", 1, 9), ("ended", 3, 9), ("tail", 1, 5)]
    scores = pl.DataFrame(
        [(name, pos, token, 1 if name == "role" else None) for name, pos, token in ends],
        schema={"rollout_id": pl.String, "pos": pl.Int32, "token_id": pl.Int32, "segment": pl.Int32},
        orient="row",
    )
    # The role's token is in the stop set too, but a role ends a turn that another follows.
    found = masked_because(rollouts, scores, units, np.array([9], np.int32))
    assert found.to_list() == units["because"].to_list()
