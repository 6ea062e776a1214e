"""Importance weights of units as polars expressions: one weight per unit, every one >= 0.

All read the column `advantage` (nats, 0 when masked) in the order of the units. A masked unit takes part as a unit without
advantage; its own weight is what the definition gives there and multiplies no loss.
"""

from collections.abc import Sequence

import polars as pl

from pipeline.weights.estimator import Estimator

MAX_LOG_WEIGHT = 300.0
"""nats; prefix ratios to the power alpha are clipped to e^+-300, so that their sums stay finite in float64."""

_FIRST = pl.int_range(pl.len())


def uniform() -> pl.Expr:
    """1 for every unit: plain on-policy distillation."""
    return pl.lit(1.0)


def iw_opd(gamma: float) -> pl.Expr:
    """IW-OPD's weight of each unit: w_t = 1 + gamma (1 - D_t / D), D_t = sum of |A_k| for k < t, D over all k.

    arXiv 2606.22600. Needs a whole response. A response without any advantage has D_t / D = 0.
    A = [.2, -.3, .5] with gamma .5 gives [1.5, 1.4, 1.25]; gamma 0 is `uniform`.
    """
    size = pl.col("advantage").abs()
    return _decayed(size.cum_sum() - size, gamma)


def signed(gamma: float) -> pl.Expr:
    """The signed variant: w_t = 1 + gamma (1 - D_t / D), D_t = |sum of A_k for k < t|, D = sum of |A_k| over all k.

    arXiv 2606.22600 has a signed variant in an ablation; this definition is our reading of it. Advantages of opposite signs
    cancel, so the weight may rise again; dividing by the unsigned total keeps it within [1, 1 + gamma] where the signed total
    could be near 0. A = [.2, -.3, .5] with gamma .5 gives [1.5, 1.4, 1.45].
    """
    value = pl.col("advantage")
    return _decayed((value.cum_sum() - value).abs(), gamma)


def _decayed(before: pl.Expr, gamma: float) -> pl.Expr:
    total = pl.col("advantage").abs().sum()
    share = pl.when(total > 0).then(before / total).otherwise(0.0)
    return (1 + gamma * (1 - share)).over("rollout_id")


def prefix(share: float) -> pl.Expr:
    """1 on a response's first units, 0 on the rest: unit t of n counts when t / n < share, so at least the first one does.

    The prefix-only baseline of arXiv 2606.22600. Masked units count towards n.
    """
    # Correctly rounded division keeps t / n = share exact where share * n is not (0.55 * 100 > 55).
    return (_FIRST / pl.len() < share).cast(pl.Float64).over("rollout_id")


def prefix_ratio(alpha: float) -> pl.Expr:
    """r_t^alpha with r_t = exp(sum of A_k for k < t) = pi_T(prefix) / pi_S(prefix), clipped to e^+-300.

    How likely the teacher is to be where the student has got to, arXiv 2606.22600: the optimal policy of its trust region is
    pi_S (pi_T / pi_S)^alpha. With the whole prefix it collapses within tens of tokens for alpha >= 0.1.
    """
    value = pl.col("advantage")
    before = alpha * (value.cum_sum() - value)
    return before.clip(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp().over("rollout_id")


def ideal() -> pl.Expr:
    """r_t^alpha over its mean at the same position: the ideal weight of arXiv 2606.22600.

    Reads the columns `prefix_ratio`, and `count` and `prefix_ratio_sum` of the unit's position among the responses that have
    it (`cross_fitting.position_sums`). The weights of one position average 1.
    """
    return pl.col("prefix_ratio") * pl.col("count") / pl.col("prefix_ratio_sum")


def truncated(ceiling: float) -> pl.Expr:
    """Truncated importance sampling, min(pi_theta / pi_sampler, ceiling), a factor of any other weight.

    Reads `is_ratio`: 1 when masked, and everywhere when the policy that is trained sampled the response as it is. At a unit
    whose loss doesn't depend on what was sampled there it changes the variance; its mean is 1, less what the ceiling takes.
    """
    return pl.col("is_ratio").clip(upper_bound=ceiling)


def corrected(kinds: Sequence[str]) -> pl.Expr:
    """pi_behavior / pi_sampler of units of these kinds, 1 at others: what temperature and top-p made likelier weighs less.

    Reads `sampler_ratio`, which is 1 everywhere when nothing but the model's own distribution was sampled from. The policy that
    is trained isn't in it: what that has moved since the sampling is for `truncated`. A role counts as what its tokens make it.
    """
    single = (pl.col("s_len") == 1) & (pl.col("t_len") == 1)
    form = pl.when(pl.col("kind") != "role").then("kind").when(single).then(pl.lit("1:1")).otherwise(pl.lit("n:m"))
    return pl.when(form.is_in(list(kinds))).then("sampler_ratio").otherwise(1.0)


def ess(count: float, total: float, squared: float) -> float | None:
    """Effective sample size of weights w as a share, (sum w)^2 / (n sum w^2); None when there is no weight."""
    whole = count * squared
    return total * total / whole if whole else None


SCHEMES: dict[str, Estimator] = {
    "uniform": Estimator(lambda options: uniform()),
    "iw_opd": Estimator(lambda options: iw_opd(options.gamma)),
    "signed": Estimator(lambda options: signed(options.gamma)),
    "prefix": Estimator(lambda options: prefix(options.prefix_share)),
    "ideal": Estimator(
        lambda options: ideal(),
        prepare=lambda units, rollouts, options: units.with_columns(prefix_ratio=prefix_ratio(options.alpha)),
        by_position=("prefix_ratio",),
    ),
}
"""What computes each `weights.scheme`; its meaning and the keys it reads are in `schemas.config.weights.SCHEMES`."""
