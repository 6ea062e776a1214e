"""Training over torchrun's processes (gloo) against one process: the same steps, states and figures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_process
import tiny
import torch
from safetensors.torch import load_file

TRAIN = {"batch_size": 13, "micro_batch_size": 2, "epochs": 5, "save_every": 1}
"""20 steps of 40 responses an epoch; every fourth has one response, and so none on the second rank."""
LORA = {"lora": {"rank": 4, "alpha": 8}, "ema": 0.9}
JOBS: list[dict[str, Any]] = [
    {"name": "whole"},
    {"name": "untied", "tied": False},
    {"name": "lora", "train": LORA},
    {"name": "bfloat16", "dtype": "bfloat16"},
]
"""What is trained by one process, by two, and by two that share one model."""
RESUMED = (7, 13)
"""Before these steps, the number of ranks changes: one, two, one."""


def torchrun(folder: Path, jobs: list[dict[str, Any]], count: int = 2) -> subprocess.CompletedProcess[str]:
    """Do jobs in `count` processes of one thread each."""
    script = Path(__file__).with_name("ranks_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [{**job, "train": {**TRAIN, **job.get("train", {})}} for job in jobs]
    return subprocess.run(
        [*command, str(script), str(folder), json.dumps(jobs)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def alone(folder: Path, **job: Any) -> None:
    """Do a job here."""
    ranks_process.train(folder, {**job, "train": {**TRAIN, **job.get("train", {})}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is trained here: `<name>-1` by one rank, `<name>-ddp` and `<name>-fsdp` by two."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.shards(folder)
    many = []
    for job in JOBS:
        alone(folder, **{**job, "name": f"{job['name']}-1"})
        many += [{**job, "name": f"{job['name']}-{kind}", "parallel": kind} for kind in ("ddp", "fsdp")]
    checkpointed = {**TRAIN, "gradient_checkpointing": True}
    many.append({"name": "recomputed-fsdp", "parallel": "fsdp", "train": checkpointed})
    alone(folder, name="begun", until=RESUMED[0])
    for kind in ("ddp", "fsdp"):
        shutil.copytree(folder / "begun", folder / f"resumed-{kind}")
        many.append({"name": f"resumed-{kind}", "parallel": kind, "until": RESUMED[1]})
    done = torchrun(folder, many)
    assert done.returncode == 0, done.stderr
    for kind in ("ddp", "fsdp"):
        alone(folder, name=f"resumed-{kind}")
    return folder


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, many: Path, tolerance: float) -> None:
    """Weights, moments and each step's figures."""
    a, b = (load_file(path / "state.safetensors") for path in (one, many))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    lines = list(zip(figures(one), figures(many), strict=True))
    assert len(lines) == 20
    for x, y in lines:
        assert [x[k] for k in ("step", "units", "tokens", "used_share")] == [y[k] for k in ("step", "units", "tokens", "used_share")]
        for key in ("loss", "sampled_kl", "grad_norm"):
            assert y[key] == pytest.approx(x[key], rel=10 * tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["whole", "untied", "lora"])
def test_two_ranks_are_one_with_twice_the_accumulation(folder: Path, name: str, kind: str) -> None:
    assert_same_training(folder / f"{name}-1", folder / f"{name}-{kind}", 1e-5)
