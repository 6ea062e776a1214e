"""Faults: a kill at any change to files or inside a write, a full disk likewise, a flipped byte anywhere.

`pytest -m faults` samples them. All of them, with 20,000 flips and 60 kills of whole runs, on two processes:

    FAULTS=all pytest -m faults --dist worksteal
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from typer.testing import CliRunner

from pipeline.models import ModelRef
from pipeline.store.cache import entries, verify
from schemas.errors import OpdError
from stages.run.context import located
from stages.tools.cache import app, damage, held
from train.checkpoint import load_state, save_pieces, save_state
from train.states import state_path

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[1]
WHOLE = os.environ.get("FAULTS") == "all"
C = "config.yaml"
JOBS: dict[str, tuple[str, list[Any], tuple[str, ...]]] = {
    "prompts": ("prompts", [C], ("runs/a/prompts.*",)),
    "models": ("models", ["student", C], ("runs/a/models/student*",)),
    "fit": ("fit", [C], ("runs/a/fit.json",)),
    "rollouts": ("rollouts", ["round-0", 0, C], ("runs/a/round-0/rollouts/000.*", "cache/sampled/*")),
    "scores": ("scores", ["round-0", 0, C], ("runs/a/round-0/scores/000.*", "cache/scores/*", "cache/users/*")),
    "units": ("units", ["round-0", 0, C], ("runs/a/round-0/units/000.*",)),
    "weights": ("weights", ["round-0", C], ("runs/a/round-0/weights*",)),
    "coverage": ("coverage", ["round-0", C], ("runs/a/round-0/coverage.json",)),
    "train 0": ("train", [0, C], ("runs/a/round-0/train", "runs/a/round-0/checkpoint*")),
    "train 1": ("train", [1, C], ("runs/a/round-1/train", "runs/a/round-1/checkpoint*")),
    "evaluate": ("evaluate", ["0", C], ("runs/a/eval-0/result.json", "runs/a/eval-0/answers.*")),
    "diagnostics": ("diagnostics", ["round-0", C], ("runs/a/round-0/diagnostics.json",)),
    "report": ("report", [C], ("runs/a/report.html", "runs/a/summary.json")),
}
"""Stage, arguments, and what it makes: it runs where that is gone, and where it lies already."""


class Forks:
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fault_process.py"))]
        where = {"OPD_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=os.environ | where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def __call__(self, stage: str, arguments: list[Any], fault: str | None = None, at: int = 0) -> tuple[int, int]:
        """Exit status and number of changes."""
        assert self.process.stdin and self.process.stdout
        asked = {"stage": stage, "arguments": arguments, "fault": fault, "at": at}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        status, count = self.process.stdout.readline().split()
        return int(status), int(count)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Forks]]:
    """A finished run, in the working directory."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.made()
        forks = Forks(folder)
        yield folder, forks
        forks.process.kill()
        forks.process.wait()


def files() -> dict[str, str]:
    """All files of run and cache by digest; those whose content holds times without one."""
    found = {}
    for path in (path for root in ("runs", "cache") for path in Path(root).rglob("*")):
        timed = (
            path.name in ("metrics.jsonl", "README.md")
            or path.parent.name == "train"
            or path.suffix in (".lock", ".html")
        )
        if path.is_file() and not path.match("state-*"):
            timed = timed or path.name in ("diagnostics.json", "summary.json") or path.suffix == ".origin"
            found[str(path)] = "" if timed else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def left_behind() -> list[str]:
    return [str(path) for root in ("runs", "cache") for path in Path(root).rglob(".*") if path.suffix != ".lock"]


def restored(kept: Path) -> None:
    for name in ("runs", "cache"):
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(kept / name, name, symlinks=True)


def sizes(since: int) -> set[int]:
    """Sizes in bytes of the files of run and cache that were made since a time, ns."""
    paths = [path for root in ("runs", "cache") for path in Path(root).rglob("*") if path.suffix != ".lock"]
    made = [path.lstat() for path in paths if path.is_file() and not path.is_symlink()]
    return {about.st_size for about in made if about.st_ctime_ns >= since}


