"""A response in segments: text, and between it what a text can't say, such as a token that ends thinking.

Each segment is aligned for itself, so that what one side can't say or spells otherwise costs that segment and not what follows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.align.roles import Roles, find_roles, say
from pipeline.align.tokens import Spelling, TokenBytes, flat_bytes, spell
from schemas.errors import OpdError

REPLACEMENT = "\ufffd"
"""Stands in `response` for bytes that are no UTF-8, whose places the rollout lists in `broken`."""
STAND_IN = len(REPLACEMENT.encode())
"""Its bytes."""


@dataclass(frozen=True)
class Segments:
    """Segments of many responses, flat; each response has at least one. The final stop is in none.

    Attributes:
        offsets: int64 (responses + 1,), where each response's segments start.
        role: string (segments,), null for text.
        tokens: int64 (segments,), student tokens.
        size: int64 (segments,), bytes of `response`.
        text: bool (segments,), whether it is read as the text that it is where a role has no counterpart.
        loss: bool (segments,), whether the student wrote it, rather than only read it.
    """

    offsets: np.ndarray
    role: pa.Array
    tokens: np.ndarray
    size: np.ndarray
    text: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_role(self) -> np.ndarray:
        """bool (segments,)"""
        return self.role.is_valid().to_numpy(zero_copy_only=False)

    @cached_property
    def row(self) -> np.ndarray:
        """int64 (segments,), the response of each."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @cached_property
    def byte_start(self) -> np.ndarray:
        """int64 (segments,), where each starts in its response."""
        return self.starts_of(self.size)

    def starts_of(self, counts: np.ndarray) -> np.ndarray:
        """int64 (segments,): of something that each segment has `counts` of, how many are before it in its response."""
        before = np.concatenate([[0], np.cumsum(counts)])
        return before[:-1] - before[self.offsets[self.row]]

    @property
    def last(self) -> np.ndarray:
        """int64 (responses,), the last segment of each."""
        return self.offsets[1:] - 1

    def texts(self, responses: pa.Array) -> pa.Array:
        """large_binary (segments,): the bytes of each, of `response`."""
        data, starts = flat_bytes(responses)
        begin = starts[self.row] + self.byte_start
        # Segments partition the responses, so that their borders are offsets into the same bytes.
        offsets = np.append(begin, starts[-1]).astype(np.int64)
        return pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(self), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
        )


def segments_of(rollouts: pa.Table, tokens: np.ndarray) -> Segments:
    """The segments of rollouts (schema of that name), one of text where they list none.

    Args:
        tokens: int64 (responses,), response tokens of each without a final stop.
    """
    size = pc.binary_length(rollouts["response"].combine_chunks()).to_numpy().astype(np.int64)
    listed = rollouts["segments"].combine_chunks()
    known = listed.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        count = len(rollouts)
        every = np.ones(count, bool)
        return Segments(np.arange(count + 1), pa.nulls(count, pa.string()), tokens, size, every, every)
    counts = np.where(known, pc.fill_null(pc.list_value_length(listed), 0).to_numpy(), 1)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    inner = listed.flatten()
    given = np.repeat(known, counts)
    columns = {}
    every = np.ones(len(rollouts), bool)
    for name, whole in (("tokens", tokens), ("bytes", size), ("text", every), ("loss", every)):
        values = np.empty(offsets[-1], whole.dtype)
        values[given] = inner.field(name).to_numpy(zero_copy_only=False)
        values[~given] = whole[~known]
        columns[name] = values
    at = np.where(given, np.cumsum(given) - 1, 0)
    role = inner.field("role").take(pa.array(at, mask=~given))
    return Segments(offsets, role, columns["tokens"], columns["bytes"], columns["text"], columns["loss"])


