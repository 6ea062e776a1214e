"""Run: the whole workflow, from any folder."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from schemas.config.strict_yaml import read_yaml
from schemas.errors import OpdError
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption
from stages.run.shipped import shipped

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
SAY_WHERE = ("--cores", "-c", "--jobs", "-j", "--profile", "--workflow-profile", "--executor", "-e")
"""Options of Snakemake's that say how much may run at once; without any it is all that this machine has."""
SHORT = re.compile(r"-[cj]\d+$")
"""The same with their number behind them."""
FOLDERS = ("--profile", "--workflow-profile")
"""Those that name a folder, which may be one that ships with us."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(context: typer.Context, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Run the whole workflow on a config in the working directory; all further arguments go to Snakemake.

    `--dry-run` shows what would be done, `--cores 8` bounds it, `--executor slurm --profile profiles/slurm` has a cluster do it
    (a profile that isn't here is looked for among those that ship with us). Files to make come before any options.
    """
    command, environment = snakemake(config_file, context.args)
    os.execve(command[0], command, environment)  # noqa: S606 - so that signals and the exit status are Snakemake's own


def snakemake(config_file: Path, arguments: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that runs the workflow, and its environment. Raises OpdError where the config is not there or no mapping.

    Jobs find the Python that this is, and its packages rather than modules of the same names (`train.py`) in the working
    directory.
    """
    if not config_file.is_file():
        raise OpdError(f"--config {config_file}: no such file; `opd init` writes one")
    if config_file.suffix != ".json" and not isinstance(values := read_yaml(config_file), dict):
        raise OpdError(f"{config_file}: expected a mapping of keys, found {type(values).__name__}")
    folder = shipped()
    given = [_beside(folder, before, argument) for before, argument in zip(["", *arguments], arguments, strict=False)]
    # The config's option would take files to make, which come next, for further configs.
    command = [sys.executable, "-m", "snakemake", "--configfile", str(config_file)]
    command += ["--snakefile", str(folder / "Snakefile")]
    options = given[: given.index("--")] if "--" in given else given
    says = any(option.partition("=")[0] in SAY_WHERE or SHORT.match(option) for option in options)
    if not says and "SNAKEMAKE_PROFILE" not in os.environ:
        command += ["--cores", "all"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    again = shlex.join(["opd", "run", "--config", str(config_file), *arguments])
    return [*command, *given], {**os.environ, "PATH": path, "PYTHONSAFEPATH": "1", console.AGAIN: again}


def _beside(folder: Path, before: str, argument: str) -> str:
    """An argument, where it names a folder that is not here but among what ships, as that one."""
    option, equals, value = argument.partition("=") if argument.startswith(FOLDERS) else (before, "", argument)
    if option not in FOLDERS or not value or Path(value).exists() or not (folder / value).is_dir():
        return argument
    return f"{option}={folder / value}" if equals else str(folder / value)


app.command("run", context_settings=PASSED_ON)(console.reporting(main))
