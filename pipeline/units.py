"""Minimal aligned units: the one place that finds them (SimCT, arXiv 2605.07711, section 3).

A unit is an interval between consecutive elements of B_T and B_S's intersection, the byte offsets at which tokens of the
teacher and of the student end in the same response. Everything here works on a whole shard at once.
"""

from dataclasses import dataclass

import numpy as np

ONE_TO_ONE, N_TO_M, STOP, MASKED = 0, 1, 2, 3
KINDS = ("1:1", "n:m", "stop", "masked")
"""Names of the kind codes, by code."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of many responses, flat.

    Attributes:
        offsets: int64 (responses + 1,), where each response's tokens start.
        ends: int64 (tokens,), byte offset in its own response at which each token ends; never falls within a response.
    """

    offsets: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 (responses,): number of tokens of each response."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Units:
    """Aligned units of many responses, flat, ordered by response and position. All arrays are (units,)."""

    row: np.ndarray
    """int64: index of the response."""
    kind: np.ndarray
    """int8: ONE_TO_ONE | N_TO_M | STOP | MASKED."""
    s_start: np.ndarray
    s_len: np.ndarray
    t_start: np.ndarray
    t_len: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def flat(offsets: np.ndarray, ends: np.ndarray) -> Tokens:
    """Tokens from the running end of *all* bytes (as `TokenBytes.concatenate` gives it) and the responses' offsets."""
    before = np.concatenate([[0], ends])[offsets[:-1]]
    return Tokens(offsets, ends - np.repeat(before, np.diff(offsets)))


def align(student: Tokens, teacher: Tokens, limit: np.ndarray, stop: np.ndarray) -> Units:
    """Minimal aligned units of a shard.

    Args:
        student: the sampled tokens, the final stop token (if any) left out.
        teacher: the teacher's tokens of the same responses.
        limit: int64 (responses,), bytes up to which both sides spell the same text; what lies beyond is masked.
        stop: bool (responses,), whether the student sampled a stop token after `student`'s tokens.
    Returns:
        Units that cover every student token (the stop token too) exactly once. Tokens after the last common boundary
        within `limit` form one masked unit of their response; a stop after a masked unit is masked too, because the
        teacher never saw what came before it.
    """
    rows = len(limit)
    s_row = np.repeat(np.arange(rows), student.counts)
    t_row = np.repeat(np.arange(rows), teacher.counts)
    # Lay all responses on one line of bytes, one spare position each, so that offset 0 of one isn't the end of another.
    size = np.maximum(_last_end(student), _last_end(teacher)) + 1
    base = np.cumsum(size) - size
    s_key = base[s_row] + student.ends
    t_key = base[t_row] + teacher.ends
    on_s = np.zeros(int(size.sum()), bool)
    on_t = np.zeros_like(on_s)
    on_s[s_key] = True
    on_t[t_key] = True
    # A token without bytes (a sampled special token) ends where its predecessor does. It belongs to what follows: the
    # other side never read it, so it must not slip into a unit that is compared.
    s_cut = np.flatnonzero(on_t[s_key] & (student.ends <= limit[s_row]) & _first_at(s_key))
    t_cut = np.flatnonzero(on_s[t_key] & (teacher.ends <= limit[t_row]) & _first_at(t_key))
    row = s_row[s_cut]
    starts_row = np.diff(row, prepend=-1) != 0

    def spans(cut: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = cut + 1 - offsets[row]
        start = np.where(starts_row, 0, np.concatenate([[0], end[:-1]]))
        return start, end - start

    s_start, s_len = spans(s_cut, student.offsets)
    t_start, t_len = spans(t_cut, teacher.offsets)
    byte_end = student.ends[s_cut]
    byte_start = np.where(starts_row, 0, np.concatenate([[0], byte_end[:-1]]))
    kind = np.where((s_len == 1) & (t_len == 1), ONE_TO_ONE, N_TO_M).astype(np.int8)

    # One more unit a response for what is left: a masked tail, or the stop.
    s_done, t_done, bytes_done = (np.zeros(rows, np.int64) for _ in range(3))
    s_done[row] = s_start + s_len  # the last assignment of a row wins
    t_done[row] = t_start + t_len
    bytes_done[row] = byte_end
    s_left = student.counts - s_done
    t_left = teacher.counts - t_done
    broken = (s_left > 0) | (t_left > 0)
    tail = np.flatnonzero(broken | stop)
    tail_bytes = np.where(broken, np.maximum(_last_end(student), bytes_done), bytes_done)
    merged = Units(
        row=np.concatenate([row, tail]),
        kind=np.concatenate([kind, np.where(broken[tail], MASKED, STOP).astype(np.int8)]),
        s_start=np.concatenate([s_start, s_done[tail]]),
        s_len=np.concatenate([s_len, (s_left + stop)[tail]]),
        t_start=np.concatenate([t_start, t_done[tail]]),
        t_len=np.concatenate([t_len, t_left[tail]]),
        byte_start=np.concatenate([byte_start, bytes_done[tail]]),
        byte_end=np.concatenate([byte_end, tail_bytes[tail]]),
    )
    order = np.argsort(merged.row, kind="stable")
    return Units(**{name: getattr(merged, name)[order] for name in merged.__dataclass_fields__})


def _last_end(tokens: Tokens) -> np.ndarray:
    """int64 (responses,): byte offset at which each response's tokens end, 0 when it has none."""
    last = tokens.offsets[1:] - 1
    return np.where(tokens.counts > 0, np.concatenate([tokens.ends, [0]])[last], 0)


def _first_at(keys: np.ndarray) -> np.ndarray:
    """bool: whether a key is the first of its run of equal keys."""
    return np.diff(keys, prepend=-1) != 0
