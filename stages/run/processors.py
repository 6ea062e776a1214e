"""Which of a machine's processors a job takes: threads of its CPU, and of several GPUs one that no other job has."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from schemas.config import Model
from stages.run import console

VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[FileLock] = []
"""The GPUs of this process, until it ends, however it does."""


def take(threads: int | None, model: Model | None = None) -> None:
    """Take processors for what runs `model`, before anything runs on them; GPUs if this process is a stage's command.

    Args:
        threads: of the CPU, for tensors; None: torch's own choice.
        model: whose engine may spread it over several GPUs; None: one that takes one.
    """
    if threads:
        import torch  # noqa: PLC0415

        torch.set_num_threads(threads)
    if console.is_stage:
        options = model.engine_options if model else {}
        take_gpus(options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1))


def take_gpus(count: int) -> None:
    """Leave this process, of the GPUs that it sees, only so many which no other job of this user has on this machine.

    Where fewer are free than it takes it sees all, as before, which is told unless there was no choice: a scheduler gives a job
    its own. Of torchrun's processes each has the one that its rank says. CUDA must not have begun, for it keeps to what it saw.
    """
    if not (seen := _seen()):
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank = int(os.environ["LOCAL_RANK"])
        _held.extend(_locked(seen[rank : rank + 1], 1).values())
        return
    wanted = min(count, len(seen))
    mine = _locked(seen, wanted)
    if len(mine) == wanted:
        _held.extend(mine.values())
        if wanted < len(seen):
            os.environ[VISIBLE] = ",".join(mine)
        return
    for lock in mine.values():
        lock.release()
    if wanted < len(seen):
        console.say(f"{count} of {len(seen)} GPUs wanted, {len(mine)} are free of other jobs: it shares them")


def _locked(names: Sequence[str], count: int) -> dict[str, FileLock]:
    """The first so many of these GPUs that no other job holds, or fewer; none where nothing can be locked."""
    mine: dict[str, FileLock] = {}
    folder = Path(tempfile.gettempdir()) / f"opd-gpus-{os.getuid()}"
    try:
        folder.mkdir(exist_ok=True)
        for name in names:
            if len(mine) == count:
                break
            lock = FileLock(folder / f"{name.replace('/', '_')}.lock")  # names of parts of a GPU have slashes
            with suppress(Timeout):
                lock.acquire(timeout=0)
                mine[name] = lock
    except OSError as error:
        console.say(f"{folder}: GPUs can't be locked: {error.strerror}")
    return mine


def _seen() -> list[str]:
    """What names the GPUs that this process sees, as CUDA reads it."""
    if (told := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    import torch  # noqa: PLC0415

    return list(map(str, range(torch.cuda.device_count())))  # asked of the driver; CUDA doesn't begin
