"""Jobs beside each other on a machine with several GPUs, whose names the environment gives, so that none is needed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

JOB = """
import os, sys
from stages.run.processors import take_gpus
take_gpus(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., tuple[list[str], subprocess.Popen[str]]]]:
    """Starts a job that takes so many GPUs and stays: which it sees then, after what it told; its process."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int, seen: str = "4,MIG-5/1/0", **environment: str) -> tuple[list[str], subprocess.Popen[str]]:
        about = os.environ | {"CUDA_VISIBLE_DEVICES": seen, "TMPDIR": str(tmp_path)} | environment
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, "-c", JOB, str(count)], env=about, text=True, **pipes)
        started.append(process)
        assert process.stdout is not None
        lines = [process.stdout.readline().strip()]
        while " " in lines[-1]:
            lines.append(process.stdout.readline().strip())
        return lines, process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_each_job_has_gpus_of_its_own(job: Callable[..., tuple[list[str], subprocess.Popen[str]]]) -> None:
    """Until it ends, killed too. A job for which none is left shares them all, and says so; those of a scheduler or of torchrun
    are left as they are."""
    first, killed = job(1)
    assert first == ["4"]
    assert job(1)[0] == ["MIG-5/1/0"]
    assert job(1)[0] == ["1 of 2 GPUs wanted, 0 are free of other jobs: it shares them", "4,MIG-5/1/0"]
    assert job(1, seen="4")[0] == ["4"]
    assert job(1, TORCHELASTIC_RUN_ID="some", LOCAL_RANK="1")[0] == ["4,MIG-5/1/0"]
    killed.kill()
    killed.wait()
    assert job(1)[0] == ["4"]


def test_an_engine_over_several_gpus_takes_them_together(
    job: Callable[..., tuple[list[str], subprocess.Popen[str]]],
) -> None:
    """Or none of them, all that there are too; a process of torchrun the one of its rank."""
    assert job(2, seen="0,1,2")[0] == ["0,1"]
    assert job(2, seen="0,1,2")[0] == ["2 of 3 GPUs wanted, 1 are free of other jobs: it shares them", "0,1,2"]
    assert job(1, seen="0,1,2")[0] == ["2"]
    job(2, seen="7,8")
    assert job(1, seen="7,8")[0] == ["1 of 2 GPUs wanted, 0 are free of other jobs: it shares them", "7,8"]
    job(1, seen="9,10", TORCHELASTIC_RUN_ID="some", LOCAL_RANK="0")
    assert job(1, seen="9,10")[0] == ["10"]
