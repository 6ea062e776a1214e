"""What the teacher disagreed with: where the sampled reverse KL of a phase comes from, by text, place and kind of unit.

Of each unit the lost nats are log p_S - log p_T, of the policy that sampled and of the teacher. Their sum over a phase is the
sampled estimate of reverse KL times its units, so that shares of texts, places and kinds add up to all of it; a text that the
teacher likes better than the student counts negatively. All figures are sums over row groups: a phase of any size takes the
memory of one, and of `KEEP` texts.
"""

from collections.abc import Iterable
from functools import reduce

import numpy as np
import polars as pl

from pipeline.align.segments import STAND_IN
from pipeline.align.tokens import TokenBytes
from pipeline.align.units import CONTEXT, KINDS, MASKED
from pipeline.measure.diagnostics import COMPARED, TENTHS
from pipeline.measure.token_view import student_logps, token_texts, unit_texts

KEEP = 50_000
"""Rows of a table that are told apart at once; of more those that move the sum least are left out."""
CANDIDATES = 5
"""Of the teacher's, at a text."""
KEYS = {
    "texts": ("text", "kind"),
    "contexts": ("before", "text", "kind"),
    "kinds": ("kind",),
    "tenths": ("tenth",),
    "masked": ("because",),
    "responses": ("rollout_id",),
}
"""The tables and what a row of each is of. `before` is the text of the unit before, null at the start of a response."""
SUMS = ("count", "tokens", "lost", "student_logp", "teacher_logp")

NOT_UTF8, NO_ROLE, AFTER_END, SPELLING = (
    "bytes that are no UTF-8",
    "a token that the teacher has no counterpart of",
    "after what ends the teacher's answer",
    "spelled otherwise, without a common border",
)
"""Why a unit is masked."""

Tables = dict[str, pl.DataFrame]
Group = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]
"""Rollouts, scores and units of the same whole responses."""


def measure(groups: Iterable[Group], teacher_stop: np.ndarray, keep: int = KEEP) -> Tables:
    """The tables of `KEYS` over all row groups.

    Args:
        teacher_stop: ids of the teacher's stop set.
        keep: rows of a table at most.
    Returns:
        By name, the keys and of their units count, tokens (the student's), and sums in nats: lost, student_logp,
        teacher_logp. In all but `masked` and `kinds` of compared units only, and what is summed is of those.
    """
    parts = (_of_group(*group, teacher_stop) for group in groups)
    empty = {name: pl.DataFrame() for name in KEYS}
    return reduce(
        lambda left, right: {name: _added(name, left[name], right[name], keep) for name in KEYS}, parts, empty
    )


