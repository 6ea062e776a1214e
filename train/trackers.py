"""Where each step's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio; each only when asked for."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from schemas.errors import OpdError
from schemas.manifest import digest

PROJECT = "offline-opd"
Log = Callable[[dict[str, float], int], None]
"""Takes figures by name and the step of the whole run."""


@contextmanager
def trackers(names: Sequence[str], folder: Path, run: str, about: dict[str, Any], part: str = "") -> Iterator[Log]:
    """Open trackers; the same part of a run, opened again, goes on in the same logs.

    Args:
        names: as `train.trackers` takes them.
        folder: the run's; TensorBoard's and wandb's own files go there, trackio keeps its in $TRACKIO_DIR.
        run: its name.
        about: its config. What is called `run` in another folder or with another config is another run.
        part: what of the run counts its own steps from 0, for a log of its own; none: its rounds.
    Yields:
        A function that logs a step to all of them. They are opened at the first one, which says where a log goes on.
    Raises:
        OpdError: a tracker's package is missing, or it can't be opened.
    """
    modules = {name: _module(name) for name in names}
    name = "-".join([run, *([part] if part else []), digest([str(folder.absolute()), about])[:8]])
    with ExitStack() as open_until:
        logs: list[Log] = []

        def log(figures: dict[str, float], step: int) -> None:
            if not logs:
                for tracker, module in modules.items():
                    logs.append(open_until.enter_context(_OPEN[tracker](module, folder, part, name, about, step)))
            for each in logs:
                each(figures, step)

        yield log


def _module(tracker: str) -> Any:
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(tracker, tracker))
    except ImportError as error:
        raise OpdError(
            f"train.trackers: {tracker} needs a package that is not installed: pip install 'offline-opd[trackers]'"
        ) from error


@contextmanager
def _tensorboard(module: Any, folder: Path, part: str, name: str, about: dict[str, Any], step: int) -> Iterator[Log]:
    # A killed run may have logged steps that are taken again: its events from `step` on are not shown.
    with module.SummaryWriter(folder / "tensorboard" / part, purge_step=step) as writer:

        def log(figures: dict[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # else a kill takes steps along whose state was saved

        yield log


@contextmanager
def _wandb(module: Any, folder: Path, part: str, name: str, about: dict[str, Any], step: int) -> Iterator[Log]:
    try:
        run = module.init(project=PROJECT, name=name, id=name, dir=folder, config=about, resume="allow")
    except module.errors.Error as error:
        raise OpdError(
            f"train.trackers: wandb can't be opened: {error}; `wandb login`, or set WANDB_MODE=offline"
        ) from error
    with run:
        yield run.log


@contextmanager
def _trackio(module: Any, folder: Path, part: str, name: str, about: dict[str, Any], step: int) -> Iterator[Log]:
    run = module.init(project=PROJECT, name=name, config=about, resume="allow")
    try:
        yield run.log  # steps that a killed run logged and takes again are there twice, with the same figures
    finally:
        run.finish()


_OPEN: dict[str, Callable[..., Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
