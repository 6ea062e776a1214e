"""The reverse KL of a checkpoint to the teacher on its own held-out rollouts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.measure.answers import bootstrap_ratio
from schemas.config import Config, Strict1to1
from train.policy import unit_logps
from train.recipes import candidate_kl, one_to_one
from train.stream import Triple, batches, count_steps


@torch.inference_mode()
def on_policy_kl(model: Any, stop: np.ndarray, shards: Sequence[Triple], config: Config) -> dict[str, Any]:
    """Reverse KL on the checkpoint's own rollouts, nats per comparable student token.

    `reverse_kl`: at 1:1 units and stops the KL over the teacher's candidates, the realised token and one class for the
    rest (exact up to what that class hides, so a lower bound); at longer units the sampled log-ratio. `sampled_kl`: the
    log-ratio everywhere, unbiased and noisier. Intervals: bootstrap over responses.

    Args:
        model: the checkpoint, a `transformers` model whose head `check_head` knows.
        stop: its stop ids.
        shards: of the phase in which it sampled.
    Raises:
        OpdError: tables are not in step.
    """
    stop_ids = torch.from_numpy(stop.astype(np.int64)).to(model.device)
    size = config.train.batch_size
    steps = batches(shards, size, config.train.micro_batch_tokens, config.seed, range(count_steps(shards, size)))
    exact = Strict1to1(tail="bucket")
    sums: dict[str, list[float]] = {"kl": [], "sampled": [], "tokens": []}
    for step in steps:
        for part in (part.to(model.device) for part in step.parts):
            logps = unit_logps(model, part, stop_ids)
            sampled = logps.unit - part.teacher_logp
            one = one_to_one(part)
            kl = torch.where(one, candidate_kl(logps, part, exact, one), sampled)
            for row in range(len(part.responses)):
                mine = part.response_of_unit == row
                sums["kl"].append(float(kl[mine].sum()))
                sums["sampled"].append(float(sampled[mine].sum()))
                sums["tokens"].append(float(part.s_len[mine].sum()))
    kl_sum, sampled_sum, tokens = (np.array(sums[name]) for name in ("kl", "sampled", "tokens"))
    total = max(1.0, tokens.sum())
    return {
        "reverse_kl": float(kl_sum.sum() / total),
        "reverse_kl_95": bootstrap_ratio(kl_sum, tokens, config.seed),
        "sampled_kl": float(sampled_sum.sum() / total),
        "sampled_kl_95": bootstrap_ratio(sampled_sum, tokens, config.seed),
        "kl_responses": len(tokens),
        "kl_tokens": int(tokens.sum()),
    }
