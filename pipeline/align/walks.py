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
    broken_offsets: np.ndarray,
    broken_at: np.ndarray,
    broken_raw: np.ndarray,
    ends: np.ndarray,
    exact: np.ndarray,
) -> None:
    """`TokenBytes.ends`: byte by byte until the first difference, past broken characters by their number of raw bytes."""
    vocabulary = len(starts) - 1
    for row in range(len(exact)):
        begin, size = text_starts[row], text_starts[row + 1] - text_starts[row]
        at, agreed, same = -skip[row], 0, True
        hole, passed = broken_offsets[row], 0
        for position in range(offsets[row], offsets[row + 1]):
            token = ids[position]
            if 0 <= token < vocabulary:
                first, length = starts[token], starts[token + 1] - starts[token]
                if hole == broken_offsets[row + 1]:  # none is left: the inner loop of nearly all texts
                    k = max(0, -at)
                    while same and k < length:
                        same = at + k < size and data[first + k] == text[begin + at + k]
                        agreed = at + k + same
                        k += 1
                    at += length
                    length = 0
                for k in range(length):
                    if same and at >= 0:
                        if hole < broken_offsets[row + 1] and at == broken_at[hole]:
                            passed += 1
                            if passed < broken_raw[hole]:
                                continue  # within a broken character, which is three bytes of the text
                            at, hole, passed = at + 2, hole + 1, 0
                        else:
                            same = at < size and data[first + k] == text[begin + at]
                        agreed = at + same
                    at += 1
            # Within a broken character no other side ends.
            ends[position] = max(at, 0) + (passed > 0)
        exact[row] = agreed


@numba.njit(cache=True, nogil=True)
def find_spellings(
    ids: np.ndarray,
    offsets: np.ndarray,
    has_bytes: np.ndarray,
    head: np.ndarray,
    chain: np.ndarray,
    flat: np.ndarray,
    at: np.ndarray,
    out: np.ndarray,
) -> int:
    """`roles.find_roles`: spellings by the id that they begin with, `head`, and then by `chain`, the longest first.

    Writes start, number of tokens and index of the spelling (-1: an id that is neither text nor a role), returns how many.
    """
    count = 0
    for row in range(len(offsets) - 1):
        position = offsets[row]
        while position < offsets[row + 1]:
            token = ids[position]
            inside = 0 <= token < len(has_bytes)
            spelling = head[token] if inside else -1
            size = 0
            while spelling >= 0:
                size = at[spelling + 1] - at[spelling]
                same = position + size <= offsets[row + 1]
                k = 0
                while same and k < size:
                    same = ids[position + k] == flat[at[spelling] + k]
                    k += 1
                if same:
                    break
                spelling = chain[spelling]
            if spelling >= 0 or not inside or not has_bytes[token]:
                if spelling < 0:
                    size = 1
                out[0, count], out[1, count], out[2, count] = position, size, spelling
                count += 1
                position += size
            else:
                position += 1
    return count


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
