"""Rollouts: sample the student with its own log-probs, each response from its own random stream."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.infer.forward import body, halving, has_keys, head, pad, select_rows
from pipeline.infer.forward import top_k as likeliest
from pipeline.infer.prefix import aligned_right, prefix_cache, shared_start

DRAWS = 1
"""Raised when the same seeds come to draw other tokens, or other log-probs are kept: what was sampled before is then no longer
what would be."""

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All of PyTorch's attention but cuDNN's, which plans anew for each number of keys: once a token, 70 ms on an H200 where the
step itself takes 26."""


@dataclass(frozen=True)
class Response:
    """One sampled response, the stop token included. Arrays are (tokens,); log-probs in nats (see schema `rollouts`)."""

    ids: np.ndarray
    behavior_logp: np.ndarray
    sampler_logp: np.ndarray
    top_id: np.ndarray
    """int32 (tokens, top_k): the model's likeliest ids at each position."""
    stopped: bool


def seed_of(*parts: object) -> int:
    """A 64-bit seed from names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    stop: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 128,
    top_k: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Response]:
    """Sample one response per prompt.

    Args:
        prompts: token ids of each rendered prompt.
        seeds: one per prompt; the same seed gives the same uniforms whatever the batch around it.
        stop: ids that end a response; stopping is one event, whichever of them is drawn.
        temperature: 0 is greedy.
        top_k: how many of the likeliest ids to record at each position.
        advance: called with the number of finished responses.
    """
    order = np.argsort([len(p) for p in prompts], kind="stable")
    out: dict[int, Response] = {}

    def work(rows: np.ndarray) -> list[Response]:
        texts, own_seeds = [prompts[i] for i in rows], [seeds[i] for i in rows]
        with sdpa_kernel(KERNELS):
            return _sample_batch(model, texts, own_seeds, stop, max_new_tokens, temperature, top_p, top_k)

    cuts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    for rows, batch in halving(cuts, work):
        out |= dict(zip(rows.tolist(), batch, strict=True))
        advance(len(rows))
    return [out[i] for i in range(len(prompts))]


def _sample_batch(
    model: Any,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    stop: np.ndarray,
    steps: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> list[Response]:
    """One response per prompt. A prompt that several rows have is read once, and so is the start that all prompts share."""
    from pipeline.infer.room import make_room  # noqa: PLC0415 - `transformers` takes seconds to import

    rows = len(prompts)
    device = model.device
    uniforms = torch.from_numpy(np.stack([uniforms_of(seed, steps) for seed in seeds]))
    stop_index = torch.from_numpy(stop.astype(np.int64)).to(device)
    first = {prompt.tobytes(): at for at, prompt in reversed(list(enumerate(prompts)))}
    read, copies = np.unique([first[prompt.tobytes()] for prompt in prompts], return_inverse=True)
    ids, mask, cache = _start(model, [prompts[i] for i in read])
    again = torch.from_numpy(copies).to(device)
    drawn = np.full((rows, steps), -1, np.int64)
    behavior, sampler = np.zeros((rows, steps), np.float32), np.zeros((rows, steps), np.float32)
    top_id = np.zeros((rows, steps, top_k), np.int32)
    stopped = np.zeros(rows, bool)
    live = torch.arange(rows, device=device)
    for step in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        seen = mask if cache is None or has_keys(cache) else None
        hidden, cache = body(model, ids, cache, attention_mask=seen, position_ids=positions, use_cache=True)
        hidden = hidden[:, -1]
        if step == 0:
            make_room(cache)
            if len(read) < rows:
                hidden, mask = hidden[again], mask[again]
                select_rows(cache, again)
        logits = head(model, hidden)
        draws = draw(logits, uniforms[live.cpu(), step].to(device), stop_index, temperature, top_p, top_k)
        at = live.cpu().numpy()
        drawn[at, step], top_id[at, step] = draws.token.cpu().numpy(), draws.top_id.cpu().numpy()
        behavior[at, step], sampler[at, step] = draws.logps.cpu().numpy()
        stopped[at] = draws.halts.cpu().numpy()
        keep = torch.nonzero(~draws.halts)[:, 0]
        if len(keep) == 0:
            break
        if len(keep) < len(live):
            select_rows(cache, keep)
        live, ids = live[keep], draws.token[keep, None]
        mask = torch.cat([mask[keep], torch.ones_like(ids)], 1)
    lengths = (drawn >= 0).sum(1)
    return [
        Response(drawn[i, :n].astype(np.int32), behavior[i, :n], sampler[i, :n], top_id[i, :n], bool(stopped[i]))
        for i, n in enumerate(lengths)
    ]


def _start(model: Any, prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What is still to be read of prompts, padded on the left: ids, the mask of these and of all before them, and the keys and
    values of the start that all share, None where it is read with the rest."""
    ids, mask = (t.to(model.device) for t in pad(prompts, left=True))
    shared = shared_start(prompts)
    kept = prefix_cache(model, prompts[0][:shared]) if shared else None
    cache = None if kept is None else aligned_right(kept, (mask == 0).sum(1))
    return ids if cache is None else ids[:, shared:], mask, cache