def places(fault: str, changes: int, since: int) -> list[int]:
    """Where a fault may come in a job of so many changes to files that began at `since`."""
    if not fault.endswith("inside"):
        return list(range(1, changes + 1))
    return sorted({at for size in sizes(since) for at in (size // 2, size - 1)})


FAULTS = {"kill": (9,), "full": (2, 0), "kill inside": (-signal.SIGXFSZ, 0), "full inside": (2, 0)}
"""How a job may end. What is removed needs no room; a file that holds times may be smaller the next time."""
CASES = [(fault, job, anew) for fault in FAULTS for job in JOBS for anew in (True, False)]


@pytest.mark.parametrize(("fault", "job", "anew"), CASES if WHOLE else random.Random(0).sample(CASES, 10))
def test_a_fault_at_any_change_of_files(
    made: tuple[Path, Forks], fault: str, job: str, anew: bool, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """The same command then ends with the same files, and nothing is left behind."""
    folder, run = made
    stage, arguments, makes = JOBS[job]
    for name in ("runs", "cache"):
        shutil.copytree(folder / name, tmp_path / name, symlinks=True)

    def before() -> None:
        restored(tmp_path)
        for path in (path for pattern in makes if anew for path in Path().glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    wrong = []
    try:
        before()
        began = time.time_ns()
        status, changes = run(stage, arguments)
        assert status == 0 and changes, Path("output").read_text()
        expected, every = files(), places(fault, changes, began)
        tried = every if WHOLE else sorted(random.Random(0).sample(every, min(3, len(every))))
        for at in tried:
            before()
            status, _ = run(stage, arguments, fault, at)
            said = Path("output").read_text().strip().splitlines() if Path("output").exists() else []
            if status not in FAULTS[fault]:
                wrong.append((at, "ended with", status, said[-1:]))
            again, _ = run(stage, arguments)
            if again or files() != expected or left_behind():
                changed = sorted(set(files().items()) ^ set(expected.items()))[:4]
                wrong.append((at, "again", again, Path("output").read_text()[-300:], changed, left_behind()))
        record_property("faults", (f"{fault}, {job}", len(tried), len(wrong)))
        assert not wrong, wrong[:6]
    finally:
        restored(tmp_path)


def flippable(run: Path) -> dict[str, dict[Path, Path]]:
    """By class, the files of a run, its cache and its models, each with the one that `damage` is asked about."""
    kinds: dict[str, dict[Path, Path]] = {}
    for path in (path for path in held(run) if not path.is_symlink()):
        kind = path.parent.name if path.name[0].isdigit() else path.name.split("-0")[0]
        kinds.setdefault(kind, {})[path] = path
    for path in [each for each in run.rglob("*.json") if each.with_suffix(".parquet").exists()]:
        kinds.setdefault("manifests", {})[path] = path.with_suffix(".parquet")
    for entry in entries(Path("cache")):
        kinds.setdefault("cache entries", {})[entry.path] = entry.path
        kinds.setdefault("manifests of cache entries", {})[entry.path.with_suffix(".json")] = entry.path
    for kind, told in (("checkpoints", run / "round-1/checkpoint.json"), ("models", run / "models/student.json")):
        folder = Path(located(told, ModelRef.parse(told.read_text())).path)
        kinds[kind] = {path: told for path in folder.iterdir() if path.name != "README.md"}  # a card is for people
    return kinds


@pytest.mark.parametrize("part", range(4 if WHOLE else 1))
def test_a_flipped_byte_anywhere_is_found(
    made: tuple[Path, Forks], part: int, record_property: Callable[..., None]
) -> None:
    """In each class of file that a run holds, or its cache or models."""
    rng, silent = random.Random(part), []
    kinds = flippable(Path("runs/a"))
    each = 5_000 // len(kinds) + 1 if WHOLE else 12
    for kind, paths in kinds.items():
        before = len(silent)
        for _ in range(each):
            path = rng.choice(list(paths))
            good = path.read_bytes()
            at = rng.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            if damage(paths[path]) is None:
                silent.append((str(path), at))
            path.write_bytes(good)
        record_property("faults", (f"flips, {kind}", each, len(silent) - before))
    assert not silent, silent[:8]
    assert all(verify(entry) is None for entry in entries(Path("cache")))
    assert CliRunner().invoke(app, ["verify", "runs/a"]).exit_code == 0


@pytest.mark.parametrize("in_pieces", [False, True])
def test_every_flipped_bit_of_a_state_is_found(tmp_path: Path, in_pieces: bool) -> None:
    """Of its header too: the description, and the tensors' kinds and shapes."""
    path = state_path(tmp_path, 1)
    about = {"identity": {"x": 1}, "step": 1, "steps": 2, "recent_ess": [0.125], "metrics": "ab"}
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}
    if in_pieces:
        save_pieces(path.with_suffix(""), tensors, about)
        (path,) = path.with_suffix("").iterdir()
    else:
        save_state(path, tensors, about)
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
            with pytest.raises(OpdError, match="this training state is damaged"):
                load_state(path)


@pytest.mark.skipif(not WHOLE, reason="takes a quarter of an hour")
@pytest.mark.timeout(7200)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    """SIGKILL of Snakemake and all its jobs at any moment, sixty times; each run ends as one that nobody killed."""
    monkeypatch.chdir(tmp_path)
    small.laid_out()
    small.written(rollouts={"rounds": 1})
    snakemake = ["snakemake", "-s", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "2"]
    rng, kills, told, expected, longest = random.Random(2), 0, 0, None, 0.0
    while kills < 60 or Path("runs").exists():
        began = time.monotonic()
        with Path("output").open("w") as output:
            process = subprocess.Popen(
                snakemake,
                env=os.environ | {"OPD_CACHE": str(tmp_path / "cache")},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            status = process.wait(rng.uniform(0.02, 0.4) * longest if expected and kills < 60 else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert status == 0, Path("output").read_text()
        longest = longest or time.monotonic() - began
        found = {
            path: sha for path, sha in files().items() if sha and path.endswith((".parquet", ".json", ".safetensors"))
        }
        expected = expected or found
        wrong = len(set(found.items()) ^ set(expected.items())) + len(left_behind())
        record_property("faults", ("kills of a whole run", kills - told, wrong))
        told = kills
        assert not wrong, (sorted(set(found.items()) ^ set(expected.items()))[:4], left_behind())
        shutil.rmtree("runs")
        shutil.rmtree("cache")
