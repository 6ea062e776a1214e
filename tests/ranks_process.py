"""One of torchrun's processes: trains the tiny model as a JSON list of jobs says. Run by test_distributed."""

import json
from pathlib import Path
from typing import Any

import test_train
import tiny
import torch

from pipeline.store.shards import open_shard
from schemas.errors import OpdError
from stages.run import console
from train.adapters import attach
from train.checkpoint import final_state
from train.distributed import is_sharded, processes, rank, ranks, shard, together
from train.layers import recompute
from train.loop import keep_state
from train.optimiser import MasterAdamW
from train.packing import pack


class Interrupted(Exception):
    """A job's last step was taken."""


def train(folder: Path, job: dict[str, Any]) -> None:
    """Train to the end, or to the step before `until`, from whatever state lies in the job's folder."""
    settings = test_train.config(**job["train"])
    model = tiny.model(tied=job.get("tied", True), dtype=getattr(torch, job.get("dtype", "float32")))
    if settings.train.lora:
        attach(model, settings.train.lora)
    if job.get("packed"):
        assert pack(model) is None
    if settings.train.gradient_checkpointing is True:
        recompute(model)
    if job.get("parallel") == "fsdp":
        shard(model)

    def report(figures: dict[str, float]) -> None:
        if figures["step"] == job.get("until"):
            raise Interrupted
        if rank() in job.get("fail", ()):
            raise OpdError("this is wrong")

    tables = ("rollouts", "units", "weights")
    with together():
        shards = [
            tuple(open_shard(folder / name / f"{i:03}.parquet", name, whole=i % ranks() == rank()) for name in tables)
            for i in range(2)
        ]
    try:
        test_train.start(folder / job["name"], shards, settings, model=model, report=report)
    except Interrupted:
        assert "until" in job


def copy(folder: Path, job: dict[str, Any]) -> None:
    """Load the state that another job ended with, over as many ranks as there are now, and save it again."""
    model = tiny.model(tied=job.get("tied", True))
    if job.get("parallel") == "fsdp":
        shard(model)
    optimiser = MasterAdamW(model, test_train.config(**job["train"]).train)
    tensors, about = final_state(folder / job["copy"], together=True)
    optimiser.load(tensors)
    state = optimiser.state() | {"rng/cpu": tensors["rng/cpu"]}
    keep_state(folder / job["name"], state, about, is_sharded(model), keep=1)


def main(folder: Path, jobs: str) -> None:
    """Do the jobs in order, all ranks together."""
    with processes():
        for job in json.loads(jobs):
            (copy if "copy" in job else train)(folder, job)


if __name__ == "__main__":
    console.run(main)