def broken_of(rollouts: pa.Table, segments: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Broken characters: int64 (broken,) the segment and the byte in it of each stand-in, and how many raw bytes it is for."""
    listed = rollouts["broken"].combine_chunks()
    inner, counts = listed.flatten(), pc.fill_null(pc.list_value_length(listed), 0).to_numpy()
    row = np.repeat(np.arange(len(rollouts)), counts)
    byte, raw = (inner.field(name).to_numpy().astype(np.int64) for name in ("byte", "raw"))
    # One number per place: segments of a response lie one after the other, and none is longer than `width`.
    width = 1 + max(int((segments.byte_start + segments.size).max(initial=0)), int(byte.max(initial=0)))
    begins = segments.row * width + segments.byte_start
    # The last of the segments that begin there or before: of several at one byte the others are empty.
    segment = np.searchsorted(begins, row * width + byte, "right") - 1
    return segment, byte - segments.byte_start[segment], raw


def sampled_tokens(
    rollouts: pa.Table, student: TokenBytes, student_stop: np.ndarray
) -> tuple[Spelling, Segments, np.ndarray]:
    """The sampled tokens without the final stop, by segment.

    Returns:
        Their spelling, a text of it being a segment; the segments; bool (responses,), whether a stop was sampled at the end.
    Raises:
        OpdError: a response that was stopped doesn't end with a stop token, or its segments aren't those of its tokens.
    """
    response_ids = rollouts["response_ids"].combine_chunks()
    ids, offsets = response_ids.flatten().to_numpy(), offsets_of(response_ids)
    stopped = pc.equal(rollouts["finish_reason"], "stop").to_numpy()
    last = offsets[1:] - 1
    wrong = stopped & ~np.isin(np.append(ids, -1)[last], student_stop)
    if wrong.any():
        name = rollouts["rollout_id"][int(np.argmax(wrong))].as_py()
        raise OpdError(
            f"rollout {name}: finish_reason is stop, but its last token is not in the stop set of {student.name}"
        )
    keep = np.ones(len(ids), bool)
    keep[last[stopped]] = False
    counts = np.diff(offsets) - stopped
    segments = segments_of(rollouts, counts)
    if len(rollouts):
        size = pc.binary_length(rollouts["response"].combine_chunks()).to_numpy()
        wrong = np.add.reduceat(segments.tokens, segments.offsets[:-1]) != counts
        wrong |= np.add.reduceat(segments.size, segments.offsets[:-1]) != size
    if wrong.any():
        name = rollouts["rollout_id"][int(np.argmax(wrong))].as_py()
        raise OpdError(
            f"rollout {name}: its `segments` don't add up to its response_ids and response; make the shard again"
        )
    return spelled(ids[keep], segments, rollouts, student), segments, stopped


def spelled(ids: np.ndarray, segments: Segments, rollouts: pa.Table, tokens: TokenBytes) -> Spelling:
    """The student's ids by segment, and where each ends in it: the tokens of a role all at its start but for the last."""
    offsets = np.concatenate([[0], np.cumsum(segments.tokens)])
    texts = segments.texts(rollouts["response"].combine_chunks())
    broken, at, raw = broken_of(rollouts, segments)
    ends, exact = tokens.ends(
        ids, offsets, texts, broken=(np.searchsorted(broken, np.arange(len(segments) + 1)), at, raw)
    )
    return as_roles(Spelling(ids, offsets, ends, exact), segments)


def as_roles(spelling: Spelling, segments: Segments) -> Spelling:
    """The same, but tokens of role segments end at the segment's start, and the last one at its end."""
    in_role = np.repeat(segments.is_role, np.diff(spelling.offsets))
    ends = np.where(in_role, 0, spelling.ends)
    lasts = spelling.offsets[1:][segments.is_role & (np.diff(spelling.offsets) > 0)] - 1
    ends[lasts] = np.repeat(segments.size, np.diff(spelling.offsets))[lasts]
    return Spelling(spelling.ids, spelling.offsets, ends, np.where(segments.is_role, segments.size, spelling.exact))


def read_by(tokenizer: Any, tokens: TokenBytes, roles: Roles, rollouts: pa.Table, segments: Segments) -> Spelling:
    """How another model reads responses: its own spelling of each segment.

    Args:
        tokenizer: its own, for texts (`text_tokenizer`).
        tokens, roles: its own.
    Returns:
        A text of it is a segment; a role that it can't say has no tokens.
    """
    texts = segments.texts(rollouts["response"].combine_chunks())
    if not segments.is_role.any():
        return spell(tokenizer, tokens, texts.cast(pa.large_string()).to_pylist())
    said: list[np.ndarray | None] = []
    names = segments.role.to_pylist()
    for a, b in pairwise(segments.offsets):
        said += say(names[a:b], roles)
    has_said = np.array([ids is not None for ids in said])
    as_text = ~segments.is_role | segments.text & ~has_said
    of_text = spell(tokenizer, tokens, texts.filter(pa.array(as_text)).cast(pa.large_string()).to_pylist())
    counts = np.array([0 if ids is None else len(ids) for ids in said], np.int64)
    counts[as_text] = np.diff(of_text.offsets)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    from_text = np.repeat(as_text, counts)
    ids, ends = np.empty(offsets[-1], np.int32), np.zeros(offsets[-1], np.int64)
    exact = segments.size.copy()
    ids[from_text], ends[from_text], exact[as_text] = of_text.ids, of_text.ends, of_text.exact
    spoken = [ids for ids in said if ids is not None]
    ids[~from_text] = np.concatenate([np.zeros(0, np.int32), *spoken])
    lasts = offsets[1:][~as_text & (counts > 0)] - 1
    ends[lasts] = segments.size[~as_text & (counts > 0)]
    return Spelling(ids, offsets, ends, exact)


def told(
    ids: np.ndarray, offsets: np.ndarray, tokens: TokenBytes, roles: Roles, loss: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """What ids say, a response at a time: columns `response`, `segments` and `broken` of schema `rollouts`.

    Args:
        ids: int32 (tokens,) of all responses one after another, final stops left out.
        offsets: int64 (responses + 1,), where each response's ids start.
        loss: bool (tokens,), which of them the student wrote; all by default.
    """
    found = find_roles(ids, offsets, tokens.has_bytes, roles)
    borders = [offsets, found.start, found.start + found.size]
    if loss is not None:
        changes = np.flatnonzero(np.diff(loss)) + 1
        at = np.searchsorted(found.start, changes, "right") - 1
        ends = np.append(found.start + found.size, 0)[at]
        borders.append(changes[(at < 0) | (changes >= ends)])  # a role is all the student's, or not at all
    starts = np.unique(np.concatenate(borders))
    role: dict[int, str] = dict(zip(found.start.tolist(), found.role, strict=True))
    data, ends = tokens.concatenate(ids)
    byte_at = np.concatenate([[0], ends])
    first = np.searchsorted(starts, offsets)
    for row, b in enumerate(offsets[1:].tolist()):
        own = starts[first[row] : first[row + 1]].tolist()
        parts, segments, broken, size = [], [], [], 0
        for start, stop in pairwise([*own, b]):
            name = role.get(start)
            if name is not None:
                text = _named(ids[start:stop], tokens, roles)
                holes: list[tuple[int, int]] = []
            else:
                text, holes = readable(data[byte_at[start] : byte_at[stop]].tobytes())
            length = len(text.encode())
            written = loss is None or bool(loss[start:stop].all())
            broken += [{"byte": size + at, "raw": raw} for at, raw in holes]
            is_text = name is None or bool(_has_bytes(tokens, ids[start:stop]).all())
            segments.append({"role": name, "tokens": stop - start, "bytes": length, "text": is_text, "loss": written})
            parts.append(text)
            size += length
        if segments and segments[-1]["role"] is not None:
            segments.append({"role": None, "tokens": 0, "bytes": 0, "text": True, "loss": True})  # for the stop
        plain = len(segments) <= 1 and all(each["role"] is None and each["loss"] for each in segments)
        yield {"response": "".join(parts), "segments": None if plain else segments, "broken": broken or None}


def _has_bytes(tokens: TokenBytes, ids: np.ndarray) -> np.ndarray:
    """bool: ids that contribute bytes; none of those outside the vocabulary do."""
    return np.append(tokens.has_bytes, False)[np.where((ids >= 0) & (ids < len(tokens)), ids, len(tokens))]


def _named(ids: np.ndarray, tokens: TokenBytes, roles: Roles) -> str:
    """How people read role tokens: text as it is, special tokens by their content."""
    raw = b"".join(
        tokens.bytes[int(i)].as_py() if is_text else roles.names.get(int(i), f"<token {int(i)}>").encode()
        for i, is_text in zip(ids, _has_bytes(tokens, ids), strict=True)
    )
    return raw.decode(errors="replace")  # of a role that is cut text there is nothing to align by bytes


def readable(raw: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Bytes as text, without what is no UTF-8 at their end; elsewhere U+FFFD stands for each broken character.

    Returns:
        The text; of each stand-in its byte offset in the text, and how many raw bytes it stands for.
    """
    text, size = "", 0
    broken: list[tuple[int, int]] = []
    while raw:
        try:
            return text + raw.decode(), broken
        except UnicodeDecodeError as error:
            text += raw[: error.start].decode()
            size += error.start
            raw, length = raw[error.end :], error.end - error.start
            broken.append((size, length))
            text += REPLACEMENT
            size += STAND_IN
    while broken and text.endswith(REPLACEMENT) and broken[-1][0] == len(text.encode()) - STAND_IN:
        text = text[:-1]
        broken.pop()
    return text, broken


LARGEST_OFFSET = np.iinfo(np.int32).max


def list_offsets(counts: np.ndarray) -> pa.Array:
    """int32 (rows + 1,) offsets of lists of so many values, as Arrow's lists have them.

    Raises OpdError where a row group has more values than that counts: within its budget of tokens only lists of tens of
    thousands of candidates come to that.
    """
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if offsets[-1] > LARGEST_OFFSET:
        raise OpdError(
            f"a row group has {offsets[-1]:,} values in one column of lists, {int(np.max(counts)):,} in the longest of its "
            f"{len(counts):,}; at most {LARGEST_OFFSET:,} can be addressed: keep fewer candidates of each token "
            "(`scores.k_max`, `scores.min_p`, `rollouts.top_k`)"
        )
    return pa.array(offsets, pa.int32())


def offsets_of(lists: pa.ListArray) -> np.ndarray:
    """int64 (rows + 1,) offsets into `lists.flatten()`; null rows are empty."""
    return np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])
