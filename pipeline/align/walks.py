"""Walks over all tokens of a shard, compiled.

Imported where they are called: numba takes half a second to import, and most stages only read tables.
"""

import numba
import numpy as np

from pipeline.align.units import MASKED, N_TO_M, ONE_TO_ONE, STOP


@numba.njit(cache=True, nogil=True)
def byte_ends(
    ids: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    data: np.ndarray,
    text: np.ndarray,
    text_starts: np.ndarray,
    skip: np.ndarray,
    ends: np.ndarray,
    exact: np.ndarray,
) -> None:
    """`TokenBytes.ends`: byte by byte until the first difference."""
    vocabulary = len(starts) - 1
    for row in range(len(exact)):
        begin, size = text_starts[row], text_starts[row + 1] - text_starts[row]
        at, agreed, same = -skip[row], 0, True
        for position in range(offsets[row], offsets[row + 1]):
            token = ids[position]
            if 0 <= token < vocabulary:
                first, length = starts[token], starts[token + 1] - starts[token]
                k = max(0, -at)
                while same and k < length:
                    same = at + k < size and data[first + k] == text[begin + at + k]
                    agreed = at + k + same
                    k += 1
                at += length
            ends[position] = max(at, 0)
        exact[row] = agreed


@numba.njit(cache=True, nogil=True)
def close_units(
    s_offsets: np.ndarray,
    s_ends: np.ndarray,
    t_offsets: np.ndarray,
    t_ends: np.ndarray,
    limit: np.ndarray,
    stop: np.ndarray,
    out: np.ndarray,
) -> int:
    """`align`: advance the side whose token ends first; equal ends close a unit.

    Writes columns of `Units`, returns how many.
    """
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
