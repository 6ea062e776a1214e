"""Padding-free forward passes: the real tokens of a batch in one row, the start that all responses share once before them.

A response attends to that start and to itself alone, and nothing but attention looks at other tokens in the models that this is
for, so hidden states are those of the padded batch. What all responses make of the start comes back to it in backward.
"""

from typing import Any

import torch
from transformers import AttentionInterface

from pipeline.infer.prefix import attend_at_end, pays

PACKED = "opd_packed"
"""What `transformers` knows our attention as."""
LIKE, FEW = 7 / 8, 32
"""Rows of so much of the longest row's length, or of so few tokens less, are padded to it and attend in one call: more padding
costs more than a call."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    start: int,
    groups: list[torch.Tensor],
    back: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the start to itself, and of each row to it and to itself, without a mask of all tokens: its cost is a
    sum of squared lengths, no square of a sum.

    (1, heads, T, d) each, `key` and `value` perhaps of fewer heads -> (1, T, heads, d). See `like_lengths` for the rest.
    """

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = attend_at_end(module, q, k, v, None, **options)[0]
        return found.flatten(0, 1)

    found = [attended(query[:, :, :start], key[:, :, :start], value[:, :, :start])] if start else []
    for at in groups:
        q, k, v = (
            x[0].transpose(0, 1).index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
            for x in (query, key, value)
        )
        if start:
            k, v = (
                torch.cat([x[:, :, :start].expand(len(at), -1, -1, -1), own], 2) for x, own in ((key, k), (value, v))
            )
        found.append(attended(q, k, v))
    return torch.cat(found)[back][None], None


def like_lengths(start: int, lengths: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of about the same length in groups, each a call of attention.

    Args:
        start: tokens before all rows.
        lengths: int64 (B,), of the rows, which lie one after another behind them.
    Returns:
        per group int64 (rows, L), where the tokens are, the last one repeated up to the longest row's length; int64 (T,), where
        among the start and the groups' tokens one after another each token is.
    """
    begins = start + lengths.cumsum(0) - lengths
    groups, order, real = [], [torch.arange(start, device=lengths.device)], [lengths.new_ones(start, dtype=torch.bool)]
    rest, told = lengths.sort(descending=True, stable=True)
    while len(rest):
        longest = int(rest[0])
        many = int((rest >= min(LIKE * longest, longest - FEW)).sum())
        column = torch.arange(longest, device=lengths.device)
        groups.append(begins[told[:many], None] + column.minimum(rest[:many, None] - 1))
        order.append(groups[-1].flatten())
        real.append((column < rest[:many, None]).flatten())
        rest, told = rest[many:], told[many:]
    at = torch.cat(real).nonzero()[:, 0]
    return groups, at[torch.cat(order)[at].argsort()]


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
    groups, back = like_lengths(shared, mask.sum(1) - shared)
    hidden: torch.Tensor = model.base_model(
        input_ids=ids[kept][None],
        position_ids=positions[kept][None],
        use_cache=False,
        start=shared,
        groups=groups,
        back=back,
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
