"""Advantages and credit of units as polars expressions, and the weights table. No loop over tokens.

Every ratio is to the distribution that was sampled from: `sampler_logp` where rollouts have it, else the behaviour policy's own
`behavior_logp`. Advantages are always at temperature 1, log p_T - log p_theta.

What the weights of a shard need of others is in sums: `partial_sums` of every shard, added, are what `weigh` takes. A masked
unit has advantage 0 and takes part as one: it is a step of a discount and a position of its response. Its own credit is what
the definition gives there, and no loss ever reads it.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import polars as pl

from pipeline.align.units import UNCOMPARED
from pipeline.weights import gates
from pipeline.weights.cross_fitting import (
    Sums,
    folds_of,
    group,
    group_keys,
    group_sums,
    position_sums,
    residual,
    residual_keys,
    residual_sums,
    tokens_of_units,
    value_features,
    value_sums,
    values,
)
from pipeline.weights.estimator import PLAIN, Estimator, Loss
from pipeline.weights.importance import SCHEMES, corrected, truncated
from pipeline.weights.rewards import REWARDS
from schemas.config import Weights
from schemas.errors import OpdError
from schemas.tables import WEIGHTS

MASKED = pl.col("kind").is_in(UNCOMPARED)
MAX_LOG_RATIO = 20.0
"""nats; a ratio beyond it is no estimate of anything, but it must stay a number."""


def advantages(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add `student_logp`, `is_ratio`, `sampler_ratio` and `advantage` to units.

    Args:
        units: schema `units`.
        rollouts: schema `rollouts`, at least `rollout_id` and `behavior_logp`; `sampler_logp` where the sampler was another
            distribution; with `policy_logp` (schema `policy`) too when another policy than the behaviour policy is weighed.
    Returns:
        `units` with student_logp, the sum of the policy's log-probs over the unit's tokens (null when masked),
        advantage = teacher_logp - student_logp (0 when masked): A = log p_T - log p_S, design section 4,
        is_ratio = exp(student_logp - the sampler's sum), and of it sampler_ratio = exp(the behaviour policy's sum - the
        sampler's), what temperature and top-p make of it; both 1 when masked; all float64.
    Raises:
        OpdError: a log-prob of a unit that is not masked is missing, NaN or infinite; names the column, the first rollout
            and the count. -inf is no log-prob either: a softmax leaves every token some mass, and the student's view has
            `view.LOG_FLOOR` where the teacher would have ended.
    """
    policy = "policy_logp" if "policy_logp" in rollouts.columns else "behavior_logp"
    behavior = _unit_sums(units, rollouts, "behavior_logp")
    student = behavior if policy == "behavior_logp" else _unit_sums(units, rollouts, policy)
    sampler = behavior
    if warped(rollouts):
        kept = rollouts.with_columns(sampler_logp=pl.coalesce("sampler_logp", "behavior_logp"))
        sampler = _unit_sums(units, kept, "sampler_logp")
    teacher = units["teacher_logp"].cast(pl.Float64)
    columns = {"teacher_logp": teacher, "behavior_logp": behavior, "sampler_logp": sampler, policy: student}
    for name, column in columns.items():
        _refuse(units, name, ~column.is_finite().fill_null(False), "missing, NaN or infinite", "finite nats")

    def over_sampler(logp: pl.Series) -> pl.Expr:
        log_ratio = (pl.lit(logp) - pl.lit(sampler)).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return pl.when(~MASKED).then(log_ratio.exp()).otherwise(1.0)

    return units.with_columns(
        student_logp=pl.when(~MASKED).then(pl.lit(student)),
        is_ratio=over_sampler(student),
        sampler_ratio=over_sampler(behavior),
        advantage=pl.when(~MASKED).then(pl.lit(teacher) - pl.lit(student)).otherwise(0.0),
    )


def warped(rollouts: pl.DataFrame) -> int:
    """How many responses have the log-probs of a sampler that was another distribution than the model's."""
    return len(rollouts) - rollouts["sampler_logp"].null_count() if "sampler_logp" in rollouts.columns else 0


