"""A start that many rows share: its keys and values computed once, and what follows it read by the causal kernel."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipeline.infer.forward import body

NAME = "sdpa_after_prefix"


@torch.inference_mode()
def prefix_cache(model: Any, prefix: np.ndarray) -> Any:
    """Keys and values of a prefix that many rows share (see `expand`); None where the model keeps more than those.

    The state of a recurrent or linear-attention layer is not what a model goes on from with several tokens at once: some
    start anew, so models with such layers read each row from its beginning.
    """
    from transformers import DynamicCache  # noqa: PLC0415 - seconds to import
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: PLC0415

    ids = torch.from_numpy(np.asarray(prefix, np.int64))[None].to(model.device)
    kept = body(model, ids, use_cache=True)[1]
    plain = type(kept) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept.layers
    )
    return kept if plain else None


def expand(kept: Any, rows: int) -> Any:
    """A private copy of a prefix cache for a batch of `rows`."""
    private = copy.deepcopy(kept)
    private.batch_repeat_interleave(rows)
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

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(**inputs: Any) -> torch.Tensor | None:
    """The mask of `sdpa`; none where a token sees all before it."""
    from transformers.masking_utils import sdpa_mask  # noqa: PLC0415

    window = inputs.get("local_size")
    whole = inputs.get("allow_is_causal_skip", True) and (window is None or inputs["kv_length"] < window)
    return None if whole and inputs.get("attention_mask") is None else sdpa_mask(**inputs)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """`sdpa`, where queries without a mask are at the last of the keys' positions.

    PyTorch's causal kernel takes them for the first. So zeros stand for the prefix' queries, and what they see is dropped:
    that is a part of attention alone, and of nothing else in the layer.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415

    before = key.shape[2] - query.shape[2] if mask is None and query.shape[2] > 1 else 0
    query = torch.nn.functional.pad(query, (0, 0, before, 0)) if before else query
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0][:, before:], None
