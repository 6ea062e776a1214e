"""What a run takes over from the runs whose folders its `reuse` names: their rounds, and what it doesn't say itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.config.strict_yaml import read_yaml
from schemas.errors import OpdError

INHERITED = ("seed", "prompts", "teacher", "rollouts", "scores", "evaluate")
"""What must agree with, or was fixed by, the rollouts and scores that are reused. All else is the new run's own."""


def sampled_rounds(run: Path) -> list[Path]:
    """The folders of a run's rounds that have rollouts, in order; the folder itself where it is one round without a run."""
    own = [folder for folder in run.glob("round-*") if folder.name.removeprefix("round-").isdigit()]  # no replayed ones
    folders = sorted(own, key=lambda folder: int(folder.name.removeprefix("round-"))) or [run]
    return [folder for folder in folders if list((folder / "rollouts").glob("*.parquet"))]


def stored_config(values: Mapping[str, Any]) -> Path | None:
    """The resolved config of the first reused run, there or not; None where nothing is reused."""
    reuse = values.get("reuse")
    if isinstance(reuse, list | tuple) and reuse and all(isinstance(given, str) for given in reuse):
        return Path(reuse[0]).expanduser() / "config.yaml"
    return None


def inherit(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config with the sections that it doesn't name as the first reused run has them.

    Two keys are counted anew: without `rollouts`, there are as many rounds as there are to reuse, with as many horizons
    at most, and `evaluate.kl_items` is not taken over, since it would need the teacher. Relative paths in the other
    run's config are told from here.

    Raises:
        OpdError: that run's config can't be read.
    """
    path = stored_config(values)
    missing = [name for name in INHERITED if name not in values]
    if path is None or not missing or not path.is_file():
        return dict(values)
    try:
        stored = read_yaml(path)
    except OpdError as error:
        raise OpdError(f"{where}: reuse: {error}") from error
    sections = ("prompts", "teacher", "rollouts", "scores", "evaluate")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name, {}), dict) for name in sections):
        raise OpdError(
            f"{where}: reuse: {path}: expected a run's config, a mapping of sections; delete it or name another"
        )
    taken = {name: stored[name] for name in missing if name in stored}
    if "rollouts" in taken:
        rounds = sum(len(sampled_rounds(Path(given).expanduser())) for given in values["reuse"])
        horizons = taken["rollouts"].get("max_new_tokens")
        if rounds:
            taken["rollouts"] |= {"rounds": rounds}
        if rounds and isinstance(horizons, list):
            taken["rollouts"]["max_new_tokens"] = horizons[:rounds]
    if "evaluate" in taken:
        taken["evaluate"].pop("kl_items", None)
    also = taken.get("evaluate", {}).get("also", {})
    places = [(taken.get("prompts", {}), "source"), (taken.get("teacher", {}), "model")]
    places += [(held_out, "source") for held_out in also.values()] if isinstance(also, dict) else []
    for section, key in places:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = _from_here(section[key], path.parent)
    return {**values, **taken}


def _from_here(source: str, run: Path) -> str:
    """A source of another run as it is called from here: a file or folder beside <there>/runs/<run>, or a name as it is."""
    there = run.resolve().parent.parent
    path = there / Path(source).expanduser()
    return str(path) if there != Path.cwd() and path.exists() else source
