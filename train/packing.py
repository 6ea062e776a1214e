"""Padding-free forward passes: the real tokens of a batch in one row, the start that all responses share once before them.

A response attends to that start and to itself alone, and nothing but attention looks at other tokens in the models that this is
for, so hidden states are those of the padded batch. What all responses make of the start comes back to it in backward.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.infer.prefix import pays

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
    start: int,
    lengths: list[int],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself, and to the first row's `start`, without a mask: its cost is a sum of squared
    lengths, no square of a sum.

    (1, heads, T, d) each, `key` and `value` perhaps of fewer heads -> (1, T, heads, d). `lengths` add up to T.
    """
    found = []
    for row, (q, k, v) in enumerate(zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)):
        before = start if row else 0
        if before:
            # PyTorch's causal kernel takes queries for the first positions: zeros stand for the start's, and are dropped.
            q = torch.nn.functional.pad(q, (0, 0, before, 0))  # noqa: PLW2901
            k, v = torch.cat([key[:, :, :start], k], 2), torch.cat([value[:, :, :start], v], 2)  # noqa: PLW2901
        attended = sdpa_attention_forward(module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        found.append(attended[:, before:])
    return torch.cat(found, 1), None


AttentionInterface.register(PACKED, attend)


def packed(model: Any) -> bool:
    """Whether `pack` was here."""
    return bool(model.config.get_text_config()._attn_implementation == PACKED)


def packed_body(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of right-padded rows, those of a start that all rows share once, where that pays.

    Args:
        ids, mask: int64 (B, T).
    Returns:
        hidden states (tokens, d); int64 (B, T), where among them that of each real token is.
    """
    real = mask.bool()
    shared = int(((ids == ids[0]) & real).all(0).cumprod(0).sum())
    shared = min(shared, int(mask.sum(1).min()) - 1)
    shared = shared if pays(shared, len(ids), int(mask.sum())) else 0
    kept = real.clone()
    kept[1:, :shared] = False
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    at = (kept.flatten().cumsum(0) - 1).view_as(ids)
    at[:, :shared] = positions[0, :shared]
    hidden: torch.Tensor = model.base_model(
        input_ids=ids[kept][None],
        position_ids=positions[kept][None],
        use_cache=False,
        start=shared,
        lengths=kept.sum(1).tolist(),
    ).last_hidden_state[0]
    return hidden, at


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
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 7, 0]], device=model.device)
    mask = torch.ones_like(ids)
    mask[1, 4] = 0
    with torch.inference_mode():
        padded = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        model.set_attn_implementation(PACKED)
        try:
            hidden, at = packed_body(model, ids, mask)
            same = torch.allclose(hidden[at[mask.bool()]].float(), padded.float(), atol=2e-2, rtol=2e-2)
        except (TypeError, ValueError, RuntimeError):
            same = False
    if not same:
        model.set_attn_implementation(before)
        return f"{type(model).__name__} mixes tokens by more than attention"
    return None
