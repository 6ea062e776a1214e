"""Minimal aligned units: the one place that finds them (SimCT, arXiv 2605.07711, section 3).

A unit is an interval between consecutive elements of B_T and B_S's intersection, the byte offsets at which tokens of the
teacher and of the student end in the same response. One compiled walk over a whole shard.
"""

from dataclasses import dataclass

import numpy as np

ONE_TO_ONE, N_TO_M, STOP, MASKED, ROLE, CONTEXT = range(6)
KINDS = ("1:1", "n:m", "stop", "masked", "role", "context")
"""Names of the kind codes, by code."""
UNCOMPARED = (KINDS[MASKED], KINDS[CONTEXT])
"""Kinds without loss: what one side can't say, and what the student didn't write."""


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
    from pipeline.align.walks import close_units  # noqa: PLC0415

    # A unit holds a student token at least, but for the one masked tail or stop of a response.
    columns = np.empty((len(Units.__dataclass_fields__), len(student.ends) + len(limit)), np.int32)
    count = close_units(student.offsets, student.ends, teacher.offsets, teacher.ends, limit, stop, columns)
    row, kind, *rest = columns[:, :count]
    return Units(row, kind.astype(np.int8), *rest)
