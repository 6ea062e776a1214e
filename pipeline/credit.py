"""Advantages and credit of units as polars expressions, and the weights table. No loop over tokens.

A masked unit has advantage 0 and takes part as one: it is a step of a discount and a position of its response. Its own credit
is what the definition gives there, and no loss ever reads it.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.estimates import fold_of, position_sums, tokens_of_units, value_features, value_sums, values
from pipeline.importance import ideal, iw_opd, prefix, prefix_ratio, signed, truncated, uniform
from schemas.config import Weights
from schemas.errors import OpdError
from schemas.tables import WEIGHTS

MASKED = pl.col("kind") == "masked"
MAX_LOG_RATIO = 20.0
"""nats; a ratio beyond it is no estimate of anything, but it must stay a number."""


def advantages(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add `student_logp`, `is_ratio` and `advantage` to units.

    Args:
        units: schema `units`.
        rollouts: schema `rollouts`, at least `rollout_id` and `behavior_logp`; with `policy_logp` (schema `policy`) too
            when another policy than the behaviour policy is weighed.
    Returns:
        `units` with student_logp, the sum of the policy's log-probs over the unit's tokens (null when masked),
        advantage = teacher_logp - student_logp (0 when masked): A = log p_T - log p_S, design section 4, and
        is_ratio = exp(student_logp - the behaviour policy's sum), 1 when masked; all float64.
    Raises:
        OpdError: a log-prob of a unit that is not masked is missing, NaN or infinite; names the column, the first rollout
            and the count. -inf is no log-prob either: a softmax leaves every token some mass, and the student's view has
            `view.LOG_FLOOR` where the teacher would have ended.
    """
    policy = "policy_logp" if "policy_logp" in rollouts.columns else "behavior_logp"
    behavior = _unit_sums(units, rollouts, "behavior_logp")
    student = behavior if policy == "behavior_logp" else _unit_sums(units, rollouts, policy)
    teacher = units["teacher_logp"].cast(pl.Float64)
    for name, column in (("teacher_logp", teacher), ("behavior_logp", behavior), (policy, student)):
        _refuse_infinite(units, name, column)
    log_ratio = (pl.lit(student) - pl.lit(behavior)).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return units.with_columns(
        student_logp=pl.when(~MASKED).then(pl.lit(student)),
        is_ratio=pl.when(~MASKED).then(log_ratio.exp()).otherwise(1.0),
        advantage=pl.when(~MASKED).then(pl.lit(teacher) - pl.lit(student)).otherwise(0.0),
    )


def _unit_sums(units: pl.DataFrame, rollouts: pl.DataFrame, column: str) -> pl.Series:
    """Sum of a list column of rollouts over each unit's tokens, float64; NaN where the rollout or a value is missing."""
    tokens, start, end = tokens_of_units(units, rollouts.with_columns(pl.col(column).cast(pl.List(pl.Float64))), column)
    # Sums from each start to its end, and from there to the next start, which are dropped; 0 closes the last one.
    bounds = np.stack([start, end], 1).ravel()
    sums = np.add.reduceat(np.append(tokens, 0.0), bounds)[::2] if len(bounds) else np.empty(0)
    known = units["rollout_id"].is_in(rollouts["rollout_id"].implode()).to_numpy()
    return pl.Series(column, np.where(known, np.where(end > start, sums, 0.0), np.nan), dtype=pl.Float64)


def _refuse_infinite(units: pl.DataFrame, name: str, values: pl.Series) -> None:
    wrong = units.filter(~MASKED & ~pl.lit(values.is_finite().fill_null(False)))
    if len(wrong):
        raise OpdError(
            f"`{name}` is missing, NaN or infinite in {len(wrong)} units of {wrong['rollout_id'].n_unique()} rollouts, "
            f"first in rollout {wrong['rollout_id'][0]}, unit {wrong['unit'][0]}; expected finite nats in every unit that is "
            f"not masked: make the shard of {_HOME[name]} again"
        )


_HOME = {
    "teacher_logp": "units (and the scores it was made from)",
    "behavior_logp": "rollouts",
    "policy_logp": "policy",
}


def immediate() -> pl.Expr:
    """A_t: a local, biased surrogate of the sequence's reverse KL with little variance (survey, arXiv 2606.22793)."""
    return pl.col("advantage")


def return_to_go() -> pl.Expr:
    """Sum of A_k for k >= t, nats: unbiased on-policy, with high variance (survey, arXiv 2606.22793)."""
    return pl.col("advantage").cum_sum(reverse=True).over("rollout_id")


def discounted(gamma: float) -> pl.Expr:
    """Sum of gamma^(k-t) A_k for k >= t, nats: 0 is `immediate`, 1 `return_to_go`. Masked units count as steps.

    The recursion G_t = A_t + gamma G_(t+1) is polars' exponentially weighted mean of the reversed response,
    y_i = gamma y_(i-1) + (1 - gamma) x_i from y_0 = x_0, over 1 - gamma, once x_0 is scaled alike. Nothing is ever divided
    by a power of gamma, which would underflow within a few hundred units.
    """
    return _discounted(pl.col("advantage"), gamma).over("rollout_id")


