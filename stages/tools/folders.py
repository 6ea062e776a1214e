"""Runs as folders: what commands open that are given a run's folder instead of its config."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.store.shards import Shard, manifest_path, open_shard
from schemas.config import Config, load_config
from schemas.errors import OpdError
from stages.run.run import MADE_FROM, Phase, Place, Run, run_of

RunsArgument = Annotated[
    list[Path], typer.Argument(help="folders of runs, or names of runs below `runs`", metavar="RUN...")
]


def open_folder(path: Path) -> Run:
    """The run that lies in a folder, or under that name below `runs`. Raises OpdError where there is none."""
    for root in (path, Path("runs") / path):
        if (root / "config.yaml").is_file():
            config = load_config(root / "config.yaml")
            return Run(root, config, config)
    raise OpdError(f"{path}: no run here (it has no config.yaml); give a run's folder, such as runs/default")


def from_anywhere(config: Config) -> dict[str, Any]:
    """A config's values with its local files and its cache named by absolute paths, for a working directory of one's own."""

    def here(source: str) -> str:
        path = Path(source).expanduser()
        return str(path.absolute()) if path.exists() else source

    values = config.model_dump(mode="json")
    values["cache"] = str(run_of(config).cache)
    for key in ("reuse", "cache_keys"):
        values[key] = [here(given) for given in getattr(config, key)]
    places = [(values["student"], "model"), (values["teacher"], "model"), (values["prompts"], "source")]
    for held, key in (*places, *((one, "source") for one in values["evaluate"]["also"].values())):
        held[key] = here(held[key])
    return values


def places(phase: Phase, table: str) -> list[Place]:
    """The places of a phase that have a table, whatever the config says there should be."""
    shards = sorted((phase.folder / table).glob("*.parquet"))
    return [Place(phase, int(path.stem)) for path in shards if path.stem.isdigit() and manifest_path(path).exists()]


def opened(place: Place, table: str) -> Shard:
    """A table of a place, every byte of it checked, and that it was made from what lies there; not that the config is still
    read as it was then, which a later version may do otherwise. Raises OpdError as `open_shard` does."""
    return open_shard(place.path(table), table, inputs=place.inputs(table) if table in MADE_FROM else {})


def files_of(folder: Path) -> list[Path]:
    """All files and links below a folder, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file())
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
