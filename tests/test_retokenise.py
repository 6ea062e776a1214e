"""Another student's rollouts in this student's tokens, against a loop over tokens."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hard_texts import HARD_TEXTS

from pipeline.align.retokenise import retokenise
from pipeline.align.segments import sampled_tokens
from pipeline.align.tokens import encode_texts
from schemas.tables import arrow_schema

TEXTS = ["The sum of 12 and 130 is 142.", "", "42", "naïve café – 漢字 🙂", "def f(x):\n\treturn x", "   spaces  "]


def rollouts_of(model: Any, texts: list[str], stopped: list[bool], cut: int | None = None) -> pa.Table:
    """Rollouts as the model's own encoding of the texts; `cut`: a response ends in half a character there."""
    rng = np.random.default_rng(0)
    ids, at = encode_texts(model.encoder, texts)
    rows = []
    for i, text in enumerate(texts):
        own = ids[at[i] : at[i + 1]].tolist()
        if i == cut:
            whole = encode_texts(model.encoder, [text + "\U0001df00"])[0].tolist()
            own = whole[: len(whole) - 1]
            raw = model.vocabulary.concatenate(np.array(own))[0].tobytes()
            text = raw.decode(errors="ignore")  # noqa: PLW2901
            assert text.encode() != raw
        own += [int(model.stop()[0])] if stopped[i] else []
        rows.append(
            {
                "rollout_id": f"r{i}",
                "prompt_id": "p",
                "sample": 0,
                "round": 0,
                "prompt_ids": [1, 2],
                "response_ids": own,
            }
            | {"response": text, "behavior_logp": (-rng.random(len(own))).tolist()}
            | {"sampler_logp": (-rng.random(len(own))).tolist() if i % 2 else None}
            | {"top_id": None, "finish_reason": "stop" if stopped[i] else "length", "answer": "a"}
        )
    return pa.Table.from_pylist(rows, schema=arrow_schema("rollouts"))


def of_each(row: dict[str, Any]) -> list[str]:
    """The log-probs that a response has."""
    return [name for name in ("behavior_logp", "sampler_logp") if row[name] is not None]


def ends_of(model: Any, ids: list[int]) -> list[int]:
    return np.cumsum([len(model.vocabulary.bytes[i].as_py() or b"") for i in ids]).astype(int).tolist()


@pytest.mark.parametrize("direction", ["to gemma", "to smollm2", "to itself"])
def test_sums_over_shared_stretches_are_the_behaviour_policys(direction: str, smollm2: Any, gemma3: Any) -> None:
    theirs, ours = {
        "to gemma": (smollm2, gemma3),
        "to smollm2": (gemma3, smollm2),
        "to itself": (smollm2, smollm2),
    }[direction]
    texts = [*TEXTS, *(t for t in HARD_TEXTS if len(t) < 400)]
    rng = np.random.default_rng(1)
    stopped = (rng.random(len(texts)) < 0.5).tolist()
    stopped[3] = False
    given = rollouts_of(theirs, texts, stopped, cut=3)
    prompts = [rng.integers(5, 100, n).astype(np.int32) for n in rng.integers(1, 9, len(given))]
    sides = (theirs.vocabulary, theirs.stop()), (ours.vocabulary, ours.stop())
    told = retokenise(given, *sides, ours.encoder, ours.roles, prompts)
    assert told.schema.equals(arrow_schema("rollouts"))
    for name in ("rollout_id", "prompt_id", "response", "answer"):
        assert told[name].equals(given[name])
    for before, after, prompt in zip(given.to_pylist(), told.to_pylist(), prompts, strict=True):
        assert after["prompt_ids"] == prompt.tolist()
        assert [len(after[name]) for name in of_each(before)] == [len(after["response_ids"])] * len(of_each(before))
        assert (after["sampler_logp"] is None) == (before["sampler_logp"] is None)
        if direction == "to itself":
            assert {**after, "prompt_ids": None} == {**before, "prompt_ids": None}
            continue
        stops = after["finish_reason"] == "stop"
        if stops:
            assert before["finish_reason"] == "stop" and after["response_ids"][-1] in ours.stop()
            for name in of_each(before):
                assert after[name][-1] == pytest.approx(before[name][-1])
        ids = after["response_ids"][: len(after["response_ids"]) - stops]
        spelled = b"".join(ours.vocabulary.bytes[i].as_py() for i in ids)
        assert before["response"].encode().startswith(spelled)
        # A loop over borders that both have: the sums between them are equal.
        their_ids = before["response_ids"][: len(before["response_ids"]) - (before["finish_reason"] == "stop")]
        their_ends, our_ends = ends_of(theirs, their_ids), ends_of(ours, ids)
        last = (0, 0)
        for end in sorted(set(their_ends) & set(our_ends)):
            here = len([e for e in their_ends if e <= end]), len([e for e in our_ends if e <= end])
            for name in of_each(before):
                expected = sum(before[name][last[0] : here[0]])
                assert sum(after[name][last[1] : here[1]]) == pytest.approx(expected, abs=1e-4)
            last = here
        if before["finish_reason"] == "stop" and spelled == before["response"].encode():
            assert stops
    if direction != "to itself":
        assert told["finish_reason"][3].as_py() == "length"


def test_a_sibling_with_other_stops_stops_by_its_own(smollm2: Any) -> None:
    """One tokenizer, two stop sets: a final stop that is none of the student's becomes its first."""
    given = rollouts_of(smollm2, TEXTS, [True, False] * 3)
    end, (other,) = int(smollm2.stop()[0]), smollm2.tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    prompts = [np.array([1, 2], np.int32)] * len(given)
    for own, last in (([other], other), ([other, end], end)):
        sides = [(smollm2.vocabulary, stop) for stop in (smollm2.stop(), np.array(own, np.int32))]
        told = retokenise(given, *sides, smollm2.encoder, smollm2.roles, prompts)
        expected = given.to_pylist()
        for row in expected[::2]:
            row["response_ids"][-1] = last
        assert told.to_pylist() == expected and told.schema.equals(arrow_schema("rollouts"))
        assert sampled_tokens(told, *sides[1])[2].tolist() == [True, False] * 3


def test_no_responses(smollm2: Any, gemma3: Any) -> None:
    none = arrow_schema("rollouts").empty_table()
    sides = ((m.vocabulary, m.stop()) for m in (smollm2, gemma3))
    assert len(retokenise(none, *sides, gemma3.encoder, gemma3.roles, [])) == 0
