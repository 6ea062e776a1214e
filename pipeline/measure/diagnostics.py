"""Figures of a phase from sums over its row groups: each group's sums are a few numbers, and sums of sums are those of all, so
a phase of any size takes the memory of one group.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce

import numpy as np
import polars as pl

from pipeline.align.units import CONTEXT, KINDS, UNCOMPARED
from pipeline.weights.cross_fitting import tokens_of_units
from pipeline.weights.gates import REPETITIVE, seq_rep
from pipeline.weights.importance import ess
from schemas.diagnostics import Credit, Distance, Entropy, Ratios, Texts

Sums = dict[str, float]

TENTHS = range(10)
COMPARED = ~pl.col("kind").is_in(UNCOMPARED)
ADVANTAGE = pl.col("advantage").cast(pl.Float64)


Spread = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Advantage of each token, nats, from its log-prob, its unit's two log-probs, the student's and the teacher's, and tokens."""


def measure(
    groups: Iterable[tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]],
    clip: float,
    spread: Spread | None = None,
    clips: pl.Expr = ADVANTAGE,
) -> Sums:
    """Sums over all row groups.

    Args:
        groups: (rollouts, scores, units, weights) of the schemas of those names, of the same whole responses; rollouts with
            `policy_logp` where another policy sampled them.
        clip: nats, `objective.clip`.
        spread: how the recipe spreads a unit's advantage over its tokens before it is clipped; None: it doesn't.
        clips: what of a unit's weights it clips, nats.
    """
    return reduce(add, map(partial(_sums_of, clip=clip, spread=spread, clips=clips), groups))


def _sums_of(
    group: tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame],
    clip: float,
    spread: Spread | None,
    clips: pl.Expr,
) -> Sums:
    return sums(*group, clip, clips) | (_of_tokens(group[0], group[2], clip, spread) if spread else {})


def add(left: Sums, right: Sums) -> Sums:
    """The sums of both."""
    return {name: left[name] + right[name] for name in left}


def sums(
    rollouts: pl.DataFrame,
    scores: pl.DataFrame,
    units: pl.DataFrame,
    weights: pl.DataFrame,
    clip: float,
    clips: pl.Expr = ADVANTAGE,
) -> Sums:
    """Counts and float64 sums of one row group; arguments as for `measure`."""
    return (
        _of_rollouts(rollouts)
        | _of_scores(scores, rollouts)
        | _of_units(units)
        | _of_weights(weights, units["kind"], clip, clips)
    )


def _row(frame: pl.DataFrame) -> Sums:
    """The only row, as floats."""
    return {name: float(value or 0.0) for name, value in frame.row(0, named=True).items()}


def _of_rollouts(rollouts: pl.DataFrame) -> Sums:
    rep = seq_rep(rollouts["response_ids"])
    return _row(
        rollouts.select(
            responses=pl.len(),
            student_tokens=pl.col("response_ids").list.len().cast(pl.Float64).sum(),
            bytes=pl.col("response").str.len_bytes().cast(pl.Float64).sum(),
            truncated=(pl.col("finish_reason") == "length").sum(),
            warped=pl.col("sampler_logp").is_not_null().sum(),
            behavior_logp=pl.col("behavior_logp").cast(pl.List(pl.Float64)).list.sum().sum(),
        )
    ) | {"seq_rep": float(rep.sum()), "repetitive": float((rep > REPETITIVE).sum())}


def _of_scores(scores: pl.DataFrame, rollouts: pl.DataFrame) -> Sums:
    """The row at the end of a response counts where the response did stop: nothing was sampled after a cut."""
    ends = scores.join(rollouts.select("rollout_id", "finish_reason"), on="rollout_id", how="left")
    sampled = ends.filter((pl.col("token_id") >= 0) | (pl.col("finish_reason") == "stop"))
    return _row(
        sampled.select(teacher_positions=pl.len(), teacher_entropy=pl.col("entropy").cast(pl.Float64).sum()),
    )


def _of_units(units: pl.DataFrame) -> Sums:
    of_kind = {kind: pl.col("kind") == kind for kind in KINDS}
    return _row(
        units.select(
            **{
                f"tokens_{kind}": pl.col("s_len").filter(is_kind).cast(pl.Float64).sum()
                for kind, is_kind in of_kind.items()
            },
            **{f"units_{kind}": is_kind.sum() for kind, is_kind in of_kind.items()},
            dropped_mass=pl.col("dropped_logp").filter(COMPARED).cast(pl.Float64).exp().sum(),
        )
    )