def _discounted(value: pl.Expr, gamma: float) -> pl.Expr:
    if gamma == 1:
        return value.cum_sum(reverse=True)
    if gamma == 0:
        return value
    value = value.reverse()
    value = pl.when(pl.int_range(pl.len()) == 0).then(value * (1 - gamma)).otherwise(value)
    return value.ewm_mean(alpha=1 - gamma, adjust=False).reverse() / (1 - gamma)


def baseline() -> pl.Expr:
    """Return to go less its mean over the *other* responses that have a unit at the same position; 0 stands for no others.

    The baseline leaves the response itself out, so it is independent of what was sampled there and leaves the estimate
    unbiased. It is by position, not by prompt, since one response per prompt is the usual case. Reads the columns
    `return_to_go`, and `count` and `return_to_go_sum` of the position (`estimates.position_sums`).
    """
    own, others = pl.col("return_to_go"), pl.col("count") - 1
    mean = pl.when(others > 0).then((pl.col("return_to_go_sum") - own) / others).otherwise(0.0)
    return own - mean


def gae(gamma: float, lam: float) -> pl.Expr:
    """GAE: sum of (gamma lam)^(k-t) delta_k for k >= t, delta_t = A_t + gamma V_(t+1) - V_t, and V = 0 after the last unit.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; for distillation a hypothesis of the survey arXiv 2606.22793 without
    experiments. Reads `advantage` and `value` (`estimates.values`); lam 0 is delta_t, lam 1 the discounted return less V_t.
    """
    after = pl.col("value").shift(-1, fill_value=0.0)
    delta = pl.col("advantage") + gamma * after - pl.col("value")
    return _discounted(delta, gamma * lam).over("rollout_id")


def weigh(units: pl.DataFrame, rollouts: pl.DataFrame, options: Weights) -> pl.DataFrame:
    """The weights table of one shard (schema `weights`).

    Args:
        units: schema `units`, whole responses; `cand_logp` and `tail_logp` only for gae.
        rollouts: as `advantages` takes it.
        options: section `weights` of the config. `baseline`, `gae` and `ideal` compare the responses of `units`.
    Raises:
        OpdError: a log-prob of a unit that is not masked is missing, NaN or infinite; names column, rollout and count.
    """
    table = _weight(_credit(advantages(units, rollouts), options), options)
    floats = [c.name for c in WEIGHTS if c.name not in ("rollout_id", "unit")]
    return table.select("rollout_id", "unit", pl.col(floats).cast(pl.Float32))


def _credit(table: pl.DataFrame, options: Weights) -> pl.DataFrame:
    if options.credit == "gae":
        target = table.with_columns(fold=fold_of(), target=discounted(options.discount))
        features = value_features(target)
        value = values(features, value_sums(features))
        return table.with_columns(value).with_columns(credit=gae(options.discount, options.gae_lambda))
    if options.credit == "baseline":
        return _with_position_sums(
            table.with_columns(return_to_go=return_to_go()), "return_to_go", baseline(), "credit"
        )
    simple = {"immediate": immediate, "return_to_go": return_to_go, "discounted": lambda: discounted(options.discount)}
    return table.with_columns(credit=simple[options.credit]())


def _weight(table: pl.DataFrame, options: Weights) -> pl.DataFrame:
    if options.scheme == "ideal":
        table = table.with_columns(prefix_ratio=prefix_ratio(options.alpha))
        table = _with_position_sums(table, "prefix_ratio", ideal(), "weight")
    else:
        schemes = {
            "uniform": uniform,
            "iw_opd": lambda: iw_opd(options.gamma),
            "signed": lambda: signed(options.gamma),
            "prefix": lambda: prefix(options.prefix_share),
        }
        table = table.with_columns(weight=schemes[options.scheme]())
    if options.truncate is None:
        return table
    return table.with_columns(weight=pl.col("weight") * truncated(options.truncate))


def _with_position_sums(table: pl.DataFrame, column: str, estimate: pl.Expr, name: str) -> pl.DataFrame:
    """`table` with `estimate` as `name`, which may read the sums of `column` by position."""
    sums = position_sums(table, [column])
    joined = table.join(sums, on="unit", how="left", maintain_order="left")
    return joined.with_columns(estimate.alias(name)).drop("count", f"{column}_sum")


@dataclass(frozen=True)
class Summary:
    """Figures of a weights table.

    Attributes:
        units: number of rows, masked ones included.
        advantage_mean: nats per unit.
        advantage_share: |A| share of each tenth of the response, by tenth (0 to 9; tenths that no unit starts in are absent).
        ess: effective sample size of the weights as a share of the units, (sum w)^2 / (n sum w^2).
    """

    units: int
    advantage_mean: float
    advantage_share: dict[int, float]
    ess: float


def summary(weights: pl.DataFrame) -> Summary:
    """Summarise a weights table (schema `weights`)."""
    tenth = (pl.col("unit") * 10 / pl.len().over("rollout_id")).floor().cast(pl.Int32)
    share = weights.group_by(tenth=tenth).agg(pl.col("advantage").abs().sum()).sort("tenth")
    total = share["advantage"].sum() or 1.0
    w = weights["weight"].cast(pl.Float64).to_numpy()
    return Summary(
        len(weights),
        float(weights["advantage"].sum()) / max(1, len(weights)),
        dict(zip(share["tenth"].to_list(), (share["advantage"] / total).to_list(), strict=True)),
        float(w.sum() ** 2 / (len(w) * (w @ w))) if len(w) else 0.0,
    )
