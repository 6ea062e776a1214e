"""Teacher scoring: one pass over the responses, everything kept gathered in the same chunk as the logits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.infer.forward import batches, body, halving, pad, top_k
from pipeline.infer.logit_stats import GROUP, row_statistics
from pipeline.infer.prefix import causal, expand, prefix_cache, shared_start

CHUNK_BYTES = 512 << 20
"""Logits held at once, bytes: the head of a 262k vocabulary reads its weights once for 1024 rows of bfloat16."""


@dataclass(frozen=True)
class Candidates:
    """Which candidates are kept of each row.

    Attributes:
        mass: the likeliest, until they and the stop mass hold this share of the distribution,
        k_max: but no more than this many,
        min_p: and none less likely than this.
        requested: ids to be kept beside them, for each response int (tokens + 1, any); -1 requests nothing.
    """

    mass: float
    k_max: int
    min_p: float = 0.0
    requested: Sequence[np.ndarray] | None = None


@dataclass(frozen=True)
class Scores:
    """Next-token statistics of many rows, one per teacher token and one more at each response's end. Nats.

    Attributes:
        logp: float32 (rows,), log-prob of the realised token; of stopping in end rows.
        entropy, stop_logp, tail_logp: float32 (rows,), see schema `scores`.
        log_z: float32 (rows,), log of the normaliser: what a log-prob lacks to the logit that the head gives.
        cand_id, cand_logp: int32 and float32 (kept,), flat; the likeliest of a row, then the requested ones.
        cand_count: int64 (rows,), candidates kept in each row.
    """

    logp: np.ndarray
    entropy: np.ndarray
    stop_logp: np.ndarray
    tail_logp: np.ndarray
    log_z: np.ndarray
    cand_id: np.ndarray
    cand_logp: np.ndarray
    cand_count: np.ndarray


@torch.inference_mode()
def score(
    rows: Iterable[tuple[np.ndarray, list[torch.Tensor]]],
    logits: Callable[[torch.Tensor], torch.Tensor],
    responses: Sequence[np.ndarray],
    stop: np.ndarray,
    candidates: Candidates,
    advance: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Score responses under a teacher.

    Args:
        rows: hidden states of the responses, batch by batch in any order: indices of responses, and for each of them
            (tokens + 1, d), the state before each token and after the last (`hidden_rows`, or another engine's).
        logits: the model's head, (n, d) -> (n, vocab).
        responses: token ids of each response; may be empty.
        stop: the teacher's stop ids; their mass is one candidate of its own, kept as `stop_logp`.
        candidates: which are kept.
        advance: called with the number of scored teacher tokens.
        say: told when memory runs out in the head, which then takes half as many rows at once.
    Returns:
        Rows of response 0, its end row, rows of response 1, ...
    Raises:
        OpdError: logits of one row are more than memory holds.
    """
    parts: list[dict[str, np.ndarray]] = [{} for _ in responses]
    stop_index = torch.from_numpy(stop.astype(np.int64))
    for batch, hidden in rows:
        counts = [len(part) for part in hidden]
        # An end row has no realised token: -1.
        realised = torch.from_numpy(np.concatenate([np.append(responses[i], -1) for i in batch]))
        ids = candidates.requested
        requested = torch.from_numpy(np.concatenate([ids[i] for i in batch])) if ids is not None else None
        scored = _score_rows(logits, torch.cat(hidden), realised, stop_index, candidates, requested, say)
        split = np.cumsum(counts)[:-1]
        kept_split = np.cumsum(scored["cand_count"])[split - 1]
        for name, values in scored.items():
            pieces = np.split(values, kept_split if name in ("cand_id", "cand_logp") else split)
            for i, piece in zip(batch, pieces, strict=True):
                parts[i][name] = piece
        advance(sum(counts) - len(counts))
    return Scores(**{name: np.concatenate([part[name] for part in parts]) for name in Scores.__dataclass_fields__})


