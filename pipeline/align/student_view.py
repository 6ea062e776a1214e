"""The student's view of the teacher's scores: aligned units with candidates in student ids. No model needed."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.align.segments import STAND_IN, Segments, broken_of, list_offsets, offsets_of, sampled_tokens
from pipeline.align.tokens import Spelling, TokenBytes
from pipeline.align.units import CONTEXT, KINDS, MASKED, ROLE, STOP, Tokens, Units, align
from schemas.errors import OpdError
from schemas.tables import STOP_ID, arrow_schema

LOG_FLOOR = -30.0
"""nats; stands for the log of no mass at all where a finite number is needed."""


def student_view(
    rollouts: pa.Table,
    scores: pa.Table,
    student: TokenBytes,
    student_stop: np.ndarray,
    teacher_stop: np.ndarray,
    pairs: np.ndarray,
    same: bool = False,
) -> pa.Table:
    """Units of the rollouts, with the teacher's candidates mapped to student ids.

    Args:
        rollouts, scores: rows of the same responses in the same order (schemas of those names).
        student: bytes of the student's tokens.
        student_stop, teacher_stop: ids of the two stop sets.
        pairs: teacher id -> student id (`support.pair_ids`).
        same: whether the teacher read these very ids: then each token is a unit, whatever its bytes.
    Returns:
        A table of schema `units`. Where the student wrote what stops the teacher (a newline, say), the teacher's log-prob
        of it is at most the mass that neither candidates nor stopping hold, since the teacher would have ended there;
        what the student wrote after it is masked.
    Raises:
        OpdError: the two tables hold other responses.

    A student with the tokens a = 1, bc = 2, b = 3 and the stop 0 wrote abc and stopped; the teacher has a, b and c, and gave
    them .5, .5 and .75, and ending .75. The borders that both have make three units. Where bc begins the teacher's candidates
    were b with .5 and c with .25: no token of the student is c, so that this much mass is dropped. Stopping (-1) is a
    candidate everywhere.

    >>> units = student_view(rollouts, scores, student, student_stop, teacher_stop, pairs)
    >>> for unit in units.to_pylist():
    ...     print(unit["kind"], unit["s_len"], unit["t_len"], np.exp(unit["teacher_logp"]).round(3), unit["cand_id"],
    ...           np.exp(unit["cand_logp"]).round(3), np.exp(unit["dropped_logp"]).round(3))
    1:1 1 1 0.5 [1, 3, -1] [0.5   0.25  0.125] 0.0
    n:m 1 2 0.375 [3, -1] [0.5   0.125] 0.25
    stop 1 0 0.75 [1, -1] [0.125 0.75 ] 0.0
    """
    sampled, segments, stopped = sampled_tokens(rollouts, student, student_stop)
    teacher, t_row_start = _teacher_tokens(rollouts, scores, segments)
    units = _units(sampled, teacher, segments, stopped, same)
    row, segment = segments.row[units.row], units.row
    s_start = units.s_start + segments.starts_of(np.diff(sampled.offsets))[segment]
    t_start = units.t_start + segments.starts_of(np.diff(teacher.offsets))[segment]
    byte_start, byte_end = (at + segments.byte_start[segment] for at in (units.byte_start, units.byte_end))
    kind = units.kind.copy()
    if not same:
        kind[_holds_broken(rollouts, segments, units)] = MASKED

    at = t_row_start[row] + t_start  # row of `scores` at each unit's start
    logp = scores["logp"].to_numpy().astype(np.float64)
    token_id = scores["token_id"].to_numpy()
    halts = np.isin(token_id, teacher_stop)
    # A role may end a turn that another follows, and what was only read ends nothing.
    halts[token_id >= 0] &= np.repeat(~segments.is_role & segments.loss, np.diff(teacher.offsets))
    logp[halts] = np.clip(scores["tail_logp"].to_numpy()[halts], LOG_FLOOR, logp[halts])
    halted_before: np.ndarray = np.cumsum(halts) - halts
    kind[halted_before[at] > halted_before[t_row_start[row]]] = MASKED

    # A role that is one of the student's stop tokens stops, although another turn follows.
    is_stop = np.isin(np.append(sampled.ids, -1), student_stop)
    first = np.minimum(sampled.offsets[segment] + units.s_start, len(sampled.ids))
    ends_turn = segments.is_role[segment] & (units.s_len == 1) & is_stop[first]
    kind = np.where(segments.is_role[segment] & (kind != MASKED), np.where(ends_turn, STOP, ROLE), kind)
    kind = np.where(segments.loss[segment], kind, CONTEXT).astype(np.int8)

    masked = np.isin(kind, (MASKED, CONTEXT))
    t_rows = np.where(masked, 0, np.where((kind == STOP) & ~ends_turn, 1, units.t_len))

    def sums(values: np.ndarray) -> np.ndarray:
        """Over each unit's teacher tokens."""
        total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return total[at + t_rows] - total[at]

    teacher_logp = np.where(ends_turn, scores["stop_logp"].to_numpy()[at], sums(logp))
    log_z = scores["log_z"].to_numpy()  # NaN where it is null
    t_log_z = sums(log_z) / np.maximum(t_rows, 1) - log_z[at]
    cand_id, cand_logp, dropped_logp = _candidates(scores, at, masked, pairs, student_stop)
    counts = np.bincount(row, minlength=len(rollouts))
    columns = {
        "rollout_id": rollouts["rollout_id"].combine_chunks().take(pa.array(row)),
        "unit": pa.array(np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts), pa.int32()),
        "kind": pa.array(KINDS).take(pa.array(kind)),
        "s_start": pa.array(s_start, pa.int32()),
        "s_len": pa.array(units.s_len, pa.int32()),
        "t_start": pa.array(t_start, pa.int32()),
        "t_len": pa.array(units.t_len, pa.int32()),
        "byte_start": pa.array(byte_start, pa.int32()),
        "byte_end": pa.array(byte_end, pa.int32()),
        "teacher_logp": pa.array(teacher_logp, pa.float32(), mask=masked),
        "teacher_entropy": pa.array(scores["entropy"].to_numpy()[at], pa.float32(), mask=masked),
        "t_log_z": pa.array(t_log_z, pa.float32(), mask=masked | np.isnan(t_log_z)),
        "cand_id": cand_id,
        "cand_logp": cand_logp,
        "tail_logp": pa.array(scores["tail_logp"].to_numpy()[at], pa.float32(), mask=masked),
        "dropped_logp": pa.array(dropped_logp, pa.float32(), mask=masked),
    }
    return pa.table(columns, schema=arrow_schema("units"))


