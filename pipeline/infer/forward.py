"""Forward passes of a causal language model in two parts, body and head, so that only the rows that matter get logits."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from schemas.errors import OpdError

KEPT = 8
"""Tokens whose keys and values a batch may hold, as a multiple of those that it computes. In all layers a token's take about
what computing it takes, 0.13 MB each in an 8B model; fewer rows at once cost time where a long start is read once for all."""


def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states: (rows, d) -> (rows, vocab), scaled (Cohere, Falcon H1, Granite) or soft-capped (Gemma)
    where the architecture does so."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) not in (None, 1):
            logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) not in (None, 1):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@cache
def _cache_name(kind: Any) -> str:
    """What a model's class calls what it keeps of earlier positions: `cache` since transformers 5.24, which drops
    `past_key_values` in 5.40; that name alone in what vLLM runs with (below 5.20), where `cache` would be ignored, and
    `cache_params` there in a model of recurrent layers alone."""
    known = inspect.signature(kind.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")


def body(model: Any, ids: torch.Tensor, kept: Any = None, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """The model without its head, on new positions.

    Args:
        ids: int64 (rows, positions).
        kept: keys and values of the positions before, which an earlier call returned; None at the start.
        inputs: what else its forward takes.
    Returns:
        Last hidden states (rows, positions, d); keys and values, None without `use_cache`.
    """
    name = _cache_name(model.base_model.__class__)
    out = model.base_model(input_ids=ids, **{name: kept}, **inputs)
    return out.last_hidden_state, out.get(name)


@torch.inference_mode()
def check_head(model: Any, name: str) -> None:
    """Compare `head` with the model's own logits once; an architecture that does something else to them is refused, or that
    has no body to call without its head (Llama 4's text model)."""
    if model.base_model is model:
        raise OpdError(
            f"model {name}: {type(model).__name__} can't be run without its head in this version of `transformers`"
        )
    ids = torch.arange(1, 5, device=model.device)[None]
    ours, theirs = head(model, model.base_model(input_ids=ids).last_hidden_state[0]), model(input_ids=ids).logits[0]
    if not torch.allclose(ours.float(), theirs.float(), atol=1e-2, rtol=1e-2):
        raise OpdError(f"model {name}: {type(model).__name__} changes its logits in a way this version doesn't know")


def batches(lengths: Sequence[int] | np.ndarray, budget: int, before: int = 0) -> Iterator[np.ndarray]:
    """Indices of rows in batches of similar length whose padded size stays within `budget` tokens (one row at least), and
    within KEPT times that with the `before` tokens whose keys and values each row goes on from."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        width = max(1, int(lengths[order[start]]))
        size = max(1, min(budget // width, KEPT * budget // (before + width)))
        yield order[start : start + size]
        start += size


def halving(
    batches: Iterable[np.ndarray],
    work: Callable[[np.ndarray], Any],
    say: Callable[[str], None] = lambda _: None,
    rows: str = "responses",
    alone: str = "out of memory with a single response; use a machine with more, or lower max_new_tokens",
) -> Iterator[tuple[np.ndarray, Any]]:
    """`work` on each batch of row indices; when memory runs out, all that is left to do is cut in half and goes on.

    Args:
        rows: what they are, for people.
        alone: what to say of one that is too much.
    Raises:
        OpdError: one row alone is.
    """
    todo = list(batches)
    while todo:
        batch, *todo = todo
        result = None
        try:
            result = work(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        if result is not None:
            yield batch, result
            continue
        # Outside of `except`, whose traceback would keep the failed batch's tensors alive.
        if len(batch) == 1:
            raise OpdError(alone)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory with {len(batch)} {rows} at once: going on with half as many")
        todo = [half for each in (batch, *todo) for half in np.array_split(each, 2) if len(half)]


def pad(rows: Sequence[np.ndarray], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack ragged id rows.

    Returns:
        int64 (rows, width) ids padded with 0, on the right or the left; int64 mask of the same shape, 1 at real ids.
    """
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def common_start(rows: Sequence[np.ndarray]) -> int:
    """How many leading ids all rows share."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return int(np.argmin(np.append(same, False)))


def has_keys(kept: Any) -> bool:
    """Whether some layer attends to earlier positions, so that what `body` returned goes on with a mask of all of them;
    a model of recurrent layers alone takes one of the new positions."""
    return any(hasattr(layer, "keys") for layer in kept.layers)


def select_rows(kept: Any, rows: torch.Tensor) -> None:
    """Keep only some rows, int64 indices, of what `body` returned; of a recurrent layer's state too."""
    recurrent = any(hasattr(layer, "recurrent_states") for layer in kept.layers)
    (kept.reorder_cache if recurrent else kept.batch_select_indices)(rows)


def top_k(
    logits: torch.Tensor, k: int, group: int = 64, maxima: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k of each row, by falling value: values and int64 indices, both (rows, k).

    A sort of a 262k vocabulary costs more than the matmul that made it. The k largest entries lie in the k groups with
    the largest maxima, so all but k*group entries are dropped after one pass over the row. `maxima`, (rows, vocab //
    group), saves that pass where they are at hand.
    """
    rows, vocab = logits.shape
    groups = vocab // group
    if groups <= 2 * k:
        return logits.topk(k, dim=-1)
    if maxima is None:
        maxima = logits[:, : groups * group].view(rows, groups, group).amax(-1)
    best = maxima.topk(k, dim=-1).indices  # (rows, k)
    # Whole groups are copied: 1.2 to 1.6 times as fast, all in all, as a gather by single ids.
    found = logits[:, : groups * group].unflatten(1, (groups, group))[
        torch.arange(rows, device=best.device)[:, None], best
    ]
    values, where = torch.cat([found.flatten(1), logits[:, groups * group :]], 1).topk(k, dim=-1)
    in_rest = where - k * group
    index = best.gather(1, (where // group).clamp(max=k - 1)) * group + where % group
    return values, torch.where(in_rest >= 0, groups * group + in_rest, index)
