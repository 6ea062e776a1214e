"""Teacher scoring: one pass over the responses, everything kept gathered in the same chunk as the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.lm import batches, common_start, expand, head, pad, prefix_cache, top_k

CHUNK_BYTES = 256 << 20
"""float32 logits held at once, bytes."""


@dataclass(frozen=True)
class Scores:
    """Next-token statistics of many rows, one per teacher token and one more at each response's end. Nats.

    Attributes:
        logp: float32 (rows,), log-prob of the realised token; of stopping in end rows.
        entropy, stop_logp, tail_logp: float32 (rows,), see schema `scores`.
        cand_id, cand_logp: int32 and float32 (kept,), flat, by falling probability within a row.
        cand_count: int64 (rows,), candidates kept in each row.
    """

    logp: np.ndarray
    entropy: np.ndarray
    stop_logp: np.ndarray
    tail_logp: np.ndarray
    cand_id: np.ndarray
    cand_logp: np.ndarray
    cand_count: np.ndarray


@torch.inference_mode()
def score(
    model: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    stop: np.ndarray,
    mass: float,
    k_max: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score responses under a teacher.

    Args:
        prompts, responses: token ids, row by row; a response may be empty.
        stop: the teacher's stop ids; their mass is one candidate of its own, kept as `stop_logp`.
        mass: candidates are kept until they and the stop mass hold this share of the distribution,
        k_max: but no more than this many.
        batch_tokens: padded tokens per forward pass.
        advance: called with the number of scored teacher tokens.
    Returns:
        Rows of response 0, its end row, rows of response 1, ...
    """
    counts = np.array([len(r) + 1 for r in responses])
    first = np.cumsum(counts) - counts
    rows: list[dict[str, np.ndarray]] = [{} for _ in responses]
    # A prefix is worth a cache of its own only when several rows share it; each row keeps one own token at least.
    shared = min(common_start(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    cache = prefix_cache(model, prompts[0][:shared]) if shared > 0 else None
    inputs = [np.concatenate([p[shared:], r]) for p, r in zip(prompts, responses, strict=True)]
    stop_index = torch.from_numpy(stop.astype(np.int64)).to(model.device)
    for batch in batches([len(i) for i in inputs], batch_tokens):
        ids, mask = (t.to(model.device) for t in pad([inputs[i] for i in batch]))
        mask = torch.cat([mask.new_ones(len(batch), shared), mask], 1)
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=expand(cache, len(batch)) if cache is not None else None,
            use_cache=cache is not None,
        ).last_hidden_state
        wanted = [hidden[j, len(inputs[i]) - counts[i] : len(inputs[i])] for j, i in enumerate(batch)]
        # An end row has no realised token: -1.
        realised = np.concatenate([np.append(responses[i], -1) for i in batch])
        scored = _score_rows(model, torch.cat(wanted), torch.from_numpy(realised), stop_index, mass, k_max)
        split = np.cumsum(counts[batch])[:-1]
        kept_split = np.cumsum(scored["cand_count"])[np.cumsum(counts[batch]) - 1][:-1]
        for name, values in scored.items():
            pieces = np.split(values, kept_split if name in ("cand_id", "cand_logp") else split)
            for i, piece in zip(batch, pieces, strict=True):
                rows[i][name] = piece
        advance(int(counts[batch].sum() - len(batch)))
    assert first[-1] + counts[-1] == counts.sum()
    return Scores(**{name: np.concatenate([row[name] for row in rows]) for name in Scores.__dataclass_fields__})


def _score_rows(
    model: Any, hidden: torch.Tensor, realised: torch.Tensor, stop: torch.Tensor, mass: float, k_max: int
) -> dict[str, np.ndarray]:
    vocab = model.get_output_embeddings().weight.shape[0]
    size = max(1, CHUNK_BYTES // (4 * vocab))
    parts = [
        _score_chunk(head(model, hidden[i : i + size]), realised[i : i + size].to(hidden.device), stop, mass, k_max)
        for i in range(0, len(hidden), size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _score_chunk(
    logits: torch.Tensor, realised: torch.Tensor, stop: torch.Tensor, mass: float, k_max: int
) -> dict[str, np.ndarray]:
    k = min(k_max, logits.shape[1] - len(stop))
    stop_logits = logits[:, stop].float()
    own = logits.gather(1, realised.clamp(min=0)[:, None])[:, 0].float()
    logits = logits.float()
    peak = logits.amax(1, keepdim=True)
    weights = (logits - peak).exp_()
    total = weights.sum(1)
    log_z = total.log() + peak[:, 0]
    entropy = log_z - torch.linalg.vecdot(weights, logits) / total
    logits[:, stop] = -torch.inf  # the stop set is a candidate of its own
    values, cand_id = top_k(logits, k)
    stop_logp = stop_logits.logsumexp(1) - log_z
    logp = torch.where(realised >= 0, own - log_z, stop_logp)
    cand_logp = values - log_z[:, None]
    share = cand_logp.double().exp()
    before = share.cumsum(1) - share + stop_logp.double().exp()[:, None]
    keep = (before < mass) & (values > -torch.inf)
    held = stop_logp.double().exp() + (share * keep).sum(1)
    # What is left of 1; below float32's resolution of the sum it is rounding, not mass.
    tail = (1 - held).clamp(min=0)
    tail_logp = torch.where(tail > 1e-7, tail, 0).log()
    return {
        "logp": logp.cpu().numpy(),
        "entropy": entropy.cpu().numpy(),
        "stop_logp": stop_logp.cpu().numpy(),
        "tail_logp": tail_logp.float().cpu().numpy(),
        "cand_id": cand_id[keep].int().cpu().numpy(),
        "cand_logp": cand_logp[keep].cpu().numpy(),
        "cand_count": keep.sum(1).cpu().numpy(),
    }