def _units(sampled: Spelling, teacher: Spelling, segments: Segments, stopped: np.ndarray, same: bool) -> Units:
    """Units within segments: `row` is the segment, and starts count from its own."""
    stops = np.zeros(len(segments), bool)
    stops[segments.last[stopped]] = True
    if not same:
        limit = np.minimum(sampled.exact, teacher.exact)
        # Past `limit` any end will do, as long as ends never fall.
        ends = np.minimum(teacher.ends, np.repeat(limit + 1, np.diff(teacher.offsets)))
        return align(Tokens(sampled.offsets, sampled.ends), Tokens(teacher.offsets, ends), limit, stops)
    if not np.array_equal(sampled.ids, teacher.ids):
        raise OpdError("scores hold other tokens than the rollouts, which their teacher reads as they are")
    counts = np.diff(sampled.offsets)
    nth = np.arange(1, len(sampled.ids) + 1) - np.repeat(sampled.offsets[:-1], counts)
    tokens = Tokens(sampled.offsets, nth)
    units = align(tokens, tokens, counts, stops)
    # Bytes are where the tokens end in the text.
    ends = np.append(np.minimum(sampled.ends, np.repeat(segments.size, counts)), 0)
    byte_start, byte_end = (
        np.where(tokens_before > 0, ends[sampled.offsets[units.row] + tokens_before - 1], 0)
        for tokens_before in (units.byte_start, units.byte_end)
    )
    return replace(units, byte_start=byte_start, byte_end=byte_end)


