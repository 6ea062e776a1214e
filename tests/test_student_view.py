"""The student's view of scores against loops over tokens, on the two real tokenizers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.align.student_view import LOG_FLOOR, student_view
from pipeline.align.tokens import TokenBytes, encode_texts
from pipeline.align.vocabularies import pair_ids, same_ids, stop_ids
from schemas.errors import OpdError
from schemas.tables import STOP_ID, arrow_schema

TEXTS = [
    "The sum of 12 and 130 is 142.",
    "",
    "42",
    "naïve café – 漢字 🙂",
    "60 + 55 = 115\nQuestion: more",
    "def f(x):\n\treturn x  # tab",
    "no newline but   runs of spaces   ",
]
STOPPED = [True, True, False, True, True, False, True]


@pytest.fixture(scope="module")
def case(smollm2: Any, gemma3: Any) -> dict[str, Any]:
    """Rollouts of SmolLM2 and made-up scores of Gemma on the same texts."""
    rng = np.random.default_rng(0)
    student_stop, teacher_stop = smollm2.stop(), gemma3.stop("\n")
    s_ids, s_at = encode_texts(smollm2.encoder, TEXTS)
    t_ids, t_at = encode_texts(gemma3.encoder, TEXTS)
    rollouts, scores = [], []
    allowed = np.setdiff1d(np.flatnonzero(gemma3.vocabulary.has_bytes), teacher_stop)
    for i, text in enumerate(TEXTS):
        ids = s_ids[s_at[i] : s_at[i + 1]].tolist() + ([int(student_stop[0])] if STOPPED[i] else [])
        rollouts.append(
            {"rollout_id": f"r{i}", "prompt_id": "p", "sample": 0, "round": 0, "prompt_ids": [1], "response_ids": ids}
            | {"response": text, "behavior_logp": [-1.0] * len(ids), "sampler_logp": None, "answer": None}
            | {"finish_reason": "stop" if STOPPED[i] else "length"}
        )
        tokens = t_ids[t_at[i] : t_at[i + 1]].tolist()
        spelled = [gemma3.vocabulary.bytes[t].as_py() for t in tokens]
        ends = np.cumsum([len(b) for b in spelled]).astype(int).tolist()
        for pos in range(len(tokens) + 1):
            share = np.sort(rng.dirichlet(np.ones(8)))[::-1]
            end = pos == len(tokens)
            scores.append(
                {
                    "rollout_id": f"r{i}",
                    "pos": pos,
                    "token_id": -1 if end else tokens[pos],
                    "entropy": 1 + len(scores) / 8,
                }
                | {"byte_start": 0 if pos == 0 else ends[pos - 1], "byte_end": (ends or [0])[-1] if end else ends[pos]}
                | {
                    "logp": float(np.log(share[1])),
                    "stop_logp": float(np.log(share[6])),
                    "tail_logp": float(np.log(share[7])),
                    "log_z": 20 + 3 * np.sin(len(scores)),
                }
                | {"cand_id": rng.choice(allowed, 6, replace=False).tolist(), "cand_logp": np.log(share[:6]).tolist()}
            )
    return {
        "rollouts": pa.Table.from_pylist(rollouts, schema=arrow_schema("rollouts")),
        "scores": pa.Table.from_pylist(scores, schema=arrow_schema("scores")),
        "student": smollm2.vocabulary,
        "teacher": gemma3.vocabulary,
        "student_stop": student_stop,
        "teacher_stop": teacher_stop,
    }


def view(case: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    case = {**case, **changes}
    pairs = pair_ids(case["teacher"], case["student"])
    table = student_view(
        case["rollouts"], case["scores"], case["student"], case["student_stop"], case["teacher_stop"], pairs
    )
    assert table.schema.equals(arrow_schema("units"))
    return table.to_pylist()


def test_units_match_a_loop_over_tokens(case: dict[str, Any]) -> None:
    student_of: dict[bytes, int] = {}
    for index, value in enumerate(case["student"].bytes.to_pylist()):
        if value is not None:
            student_of.setdefault(value, index)
    teacher_bytes = case["teacher"].bytes.to_pylist()
    rows = case["scores"].to_pylist()
    by_response = {f"r{i}": [row for row in rows if row["rollout_id"] == f"r{i}"] for i in range(len(TEXTS))}
    halts = set(case["teacher_stop"].tolist())
    checked = 0
    for unit in view(case):
        scored = by_response[unit["rollout_id"]]
        tokens = scored[unit["t_start"] : unit["t_start"] + unit["t_len"]]
        if any(row["token_id"] in halts for row in scored[: unit["t_start"]]):
            assert unit["kind"] == "masked"  # the student went on where the teacher had ended
        if unit["kind"] == "masked":
            assert unit["teacher_logp"] is unit["teacher_entropy"] is unit["t_log_z"] is None and unit["cand_id"] == []
            continue
        start = scored[unit["t_start"]]
        expected = sum(
            min(row["logp"], max(row["tail_logp"], LOG_FLOOR)) if row["token_id"] in halts else row["logp"]
            for row in tokens
        )
        if unit["kind"] == "stop":
            assert unit["t_len"] == 0 and start["token_id"] == -1
            expected = start["logp"]
        assert unit["teacher_logp"] == pytest.approx(expected, rel=1e-5)
        log_z = [row["log_z"] for row in tokens or [start]]
        assert unit["teacher_entropy"] == start["entropy"]
        assert unit["t_log_z"] == pytest.approx(sum(log_z) / len(log_z) - log_z[0], abs=1e-5)
        pairs = [
            (student_of.get(teacher_bytes[t]), logp)
            for t, logp in zip(start["cand_id"], start["cand_logp"], strict=True)
        ]
        kept = [(index, logp) for index, logp in pairs if index is not None]
        assert unit["cand_id"] == [index for index, _ in kept] + [STOP_ID]
        assert unit["cand_logp"] == pytest.approx([logp for _, logp in kept] + [start["stop_logp"]])
        lost = sum(np.exp(logp) for index, logp in pairs if index is None)
        assert np.exp(unit["dropped_logp"]) == pytest.approx(lost, abs=1e-6)
        checked += 1
    assert checked > 40


def test_scores_without_log_z_give_none(case: dict[str, Any]) -> None:
    at = case["scores"].schema.get_field_index("log_z")
    none = pa.nulls(len(case["scores"]), pa.float32())
    table = case["scores"].set_column(at, arrow_schema("scores").field("log_z"), none)
    with_it, without = view(case), view(case, scores=table)
    assert without == [unit | {"t_log_z": None} for unit in with_it]


def test_a_newline_is_not_rewarded_where_the_teacher_would_stop(case: dict[str, Any]) -> None:
    units = [unit for unit in view(case) if unit["rollout_id"] == "r4"]
    newline = next(unit for unit in units if TEXTS[4].encode()[unit["byte_start"] : unit["byte_end"]].startswith(b"\n"))
    scored = [row for row in case["scores"].to_pylist() if row["rollout_id"] == "r4"][newline["t_start"]]
    assert newline["kind"] != "masked" and newline["teacher_logp"] == pytest.approx(scored["tail_logp"])
    assert newline["teacher_logp"] < scored["logp"]
    after = units[newline["unit"] + 1 :]
    assert after and all(unit["kind"] == "masked" for unit in after)


def test_every_response_token_is_in_one_unit(case: dict[str, Any]) -> None:
    lengths: dict[str, int] = {}
    for unit in view(case):
        assert unit["s_start"] == lengths.get(unit["rollout_id"], 0)
        lengths[unit["rollout_id"]] = unit["s_start"] + unit["s_len"]
    expected = {
        row["rollout_id"]: len(row["response_ids"]) for row in case["rollouts"].to_pylist() if row["response_ids"]
    }
    assert lengths == expected


def test_length_cut_responses_have_no_stop_unit(case: dict[str, Any]) -> None:
    stops = {unit["rollout_id"] for unit in view(case) if unit["kind"] == "stop"}
    assert stops == {f"r{i}" for i, stopped in enumerate(STOPPED) if stopped and "\n" not in TEXTS[i]}


def test_other_responses_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(OpdError, match="are not the 6 of the rollouts"):
        view(case, rollouts=case["rollouts"].slice(0, 6))
    reordered = case["rollouts"].take(pa.array([1, 0, 2, 3, 4, 5, 6]))
    with pytest.raises(OpdError, match="in their order"):
        view(case, rollouts=reordered)


def test_pairs_are_exactly_the_canonical_tokens_of_equal_bytes(case: dict[str, Any]) -> None:
    teacher, student = case["teacher"], case["student"]
    for a, b in ((teacher, student), (student, teacher)):
        pairs = pair_ids(a, b)
        a_bytes, b_bytes = a.bytes.to_pylist(), b.bytes.to_pylist()
        known = {value for value in b_bytes if value is not None}
        for index in np.flatnonzero(pairs >= 0).tolist():
            assert a_bytes[index] == b_bytes[pairs[index]]
        unpaired = [value for value, other in zip(a_bytes, pairs, strict=True) if other < 0 and value in known]
        paired = {a_bytes[index] for index in np.flatnonzero(pairs >= 0).tolist()}
        assert set(unpaired) <= paired  # only doubles of a paired token are left out
        assert len(set(pairs[pairs >= 0].tolist())) == (pairs >= 0).sum()


def test_stop_sets(smollm2: Any, gemma3: Any) -> None:
    assert smollm2.stop().tolist() == [smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    stop = gemma3.stop("\n")
    assert gemma3.tokenizer.eos_token_id in stop
    spelled = [gemma3.vocabulary.bytes[int(i)].as_py() for i in stop if i != gemma3.tokenizer.eos_token_id]
    everything = gemma3.vocabulary.bytes.to_pylist()
    assert sorted(spelled) == sorted(v for v in everything if v is not None and v[:1] == b"\n")
    with pytest.raises(OpdError, match="no token of"):
        gemma3.stop("\N{PILE OF POO}\N{PILE OF POO}\N{PILE OF POO}")
    with pytest.raises(OpdError, match="has no end token"):
        stop_ids(gemma3.vocabulary, [], [])


def test_ids_are_the_same_only_where_every_one_of_them_means_the_same(smollm2: Any, gemma3: Any) -> None:
    ours = smollm2.vocabulary
    assert same_ids(ours, ours) and not same_ids(ours, gemma3.vocabulary)
    more = len(ours) + 64
    padded = TokenBytes(
        "padded",
        pa.concat_arrays([ours.bytes, pa.nulls(64, pa.large_binary())]),
        np.resize(np.append(ours.special, np.zeros(64, bool)), more),
        np.append(ours.canonical, np.zeros(64, bool)),
    )
    assert same_ids(padded, ours) and same_ids(ours, padded)
    values = padded.bytes.to_pylist()
    values[-1] = b"new"
    assert not same_ids(replace(padded, bytes=pa.array(values, pa.large_binary())), ours)
    special = padded.special.copy()
    special[-1] = True
    assert not same_ids(replace(padded, special=special), ours)
    special = ours.special.copy()
    special[5] ^= True
    assert not same_ids(replace(ours, special=special), ours)
