"""Memory that training takes beside the model's weights, estimated before the first step. Bytes.

How far it is from what was taken: docs/benchmarks.md.
"""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.infer.memory import kept_per_token
from schemas.config import Train
from train.layers import layers
from train.packing import packed, packed_body
from train.policy import CHUNK_BYTES

FREE_SHARE = 0.9
"""Of what is free, an estimate may take so much before layers are recomputed."""
HEAD_COPIES = 3
"""Arrays of a chunk's logits in its backward pass (`train.policy`)."""


@dataclass(frozen=True)
class Needs:
    """What a rank takes beside its weights.

    Attributes:
        optimiser: masters, their gradients, AdamW's moments and the average, float32.
        activations: what a micro-batch keeps for backward, and the gradients of one layer's.
        recomputed: the same where layers are computed again: their inputs, and one layer's own twice.
        head: a chunk of logits with its gradients, and the head's own gradient twice.
        gathered: of a sharded model, its part of the weights, and what is whole at a time: a layer, the next one and a
            gradient, and all else with its own.
    """

    optimiser: int
    activations: int
    recomputed: int
    head: int
    gathered: int = 0

    def total(self, recompute: bool) -> int:
        """All of it."""
        return self.optimiser + (self.recomputed if recompute else self.activations) + self.head + self.gathered


def needs(model: Any, settings: Train, longest: int, parts: int = 1) -> Needs:
    """What training of a model takes that is not sharded yet.

    Args:
        longest: tokens of the longest prompt and response: a micro-batch of its own where they are more than
            `train.micro_batch_tokens`.
        parts: ranks that it will be sharded over; 1: each holds all of it.
    """
    tokens = max(longest, min(settings.micro_batch_tokens, settings.batch_size * longest))
    text, width = model.config.get_text_config(), model.dtype.itemsize
    blocks = layers(model)
    count = max(1, len(blocks))
    kept = kept_per_token(model, lambda ids, mask: body(model, ids, mask)) * tokens
    inputs = count * tokens * text.hidden_size * width
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings().weight
    of_layers = [sum(p.numel() for p in block.parameters()) * width for block in blocks]
    rest = sum(p.numel() for p in model.parameters()) * width - sum(of_layers)
    return Needs(
        optimiser=int(optimiser_bytes(trained, settings)) // parts,
        activations=int(kept * (1 + 1 / count)),
        recomputed=int(inputs + 2 * kept / count),
        head=logits_bytes(tokens, text.vocab_size) + 2 * head.numel() * width * head.requires_grad,
        gathered=(sum(of_layers) + rest) // parts + 3 * max(of_layers, default=0) + 2 * rest if parts > 1 else 0,
    )


def optimiser_bytes(trained: float, settings: Train) -> float:
    """Masters of so many weights, their gradients, AdamW's moments and the average, float32."""
    return 4 * trained * (4 + (settings.ema is not None))


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """A chunk of a micro-batch's logits with its gradients, float32."""
    return HEAD_COPIES * min(CHUNK_BYTES, 4 * vocabulary * tokens)


def body(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states, with or without padding as the model is set."""
    if packed(model):
        return packed_body(model, ids, mask)[0]
    hidden: torch.Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden
