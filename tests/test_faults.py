"""Faults: a kill at any change to files, a full disk at any, a flipped byte anywhere. `pytest -m faults`, FAULTS=all."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from typer.testing import CliRunner

from pipeline.store.cache import entries, verify
from schemas.errors import OpdError
from stages.tools.cache import app, damage, held
from train.checkpoint import load_state, save_pieces, save_state, state_path

pytestmark = pytest.mark.faults
WHOLE = os.environ.get("FAULTS") == "all"
C = "config.yaml"
JOBS: list[tuple[str, list[Any]]] = [
    ("prompts", [C]),
    ("models", ["student", C]),
    ("fit", [C]),
    ("rollouts", ["round-0", 0, C]),
    ("scores", ["round-0", 0, C]),
    ("units", ["round-0", 0, C]),
    ("weights", ["round-0", C]),
    ("coverage", ["round-0", C]),
    ("train", [0, C]),
    ("train", [1, C]),
    ("evaluate", ["0", C]),
    ("diagnostics", ["round-0", C]),
    ("report", [C]),
]


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


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_a_fault_at_any_change_of_files(made: tuple[Path, Forks], fault: str, tmp_path: Path) -> None:
    """The same command then ends with the same files, and nothing is left behind."""
    folder, run = made
    for name in ("runs", "cache"):
        shutil.copytree(folder / name, tmp_path / name, symlinks=True)
    rng, done, wrong = random.Random(0), Counter[str](), []
    jobs = JOBS if WHOLE else rng.sample(JOBS, 5)
    for stage, arguments in jobs:
        restored(tmp_path)
        status, changes = run(stage, arguments)
        assert status == 0 and changes, (stage, Path("output").read_text())
        expected = files()
        for at in range(1, changes + 1) if WHOLE else sorted(rng.sample(range(1, changes + 1), min(3, changes))):
            restored(tmp_path)
            status, _ = run(stage, arguments, fault, at)
            said = Path("output").read_text().strip().splitlines()
            done[stage] += 1
            if status != (9 if fault == "kill" else 2) and not (fault == "full" and status == 0):
                wrong.append((stage, at, "ended with", status, said[-1:]))
            again, _ = run(stage, arguments)
            if again or files() != expected or left_behind():
                changed = sorted(set(files().items()) ^ set(expected.items()))[:4]
                wrong.append((stage, at, "again", again, Path("output").read_text()[-300:], changed, left_behind()))
    print(f"{sum(done.values())} of {fault}: {dict(done)}; {len(wrong)} wrong")
    assert not wrong, wrong[:6]
    restored(tmp_path)


def test_a_flipped_byte_anywhere_is_found(made: tuple[Path, Forks]) -> None:
    """In each class of file that a run holds or the cache does."""
    rng, done, silent = random.Random(1), Counter[str](), []
    kinds: dict[str, list[Path]] = {}
    for path in held(Path("runs/a")):
        if not path.is_symlink():
            kinds.setdefault(path.parent.name if path.name[0].isdigit() else path.name.split("-0")[0], []).append(path)
    for path in [each for each in Path("runs/a").rglob("*.json") if each.with_suffix(".parquet").exists()]:
        kinds.setdefault("manifests", []).append(path)
    kinds["checkpoint files"] = [
        Path(f"runs/a/round-1/checkpoint/{name}") for name in ("config.json", "model.safetensors")
    ]
    each = 20_000 // len(kinds) + 1 if WHOLE else 12
    for kind, paths in kinds.items():
        for _ in range(each):
            path = rng.choice(paths)
            good = path.read_bytes()
            at = rng.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            named = path.with_suffix(".parquet") if kind == "manifests" else path
            named = Path("runs/a/round-1/checkpoint.json") if kind == "checkpoint files" else named
            done[kind] += 1
            if damage(named) is None:
                silent.append((str(path), at))
            path.write_bytes(good)
    for entry in entries(Path("cache")):
        assert verify(entry) is None
    print(f"{sum(done.values())} flips: {dict(done)}; {len(silent)} silent")
    assert not silent, silent[:8]
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
