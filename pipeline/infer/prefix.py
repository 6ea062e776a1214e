"""A start that many rows share: its keys and values computed once, and what follows it read by the causal kernel."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from pipeline.infer.forward import body, common_start

NAME = "sdpa_after_prefix"
SMALL_MASK = 1 << 22
"""Entries, a byte each, of a mask that costs nothing."""

SHARED_PART = 0.05
"""Of all tokens, at least so many are saved by a prefix computed once, or it isn't: to go on from it takes the keys and values
of the whole batch in all layers, 5 GB for 32k tokens of an 8B model."""


def shared_start(prompts: Sequence[np.ndarray], beside: int = 0) -> int:
    """Leading tokens that all prompts share, where it pays to compute them once; each keeps one own token at least.

    Args:
        prompts: token ids, none empty.
        beside: tokens that are computed beside those of the prompts.
    """
    shared = min(common_start(prompts), min(map(len, prompts)) - 1)
    return shared if pays(shared, len(prompts), sum(map(len, prompts)) + beside) else 0


def pays(shared: int, rows: int, tokens: int) -> bool:
    """Whether a start of `shared` tokens is to be computed once for all rows, which have so many tokens."""
    return shared * (rows - 1) >= SHARED_PART * tokens


@torch.inference_mode()
def prefix_cache(model: Any, prefix: np.ndarray) -> Any:
    """Keys and values of a prefix that many rows share (see `expand`); None where the model keeps more than those.

    The state of a recurrent or linear-attention layer is not what a model goes on from with several tokens at once: some
    start anew, so models with such layers read each row from its beginning.
    """
    from transformers import DynamicCache  # noqa: PLC0415 - seconds to import

    if not _keys_alone(DynamicCache(config=model.config)):  # what most models make, known without a forward pass
        return None
    ids = torch.from_numpy(np.asarray(prefix, np.int64))[None].to(model.device)
    kept = body(model, ids, use_cache=True)[1]
    return kept if type(kept) is DynamicCache and _keys_alone(kept) else None


def _keys_alone(kept: Any) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: PLC0415

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept.layers)


def expand(kept: Any, rows: int) -> Any:
    """A private copy of a prefix cache for a batch of `rows`."""
    private = copy.deepcopy(kept)
    private.batch_repeat_interleave(rows)
    return private


def aligned_right(kept: Any, padding: torch.Tensor) -> Any:
    """A private copy of a prefix cache for rows that are padded on the left.

    A row's positions then stand in one stretch up to its end, as sliding windows, which count columns, want it: column c of
    row i holds the prefix' position c - padding[i], and what is left of position 0 something that a mask hides.

    Args:
        padding: int64 (rows,), columns before a row's first token.
    Returns:
        The cache of as many columns as the prefix has positions; None where a layer's window is shorter than the prefix.
    """
    length, used = kept.get_seq_length(), [layer for layer in kept.layers if layer.is_initialized]
    if any(layer.keys.shape[2] != length for layer in used):
        return None
    at = (torch.arange(length, device=padding.device) - padding[:, None]).clamp(min=0)
    private = copy.deepcopy(kept)
    for layer in private.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (part[0][:, at].transpose(0, 1) for part in (layer.keys, layer.values))
    return private


@contextmanager
def causal(model: Any) -> Iterator[None]:
    """Within it, rows that follow a prefix need no mask where the model's attention is PyTorch's (`sdpa`).

    `transformers` gives them one of (rows, positions) booleans, with which no flash kernel runs and grouped keys are
    repeated for every head: 1 GB at 32k tokens, and as many keys as heads.
    """
    config = model.config
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name)) is not None)]
    if any(part._attn_implementation != "sdpa" for part in parts):
        yield
        return
    _register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415

    AttentionInterface.register(NAME, attend_at_end)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(**inputs: Any) -> torch.Tensor | None:
    """The mask of `sdpa`; none where a token sees all before it."""
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415

    window = inputs.get("local_size")
    whole = inputs.get("allow_is_causal_skip", True) and (window is None or inputs["kv_length"] < window)
    return None if whole and inputs.get("attention_mask") is None else sdpa_mask(**inputs)


def attend_at_end(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """`sdpa`, where queries without a mask are at the last of the keys' positions.

    PyTorch's causal kernel takes them for the first. So zeros stand for the prefix' queries, and what they see is dropped:
    that is a part of attention alone, and of nothing else in the layer. Few queries after a long prefix have a mask that all
    rows share instead, on a CPU, whose flash kernel takes one: they are all that is computed then.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415

    new, seen = query.shape[2], key.shape[2]
    before = seen - new if mask is None and new > 1 else 0
    if before > new and new * seen <= SMALL_MASK and query.device.type == "cpu":
        own = torch.ones(new, seen, dtype=torch.bool).tril(before)
        grouped, scale = query.shape[1] != key.shape[1], options.get("scaling")
        found = scaled_dot_product_attention(query, key, value, own, scale=scale, enable_gqa=grouped)
        return found.transpose(1, 2).contiguous(), None
    query = pad(query, (0, 0, before, 0)) if before else query
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0][:, before:], None