def _of_weights(weights: pl.DataFrame, kind: pl.Series, clip: float, clips: pl.Expr = ADVANTAGE) -> Sums:
    size = ADVANTAGE.abs()
    tenth = (pl.col("unit") * len(TENTHS) / pl.len().over("rollout_id")).floor().cast(pl.Int32)
    is_ratio, weight = (pl.col(name).filter(COMPARED).cast(pl.Float64) for name in ("is_ratio", "weight"))
    own = weights.with_columns(kind).filter(pl.col("kind") != KINDS[CONTEXT])
    table = own.with_columns(pl.int_range(pl.len()).over("rollout_id").alias("unit")).with_columns(tenth=tenth)
    per_unit = pl.col("is_ratio").cast(pl.Float64).log().mean()
    by_response = table.filter(COMPARED).group_by("rollout_id", maintain_order=True).agg(log_ratio=per_unit)
    return _row(
        table.select(
            advantage=pl.col("advantage").filter(COMPARED).cast(pl.Float64).sum(),
            **{f"advantage_in_tenth_{n}": size.filter(pl.col("tenth") == n).sum() for n in TENTHS},
            **{f"clipped_{name}": ((pl.col("kind") == name) & (clips.abs() > clip)).sum() for name in KINDS},
            ratio=is_ratio.sum(),
            ratio_squared=(is_ratio * is_ratio).sum(),
            weight=weight.sum(),
            weight_squared=(weight * weight).sum(),
        )
    ) | _row(
        by_response.select(
            weighed_responses=pl.len(),
            log_ratio=pl.col("log_ratio").sum(),
            log_ratio_squared=(pl.col("log_ratio") ** 2).sum(),
        )
    )


def _of_tokens(rollouts: pl.DataFrame, units: pl.DataFrame, clip: float, spread: Spread) -> Sums:
    """Student tokens of compared units, and how many of them `spread` gives more than `clip`."""
    compared = units.filter(COMPARED)
    column = "policy_logp" if "policy_logp" in rollouts.columns else "behavior_logp"
    logp, start, end = tokens_of_units(compared, rollouts, column)
    size = end - start
    unit = np.repeat(np.arange(len(size)), size)
    token = logp[np.repeat(start + size - np.cumsum(size), size) + np.arange(len(unit))].astype(np.float64)
    student = np.bincount(unit, token, len(size))
    teacher = compared["teacher_logp"].cast(pl.Float64).to_numpy()
    credit = spread(token, student[unit], teacher[unit], size[unit])
    return {"path_tokens": float(len(token)), "path_tokens_clipped": float((np.abs(credit) > clip).sum())}


def texts(total: Sums) -> Texts:
    """Section `texts` of `schemas.diagnostics`."""
    responses = total["responses"]
    return Texts(
        responses=int(responses),
        student_tokens=int(total["student_tokens"]),
        truncated=ratio(total["truncated"], responses),
        seq_rep_4=ratio(total["seq_rep"], responses),
        repetitive=ratio(total["repetitive"], responses),
    )


def entropy(total: Sums, own: bool) -> Entropy:
    """Section `entropy`; the student's only when the responses are its `own` and none has a sampler's log-probs beside."""
    unbiased = own and not total["warped"]
    return Entropy(
        teacher=ratio(total["teacher_entropy"], total["teacher_positions"]),
        student=ratio(-total["behavior_logp"], total["student_tokens"]) if unbiased else None,
        teacher_per_byte=ratio(total["teacher_entropy"], total["bytes"]),
        student_per_byte=ratio(-total["behavior_logp"], total["bytes"]) if unbiased else None,
    )


def ratios(total: Sums) -> Ratios:
    """Effective sample size and chi^2 of the compared units' importance ratios."""
    found = ess(compared(total), total["ratio"], total["ratio_squared"])
    return Ratios(ess=found, chi2=found and 1 / found - 1)


def distance(total: Sums) -> Distance:
    """Mean and standard deviation of the responses' log-ratios per unit; a response without compared units has none."""
    mean, squared = (ratio(total[name], total["weighed_responses"]) for name in ("log_ratio", "log_ratio_squared"))
    if mean is None or squared is None:
        return Distance(log_ratio=None, log_ratio_sd=None)
    return Distance(log_ratio=mean, log_ratio_sd=math.sqrt(max(0.0, squared - mean * mean)))


def clipped(total: Sums, kinds: Iterable[str]) -> float | None:
    """Share of units of these kinds whose advantage is clipped, or of tokens where it is spread over them; None of nothing."""
    if "path_tokens" in total:
        return ratio(total["path_tokens_clipped"], total["path_tokens"])
    of_kinds = list(kinds)
    return ratio(sum(total[f"clipped_{kind}"] for kind in of_kinds), sum(total[f"units_{kind}"] for kind in of_kinds))


def credit(total: Sums, clipped_share: float | None) -> Credit:
    """Section `credit`; `clipped_share` is what `clipped` gives, None where the recipe clips nothing that is known here."""
    sizes = {n: total[f"advantage_in_tenth_{n}"] for n in TENTHS}
    return Credit(
        advantage_mean=ratio(total["advantage"], compared(total)),
        advantage_share={n: size / (sum(sizes.values()) or 1.0) for n, size in sizes.items()},
        clipped=clipped_share,
        weight_ess=ess(compared(total), total["weight"], total["weight_squared"]),
    )


def kinds(total: Sums) -> dict[str, float]:
    """Share of the student's own tokens in each kind of unit."""
    own = [kind for kind in KINDS if kind != KINDS[CONTEXT]]
    tokens = sum(total[f"tokens_{kind}"] for kind in own)
    return {kind: total[f"tokens_{kind}"] / max(1.0, tokens) for kind in own}


def compared(total: Sums) -> float:
    """Number of units that are not masked."""
    return sum(total[f"units_{kind}"] for kind in KINDS if kind not in UNCOMPARED)


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None
