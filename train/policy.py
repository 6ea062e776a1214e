"""The student's log-probs at aligned units: body on the whole batch, head on response rows only."""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.lm import head
from schemas.tables import STOP_ID
from train.stream import Batch


@dataclass(frozen=True)
class UnitLogps:
    """Student log-probs in nats. `token` (R,) per response token; `unit` (U,) their sum; `cand` (U, K) at its start."""

    token: torch.Tensor
    unit: torch.Tensor
    cand: torch.Tensor


def unit_logps(model: Any, batch: Batch, stop: torch.Tensor) -> UnitLogps:
    """Run the student over a batch.

    Args:
        stop: int64, the student's stop ids; stopping is one event with the log-sum-exp of their log-probs.
    """
    hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    logits = head(model, hidden.flatten(0, 1)[batch.rows]).float()
    log_z = logits.logsumexp(-1)
    stop_logp = logits[:, stop].logsumexp(-1) - log_z

    def pick(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        own = logits[rows, ids.clamp(min=0)] - log_z[rows]
        return torch.where(ids == STOP_ID, stop_logp[rows], own)

    token = pick(torch.arange(len(logits), device=logits.device), batch.targets)
    units = len(batch.unit_row)
    summed = torch.zeros(units + 1, device=token.device).index_add(0, batch.token_unit, token)[:units]
    slots = batch.cand_id.shape[1]
    cand = pick(batch.unit_row[:, None].expand(-1, slots), batch.cand_id)
    return UnitLogps(token, summed, cand)
