"""After a kill: Snakemake's leftovers are cleared, so that the same command simply goes on."""

from pathlib import Path

from filelock import FileLock, Timeout

STATE = Path(".snakemake")


def claim(state: Path = STATE) -> FileLock | None:
    """Take this working directory for a Snakemake run.

    A killed Snakemake leaves its lock and marks the outputs of unfinished jobs as incomplete; the next run would refuse
    to start. Our stages publish complete files under their final names or nothing, so neither says anything: both are
    removed, but only under a lock that the kernel frees when its holder dies, so never those of a run that is alive.

    Returns:
        The lock, to be kept for as long as the process lives; None when another live run holds it (Snakemake's own lock
        then speaks up).
    """
    state.mkdir(exist_ok=True)
    lock = FileLock(state / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    for leftover in ("locks", "incomplete"):
        for path in (state / leftover).rglob("*"):
            if path.is_file():
                path.unlink()
    return lock
