"""After a kill: Snakemake's leftovers are cleared, so that the same command simply goes on."""

import base64
import fcntl
from pathlib import Path
from typing import IO

STATE = Path(".snakemake")


def claim(state: Path = STATE) -> IO[str]:
    """Take part in this working directory as a Snakemake run; keep the returned handle for as long as the process lives.

    A killed Snakemake leaves its lock and marks of the outputs it was making, and the next run would refuse to start.
    Every live run holds a shared lock, which the kernel frees when its holder dies. Whoever can have it alone is the only
    run alive, and clears up: the lock goes, and a marked output goes with its mark, since it may stem from another config
    than the one that asks now. What made it is in the cache or in a resumable state.
    """
    state.mkdir(exist_ok=True)
    lock = (state / "run.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another run is alive; Snakemake's own lock speaks up if the two want the same files
    else:
        for mark in [path for path in (state / "incomplete").rglob("*") if path.is_file()]:
            output = _marked(mark.relative_to(state / "incomplete"))
            if output is not None and (output.is_file() or output.is_symlink()):
                output.unlink()
            mark.unlink()
        for path in (state / "locks").glob("*"):
            path.unlink()
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _marked(mark: Path) -> Path | None:
    """The output that a mark stands for: its name is the output's path in base64, long ones cut with `@`."""
    try:
        return Path(base64.urlsafe_b64decode("".join(part.removeprefix("@") for part in mark.parts)).decode())
    except ValueError:
        return None
