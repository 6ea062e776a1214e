"""Room on disk: what a stage is about to write, told and compared with what there is before it begins."""

import math
import shutil
from pathlib import Path
from typing import Any

from pipeline.store.shards import manifest_path, read_manifest
from schemas.config import Train
from schemas.errors import OpdError
from stages.run import console
from stages.run.run import Place

SAID = 100e6
"""Bytes from which on it is told."""


def check_room(folder: Path, needed: float, what: str) -> None:
    """Say how much will be written below a folder, there or not. Raises OpdError where its disk has less room."""
    free = room_below(folder)[1]
    if needed > free:
        raise OpdError(
            f"{folder}: {what} takes about {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left; make room there "
            "and run the same command again"
        )
    if needed >= SAID:
        console.say(f"{what}: will write about {needed / 1e6:,.1f} MB")


def room_below(folder: Path) -> tuple[Path, int]:
    """The nearest folder that is there, itself or above, and the bytes that its disk has left."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there, shutil.disk_usage(there).free


def shard_bytes(place: Place, table: str, responses: int) -> float:
    """Bytes of a shard of so many responses, as large as those of the run's other shards; 0 where there are none yet."""
    for other in (one for phase in place.phase.run.phases for one in phase):
        paths = other.path(table), other.path("rollouts")
        if all(manifest_path(path).exists() for path in paths):
            made, rollouts = map(read_manifest, paths)
            return responses * made.bytes / max(1, rollouts.rows)
    return 0


def training_bytes(model: Any, config: Train, steps: int, existing: Path) -> float:
    """Bytes that a round's training states and checkpoint add to what lies there already.

    The newest state is written before the oldest is removed.

    Args:
        model: in the dtype that it is trained in; the checkpoint's may be smaller.
        steps: that the round may take.
        existing: the folder of its states.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    states = min(config.keep_states + 1, math.ceil(steps / config.save_every))
    there = sum(path.stat().st_size for path in existing.rglob("*.safetensors"))
    checkpoint = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    return max(0.0, states * state_bytes(trained, config) - there) + checkpoint


def state_bytes(trained: float, config: Train) -> float:
    """Bytes of a training state: of each trained weight its master, two moments and with `train.ema` an average, float32."""
    return trained * 4.0 * (4 if config.ema else 3)
