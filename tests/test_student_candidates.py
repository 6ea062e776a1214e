"""Where the student's own candidates are requested, against a loop over bytes."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align.segments import Segments
from pipeline.align.student_candidates import requested_ids
from pipeline.align.tokens import Spelling, spell
from pipeline.align.vocabularies import pair_ids


def reference(
    top_id: list[list[list[int]]], s_ends: list[list[int]], t_ends: list[list[int]], exact: list[int], pairs: dict
) -> list:
    out = []
    for top, ours, theirs, limit in zip(top_id, s_ends, t_ends, exact, strict=True):
        place: dict[int, list[int]] = {}
        for start, ids in zip([0, *ours], top, strict=False):
            if start <= limit:
                place.setdefault(start, ids)
        rows, seen = [], set()
        for start in [0, *theirs]:
            ids = place.get(start) if start not in seen else None
            seen.add(start)
            rows.append([pairs.get(i, -1) for i in ids] if ids is not None else [-1, -1])
        out.append(rows)
    return out


@st.composite
def cases(draw: Any) -> Any:
    responses = draw(st.integers(1, 4))
    ends = [
        [np.cumsum(draw(st.lists(st.integers(0, 3), max_size=8))).astype(int).tolist() for _ in range(2)]
        for _ in range(responses)
    ]
    top = [
        draw(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True), min_size=n, max_size=n))
        for n in [len(s) + draw(st.integers(0, 1)) for s, _ in ends]
    ]
    return ends, top, [draw(st.integers(0, 24)) for _ in range(responses)]


def spelling(ends: list[list[int]], exact: list[int]) -> Spelling:
    offsets = np.concatenate([[0], np.cumsum([len(e) for e in ends])])
    return Spelling(
        np.zeros(offsets[-1], np.int32), offsets, np.concatenate([np.array(e, np.int64) for e in ends]), np.array(exact)
    )


def one_each(spelled: Spelling) -> Segments:
    """Each response is one text."""
    counts = np.diff(spelled.offsets)
    n = len(counts)
    return Segments(np.arange(n + 1), pa.nulls(n, pa.string()), counts, spelled.exact, *[np.ones(n, bool)] * 2)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_requested_at_the_same_place_only(case: Any) -> None:
    ends, top, exact = case
    pairs = np.array([3, -1, 5, 0, -1, 7, 8, 1, 2, 4], np.int32)
    ours, theirs = ([pair[side] for pair in ends] for side in (0, 1))
    lists = pa.array(top, pa.list_(pa.list_(pa.int32())))
    if not lists.flatten().flatten():
        return
    sampled = spelling(ours, exact)
    found = requested_ids(lists, sampled, spelling(theirs, [99] * len(exact)), one_each(sampled), pairs)
    mapping = {i: int(p) for i, p in enumerate(pairs)}
    assert [rows.tolist() for rows in found] == reference(top, ours, theirs, exact, mapping)


def test_on_real_tokenizers_shared_tokens_are_requested_where_words_start(smollm2: Any, gemma3: Any) -> None:
    texts = ["The sum of 12 and 130 is 142."]
    sampled = spell(smollm2.encoder, smollm2.vocabulary, texts)
    teacher = spell(gemma3.encoder, gemma3.vocabulary, texts)
    pairs = pair_ids(smollm2.vocabulary, gemma3.vocabulary)
    top = pa.array([[[i] for i in sampled.ids.tolist()]], pa.list_(pa.list_(pa.int32())))
    (requested,) = requested_ids(top, sampled, teacher, one_each(sampled), pairs)
    # With the sampled tokens themselves for candidates, the teacher's own are requested wherever the two share a token.
    assert (requested[:-1, 0] == teacher.ids).mean() > 0.8 and requested[-1, 0] == -1