def _unit_sums(units: pl.DataFrame, rollouts: pl.DataFrame, column: str) -> pl.Series:
    """Sum of a list column of rollouts over each unit's tokens, float64; NaN where the rollout or a value is missing."""
    tokens, start, end = tokens_of_units(units, rollouts.with_columns(pl.col(column).cast(pl.List(pl.Float64))), column)
    # Sums from each start to its end, and from there to the next start, which are dropped; 0 closes the last one.
    bounds = np.stack([start, end], 1).ravel()
    sums = np.add.reduceat(np.append(tokens, 0.0), bounds)[::2] if len(bounds) else np.empty(0)
    known = units["rollout_id"].is_in(rollouts["rollout_id"].implode()).to_numpy()
    return pl.Series(column, np.where(known, np.where(end > start, sums, 0.0), np.nan), dtype=pl.Float64)


def _refuse(units: pl.DataFrame, name: str, is_wrong: pl.Series, found: str, expected: str) -> None:
    wrong = units.filter(~MASKED & pl.lit(is_wrong))
    if len(wrong):
        raise OpdError(
            f"`{name}` is {found} in {len(wrong)} units of {wrong['rollout_id'].n_unique()} rollouts, "
            f"first in rollout {wrong['rollout_id'][0]}, unit {wrong['unit'][0]}; expected {expected} in every unit that is "
            f"not masked: make the shard of {_HOME.get(name, 'units (and the scores it was made from)')} again"
        )


_HOME = {
    "behavior_logp": "rollouts",
    "sampler_logp": "rollouts",
    "policy_logp": "policy",
    "reference_logp": "reference",
}
"""The table that a column is of, if not units."""


def check_candidates(units: pl.DataFrame) -> None:
    """Raise OpdError when a candidate, the tail or the dropped mass of a unit that is not masked is missing, NaN or +inf.

    `units` is of schema `units`. -inf, the log of no mass, is fine.
    """

    def wrong(logp: pl.Expr) -> pl.Expr:
        return (logp.is_nan() | (logp == np.inf)).fill_null(True)

    is_wrong = {name: wrong(pl.col(name)) for name in ("tail_logp", "dropped_logp")}
    is_wrong["cand_logp"] = pl.col("cand_logp").list.eval(wrong(pl.element())).list.any()
    for name, column in is_wrong.items():
        _refuse(units, name, units.select(column).to_series(), "missing, NaN or +inf", "nats or -inf")


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
    `return_to_go`, and `count` and `return_to_go_sum` of the position (`cross_fitting.position_sums`).
    """
    own, others = pl.col("return_to_go"), pl.col("count") - 1
    mean = pl.when(others > 0).then((pl.col("return_to_go_sum") - own) / others).otherwise(0.0)
    return own - mean


def gae(gamma: float, lam: float) -> pl.Expr:
    """GAE: sum of (gamma lam)^(k-t) delta_k for k >= t, delta_t = A_t + gamma V_(t+1) - V_t, and V = 0 after the last unit.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; for distillation a hypothesis of the survey arXiv 2606.22793 without
    experiments. Reads `advantage` and `value` (`cross_fitting.values`); lam 0 is delta_t, lam 1 the discounted return less V_t.
    """
    after = pl.col("value").shift(-1, fill_value=0.0)
    delta = pl.col("advantage") + gamma * after - pl.col("value")
    return _discounted(delta, gamma * lam).over("rollout_id")


CREDITS: dict[str, Estimator] = {
    "immediate": Estimator(lambda options: immediate()),
    "return_to_go": Estimator(lambda options: return_to_go()),
    "discounted": Estimator(lambda options: discounted(options.discount)),
    "baseline": Estimator(
        lambda options: baseline(),
        prepare=lambda units, rollouts, options: units.with_columns(return_to_go=return_to_go()),
        by_position=("return_to_go",),
    ),
    "group": Estimator(
        lambda options: pl.col("group"),
        prepare=lambda units, rollouts, options: group_keys(units, rollouts),
        sums=group_sums,
        estimate=group,
        rollouts=("prompt_id",),
    ),
    "gae": Estimator(
        lambda options: gae(options.discount, options.gae_lambda),
        prepare=lambda units, rollouts, options: value_features(
            units.with_columns(folds_of(units["rollout_id"]), target=discounted(options.discount))
        ),
        sums=value_sums,
        estimate=values,
        units=("cand_logp", "tail_logp"),
    ),
    "residual": Estimator(
        lambda options: pl.col("residual"),
        prepare=lambda units, rollouts, options: residual_keys(units, rollouts),
        sums=residual_sums,
        estimate=residual,
        rollouts=("response_ids",),
    ),
}
"""What computes each `weights.credit`; its meaning and the keys it reads are in `schemas.config.weights.CREDITS`."""


def _estimators(options: Weights) -> dict[str, Estimator]:
    """The estimator of each column of the weights table that has one."""
    return {"credit": CREDITS[options.credit], "weight": SCHEMES[options.scheme], "reward": REWARDS[options.reward]}


def compares_responses(options: Weights) -> bool:
    """Whether a response's weights depend on other responses, so that `weigh` needs sums."""
    return any(estimator.compares_responses for estimator in _estimators(options).values())


