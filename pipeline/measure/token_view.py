"""A response as both models saw it: each of its units as text, with the log-probs of both and what they would have said."""

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.align.tokens import TokenBytes, flat_bytes
from pipeline.store.shards import Shard
from pipeline.weights.cross_fitting import tokens_of_units
from schemas.errors import OpdError, shown
from schemas.tables import STOP_ID, TABLES

STOP_TEXT = "<stop>"
"""What a stop is called among texts: any token of the student's stop set."""
OF_WEIGHTS = ("advantage", "credit", "weight", "is_ratio")
"""Columns of weights that a view takes over."""


def token_view(
    rollouts: pl.DataFrame, units: pl.DataFrame, student: TokenBytes, weights: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Units of responses for people.

    Args:
        rollouts, units, weights: of the schemas of those names, the same whole responses; weights when they were made.
        student: bytes of the student's tokens.
    Returns:
        A row a unit, in order: rollout_id, unit, kind, s_start, byte_start, byte_end; text, bytes that are no UTF-8 as
        `\\xNN`; teacher_logp, nats, null when masked; student_logp, nats, of the policy that sampled, at temperature 1; gap =
        teacher_logp - student_logp, nats, negative where the teacher finds it unlikelier; `OF_WEIGHTS`, with weights;
        teacher_candidates, a list of (id, text, logp) by falling log-prob, in ids of the student; teacher_elsewhere, share of
        the teacher's mass on none of them; student_candidates, a list of (id, text) likeliest first, where `rollouts.top_k` had
        them recorded, else null.
    Raises:
        OpdError: the units are of other rollouts.
    """
    candidates = units.select("cand_id", "cand_logp").with_row_index("at").explode("cand_id", "cand_logp").drop_nulls()
    named = candidates.with_columns(text=token_texts(candidates["cand_id"], student))
    ranked = named.sort("at", "cand_logp", descending=[False, True], maintain_order=True)
    told = ranked.group_by("at", maintain_order=True).agg(
        teacher_candidates=pl.struct(id="cand_id", text="text", logp="cand_logp")
    )
    elsewhere = pl.sum_horizontal(pl.col("tail_logp", "dropped_logp").cast(pl.Float64).exp())
    found = units.with_row_index("at").select(
        *("at", "rollout_id", "unit", "kind", "s_start", "byte_start", "byte_end", "teacher_logp"),
        text=unit_texts(rollouts, units),
        student_logp=student_logps(rollouts, units).cast(pl.Float32),
        teacher_elsewhere=pl.when(pl.col("teacher_logp").is_not_null()).then(elsewhere),
    )
    if weights is not None:
        found = found.with_columns(weights.select(OF_WEIGHTS))
    return (
        found.with_columns(gap=pl.col("teacher_logp") - pl.col("student_logp"))
        .join(told, on="at", how="left", maintain_order="left")
        .with_columns(student_candidates=_own_candidates(rollouts, units, student))
        .drop("at")
    )


def response_tables(
    rollout_id: str, rollouts: Shard, units: Shard, weights: Shard | None = None
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None] | None:
    """Rollout, units and weights of one response, for `token_view`; None where the shard has no such response.

    Args:
        rollouts, units, weights: the shards of the same responses; of each one row group is read.
    """
    for index, names in enumerate(rollouts.row_groups(["rollout_id"])):
        if rollout_id in names["rollout_id"].to_pylist():
            shards = (rollouts, units, weights)
            own = (shard and row_group(shard, index).filter(rollout_id=rollout_id) for shard in shards)
            return tuple(own)  # type: ignore[return-value]
    return None


def row_group(shard: Shard, number: int) -> pl.DataFrame:
    """All columns of one row group of a shard."""
    table = shard.row_group(number, [column.name for column in TABLES[shard.manifest.kind]])
    return pl.DataFrame(table).with_columns(pl.col(pl.Categorical).cast(pl.String))


def student_logps(rollouts: pl.DataFrame, units: pl.DataFrame) -> pl.Series:
    """float64, nats: the log-prob that the policy that sampled gave each unit, at temperature 1."""
    logp, start, end = tokens_of_units(units, rollouts, "behavior_logp")
    running = np.concatenate([[0.0], np.cumsum(logp, dtype=np.float64)])
    return pl.Series("student_logp", running[end] - running[start])


def unit_texts(rollouts: pl.DataFrame, units: pl.DataFrame) -> pl.Series:
    """The text of each unit: the bytes of `response` that it spans, and a stop's name."""
    data, starts = flat_bytes(rollouts["response"].to_arrow())
    places = pl.DataFrame({"rollout_id": rollouts["rollout_id"], "first": starts[:-1], "last": starts[1:]})
    at = units.select("rollout_id", "byte_start", "byte_end").join(
        places, on="rollout_id", how="left", maintain_order="left"
    )
    if at["first"].null_count():
        name = at.filter(pl.col("first").is_null())["rollout_id"][0]
        raise OpdError(f"units of rollout {shown(name)}, which the rollouts lack; make the units again")
    # What a tokenizer spells past the response is none of its text.
    begin, end = (
        at.select(pl.min_horizontal(pl.col("first") + pl.col(name), "last")).to_series().to_numpy()
        for name in ("byte_start", "byte_end")
    )
    size = end - begin
    offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
    taken = data[np.repeat(begin - offsets[:-1], size) + np.arange(offsets[-1])]
    spelled = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(size), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(taken))]
    )
    text = readable(spelled)
    is_stop = (units["kind"] == "stop") & (text == "")
    return pl.select(pl.when(is_stop).then(pl.lit(STOP_TEXT)).otherwise(text).alias("text")).to_series()


