"""The student's view of the teacher's scores: aligned units with candidates in student ids. No model needed."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.align.tokens import Spelling, TokenBytes
from pipeline.align.units import KINDS, MASKED, STOP, Tokens, Units, align
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
) -> pa.Table:
    """Units of the rollouts, with the teacher's candidates mapped to student ids.

    Args:
        rollouts, scores: rows of the same responses in the same order (schemas of those names).
        student: bytes of the student's tokens.
        student_stop, teacher_stop: ids of the two stop sets.
        pairs: teacher id -> student id (`support.pair_ids`).
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
    teacher, text_limit, t_row_start = _teacher_tokens(rollouts, scores)
    sampled, stopped = sampled_tokens(rollouts, student, student_stop)
    limit = np.minimum(sampled.exact, text_limit)
    # Past `limit` any end will do, as long as ends never fall; the shard has -1 where tokens don't spell the response.
    beyond = np.repeat(limit + 1, teacher.counts)
    ends = np.where(teacher.ends < 0, beyond, np.minimum(teacher.ends, beyond))
    units = align(Tokens(sampled.offsets, sampled.ends), Tokens(teacher.offsets, ends), limit, stopped)
    kind = units.kind.copy()

    at = t_row_start[units.row] + units.t_start  # row of `scores` at each unit's start
    logp = scores["logp"].to_numpy().astype(np.float64)
    token_id = scores["token_id"].to_numpy()
    halts = np.isin(token_id, teacher_stop)
    logp[halts] = np.clip(scores["tail_logp"].to_numpy()[halts], LOG_FLOOR, logp[halts])
    halted_before: np.ndarray = np.cumsum(halts) - halts
    kind[halted_before[at] > halted_before[t_row_start[units.row]]] = MASKED

    masked = kind == MASKED
    t_rows = np.where(masked, 0, np.where(kind == STOP, 1, units.t_len))

    def sums(values: np.ndarray) -> np.ndarray:
        """Over each unit's teacher tokens."""
        total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return total[at + t_rows] - total[at]

    log_z = scores["log_z"].to_numpy()  # NaN where it is null
    t_log_z = sums(log_z) / np.maximum(t_rows, 1) - log_z[at]
    cand_id, cand_logp, dropped_logp = _candidates(scores, at, masked, pairs, student_stop)
    columns = {
        "rollout_id": rollouts["rollout_id"].combine_chunks().take(pa.array(units.row)),
        "unit": pa.array(_index_within(units, len(rollouts)), pa.int32()),
        "kind": pa.array(KINDS).take(pa.array(kind)),
        **{
            name: pa.array(getattr(units, name), pa.int32())
            for name in ("s_start", "s_len", "t_start", "t_len", "byte_start", "byte_end")
        },
        "teacher_logp": pa.array(sums(logp), pa.float32(), mask=masked),
        "teacher_entropy": pa.array(scores["entropy"].to_numpy()[at], pa.float32(), mask=masked),
        "t_log_z": pa.array(t_log_z, pa.float32(), mask=masked | np.isnan(t_log_z)),
        "cand_id": cand_id,
        "cand_logp": cand_logp,
        "tail_logp": pa.array(scores["tail_logp"].to_numpy()[at], pa.float32(), mask=masked),
        "dropped_logp": pa.array(dropped_logp, pa.float32(), mask=masked),
    }
    return pa.table(columns, schema=arrow_schema("units"))


def _teacher_tokens(rollouts: pa.Table, scores: pa.Table) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Teacher tokens (end rows left out), bytes up to which they spell the response, each response's first score row."""
    token_id = scores["token_id"].to_numpy()
    end_rows = np.flatnonzero(token_id < 0)
    if not scores["rollout_id"].take(pa.array(end_rows)).equals(rollouts["rollout_id"]):
        raise OpdError(
            f"scores hold {len(end_rows)} responses that are not the {len(rollouts)} of the rollouts, in their order"
        )
    first = np.concatenate([[0], end_rows[:-1] + 1])[: len(end_rows)]
    offsets = np.concatenate([[0], np.cumsum(end_rows - first)])
    ends = scores["byte_end"].to_numpy().astype(np.int64)[token_id >= 0]
    limit = np.zeros(len(rollouts), np.int64)
    np.maximum.at(limit, np.repeat(np.arange(len(rollouts)), np.diff(offsets)), ends)
    return Tokens(offsets, ends), limit, first


def sampled_tokens(rollouts: pa.Table, student: TokenBytes, student_stop: np.ndarray) -> tuple[Spelling, np.ndarray]:
    """The sampled tokens without the final stop, and bool (responses,), whether a stop was sampled.

    Raises OpdError when a response that was stopped doesn't end with a stop token.
    """
    response_ids = rollouts["response_ids"].combine_chunks()
    ids, offsets = response_ids.flatten().to_numpy(), _offsets(response_ids)
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
    ids, offsets = ids[keep], np.concatenate([[0], np.cumsum(np.diff(offsets) - stopped)])
    return Spelling(ids, offsets, *student.ends(ids, offsets, rollouts["response"].combine_chunks())), stopped


def _candidates(
    scores: pa.Table, at: np.ndarray, masked: np.ndarray, pairs: np.ndarray, student_stop: np.ndarray
) -> tuple[pa.ListArray, pa.ListArray, np.ndarray]:
    """Candidates at each unit's start in student ids, the stop candidate last; log of the mass that has no student id."""
    rows = pa.array(np.where(masked, 0, at), mask=masked)
    taken_id = scores["cand_id"].combine_chunks().take(rows)
    taken_logp = scores["cand_logp"].combine_chunks().take(rows)
    ids, offsets = taken_id.flatten().to_numpy(), _offsets(taken_id)
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
    list_offsets = pa.array(starts, pa.int32())
    with np.errstate(divide="ignore"):
        dropped_logp = np.log(dropped)
    return (
        pa.ListArray.from_arrays(list_offsets, pa.array(out_id), type=fields.field("cand_id").type),
        pa.ListArray.from_arrays(list_offsets, pa.array(out_logp), type=fields.field("cand_logp").type),
        dropped_logp,
    )


def _offsets(lists: pa.ListArray) -> np.ndarray:
    """int64 (rows + 1,) offsets into `lists.flatten()`; null rows are empty."""
    return np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])


def _index_within(units: Units, rows: int) -> np.ndarray:
    counts = np.bincount(units.row, minlength=rows)
    return np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