def columns_read(options: Weights) -> tuple[list[str], list[str]]:
    """The columns of units and of rollouts that `weigh` takes beside those of advantages; `right` is of schema `outcomes`."""
    estimators = _estimators(options).values()
    units, rollouts = ([*e.units] for e in estimators), ([*e.rollouts] for e in estimators)
    gate = gates.columns_read(options.gate)
    return list(dict.fromkeys(chain(*units))), list(dict.fromkeys(chain(*rollouts, gate)))


def partial_sums(units: pl.DataFrame, rollouts: pl.DataFrame, options: Weights, loss: Loss = PLAIN) -> Sums:
    """First pass over a shard: what it adds to the sums that `weigh` needs, none where no responses are compared.

    Arguments and errors are those of `weigh`.
    """
    return _sums(_prepare(units, rollouts, options, loss), options)


def weigh(
    units: pl.DataFrame, rollouts: pl.DataFrame, options: Weights, sums: Sums | None = None, loss: Loss = PLAIN
) -> pl.DataFrame:
    """Second pass: the weights table of a shard (schema `weights`).

    Credit is formed of advantages clipped to +-`loss.clip`, weights of unclipped ones, and the column `advantage` holds those.
    With `options.truncate` a unit's weight has the factor min(pi_theta / pi_sampler, truncate). Without, it has pi_behavior /
    pi_sampler at the kinds `loss.corrected`: the sampled path's expected gradient, the sum over y of pi_sampler(y) w(y) A(y)
    grad log pi_theta(y), is that of pi_behavior only with that factor, wherever the sampler has mass. It corrects for the unit
    itself; the texts before it stay those that the sampler prefers.

    Args:
        units: schema `units`, whole responses; of what only some estimators read, the columns that `columns_read` names.
        rollouts: as `advantages` takes it, and likewise.
        options: section `weights` of the config.
        sums: `partial_sums` of all shards that are compared, added; None: `units` are all there are.
        loss: what the weights are for; by default a loss that neither clips nor is corrected.
    Raises:
        OpdError: a log-prob of a unit that is not masked is missing, NaN or infinite; names column, rollout and count.
    """
    table = _prepare(units, rollouts, options, loss)
    sums = _sums(table, options) if sums is None else sums
    if "position" in sums:
        table = table.join(sums["position"], on="unit", how="left", maintain_order="left")
    for name, estimator in _estimators(options).items():
        seen = _seen(table, name)
        if estimator.estimate:
            seen = seen.with_columns(estimator.estimate(seen, sums))
        table = table.with_columns(seen.with_columns(estimator.value(options).alias(name))[name])
    if options.truncate is not None:
        table = table.with_columns(weight=pl.col("weight") * truncated(options.truncate))
    elif loss.corrected:
        table = table.with_columns(weight=pl.col("weight") * corrected(loss.corrected))
    table = gates.gated(table, rollouts, options.gate).with_columns(reference_logp=_reference(units, rollouts))
    floats = [c.name for c in WEIGHTS if c.name not in ("rollout_id", "unit")]
    return table.select("rollout_id", "unit", pl.col(floats).cast(pl.Float32))


