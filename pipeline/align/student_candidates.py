"""The student's own candidates, in teacher ids at teacher tokens, so that they can be requested of the teacher."""

import numpy as np
import pyarrow as pa

from pipeline.align.tokens import Spelling


def requested_ids(top_id: pa.ListArray, sampled: Spelling, teacher: Spelling, pairs: np.ndarray) -> list[np.ndarray]:
    """Which teacher ids to keep at each teacher token, because the student found them likely at the same place.

    Two tokens are at the same place when they start at the same byte and everything before it is spelled alike; at other
    teacher tokens the student has no distribution of its own, and nothing is requested.

    Args:
        top_id: schema `rollouts`: for each response, for each sampled token (a final stop too) its k likeliest ids.
        sampled: the sampled tokens without the final stop.
        teacher: the teacher's tokens of the same responses.
        pairs: int32 (student vocab,), student id -> teacher id, -1 where there is none.
    Returns:
        For each response int64 (teacher tokens + 1, k); -1 requests nothing.
    """
    counts = np.diff(teacher.offsets)
    owners, starts = _starts(teacher)
    s_owners, s_starts = _starts(sampled)
    recorded = top_id.value_lengths().to_numpy()  # no distribution after the last token of a truncated response
    s_position = np.arange(len(s_owners)) - np.searchsorted(s_owners, s_owners)
    limit = np.minimum(sampled.exact, teacher.exact)
    usable = (s_position < recorded[s_owners]) & (s_starts <= limit[s_owners])
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
    requested[at[of_teacher]] = rows[first[s_owners[source]] + s_position[source]]
    return np.split(requested, np.cumsum(counts + 1)[:-1])


def _starts(spelling: Spelling) -> tuple[np.ndarray, np.ndarray]:
    """int64 response and start byte of every token, and of the end of every response."""
    counts = np.diff(spelling.offsets)
    owners = np.repeat(np.arange(len(counts)), counts + 1)
    first = np.cumsum(counts + 1) - counts - 1
    starts = np.zeros(len(owners), np.int64)
    starts[np.delete(np.arange(len(owners)), first)] = spelling.ends
    return owners, starts
