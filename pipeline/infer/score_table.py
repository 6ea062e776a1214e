"""Scores as rows of a table, rounded to what is stored."""

import numpy as np
import pyarrow as pa

from pipeline.align.segments import Segments, list_offsets
from pipeline.align.tokens import Spelling
from pipeline.infer.score import Scores
from pipeline.store.rounding import STATISTIC_BITS, candidates, rounded
from schemas.tables import arrow_schema


def score_table(
    names: pa.ChunkedArray, spelling: Spelling, segments: Segments, scored: Scores, log_z: bool
) -> pa.Table:
    """Rows of schema `scores`: each response's tokens, then its end row. Ends past the exact spelling become -1.

    Args:
        names: of the responses.
        spelling: as the teacher reads them, by segment.
    """
    of_segment = np.repeat(np.arange(len(segments)), np.diff(spelling.offsets))
    ends = np.where(spelling.ends <= spelling.exact[of_segment], spelling.ends + segments.byte_start[of_segment], -1)
    offsets = spelling.offsets[segments.offsets]
    counts = np.diff(offsets)
    rows = len(ends) + len(counts)
    row_first = offsets[:-1] + np.arange(len(counts))
    is_end = np.zeros(rows, bool)
    is_end[row_first + counts] = True
    owner = np.repeat(np.arange(len(counts)), counts + 1)
    token_id, byte_end = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    token_id[~is_end], byte_end[~is_end] = spelling.ids, ends
    byte_start = np.zeros(rows, np.int32)
    inner = np.flatnonzero(np.arange(rows) != row_first[owner])
    byte_start[inner] = byte_end[inner - 1]
    # A segment starts where the last one ends, however that was spelled.
    opens = np.append(True, of_segment[1:] != of_segment[:-1]) if len(of_segment) else np.zeros(0, bool)
    byte_start[np.flatnonzero(~is_end)[opens]] = segments.byte_start[of_segment[opens]]
    byte_end[is_end] = byte_start[is_end]
    byte_start[byte_end < 0] = -1
    segment = np.zeros(rows, np.int32)
    segment[~is_end] = of_segment - segments.offsets[segments.row[of_segment]]
    single = np.repeat(np.diff(segments.offsets) == 1, counts + 1)
    lists = list_offsets(scored.cand_count)
    cand_id, cand_logp = candidates(scored.cand_id, scored.cand_logp, scored.cand_count)
    schema = arrow_schema("scores")
    columns = {
        "rollout_id": names.combine_chunks().take(pa.array(owner)),
        "pos": pa.array(np.arange(rows) - row_first[owner], pa.int32()),
        "byte_start": byte_start,
        "byte_end": byte_end,
        "token_id": token_id,
        "segment": pa.array(segment, mask=single | is_end),
        "logp": scored.logp,
        **{name: rounded(getattr(scored, name), STATISTIC_BITS) for name in ("entropy", "stop_logp", "tail_logp")},
        "log_z": pa.array(scored.log_z) if log_z else pa.nulls(rows, pa.float32()),
        "cand_id": pa.ListArray.from_arrays(lists, pa.array(cand_id), type=schema.field("cand_id").type),
        "cand_logp": pa.ListArray.from_arrays(lists, pa.array(cand_logp), type=schema.field("cand_logp").type),
    }
    return pa.table(columns, schema=schema)
