"""The token view against plain loops over responses, candidates and bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tiny

from pipeline.align.tokens import TokenBytes
from pipeline.measure.token_view import STOP_TEXT, readable, response_tables, token_texts, token_view, unit_texts
from schemas.errors import OpdError
from schemas.tables import STOP_ID

SPELLED = [None, None, b"a", "é".encode(), b"\xe2\x82", b" \xff", *(f" {i}".encode() for i in range(6, tiny.VOCAB))]
STUDENT = TokenBytes(
    "student", pa.array(SPELLED, pa.large_binary()), np.zeros(tiny.VOCAB, bool), np.ones(tiny.VOCAB, bool), {1: "think"}
)


def said(index: int) -> str:
    if index == STOP_ID:
        return STOP_TEXT
    spelled = SPELLED[index] if index < len(SPELLED) else None
    if spelled is None:
        return {1: "<think>"}.get(index, f"<{index}>")
    out, at = "", 0
    while at < len(spelled):  # the longest character there, or a byte that begins none
        size = next((n for n in (4, 3, 2, 1) if valid(spelled[at : at + n])), 0)
        out += spelled[at : at + size].decode() if size else f"\\x{spelled[at]:02x}"
        at += size or 1
    return out


def valid(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[pl.DataFrame]:
    """Random responses with text, half of them with the student's own candidates."""
    rng = np.random.default_rng(3)
    shards = tiny.shards(tmp_path_factory.mktemp("view"), count=1)[0]
    rollouts, units, weights = (pl.DataFrame(shard.read()) for shard in shards)
    texts = ["".join(rng.choice(list("aé€b "), 12)) for _ in range(len(rollouts))]
    recorded = [
        None if i % 2 else [rng.integers(0, tiny.VOCAB + 3, 3).tolist() for _ in ids]
        for i, ids in enumerate(rollouts["response_ids"])
    ]
    top = pl.Series("top_id", recorded, dtype=pl.List(pl.List(pl.Int32)))
    return [rollouts.with_columns(top, response=pl.Series(texts)), units, weights]


def test_a_view_says_what_loops_over_the_tables_say(tables: list[pl.DataFrame]) -> None:
    rollouts, units, weights = tables
    by_id = {row["rollout_id"]: row for row in rollouts.to_dicts()}
    found = token_view(rollouts, units, STUDENT, weights).to_dicts()
    assert len(found) == len(units)
    masked = own = 0
    for view, unit, weight in zip(found, units.to_dicts(), weights.to_dicts(), strict=True):
        rollout = by_id[unit["rollout_id"]]
        tokens = slice(unit["s_start"], unit["s_start"] + unit["s_len"])
        student = sum(rollout["behavior_logp"][tokens])
        assert view["student_logp"] == pytest.approx(student, abs=1e-5)
        assert [view[name] for name in ("unit", "kind", "teacher_logp", "advantage", "weight")] == [
            unit["unit"], unit["kind"], unit["teacher_logp"], weight["advantage"], weight["weight"]
        ]  # fmt: skip
        if unit["kind"] == "masked":
            masked += 1
            assert view["gap"] is view["teacher_candidates"] is view["teacher_elsewhere"] is None
        else:
            assert view["gap"] == pytest.approx(unit["teacher_logp"] - student, abs=1e-5)
            ranked = sorted(zip(unit["cand_logp"], unit["cand_id"], strict=True), reverse=True)
            assert [(one["logp"], one["id"], one["text"]) for one in view["teacher_candidates"]] == [
                (logp, index, said(index)) for logp, index in ranked
            ]
            kept = sum(np.exp(unit["cand_logp"]))
            # tiny.shards gives the realised unit mass of its own.
            assert view["teacher_elsewhere"] == pytest.approx(1 - kept - np.exp(unit["teacher_logp"]), abs=1e-5)
        if rollout["top_id"] is None:
            assert view["student_candidates"] is None
        else:
            own += 1
            expected = rollout["top_id"][unit["s_start"]]
            assert [(one["id"], one["text"]) for one in view["student_candidates"]] == [(i, said(i)) for i in expected]
    assert masked and own
    assert "advantage" not in token_view(rollouts, units, STUDENT).columns


def test_texts_of_units_are_slices_of_the_bytes_of_their_response() -> None:
    rollouts = pl.DataFrame({"rollout_id": ["r", "s", "empty"], "response": ["a€b", "é", ""]})
    rows: list[tuple[Any, ...]] = [
        ("r", "1:1", 0, 1, "a"),
        ("r", "1:1", 1, 2, "\\xe2"),  # a unit may end within a character
        ("r", "1:1", 2, 4, "\\x82\\xac"),
        ("r", "masked", 4, 9, "b"),  # what a tokenizer spells past the end
        ("s", "n:m", 0, 2, "é"),
        ("s", "stop", 2, 2, STOP_TEXT),
        ("empty", "stop", 0, 0, STOP_TEXT),
    ]
    units = pl.DataFrame(rows, ["rollout_id", "kind", "byte_start", "byte_end", "text"], orient="row")
    assert unit_texts(rollouts, units).to_list() == units["text"].to_list()
    with pytest.raises(OpdError, match="units of rollout 's', which the rollouts lack"):
        unit_texts(rollouts.filter(rollout_id="r"), units)


def test_ids_are_called_by_text_role_or_number() -> None:
    ids = pl.Series([*range(8), STOP_ID, tiny.VOCAB + 7], dtype=pl.Int32)
    assert token_texts(ids, STUDENT).to_list() == [said(i) for i in ids]
    assert token_texts(ids.clear(), STUDENT).to_list() == []
    assert readable(pa.array([b"a", None, b"\xff"], pa.large_binary())).to_list() == ["a", None, "\\xff"]


def test_one_response_is_found_in_its_row_group(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path, count=1)[0]
    whole = [pl.DataFrame(shard.read()) for shard in shards]
    for name in (whole[0]["rollout_id"][0], whole[0]["rollout_id"][-1]):
        found = response_tables(name, *shards)
        assert found is not None
        for table, every in zip(found, whole, strict=True):
            assert table is not None and table.equals(every.filter(rollout_id=name))
        alone = response_tables(name, *shards[:2])
        assert alone is not None and alone[2] is None and alone[1].equals(found[1])
    assert response_tables("none", *shards) is None
