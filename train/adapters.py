"""LoRA (arXiv 2106.09685) through `peft`: low-rank updates of frozen weights."""

from typing import Any

from schemas.config import Lora
from schemas.errors import OpdError


def attach(model: Any, lora: Lora) -> Any:
    """Put adapters that change nothing yet into a model, in place, and freeze all else.

    Returns `peft`'s model around it, whose `merge_and_unload` adds them to the weights. Raises OpdError when `peft` is
    missing or the targets don't fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    except ImportError as error:
        raise OpdError("train.lora needs the package peft: pip install 'offline-opd[lora]'") from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    try:
        # Adapters in the model's own dtype, as FSDP wants it: the optimiser's masters are float32 anyway.
        adapted = get_peft_model(
            model,
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets),
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        raise OpdError(f"train.lora.targets: {' '.join(str(error).split())}") from error
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(hasattr(m, "lora_A") for m in embeddings):
        raise OpdError(
            f"train.lora.targets: {targets} names a head or an embedding of {type(model).__name__}, whose weights are one "
            "and the same; leave it out"
        )
    return adapted
