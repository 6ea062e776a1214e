"""Memory of forward passes, estimated before it is taken, and what is free. Bytes.

Nothing here grows with the square of a response, as attention does that is none of PyTorch's kernels. How far the estimates are
from what was taken: docs/benchmarks.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

SHORT = 32
"""Tokens of the shorter of two passes that are measured; the other has twice as many."""
CGROUP = Path("/sys/fs/cgroup")
HEAD_COPIES = 2
"""Arrays of a chunk's logits that scoring holds at once: they and their statistics, or the groups that the likeliest are in."""


def free(device: torch.device) -> int:
    """What this process can still take: of a GPU's memory, or of the machine's and its control group's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    of_machine: int = psutil.virtual_memory().available
    return min(of_machine, _free_of_group(of_machine))


def _free_of_group(otherwise: int) -> int:
    """What a container's limit (cgroup v2) leaves; `otherwise` where there is none. Cached files count as free."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        figures = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return otherwise
    return otherwise if limit == "max" else int(limit) - int(used) + int(figures.get("inactive_file", 0))


def kept_per_token(model: Any, body: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
    """What a pass through a model's layers keeps for its backward pass, a token, weights left out: two short ones tell.

    Args:
        body: runs the model without its head on ids and mask, int64 (1, tokens); what it returns holds what was kept.
    """
    short, longer = (_kept(model, body, tokens) for tokens in (SHORT, 2 * SHORT))
    return (longer - short) / SHORT


def _kept(model: Any, body: Callable[[torch.Tensor, torch.Tensor], Any], tokens: int) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(1, tokens, dtype=torch.int64, device=model.device)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        alive = body(ids, torch.ones_like(ids))  # an address is another tensor's once this one is gone
    del alive
    return sum(found.values())


def scoring(config: Any, width: int, tokens: int, chunk_bytes: int) -> int:
    """What a pass that keeps nothing takes beside the weights: a layer's tensors at a time, the last hidden states, logits.

    Args:
        config: of the text model; of experts those that a token is sent to count.
        width: bytes of a number.
        tokens: of a forward pass, padding included.
        chunk_bytes: logits held at once, at most.
    """
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(
        config, "intermediate_size", 4 * config.hidden_size
    )
    logits = min(chunk_bytes, tokens * config.vocab_size * width)
    return int(tokens * (5 * config.hidden_size + 3 * experts * inner) * width + HEAD_COPIES * logits)
