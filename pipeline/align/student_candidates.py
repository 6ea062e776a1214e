"""The student's own candidates, in teacher ids at teacher tokens, so that they can be requested of the teacher."""

import numpy as np
import pyarrow as pa

from pipeline.align.segments import Segments
from pipeline.align.tokens import Spelling


def requested_ids(
    top_id: pa.ListArray, sampled: Spelling, teacher: Spelling, segments: Segments, pairs: np.ndarray
) -> list[np.ndarray]:
    """Which teacher ids to keep at each teacher token, because the student found them likely at the same place.

    Two tokens are at the same place when they start at the same byte of a segment and everything before it there is spelled
    alike; at other teacher tokens the student has no distribution of its own, and nothing is requested.

    Args:
        top_id: schema `rollouts`: for each response, for each sampled token (a final stop too) its k likeliest ids.
        sampled, teacher: the sampled tokens without the final stop, and the teacher's, by segment.
        pairs: int32 (student vocab,), student id -> teacher id, -1 where there is none.
    Returns:
        For each response int64 (teacher tokens + 1, k); -1 requests nothing.
    """
    counts = np.diff(teacher.offsets[segments.offsets])
    owners, starts = _starts(teacher, segments)
    s_owners, s_starts = _starts(sampled, segments)
    recorded = top_id.value_lengths().to_numpy()  # no distribution after the last token of a truncated response
    s_row = segments.row[s_owners]
    s_position = np.arange(len(s_owners)) - np.searchsorted(s_row, s_row)
    limit = np.minimum(sampled.exact, teacher.exact)
    usable = (s_position < recorded[s_row]) & (s_starts <= limit[s_owners])
    ids = top_id.flatten().flatten().to_numpy()
    k = len(ids) // max(1, int(recorded.sum()))
    first = np.concatenate([[0], np.cumsum(recorded)])
    rows = pairs[ids].astype(np.int64).reshape(-1, k)
    # One number per place; where tokens without bytes share one, the first of them opens the unit.
    width = 1 + max(int(starts.max(initial=0)), int(s_starts.max(initial=0)))
    places, at = np.unique(owners * width + starts, return_index=True)
    s_places, s_at = np.unique((s_owners * width + s_starts)[usable], return_index=True)
    _, of_teacher, of_student = np.intersect1d(places, s_places, assume_unique=True, return_indices=True)
    source = np.flatnonzero(usable)[s_at[of_student]]
    requested = np.full((len(starts), k), -1, np.int64)
    requested[at[of_teacher]] = rows[first[s_row[source]] + s_position[source]]
    return np.split(requested, np.cumsum(counts + 1)[:-1])


def _starts(spelling: Spelling, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """int64 segment and start byte in it of every token, and of the end of every response."""
    counts = np.diff(spelling.offsets)
    owners = np.repeat(np.arange(len(segments)), counts)
    starts = np.concatenate([[0], spelling.ends[:-1]])[: len(owners)]
    starts[spelling.offsets[:-1][counts > 0]] = 0
    last = segments.last
    at_end = np.where(counts[last] > 0, np.append(spelling.ends, 0)[spelling.offsets[last + 1] - 1], 0)
    ends = spelling.offsets[segments.offsets[1:]]
    return np.insert(owners, ends, last), np.insert(starts, ends, at_end)