@dataclass(frozen=True)
class Draws:
    """One token for each of several rows."""

    token: torch.Tensor
    """int64 (rows,)"""
    halts: torch.Tensor
    """bool (rows,): a stop id was drawn."""
    logps: torch.Tensor
    """float32 (2, rows): log-probs of the model and of the sampler; of stopping where it halts."""
    top_id: torch.Tensor
    """int64 (rows, top_k): the likeliest ids."""


def uniforms_of(seed: int, steps: int) -> np.ndarray:
    """float64 (steps,): a response's own random stream, one number per token."""
    return np.random.Generator(np.random.Philox(seed)).random(steps)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, stop: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> Draws:
    """One step of sampling, the same for every engine.

    Args:
        logits: (rows, vocab), as the model gives them.
        uniform: float64 (rows,), what decides each row's token.
        stop: int64 ids that end a response.
    """
    logp = torch.log_softmax(logits.float(), -1)
    token, sampled = _draw(logp, uniform, temperature, top_p)
    halts = torch.isin(token, stop)
    stop_logp = torch.stack([logp[:, stop].logsumexp(1), sampled[:, stop].logsumexp(1)])
    own_logp = torch.stack([t.gather(1, token[:, None])[:, 0] for t in (logp, sampled)])
    top_id = likeliest(logp, top_k)[1] if top_k else token.new_empty(len(token), 0)
    return Draws(token, halts, torch.where(halts, stop_logp, own_logp), top_id)


def _draw(
    logp: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse CDF, and the sampler's log-probs (rows, vocab)."""
    if temperature == 0:
        token = logp.argmax(-1)
        sampled = torch.full_like(logp, -torch.inf).scatter_(1, token[:, None], 0.0)
        return token, sampled
    sampled = logp if temperature == 1 else torch.log_softmax(logp / temperature, -1)
    if top_p < 1:
        sampled = _nucleus(sampled, top_p)
    cdf = sampled.double().exp().cumsum(-1)
    # Scaled to the row's own total, so rounding can't leave the draw past the last token that has mass.
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logp.shape[1] - 1), sampled


def _nucleus(logp: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs (rows, vocab) of the likeliest tokens until they hold `top_p`, normalised; -inf elsewhere.

    A sort of the whole vocabulary takes longer than the model's own step, and most nuclei are small: the likeliest 128 are
    looked at first, and all only where these hold less in some row.
    """
    vocab = logp.shape[1]
    for k in sorted({min(128, vocab), vocab}):
        values, index = likeliest(logp, k)
        share = values.exp()
        before = share.cumsum(-1) - share
        if k == vocab or bool((before[:, -1] + share[:, -1] >= top_p).all()):
            break
    kept = values.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logp, -torch.inf).scatter_(1, index, kept).log_softmax(-1)