def _holds_broken(rollouts: pa.Table, segments: Segments, units: Units) -> np.ndarray:
    """bool (units,): a broken character lies in it, which no text spells."""
    segment, byte, _ = broken_of(rollouts, segments)
    width = STAND_IN + max(int(segments.size.max(initial=0)), int(units.byte_end.max(initial=0)))
    places = segment * width + byte
    first, last = (
        np.searchsorted(places, units.row.astype(np.int64) * width + border)
        for border in (units.byte_start - STAND_IN + 1, units.byte_end)
    )
    return last > first


def _teacher_tokens(rollouts: pa.Table, scores: pa.Table, segments: Segments) -> tuple[Spelling, np.ndarray]:
    """Teacher tokens by segment (end rows left out), and each response's first score row."""
    token_id = scores["token_id"].to_numpy()
    end_rows = np.flatnonzero(token_id < 0)
    if not scores["rollout_id"].take(pa.array(end_rows)).equals(rollouts["rollout_id"]):
        raise OpdError(
            f"scores hold {len(end_rows)} responses that are not the {len(rollouts)} of the rollouts, in their order"
        )
    first = np.concatenate([[0], end_rows[:-1] + 1])[: len(end_rows)]
    real = token_id >= 0
    owner = np.repeat(np.arange(len(rollouts)), end_rows - first)
    within = pc.fill_null(scores["segment"].combine_chunks(), 0).to_numpy()[real]
    if (within >= np.diff(segments.offsets)[owner]).any():
        raise OpdError("scores hold more segments of a response than the rollouts; make one of the two shards again")
    segment = segments.offsets[owner] + within
    offsets = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=len(segments)))])
    given = scores["byte_end"].to_numpy().astype(np.int64)[real]
    ends = given - segments.byte_start[segment]
    # The shard has -1 where tokens don't spell the response: they end past all that is exact.
    exact = np.zeros(len(segments), np.int64)
    np.maximum.at(exact, segment[given >= 0], ends[given >= 0])
    ends = np.where(given < 0, exact[segment] + 1, ends)
    return Spelling(token_id[real], offsets, ends, exact), first


def _candidates(
    scores: pa.Table, at: np.ndarray, masked: np.ndarray, pairs: np.ndarray, student_stop: np.ndarray
) -> tuple[pa.ListArray, pa.ListArray, np.ndarray]:
    """Candidates at each unit's start in student ids, the stop candidate last; log of the mass that has no student id."""
    rows = pa.array(np.where(masked, 0, at), mask=masked)
    taken_id = scores["cand_id"].combine_chunks().take(rows)
    taken_logp = scores["cand_logp"].combine_chunks().take(rows)
    ids, offsets = taken_id.flatten().to_numpy(), offsets_of(taken_id)
    logp = taken_logp.flatten().to_numpy()
    unit = np.repeat(np.arange(len(at)), np.diff(offsets))
    # What stops the student is the stop candidate's business, even where the teacher means it as text.
    mapped = np.where(np.isin(pairs, student_stop), -1, pairs)[ids]
    keep = mapped >= 0
    dropped = np.bincount(unit[~keep], np.exp(logp[~keep].astype(np.float64)), len(at))
    kept = np.bincount(unit[keep], minlength=len(at))
    size = kept + ~masked
    starts = np.concatenate([[0], np.cumsum(size)])
    out_id = np.empty(starts[-1], np.int32)
    out_logp = np.empty(starts[-1], np.float32)
    is_stop = np.zeros(starts[-1], bool)
    is_stop[starts[1:][~masked] - 1] = True
    out_id[is_stop], out_logp[is_stop] = STOP_ID, scores["stop_logp"].to_numpy()[at[~masked]]
    out_id[~is_stop], out_logp[~is_stop] = mapped[keep], logp[keep]
    fields = arrow_schema("units")
    lists = list_offsets(size)
    with np.errstate(divide="ignore"):
        dropped_logp = np.log(dropped)
    return (
        pa.ListArray.from_arrays(lists, pa.array(out_id), type=fields.field("cand_id").type),
        pa.ListArray.from_arrays(lists, pa.array(out_logp), type=fields.field("cand_logp").type),
        dropped_logp,
    )
