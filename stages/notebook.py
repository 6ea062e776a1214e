"""Offline on-policy distillation from Python: a notebook opens a run, runs one of its stages, or all of it.

    from stages.notebook import open_run, run_stage, run_workflow

    run_workflow("mine.yaml", "--cores", "8")
    run_stage("units", "mine.yaml", phase="round-0", shard=0)
    units = open_run("mine.yaml").phase("round-0")[0].units.read()

Beneath lie the packages `pipeline`, `schemas`, `stages` and `train`, whose modules may be imported by these names.
"""

import importlib
import subprocess
from pathlib import Path
from typing import Any

from schemas.errors import OpdError
from stages.run import run as _run
from stages.run.run import Run
from stages.tools.cli import MODULES, STAGES
from stages.tools.run import snakemake

__all__ = ["OpdError", "Run", "open_run", "run_stage", "run_workflow"]


def open_run(config: str | Path) -> Run:
    """The run of a config: its phases, their shards, its models. Raises OpdError where the config can't be read."""
    return _run.open_run(Path(config))


def run_stage(stage: str, config: str | Path, **options: Any) -> None:
    """Run one stage in this process, as `opd <stage>` does; files that it reads must be there.

    Args:
        stage: as `opd --help` lists them: `rollouts`, `scores`, `units`, ...
        config: the run's YAML file.
        options: of the stage's `main`: `phase` and `shard`, `role`, `round_index`, `checkpoint`, ...
    Raises:
        OpdError: there is no such stage, or what the stage itself refuses.
    """
    if stage not in STAGES:
        raise OpdError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    importlib.import_module(MODULES[stage]).main(config_file=Path(config), **options)


def run_workflow(config: str | Path, *arguments: str) -> None:
    """Run all that is missing, in processes of Snakemake's, as `opd run` does.

    Args:
        config: the run's YAML file.
        arguments: Snakemake's own, such as `--dry-run`.
    Raises:
        OpdError: there is no such file.
        subprocess.CalledProcessError: a job failed; what it said is in runs/<run>/logs.
    """
    command, environment = snakemake(Path(config), arguments)
    subprocess.run(command, env=environment, check=True)
