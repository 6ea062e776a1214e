"""Checkpoints: a `save_pretrained` folder for users, the optimiser's state beside it for us. All safetensors, all atomic."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.models import ModelRef, reference
from pipeline.shards import publish, sync_folder
from schemas.config import Train
from schemas.errors import OpdError
from train.adapters import attach


def save_state(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able description to one safetensors file, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with publish(path) as temporary:
        try:
            save_file(contiguous, temporary, {"opd": json.dumps(about, sort_keys=True)})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OpdError(f"{path}: cannot write: {error}") from error


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors and the description that `save_state` wrote. Raises OpdError when the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["opd"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise OpdError(f"{path}: this training state is damaged; delete it to train the round again") from error
    return tensors, about


def trained(model: Any, tensors: dict[str, torch.Tensor], settings: Train) -> Any:
    """The model that a state stands for: its average with `train.ema`, its adapters merged with `train.lora`.

    Args:
        model: what the training of `tensors` began with; it is changed.
    """
    adapters = attach(model, settings.lora) if settings.lora else None
    kind = "ema" if settings.ema else "master"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = tensors[f"{kind}/{name}"].to(parameter.device)
            parameter.data = value if adapters else value.to(parameter.dtype)  # adapters merge in float32
    return adapters.merge_and_unload() if adapters else model


def export(model: Any, tokenizer: Any, folder: Path, card: str, source: str) -> ModelRef:
    """Publish a folder that `from_pretrained` loads: weights, tokenizer, generation config and a model card."""
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(card)
        sync_folder(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OpdError(f"{folder}: cannot write: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return reference(source, folder)
