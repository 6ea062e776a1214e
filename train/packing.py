"""Padding-free forward passes: the real tokens of a batch in one row, in which each response attends to itself alone.

Nothing but attention looks at other tokens in the models that this is for, so hidden states are those of the padded batch.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "opd_packed"
"""What `transformers` knows our attention as."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    lengths: list[int],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each response to itself, without a mask: its cost is the sum of squared lengths, no square of a sum.

    (1, heads, T, d) each, `key` and `value` perhaps of fewer heads -> (1, T, heads, d). `lengths` add up to T.
    """
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    found = [
        sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in parts
    ]
    return torch.cat(found, 1), None


AttentionInterface.register(PACKED, attend)


def packed(model: Any) -> bool:
    """Whether `pack` was here."""
    return bool(model.config.get_text_config()._attn_implementation == PACKED)


def packed_body(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states at the real tokens of right-padded rows, one row after the other.

    Args:
        ids, mask: int64 (B, T).
    Returns:
        (tokens, d), where `mask` is 1.
    """
    real = mask.bool()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[real]
    hidden: torch.Tensor = model.base_model(
        input_ids=ids[real][None], position_ids=positions[None], use_cache=False, lengths=mask.sum(1).tolist()
    ).last_hidden_state[0]
    return hidden


def pack(model: Any) -> str | None:
    """Let a model run without padding from now on, where that is exact. Returns why it is not; None when it is done."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if other := sorted(kinds - {"full_attention", "attention"}):
        return f"{type(model).__name__} has layers of {', '.join(other)}"
    if getattr(config, "sliding_window", None):
        return f"{type(model).__name__} has a sliding window of {config.sliding_window} tokens"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{type(model).__name__} caps its attention's logits"
    if before != "sdpa" or not model._supports_attention_backend:
        return f"{type(model).__name__} has attention of its own ({before})"
    # What no name tells: recurrent layers, positions taken from the mask.
    ids = torch.arange(1, 9, device=model.device).view(2, 4)
    mask = torch.ones_like(ids)
    mask[1, 3] = 0
    with torch.inference_mode():
        padded = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        model.set_attn_implementation(PACKED)
        try:
            same = torch.allclose(packed_body(model, ids, mask).float(), padded.float(), atol=2e-2, rtol=2e-2)
        except (TypeError, ValueError, RuntimeError):
            same = False
    if not same:
        model.set_attn_implementation(before)
        return f"{type(model).__name__} mixes tokens by more than attention"
    return None