def token_texts(ids: pl.Series, tokens: TokenBytes) -> pl.Series:
    """What each id says: its text, a stop's or a role's name, else `<id>`; STOP_ID is the stop set."""
    distinct = ids.unique().drop_nulls()
    spelled = tokens.bytes.take(pa.array(np.clip(distinct.to_numpy(), 0, len(tokens) - 1)))
    names = {STOP_ID: STOP_TEXT} | {index: f"<{role}>" for index, role in tokens.roles.items()}
    called = [names.get(index, f"<{index}>") for index in distinct.to_list()]
    is_text = (distinct >= 0) & (distinct < len(tokens))
    text = readable(spelled)
    said = pl.select(pl.when(is_text & text.is_not_null()).then(text).otherwise(pl.Series(called, dtype=pl.String)))
    return ids.replace_strict(distinct, said.to_series(), return_dtype=pl.String)


def readable(spelled: pa.Array) -> pl.Series:
    """Binary values as text; bytes that are no UTF-8 as `\\xNN`."""
    coded = spelled.dictionary_encode()
    texts = [value.decode(errors="backslashreplace") for value in coded.dictionary.to_pylist()]
    return pl.Series("text", pl.from_arrow(pa.array(texts, pa.large_string()).take(coded.indices)), dtype=pl.String)


def _own_candidates(rollouts: pl.DataFrame, units: pl.DataFrame, student: TokenBytes) -> pl.Series:
    """The student's likeliest ids at each unit's start, where they were recorded."""
    recorded = rollouts.select("rollout_id", "top_id").filter(pl.col("top_id").is_not_null())
    dtype = pl.List(pl.Struct({"id": pl.Int32, "text": pl.String}))
    if recorded.is_empty():
        return pl.Series("student_candidates", [None] * len(units), dtype=dtype)
    at = units.select("rollout_id", pl.col("s_start").cast(pl.Int64)).with_row_index("at")
    ids = recorded.explode("top_id").with_columns(s_start=pl.int_range(pl.len(), dtype=pl.Int64).over("rollout_id"))
    here = at.join(ids, on=["rollout_id", "s_start"], how="left", maintain_order="left")
    flat = here.select("at", id="top_id").explode("id").drop_nulls()
    named = flat.with_columns(text=token_texts(flat["id"], student)).group_by("at", maintain_order=True)
    lists = named.agg(student_candidates=pl.struct("id", "text"))
    return here.select("at").join(lists, on="at", how="left", maintain_order="left")["student_candidates"].cast(dtype)
