"""Where the training states of a round lie; nothing here reads one, so that nothing here imports torch."""

import shutil
from pathlib import Path

SUFFIX, STATES = ".safetensors", "states"


def state_path(folder: Path, step: int) -> Path:
    """The state after so many steps of a round, as a file; names sort by step. States have a folder of their own."""
    return folder / STATES / f"state-{step:08}{SUFFIX}"


def states(folder: Path) -> list[Path]:
    """The states in a folder, the newest (of the most steps) first."""
    return sorted((folder / STATES).glob("state-*"), key=lambda path: path.stem, reverse=True)


def forget(state: Path) -> None:
    """Remove a state, at once."""
    if state.is_dir():
        gone = state.with_name(f".{state.name}.gone.tmp")  # half a folder must not be taken for a state
        shutil.rmtree(gone, ignore_errors=True)
        state.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        state.unlink(missing_ok=True)


def drop_states(folder: Path) -> None:
    """Remove every state in a folder, and what killed writers left."""
    for path in states(folder):
        forget(path)
    sweep_states(folder / STATES)


def sweep_states(states: Path) -> None:
    """Remove what killed writers left among states; safetensors itself writes under a name like `.tmpMqnJWX`."""
    for leftover in (path for pattern in (".state-*.tmp", ".tmp*") for path in states.glob(pattern)):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
