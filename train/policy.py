"""The student's log-probs at aligned units: body on the whole batch, head on compared rows only, a chunk of them at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.infer.forward import head
from schemas.tables import STOP_ID
from train.batch import Batch
from train.packing import packed, packed_body

CHUNK_BYTES = 256 << 20
"""Logits held at once, bytes of float32; backward holds three times as much, and twice the head's weight gradient. Each chunk
adds a whole gradient of the head's weights to that of the others, so that much smaller chunks would cost time."""


@dataclass(frozen=True)
class UnitLogps:
    """Student log-probs in nats. `token` (R,) per response token, 0 at tokens of masked units; `unit` (U,) their sum over
    the unit; `cand` (U, K) at its start. `log_z` (R,) is what they lack to the head's logits, likewise 0."""

    token: torch.Tensor
    unit: torch.Tensor
    cand: torch.Tensor
    log_z: torch.Tensor


def unit_logps(model: Any, batch: Batch, stop: torch.Tensor) -> UnitLogps:
    """Run the student over a batch.

    Tokens of masked units get no logits. Those of the others are made, reduced to the log-probs that are requested, and made
    again in backward, chunk by chunk: memory doesn't grow with tokens times vocabulary. Those of the last chunk, with which
    backward begins, are kept.

    Args:
        stop: int64, the student's stop ids; stopping is one event with the log-sum-exp of their log-probs.
    """
    if packed(model):
        hidden, at = packed_body(model, batch.ids, batch.mask)
        rows = at.flatten()[batch.rows]
    else:
        passed = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        hidden, rows = passed.last_hidden_state.flatten(0, 1), batch.rows
    units, slots = batch.cand_id.shape
    compared = (batch.token_unit < units).nonzero()[:, 0]
    # Requested ids of each response token: its own, and at a unit's start the candidates too (elsewhere id 0, unread).
    requested = batch.cand_id.new_zeros(len(batch.targets), 1 + slots)
    requested[:, 0] = batch.targets
    requested[batch.unit_row, 1:] = batch.cand_id
    logps, log_z = _chunked(model, hidden[rows[compared]], requested[compared], stop)
    found = logps.new_zeros(requested.shape).index_copy(0, compared, logps)
    unit = logps.new_zeros(units).index_add(0, batch.token_unit[compared], logps[:, 0])
    of_tokens = logps.new_zeros(len(requested)).index_copy(0, compared, log_z)
    return UnitLogps(found[:, 0], unit, found[batch.unit_row, 1:], of_tokens)


def _chunked(
    model: Any, hidden: torch.Tensor, ids: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of some ids, STOP_ID among them, in each row, and each row's log Z.

    (rows, d) x (rows, n) -> float32 (rows, n), float32 (rows,).
    """

    def logps(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # One log-softmax and one gather: their backward passes take two arrays of the chunk's size, and no more.
        wanted = torch.cat([ids.clamp(min=0), stop.expand(len(ids), -1)], 1)
        logits = head(model, hidden).float()
        every = logits.log_softmax(-1)
        own, stops = every.gather(1, wanted).split([ids.shape[1], len(stop)], 1)
        # Any id's logit and log-prob differ by log Z. A loss that doesn't read it has no backward pass through it.
        return torch.where(ids == STOP_ID, stops.logsumexp(-1, keepdim=True), own), logits[:, 0] - every[:, 0]

    row_bytes = 4 * model.config.get_text_config().vocab_size
    chunks = max(1, -(-len(hidden) * row_bytes // CHUNK_BYTES))
    *before, last = zip(hidden.chunk(chunks), ids.chunk(chunks), strict=True)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = [
        *(checkpoint(logps, *part, use_reentrant=False, preserve_rng_state=False) for part in before),
        logps(*last),
    ]
    found, log_z = zip(*parts, strict=True)
    return torch.cat(found), torch.cat(log_z)
