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
import torch.distributed.checkpoint as dcp

from schemas.errors import OpdError
from train.checkpoint import final_state, load_state
from train.states import states

TRAIN = {"batch_size": 13, "micro_batch_tokens": 64, "epochs": 5}
"""20 steps of 40 responses an epoch; every fourth has one response, and so none on the second rank."""
JOBS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False, "train": {"ema": 0.9}},
    "lora": {"train": {"lora": {"rank": 4, "alpha": 8}, "learning_rate": 1e-2}},
    "bfloat16": {"dtype": "bfloat16", "train": {"epochs": 1}},
}
"""What is trained by one process, by two, and by two that share one model."""
BEGUN, RESUMED = 7, 13
"""Steps before which the number of ranks changes: one, two, one."""


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
    """All that is trained here: `<name>-alone` by one rank, `<name>-ddp` and `<name>-fsdp` by two."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.shards(folder)
    many = []
    for name, job in JOBS.items():
        alone(folder, **job, name=f"{name}-alone")
        many += [{**job, "name": f"{name}-{kind}", "parallel": kind} for kind in ("ddp", "fsdp")]
    recomputed = {"gradient_checkpointing": True, "epochs": 1}
    many.append({"name": "recomputed-fsdp", "parallel": "fsdp", "train": recomputed})
    many += [
        {"name": f"packed-{kind}", "parallel": kind, "packed": True, "train": {"epochs": 1}} for kind in ("ddp", "fsdp")
    ]
    alone(folder, name="short-alone", train={"epochs": 1})
    alone(folder, name="begun", until=BEGUN, train={"save_every": BEGUN})
    for kind in ("ddp", "fsdp"):
        shutil.copytree(folder / "begun", folder / f"resumed-{kind}")
        train = {"save_every": RESUMED}
        many.append({"name": f"resumed-{kind}", "parallel": kind, "until": RESUMED, "train": train})
    done = torchrun(folder, many)
    assert done.returncode == 0, done.stderr
    for kind in ("ddp", "fsdp"):
        alone(folder, name=f"resumed-{kind}")
    return folder


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, many: Path, tolerance: float) -> None:
    """Weights, moments and each step's figures."""
    a, b = (final_state(path)[0] for path in (one, many))
    assert a.keys() == b.keys()
    for name in a.keys() - {"rng/cpu"}:
        assert float((b[name] - a[name]).abs().max()) <= tolerance, name
    lines = list(zip(figures(one), figures(many), strict=True))
    assert [x["step"] for x, _ in lines] == list(range(lines[0][0]["steps"]))
    for x, y in lines:
        assert all(x[key] == y[key] for key in ("step", "units", "tokens", "used_share", "learning_rate"))
        close = [key for key in ("loss", "sampled_kl", "divergence", "surrogate", "grad_norm") if key in x]
        assert len(close) > 3
        assert all(y[key] == pytest.approx(x[key], rel=tolerance, abs=tolerance) for key in close)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["tied", "untied", "lora"])
def test_two_ranks_are_one_with_twice_the_accumulation(folder: Path, name: str, kind: str) -> None:
    assert_same_training(folder / f"{name}-alone", folder / f"{name}-{kind}", 1e-5)
    assert len(figures(folder / f"{name}-{kind}")) == 20


@pytest.mark.slow
def test_layers_that_are_sharded_and_recomputed(folder: Path) -> None:
    assert_same_training(folder / "short-alone", folder / "recomputed-fsdp", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_without_padding_are_one_with_it(folder: Path, kind: str) -> None:
    """Micro-batches of both ranks in one row each; every fourth step leaves the second rank none, an idle pass when sharded."""
    assert_same_training(folder / "short-alone", folder / f"packed-{kind}", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_rank_resumes_on_two_and_back(folder: Path, kind: str) -> None:
    assert_same_training(folder / "tied-alone", folder / f"resumed-{kind}", 1e-5)


@pytest.mark.slow
def test_a_state_of_two_ranks_is_one_of_four_and_of_one_to_the_bit(folder: Path) -> None:
    """Each rank writes its own pieces, 97 rows of the vocabulary over 2 and over 4; PyTorch's own reader finds the same."""
    job = {**JOBS["untied"], "copy": "untied-fsdp", "name": "copied-4", "parallel": "fsdp"}
    done = torchrun(folder, [job], count=4)
    assert done.returncode == 0, done.stderr
    ranks_process.copy(folder, {**job, "copy": "copied-4", "name": "copied-1", "parallel": None})
    two, four, one = (states(folder / name)[0] for name in ("untied-fsdp", "copied-4", "copied-1"))
    assert len(list(two.iterdir())) == 2 and len(list(four.iterdir())) == 4 and one.is_file()
    sizes = [path.stat().st_size for path in four.iterdir()]
    assert max(sizes) < 1.2 * min(sizes)
    wanted, about = load_state(two)
    assert len(wanted) > 50 and {name.partition("/")[0] for name in wanted} > {"master", "ema", "exp_avg", "step"}
    for path in (four, one):
        found, told = load_state(path)
        assert told == about and found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    read = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(four)), no_dist=True)
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    (next(four.iterdir())).unlink()
    with pytest.raises(OpdError, match="this training state is damaged"):
        load_state(four)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bfloat16_ranks_agree_as_far_as_their_gradients_are_rounded(folder: Path, kind: str) -> None:
    """Masters move by up to a learning rate of 1e-3 a step, and gradients have 8 bits."""
    one, many = (final_state(folder / f"bfloat16-{name}")[0] for name in ("alone", kind))
    names = [name for name in one if name.startswith("master/")]
    moved = {name.removeprefix("master/"): p for name, p in tiny.model(dtype=torch.bfloat16).named_parameters()}
    start = torch.cat([moved[name.removeprefix("master/")].detach().float().ravel() for name in names])
    a, b = (torch.cat([state[name].ravel() for name in names]) - start for state in (one, many))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("failing", [[1], [0, 1]])
def test_an_error_ends_all_ranks_and_is_told_once(tmp_path: Path, failing: list[int]) -> None:
    tiny.shards(tmp_path)
    done = torchrun(tmp_path, [{"name": "failed", "fail": failing, "parallel": "ddp"}])
    assert done.returncode != 0
    assert done.stderr.count("error: this is wrong\n") == 1
    assert "RuntimeError" not in done.stderr


@pytest.mark.slow
def test_a_damaged_table_that_another_rank_reads_stops_all(tmp_path: Path) -> None:
    """The second rank alone reads the second shard to the last byte; the first one waits for it, and not in vain."""
    tiny.shards(tmp_path)
    path = tmp_path / "units" / "001.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:99] + bytes([good[99] ^ 1]) + good[100:])
    done = torchrun(tmp_path, [{"name": "damaged", "parallel": "ddp"}])
    assert done.returncode != 0 and not (tmp_path / "damaged").exists()
    assert done.stderr.count("001.parquet: damaged, its bytes differ from its manifest") == 1
    assert done.stderr.count("Traceback") == 1  # torchrun's own