@torch.inference_mode()
def hidden_rows(
    model: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    batch_tokens: int,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """What `score` reads, from a `transformers` model: length-sorted batches, a prefix of all prompts computed once.

    Args:
        prompts, responses: token ids, row by row; a response may be empty, a prompt not.
        batch_tokens: padded tokens per forward pass (see `batches`); halved when memory runs out, which `say` is told.
    """
    shared = shared_start(prompts, sum(map(len, responses)))
    cache = prefix_cache(model, prompts[0][:shared]) if shared else None
    shared = shared if cache is not None else 0
    inputs = [np.concatenate([p[shared:], r]) for p, r in zip(prompts, responses, strict=True)]

    def forward(batch: np.ndarray) -> torch.Tensor:
        # Padded on the right and causal, so no mask: what a token attends to lies before it. Without one, attention
        # takes its causal path, which neither reads a mask nor repeats grouped keys.
        ids, _ = pad([inputs[i] for i in batch])
        kept = expand(cache, len(batch)) if cache is not None else None
        with causal(model):
            return body(model, ids.to(model.device), kept, use_cache=cache is not None)[0]

    for batch, hidden in halving(batches([len(i) for i in inputs], batch_tokens, shared), forward, say):
        ends = [len(inputs[i]) for i in batch]
        yield (
            batch,
            [hidden[j, end - len(responses[i]) - 1 : end] for j, (i, end) in enumerate(zip(batch, ends, strict=True))],
        )


def _score_rows(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    realised: torch.Tensor,
    stop: torch.Tensor,
    candidates: Candidates,
    requested: torch.Tensor | None,
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:
    device = hidden.device
    stop = stop.to(device)

    def work(part: np.ndarray) -> dict[str, np.ndarray]:
        return _score_chunk(
            logits(hidden[part]),
            realised[part].to(device),
            stop,
            candidates,
            None if requested is None else requested[part].to(device),
        )

    alone = "out of memory with the logits of a single token; use a machine with more, or lower scores.batch_tokens"
    attempt = partial(halving, say=say, rows="rows of logits", alone=alone)
    ((_, row_bytes),) = attempt([np.arange(1)], lambda one: logits(hidden[one]).nbytes)
    # Chunks of equal size: a short one costs the head nearly as much as a full one.
    chunks = np.array_split(np.arange(len(hidden)), -(-len(hidden) * row_bytes // CHUNK_BYTES))
    parts = [part for _, part in attempt(chunks, work)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _score_chunk(
    logits: torch.Tensor,
    realised: torch.Tensor,
    stop: torch.Tensor,
    candidates: Candidates,
    requested: torch.Tensor | None,
) -> dict[str, np.ndarray]:
    k = min(candidates.k_max, logits.shape[1] - len(stop))
    stop_logits = logits[:, stop].float()
    own = logits.gather(1, realised.clamp(min=0)[:, None])[:, 0].float()
    requested_logits = None if requested is None else logits.gather(1, requested.clamp(min=0)).float()
    logits[:, stop] = -torch.inf  # the stop set is a candidate of its own
    log_rest, entropy, maxima = row_statistics(logits)
    stop_log_z = stop_logits.logsumexp(1)
    log_z = torch.logaddexp(log_rest, stop_log_z)
    # Entropy of the rest and the stop ids together: what choosing between them adds is in both terms.
    stop_entropy = torch.special.entr((stop_logits - log_z[:, None]).exp()).sum(1)
    entropy = (log_rest - log_z).exp() * (entropy + log_z - log_rest) + stop_entropy
    values, cand_id = top_k(logits, k, GROUP, maxima)
    values = values.float()
    stop_logp = stop_log_z - log_z
    logp = torch.where(realised >= 0, own - log_z, stop_logp)
    cand_logp = values - log_z[:, None]
    share = cand_logp.double().exp()
    before = share.cumsum(1) - share + stop_logp.double().exp()[:, None]
    keep = (before < candidates.mass) & (values > -torch.inf) & (share >= candidates.min_p)
    if requested is not None and requested_logits is not None:
        kept_already = ((requested[:, :, None] == cand_id[:, None, :]) & keep[:, None, :]).any(2)
        keep = torch.cat([keep, (requested >= 0) & ~torch.isin(requested, stop) & ~kept_already], 1)
        cand_id = torch.cat([cand_id, requested], 1)
        cand_logp = torch.cat([cand_logp, requested_logits - log_z[:, None]], 1)
    held = stop_logp.double().exp() + (cand_logp.double().exp() * keep).sum(1)
    # What is left of 1; below float32's resolution of the sum it is rounding, not mass.
    tail = (1 - held).clamp(min=0)
    tail_logp = torch.where(tail > 1e-7, tail, 0).log()
    return {
        "logp": logp.cpu().numpy(),
        "entropy": entropy.cpu().numpy(),
        "stop_logp": stop_logp.cpu().numpy(),
        "tail_logp": tail_logp.float().cpu().numpy(),
        "log_z": log_z.cpu().numpy(),
        "cand_id": cand_id[keep].int().cpu().numpy(),
        "cand_logp": cand_logp[keep].cpu().numpy(),
        "cand_count": keep.sum(1).cpu().numpy(),
    }
