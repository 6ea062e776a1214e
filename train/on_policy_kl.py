"""The reverse KL of a checkpoint to the teacher on its own held-out rollouts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.measure.answers import bootstrap_ratio
from schemas.config import Config, Strict1to1
from train.batch import Batch
from train.packing import pack
from train.policy import UnitLogps, unit_logps
from train.recipes import candidate_kl, one_to_one
from train.staleness import MAX_LOG_RATIO
from train.stream import Triple, batches, count_steps

FIGURES = ("reverse_kl", "sampled_kl", "reverse_kl_bound")


@torch.inference_mode()
def on_policy_kl(model: Any, stop: np.ndarray, shards: Sequence[Triple], config: Config) -> dict[str, Any]:
    """KL(checkpoint || teacher) at the states of the checkpoint's own rollouts, nats per comparable student token.

    `reverse_kl` and `sampled_kl` estimate the same, the mean of log p_S / p_T over what the student says: the latter by what it
    did say, the former by the candidates too (`with_candidates`), which takes noise away. `reverse_kl_bound`: at 1:1
    units and stops the KL over the teacher's candidates, the realised token and one class for the rest, which hides what
    lies within that class; the sampled log-ratio at longer units. Intervals (`_95`): bootstrap over responses.

    Args:
        model: the checkpoint, a `transformers` model whose head `check_head` knows; its passes are packed from now on, as the
            trainer's are, where `pack` can.
        stop: its stop ids.
        shards: of the phase in which it sampled.
    Raises:
        OpdError: tables are not in step.
    """
    pack(model)
    stop_ids = torch.from_numpy(stop.astype(np.int64)).to(model.device)
    size = config.train.batch_size
    steps = batches(shards, size, config.train.micro_batch_tokens, config.seed, range(count_steps(shards, size)))
    sums: dict[str, list[np.ndarray]] = {name: [] for name in (*FIGURES, "tokens")}
    for part in (part.to(model.device) for step in steps for part in step.parts):
        for name, of_units in (of_unit(unit_logps(model, part, stop_ids), part) | {"tokens": part.s_len}).items():
            total = torch.zeros(len(part.responses), dtype=torch.float64, device=model.device)
            sums[name].append(total.index_add(0, part.response_of_unit, of_units.double()).cpu().numpy())
    of_response = {name: np.concatenate(found) for name, found in sums.items()}
    tokens = of_response.pop("tokens")
    found: dict[str, Any] = {}
    for name, nats in of_response.items():
        found[name] = float(nats.sum() / max(1.0, tokens.sum()))
        found[f"{name}_95"] = bootstrap_ratio(nats, tokens, config.seed)
    return found | {"kl_responses": len(tokens), "kl_tokens": int(tokens.sum())}


def of_unit(student: UnitLogps, batch: Batch) -> dict[str, torch.Tensor]:
    """What `on_policy_kl` adds up, by its name: nats (U,) each."""
    log_ratio, one = student.unit - batch.teacher_logp, one_to_one(batch)
    ratio = (student.unit - batch.behavior_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    drawn = batch.cand_id == batch.targets[batch.unit_row][:, None]
    bound = candidate_kl(student, batch, Strict1to1(tail="bucket"), one)
    return {
        "reverse_kl": with_candidates(log_ratio, student.cand, batch.cand_logp, drawn, ratio),
        "sampled_kl": ratio * log_ratio,
        "reverse_kl_bound": torch.where(one, bound, ratio * log_ratio),
    }


def with_candidates(
    log_ratio: torch.Tensor,
    student_cand: torch.Tensor,
    teacher_cand: torch.Tensor,
    drawn: torch.Tensor,
    ratio: torch.Tensor,
) -> torch.Tensor:
    """The sampled log-ratio of a unit with the candidates C at its start as a control variate: the same mean, less variance.

    r (l - 1{y in C} f(y)) + sum_{c in C} p_S(c) f(c),  f(c) = log p_S(c) - log p_T(c),

    l the log-ratio of the realised unit, y its first token, r = p_S / p_sampler of the unit (1 where the student samples from
    itself). The mean of r 1{y in C} f(y) over what may be drawn is the sum, so that what is taken away and what is added
    cancel whatever f is: rounding the candidates costs no bias, and a unit that begins with a candidate but is spelled in
    several tokens none either. Where units have one token each and f is exact it is the exact sum over C and, where y lies
    outside, the sampled log-ratio: Rao-Blackwell for what the candidates tell.

    The mean is over what may be drawn at a unit's start. That is a matter of the past alone between models of one tokenizer;
    between others what follows may move a border, for which `sampled_kl` stands beside.

    Args:
        log_ratio, ratio: (U,), l in nats and r.
        student_cand, teacher_cand: (U, K), nats; -inf in the teacher's unused slots.
        drawn: bool (U, K), the candidate that is y.
    Returns:
        (U,), nats.
    """
    f = torch.where(teacher_cand > -torch.inf, student_cand - teacher_cand, 0.0)
    return ratio * (log_ratio - (f * drawn).sum(-1)) + (student_cand.exp() * f).sum(-1)
