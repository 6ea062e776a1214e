"""Resident memory of this process, from Linux' /proc.

Not `getrusage`: its peak outlives `exec`, so that a child's begins with whatever its parent once had.
"""

from pathlib import Path


def resident() -> float:
    """Bytes resident now."""
    return _status("VmRSS")


def peak() -> float:
    """Bytes resident at most since the program began or `restart_peak` was called."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024.0 * int(line.split()[1])
