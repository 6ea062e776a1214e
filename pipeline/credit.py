"""Advantages, credit and importance weights as polars expressions over the units table. No loop over tokens."""

from dataclasses import dataclass

import polars as pl

from schemas.tables import WEIGHTS

MASKED = pl.col("kind") == "masked"
MAX_LOG_RATIO = 20.0
"""nats; a ratio beyond it is no estimate of anything, but it must stay a number."""


def advantages(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add `student_logp` and `advantage` to units.

    Args:
        units: schema `units`.
        rollouts: schema `rollouts`, at least `rollout_id` and `behavior_logp`; with `policy_logp` (schema `policy`) too
            when another policy than the behaviour policy is weighed.
    Returns:
        `units` with student_logp, the sum of the policy's log-probs over the unit's tokens (null when masked),
        advantage = teacher_logp - student_logp (0 when masked): A = log p_T - log p_S, design section 4, and
        is_ratio = exp(student_logp - the behaviour policy's sum), 1 when masked.
    """
    policy = "policy_logp" if "policy_logp" in rollouts.columns else "behavior_logp"
    tokens = rollouts.select("rollout_id", policy=policy, behavior="behavior_logp")
    joined = units.join(tokens, on="rollout_id", how="left", maintain_order="left")
    student, behavior = (pl.col(name).list.slice("s_start", "s_len").list.sum() for name in ("policy", "behavior"))
    log_ratio = (student - behavior).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return joined.with_columns(
        student_logp=pl.when(~MASKED).then(student).cast(pl.Float32),
        is_ratio=pl.when(~MASKED).then(log_ratio.exp()).otherwise(1.0),
    ).with_columns(advantage=(pl.col("teacher_logp") - pl.col("student_logp")).fill_null(0.0))


def iw_opd(gamma: float) -> pl.Expr:
    """IW-OPD's weight of each unit: w_t = 1 + gamma (1 - D_t / D), D_t = sum of |A_k| for k < t, D over all k.

    arXiv 2606.22600. Needs a whole response: evaluate over `rollout_id`. A response without any advantage has D_t / D = 0.
    A = [.2, -.3, .5] with gamma .5 gives [1.5, 1.4, 1.25].
    """
    size = pl.col("credit").abs()
    before, total = size.cum_sum() - size, size.sum()
    share = pl.when(total > 0).then(before / total).otherwise(0.0)
    return (1 + gamma * (1 - share)).over("rollout_id")


def weigh(units: pl.DataFrame, rollouts: pl.DataFrame, scheme: str, gamma: float) -> pl.DataFrame:
    """The weights table of one shard (schema `weights`); `rollouts` as `advantages` takes it.

    `scheme`: uniform | iw_opd. Credit is immediate: a unit's own advantage.
    """
    table = advantages(units, rollouts).with_columns(credit=pl.col("advantage"))
    weight = iw_opd(gamma) if scheme == "iw_opd" else pl.lit(1.0)
    table = table.with_columns(weight=weight)
    floats = [c.name for c in WEIGHTS if c.name not in ("rollout_id", "unit")]
    return table.select("rollout_id", "unit", pl.col(floats).cast(pl.Float32))


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
