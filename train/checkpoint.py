"""Checkpoints: a `save_pretrained` folder for users, the training states beside it for us. All safetensors, all atomic."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.models import ORIGIN, ModelRef, Origin, reference
from pipeline.store.shards import publish, sweep, sync_folder, temporary_name
from schemas.config import Train
from schemas.errors import OpdError
from train.adapters import attach

State = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors and the JSON-able description that was saved with them."""


def save_state(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write tensors, their checksums and a JSON-able description to one safetensors file, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"opd": json.dumps(about, sort_keys=True), "crc32": json.dumps(_checksums(contiguous, about))}
    with publish(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OpdError(f"{path}: cannot write: {error}") from error


def load_state(path: Path) -> State:
    """Read the tensors and the description that `save_state` wrote. Raises OpdError when a byte of the file is damaged."""
    try:
        about, sums = _header(path)
        tensors = load_file(path)
        if sums != _checksums(tensors, about):
            raise ValueError("checksums differ")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise OpdError(f"{path}: this training state is damaged; delete it to train the round again") from error
    return tensors, about


def _header(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Description and checksums, without reading the tensors; safetensors checks that the file has its full length."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["opd"]), json.loads(metadata["crc32"])


def _checksums(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> dict[str, int]:
    """CRC-32 of each tensor's kind, shape and bytes, and of the description: finds damage at memory speed; nothing here guards
    against malice."""
    sums = {"": zlib.crc32(json.dumps(about, sort_keys=True).encode())}
    for name, tensor in tensors.items():
        what = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sums[name] = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, what)
    return sums


def state_path(folder: Path, step: int) -> Path:
    """The state after so many steps of a round; names sort by step."""
    return folder / f"state-{step:08}.safetensors"


def states(folder: Path) -> list[Path]:
    """The states in a folder, the newest (of the most steps) first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def newest_state(folder: Path, identity: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> State | None:
    """The newest intact state of what `identity` names; None when there is nothing to go on from.

    `say` is told of every damaged one that an older one stands in for. Raises OpdError when all that could have been it
    are damaged.
    """
    damaged: list[OpdError] = []
    for path in states(folder):
        try:
            if _header(path)[0]["identity"] != identity:
                continue
        except (SafetensorError, KeyError, ValueError, OSError):
            pass  # what it was can't be told any more
        try:
            found = load_state(path)
        except OpdError as error:
            damaged.append(error)
            continue
        for broken in damaged:
            say(f"{str(broken).split(';', maxsplit=1)[0]}; going on from {path.name} instead")
        return found
    if damaged:
        raise damaged[0]
    return None


def final_state(folder: Path) -> State:
    """The state that a finished round ended with. Raises OpdError when it is missing, damaged or not the round's last."""
    if not (found := states(folder)):
        raise OpdError(f"{folder}: no training state of the round before; train that round again")
    tensors, about = load_state(found[0])
    if about["step"] != about["steps"]:
        raise OpdError(
            f"{found[0]}: this state is of step {about['step']} of {about['steps']}; finish that round before the next"
        )
    return tensors, about


def forget_states(folder: Path, identity: dict[str, Any], step: int, keep: int) -> None:
    """Remove all states but the `keep` newest of `identity` that are not beyond `step`, and what killed writers left."""
    kept = 0
    for path in states(folder):
        try:
            ours = _header(path)[0]["identity"] == identity and path <= state_path(folder, step)
        except (SafetensorError, KeyError, ValueError, OSError):
            ours = False
        if ours and kept < keep:
            kept += 1
        else:
            path.unlink(missing_ok=True)
    for leftover in folder.glob(".state-*.tmp"):
        leftover.unlink(missing_ok=True)


def drop_states(folder: Path) -> None:
    """Remove every state in a folder."""
    for path in states(folder):
        path.unlink(missing_ok=True)


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


def export(model: Any, tokenizer: Any, folder: Path, card: str, source: str, teacher: Origin | None = None) -> ModelRef:
    """Publish a folder that `from_pretrained` loads: weights, tokenizer, generation config, a model card and its teacher."""
    sweep(folder)
    work = temporary_name(folder)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(card)
        if teacher:
            (work / ORIGIN).write_text(teacher.model_dump_json(indent=1) + "\n")
        sync_folder(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OpdError(f"{folder}: cannot write: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return reference(source, folder)
