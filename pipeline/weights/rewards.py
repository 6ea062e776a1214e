"""Rewards: the outcome of a response, 1 if it is right and 0 if not, over those of the phase's other responses to its prompt.

Sums are by prompt, so a response counts in whichever shard it lies. One that can't be judged has no outcome: it is none of the
others, and its reward is null. A response without any unit counts as none.
"""

from collections.abc import Callable

import polars as pl

from pipeline.weights.cross_fitting import Sums, sums_by
from pipeline.weights.estimator import Estimator


def outcome_keys(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add `prompt_id` and `outcome`, float64: 1 right, 0 wrong, null where `right` of `rollouts` is."""
    outcomes = rollouts.select("rollout_id", "prompt_id", outcome=pl.col("right").cast(pl.Float64))
    return units.select("rollout_id").join(outcomes, on="rollout_id", how="left", maintain_order="left")


def outcome_sums(table: pl.DataFrame) -> Sums:
    """Number of judged responses and of right ones by prompt, kind `outcome`; `table` is what `outcome_keys` gives."""
    responses = table.unique("rollout_id", keep="first", maintain_order=True).filter(pl.col("outcome").is_not_null())
    return {"outcome": sums_by(responses, ["prompt_id"], ["outcome"])}


def rloo(table: pl.DataFrame, sums: Sums) -> pl.Series:
    """r_i less the mean r_j of the *other* judged responses to the prompt; 0 where there are none.

    RLOO's leave-one-out baseline (Ahmadian et al., arXiv 2402.14740): it depends on other responses only, so the expected
    gradient stays that of the reward.
    """
    others = pl.col("count") - 1
    mean = (pl.col("outcome_sum") - pl.col("outcome")) / others
    return _with_sums(table, sums).select(
        reward=pl.when(others > 0).then(pl.col("outcome") - mean).otherwise(pl.col("outcome") * 0)
    )["reward"]


def grpo(table: pl.DataFrame, sums: Sums) -> pl.Series:
    """(r_i - mean r) / std r over the judged responses to the prompt; 0 where all of them are alike.

    GRPO's outcome supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.2). The deviation is that of the responses
    themselves: with a share p of right ones a right one has sqrt((1 - p) / p), a wrong one -sqrt(p / (1 - p)).
    """
    share = pl.col("outcome_sum") / pl.col("count")
    deviation = (share * (1 - share)).sqrt()
    return _with_sums(table, sums).select(
        reward=pl.when(deviation > 0).then((pl.col("outcome") - share) / deviation).otherwise(pl.col("outcome") * 0)
    )["reward"]


def _with_sums(table: pl.DataFrame, sums: Sums) -> pl.DataFrame:
    keys = table.select("prompt_id", "outcome")
    return keys.join(sums["outcome"], on="prompt_id", how="left", maintain_order="left")


def _relative(estimate: Callable[[pl.DataFrame, Sums], pl.Series]) -> Estimator:
    return Estimator(
        lambda options: pl.col("reward"),
        prepare=lambda units, rollouts, options: outcome_keys(units, rollouts),
        sums=outcome_sums,
        estimate=estimate,
        rollouts=("prompt_id", "right"),
    )


REWARDS: dict[str, Estimator] = {
    "none": Estimator(lambda options: pl.lit(None, pl.Float64)),
    "rloo": _relative(rloo),
    "grpo": _relative(grpo),
}
"""What computes each `weights.reward`; its meaning is in `schemas.config.weights.REWARDS`."""
