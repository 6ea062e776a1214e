"""A model's layers, as `transformers` knows them: what is recomputed, and what is sharded, at a time."""

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from schemas.errors import OpdError


def layers(model: Any) -> list[Any]:
    """The blocks of a transformer, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: Any) -> None:
    """Keep only the inputs of each layer and compute the rest again in backward: memory for a third more compute.

    `transformers` does so for a layer in training mode. Layers alone are put there, not what is in them, for dropout would
    make another policy than the one that was sampled. Raises OpdError when the architecture has no such layers.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise OpdError(f"train.gradient_checkpointing: {type(model).__name__} does not support it") from error
    for layer in layers(model):
        layer.training = True
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):  # a rate that the layer itself applies
                setattr(layer, name, 0.0)
