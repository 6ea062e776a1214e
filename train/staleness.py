"""How far the policy in training is from what was sampled from: r = pi_theta / pi_sampler of units and of responses."""

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.weights.importance import ess

WINDOW = 4
"""Steps whose effective sample sizes are averaged before a round is ended by them: one batch alone may hold an outlier."""
MAX_LOG_RATIO = 20.0
"""nats; a ratio beyond it is no estimate of anything, but its square must stay a number."""


RATIO_SUMS = (
    *(f"{of}_{name}" for of in ("unit", "drift") for name in ("count", "ratio", "ratio_squared")),
    *(f"response_{name}" for name in ("count", "log_ratio", "log_ratio_squared")),
)
"""Names of what `ratio_sums` gives."""


def ratio_sums(
    unit_logp: torch.Tensor, behavior_logp: torch.Tensor, policy_logp: torch.Tensor, response: torch.Tensor
) -> dict[str, float]:
    """What `ratio_figures` needs, as sums that add up over micro-batches and ranks.

    Args:
        unit_logp: (U,), nats, log-probs of the compared units under the policy in training.
        behavior_logp, policy_logp: (U,), nats, under what was sampled from, temperature and top-p applied, and under the policy
            that the round started from.
        response: int64 (U,), the response of each unit.
    """
    log_ratio = (unit_logp.detach() - behavior_logp).double()
    since_start = (unit_logp.detach() - policy_logp).double()
    _, index, units = response.unique(return_inverse=True, return_counts=True)
    per_unit = (
        torch.zeros(len(units), dtype=torch.float64, device=log_ratio.device).index_add(0, index, log_ratio) / units
    )
    sums = {
        "response_count": float(len(units)),
        "response_log_ratio": float(per_unit.sum()),
        "response_log_ratio_squared": float((per_unit * per_unit).sum()),
    }
    for name, value in (("unit", log_ratio), ("drift", since_start)):
        ratio = value.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        sums[f"{name}_count"] = float(len(ratio))
        sums[f"{name}_ratio"] = float(ratio.sum())
        sums[f"{name}_ratio_squared"] = float((ratio * ratio).sum())
    return sums


def ratio_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """`ess` and `chi2` over units; `response_log_ratio` and `response_log_ratio_sd` over responses, per unit.

    `drift_ess` and `drift_chi2` are over units, of the policy in training over the one that the round started from: the same as
    `ess` where that one was sampled as it is, and 1 at the round's first step also where another one was (`reuse`,
    `rollouts.replay`, a temperature or top-p that isn't 1), but not with `train.ema`: there a round starts from the average,
    which was sampled, and trains on from the weights themselves.

    ESS is a share, (sum r)^2 / (n sum r^2); chi^2(pi_theta || pi_sampler) is estimated by n sum r^2 / (sum r)^2 - 1 =
    1 / ESS - 1. Without units ESS is 1: nothing says that the policy has moved.

    The r of a whole response is a product over its units: among a batch's, one soon outweighs all others, and their ESS lies
    at its least value, 1 / n. So a response counts by its log-ratio per unit, l_i = 1/n_i sum_u log r_u over its n_i units,
    nats (the log of GSPO's sequence ratio, arXiv 2507.18071): the mean of l_i, whose negative estimates how far the policy is
    from the one that sampled, and their standard deviation, how unevenly responses feel it. 0 without responses.
    """
    responses = max(1.0, sums["response_count"])
    mean = sums["response_log_ratio"] / responses
    variance = sums["response_log_ratio_squared"] / responses - mean * mean
    found = {"response_log_ratio": mean, "response_log_ratio_sd": math.sqrt(max(0.0, variance))}
    for name, prefix in (("unit", ""), ("drift", "drift_")):
        share = ess(*(sums[f"{name}_{of}"] for of in ("count", "ratio", "ratio_squared")))
        found[f"{prefix}ess"] = 1.0 if share is None else share
        found[f"{prefix}chi2"] = 1 / found[f"{prefix}ess"] - 1
    return found


def is_stale(recent: Sequence[float], min_ess: float | None) -> bool:
    """Whether the mean of the last WINDOW steps' `drift_ess` lies below `min_ess`; fewer steps never are stale."""
    return min_ess is not None and len(recent) >= WINDOW and sum(recent[-WINDOW:]) / WINDOW < min_ess