def _reference(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.Series:
    """Sum of the reference policy's log-probs over each unit, nats; null when masked, or where `rollouts` has none.

    Raises OpdError as `advantages` does.
    """
    if "reference_logp" not in rollouts.columns:
        return pl.Series([None] * len(units), dtype=pl.Float64)
    logp = _unit_sums(units, rollouts, "reference_logp")
    _refuse(units, "reference_logp", ~logp.is_finite(), "missing, NaN or infinite", "finite nats")
    return units.select(pl.when(~MASKED).then(pl.lit(logp))).to_series()


def _prepare(units: pl.DataFrame, rollouts: pl.DataFrame, options: Weights, loss: Loss) -> pl.DataFrame:
    """Units with advantages, `clipped` ones, and the columns that estimators add to them."""
    table = advantages(units, rollouts).with_columns(clipped=pl.col("advantage").clip(-loss.clip, loss.clip))
    for name, estimator in _estimators(options).items():
        if estimator.prepare:
            added = estimator.prepare(_seen(table, name), rollouts, options)
            table = table.with_columns(added.select(pl.exclude(table.columns)))
    return table


def _seen(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """The table as the estimator of a column sees it: `advantage` is clipped where credit is formed of it."""
    return table.with_columns(advantage="clipped") if name == "credit" else table


def _sums(table: pl.DataFrame, options: Weights) -> Sums:
    estimators = _estimators(options)
    sums: Sums = {}
    if by_position := [name for estimator in estimators.values() for name in estimator.by_position]:
        sums["position"] = position_sums(table, by_position)
    for name, estimator in estimators.items():
        if estimator.sums:
            sums |= estimator.sums(_seen(table, name))
    return sums


@dataclass(frozen=True)
class Summary:
    """Sums of weights tables, which add up over shards, and their figures; `pipeline.measure.diagnostics` has many more.

    Attributes:
        responses: number of responses, those without any unit included.
        incomparable: responses of them that have no unit, or masked ones only: they carry no loss.
        units: number of rows, masked ones included.
        advantage: nats, sum of A.
        weight, weight_squared: sums of w and of w^2.
        warped: responses whose sampler was another distribution than the model's, and whose log-probs under it are kept.
        right, wrong: judged responses; neither where outcomes aren't read, or can't be told.
        rewarded: responses whose reward isn't 0.
    """

    responses: int = 0
    incomparable: int = 0
    units: int = 0
    advantage: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0
    warped: int = 0
    right: int = 0
    wrong: int = 0
    rewarded: int = 0

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @property
    def advantage_mean(self) -> float:
        """nats per unit."""
        return self.advantage / max(1, self.units)

    @property
    def ess(self) -> float:
        """Effective sample size of the weights as a share of the units, (sum w)^2 / (n sum w^2); 0 without weights."""
        return self.weight**2 / (self.units * self.weight_squared) if self.weight_squared else 0.0


def summary(weights: pl.DataFrame, responses: int, warped: int = 0, right: pl.Series | None = None) -> Summary:
    """Summarise a weights table (schema `weights`) of so many responses, so many `warped`; `right` of each where judged."""
    w = weights["weight"].cast(pl.Float64).to_numpy()
    compared = weights.filter(pl.col("student_logp").is_not_null())["rollout_id"].n_unique()
    judged = pl.Series([], dtype=pl.Boolean) if right is None else right.drop_nulls()
    return Summary(
        responses=responses,
        incomparable=responses - compared,
        units=len(weights),
        advantage=weights.select(pl.col("advantage").cast(pl.Float64).sum()).item(),
        weight=float(w.sum()),
        weight_squared=float(w @ w),
        warped=warped,
        right=int(judged.sum()),
        wrong=int((~judged).sum()),
        rewarded=weights.filter(pl.col("reward") != 0)["rollout_id"].n_unique(),
    )
