"""Minimal aligned units: the one place that finds them (SimCT, arXiv 2605.07711, section 3).

A unit is an interval between consecutive elements of B_T and B_S's intersection, the byte offsets at which tokens of the
teacher and of the student end in the same response. One compiled walk over a whole shard.
"""

from dataclasses import dataclass

import numba
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
    """int32, as are all but `kind`: index of the response."""
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
    # A unit holds a student token at least, but for the one masked tail or stop of a response.
    columns = np.empty((len(Units.__dataclass_fields__), len(student.ends) + len(limit)), np.int32)
    count = _walk(student.offsets, student.ends, teacher.offsets, teacher.ends, limit, stop, columns)
    row, kind, *rest = columns[:, :count]
    return Units(row, kind.astype(np.int8), *rest)


@numba.njit(cache=True, nogil=True)
def _walk(
    s_offsets: np.ndarray,
    s_ends: np.ndarray,
    t_offsets: np.ndarray,
    t_ends: np.ndarray,
    limit: np.ndarray,
    stop: np.ndarray,
    out: np.ndarray,
) -> int:
    """Advance the side whose token ends first; equal ends close a unit. Writes columns of `Units`, returns how many."""
    count = 0
    for row in range(len(limit)):
        s_first, t_first, s_last, t_last = s_offsets[row], t_offsets[row], s_offsets[row + 1], t_offsets[row + 1]
        s, t, s_open, t_open, done = s_first, t_first, s_first, t_first, 0
        while s < s_last and t < t_last and s_ends[s] <= limit[row] and t_ends[t] <= limit[row]:
            # A token without bytes (a sampled special token, a dummy space in front) closes nothing: it belongs to what
            # follows, so it can't slip into a unit that is compared and that the other side never read.
            if s_ends[s] == t_ends[t] and s_ends[s] > done:
                one = s == s_open and t == t_open
                out[0, count], out[1, count] = row, ONE_TO_ONE if one else N_TO_M
                out[2, count], out[3, count] = s_open - s_first, s + 1 - s_open
                out[4, count], out[5, count] = t_open - t_first, t + 1 - t_open
                out[6, count], out[7, count] = done, s_ends[s]
                count += 1
                done = s_ends[s]
                s, t = s + 1, t + 1
                s_open, t_open = s, t
            elif s_ends[s] <= t_ends[t]:
                s += 1
            else:
                t += 1
        broken = s_open < s_last or t_open < t_last
        if broken or stop[row]:
            end = max(done, s_ends[s_last - 1]) if broken and s_last > s_first else done
            out[0, count], out[1, count] = row, MASKED if broken else STOP
            out[2, count], out[3, count] = s_open - s_first, s_last - s_open + stop[row]
            out[4, count], out[5, count] = t_open - t_first, t_last - t_open
            out[6, count], out[7, count] = done, end
            count += 1
    return count
