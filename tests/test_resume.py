"""What a killed Snakemake leaves is cleared by the next run, and only when no run is alive."""

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from stages.run.resume import claim

HOLDER = """
import sys
from pathlib import Path
from stages.run.resume import claim
lock = claim(Path(sys.argv[1]))
print(1, flush=True)
input()
"""


def leftovers(folder: Path) -> tuple[Path, Path, Path]:
    """A state folder with a lock and the mark of an unfinished output."""
    state, output = folder / ".snakemake", folder / "runs/x/round-0/units/000.parquet"
    for path in (state / "locks/0.input.lock", output):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    name = base64.urlsafe_b64encode(str(output.relative_to(folder)).encode()).decode()
    mark = state / "incomplete" / f"@{name[:20]}" / name[20:]  # long names are cut so
    mark.parent.mkdir(parents=True)
    mark.write_text("")
    return state, output, mark


def test_leftovers_of_a_dead_run_go_with_their_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state, output, mark = leftovers(tmp_path)
    other = output.with_name("001.parquet")
    other.write_text("finished")
    with claim(state):
        assert not mark.exists() and not output.exists() and not list((state / "locks").iterdir())
        assert other.read_text() == "finished"


def test_those_of_a_live_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the live run was not the first: run A ends, B still lives, C must not clear."""
    monkeypatch.chdir(tmp_path)
    state = tmp_path / ".snakemake"
    command = [sys.executable, "-c", HOLDER, str(state)]
    with claim(state):
        alive = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert alive.stdout and alive.stdout.readline() == "1\n"
    _, output, mark = leftovers(tmp_path)
    with claim(state):
        assert mark.exists() and output.exists() and list((state / "locks").iterdir())
    alive.kill()
    alive.wait()
    with claim(state):
        assert not mark.exists() and not output.exists()