def _of_group(rollouts: pl.DataFrame, scores: pl.DataFrame, units: pl.DataFrame, teacher_stop: np.ndarray) -> Tables:
    own = units.select("rollout_id", "kind", "s_len", "teacher_logp").with_columns(
        text=unit_texts(rollouts, units),
        student_logp=student_logps(rollouts, units).cast(pl.Float64),
        because=masked_because(rollouts, scores, units, teacher_stop),
    )
    own = own.filter(pl.col("kind") != KINDS[CONTEXT]).with_columns(
        tenth=(pl.int_range(pl.len()) * len(TENTHS) // pl.len()).over("rollout_id"),
        before=pl.col("text").shift(1).over("rollout_id"),
        teacher_logp=pl.col("teacher_logp").cast(pl.Float64),
    )
    own = own.with_columns(
        lost=pl.col("student_logp") - pl.col("teacher_logp"),
        student_logp=pl.when(COMPARED).then("student_logp"),
    )
    rows = dict.fromkeys(KEYS, own.filter(COMPARED)) | {"kinds": own, "masked": own.filter(kind=KINDS[MASKED])}
    return {
        name: table.group_by(KEYS[name], maintain_order=True).agg(
            count=pl.len().cast(pl.Int64),
            tokens=pl.col("s_len").cast(pl.Int64).sum(),
            **{each: pl.col(each).sum() for each in SUMS[2:]},
        )
        for name, table in rows.items()
    }


def _added(name: str, left: pl.DataFrame, right: pl.DataFrame, keep: int) -> pl.DataFrame:
    both = right if left.is_empty() else pl.concat([left, right])
    sums = both.group_by(KEYS[name], maintain_order=True).agg(pl.col(SUMS).sum())
    return sums if len(sums) <= keep else sums.top_k(keep, by=pl.col("lost").abs())


def lost_in_all(tables: Tables) -> float:
    """Nats that all compared units lose together, however many texts were too many to keep: of kinds none is left out."""
    return float(tables["kinds"]["lost"].sum())


def ranked(tables: Tables, name: str, most: int) -> pl.DataFrame:
    """The rows of a table that lose most nats, and of each the mean log-probs and its share of all that is lost.

    Args:
        tables, name: what `measure` gives, and which of them.
    Returns:
        At most `most` rows, those that lose most first, none that lose nothing: with `student_mean` and `teacher_mean`, nats a
        unit, and `share`.
    """
    total = lost_in_all(tables)
    return (
        tables[name]
        .filter(pl.col("lost") > 0)
        .sort("lost", *KEYS["contexts"][1:], descending=[True, False, False])
        .head(most)
        .with_columns(
            student_mean=pl.col("student_logp") / pl.col("count"),
            teacher_mean=pl.col("teacher_logp") / pl.col("count"),
            share=pl.col("lost") / total if total > 0 else pl.lit(None, pl.Float64),
        )
    )


def change(before: Tables, after: Tables, responses: tuple[int, int], most: int) -> pl.DataFrame:
    """Where the change of the lost nats from one policy's responses to another's comes from, by text.

    Args:
        before, after: what `measure` gives of both.
        responses: how many these are of.
    Returns:
        At most `most` rows, those that change most first: text, kind; times and times_after, how often it is said in 100
        responses; lost, lost_after, nats a response; change, what was lost after less before; share, of the change over all
        units.
    """
    sides = [
        tables["texts"].select(*KEYS["texts"], times=100 * pl.col("count") / number, lost=pl.col("lost") / number)
        for tables, number in zip((before, after), responses, strict=True)
    ]
    first, last = (lost_in_all(tables) / number for tables, number in zip((before, after), responses, strict=True))
    total = last - first
    both = sides[0].join(sides[1], on=KEYS["texts"], how="full", coalesce=True, suffix="_after").fill_null(0.0)
    told = both.with_columns(change=pl.col("lost_after") - pl.col("lost"))
    share = pl.col("change") / total if total else pl.lit(None, pl.Float64)
    return (
        told.with_columns(share=share)
        .sort(pl.col("change").abs(), *KEYS["texts"], descending=[True, False, False])
        .head(most)
    )


def instead(groups: Iterable[Group], chosen: pl.DataFrame, student: TokenBytes) -> pl.DataFrame:
    """What the teacher would rather have said where the student said a text.

    Args:
        chosen: rows of `texts` or `contexts`, few.
        student: bytes of the student's tokens.
    Returns:
        A row a text of `chosen` with candidates: its keys and `candidates`, a list of (text, share): the teacher's likeliest
        `CANDIDATES`, by their mean probability over all units of that text.
    """
    keys = [name for name in KEYS["contexts"] if name in chosen.columns]
    parts = [_candidates(*group, chosen.select(keys)) for group in groups]
    sums = pl.concat(parts).group_by(*keys, "id").agg(pl.col("mass").sum())
    counts = chosen.select(*keys, "count")
    told = sums.join(counts, on=keys, nulls_equal=True).with_columns(share=pl.col("mass") / pl.col("count"))
    top = told.sort("share", "id", descending=[True, False]).group_by(keys, maintain_order=True).head(CANDIDATES)
    named = top.with_columns(candidate=token_texts(top["id"], student))
    return named.group_by(keys, maintain_order=True).agg(candidates=pl.struct(text="candidate", share="share"))


def _candidates(
    rollouts: pl.DataFrame, scores: pl.DataFrame, units: pl.DataFrame, wanted: pl.DataFrame
) -> pl.DataFrame:
    """Sums of the teacher's probabilities by candidate, at the wanted texts of a row group."""
    texts = units.select("rollout_id", "kind", "cand_id", "cand_logp").with_columns(text=unit_texts(rollouts, units))
    own = texts.filter(pl.col("kind") != KINDS[CONTEXT]).with_columns(before=pl.col("text").shift(1).over("rollout_id"))
    here = own.join(wanted, on=wanted.columns, nulls_equal=True, maintain_order="left")
    flat = here.select(*wanted.columns, "cand_id", "cand_logp").explode("cand_id", "cand_logp").drop_nulls("cand_id")
    mass = pl.col("cand_logp").cast(pl.Float64).exp().sum()
    return flat.group_by(*wanted.columns, id="cand_id", maintain_order=True).agg(mass=mass)


def masked_because(
    rollouts: pl.DataFrame, scores: pl.DataFrame, units: pl.DataFrame, teacher_stop: np.ndarray
) -> pl.Series:
    """Why each unit that is masked is; null for all others. As `pipeline.align.student_view` decides, in its order.

    Args:
        rollouts, scores, units: of the same whole responses.
        teacher_stop: ids of the teacher's stop set.
    """
    at = units.select(
        "rollout_id",
        masked=pl.col("kind") == KINDS[MASKED],
        token=pl.col("s_start").cast(pl.Int64),
        teacher=pl.col("t_start"),
        first="byte_start",
        last="byte_end",
    ).with_row_index("at")
    masked = at.filter("masked")
    segments = _segments(rollouts)
    ended = _first_end(scores, segments, teacher_stop)
    holes = rollouts.select("rollout_id", "broken").explode("broken").drop_nulls().unnest("broken")
    broken = masked.join(holes, on="rollout_id").filter(
        (pl.col("byte") < pl.col("last")) & (pl.col("byte") + STAND_IN > pl.col("first"))
    )["at"]
    within = segments.filter(pl.col("role").is_not_null() & (pl.col("tokens") > 0))
    roles = masked.join(within, on="rollout_id").filter(
        (pl.col("token") >= pl.col("token_start")) & (pl.col("token") < pl.col("token_start") + pl.col("tokens"))
    )["at"]
    late = masked.join(ended, on="rollout_id").filter(pl.col("teacher") > pl.col("ended"))["at"]
    return at.select(
        because=pl.when(~pl.col("masked"))
        .then(None)
        .when(pl.col("at").is_in(late.implode()))
        .then(pl.lit(AFTER_END))
        .when(pl.col("at").is_in(broken.implode()))
        .then(pl.lit(NOT_UTF8))
        .when(pl.col("at").is_in(roles.implode()))
        .then(pl.lit(NO_ROLE))
        .otherwise(pl.lit(SPELLING))
    )["because"]


def _segments(rollouts: pl.DataFrame) -> pl.DataFrame:
    """Segments of those responses that list them: their number, role, whether they carry loss, tokens and where these start."""
    listed = rollouts.select("rollout_id", "segments").explode("segments").drop_nulls("segments").unnest("segments")
    tokens = pl.col("tokens").cast(pl.Int64)
    return listed.select(
        "rollout_id",
        "role",
        "loss",
        segment=pl.int_range(pl.len(), dtype=pl.Int32).over("rollout_id"),
        tokens=tokens,
        token_start=(tokens.cum_sum() - tokens).over("rollout_id"),
    )


def _first_end(scores: pl.DataFrame, segments: pl.DataFrame, teacher_stop: np.ndarray) -> pl.DataFrame:
    """rollout_id and `ended`, the first position at which what the student wrote as text ends the teacher's answer."""
    stop = pl.Series(teacher_stop, dtype=pl.Int32)
    halts = scores.select("rollout_id", "pos", "token_id", "segment").filter(
        (pl.col("token_id") >= 0) & pl.col("token_id").is_in(stop.implode())
    )
    told = halts.join(segments, on=["rollout_id", "segment"], how="left")
    text = told.filter(pl.col("role").is_null() & pl.col("loss").fill_null(True))
    return text.group_by("rollout_id").agg(ended=pl.col("pos").min())
