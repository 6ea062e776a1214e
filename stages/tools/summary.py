"""Summary: a finished run's figures once more."""

from pathlib import Path
from typing import Annotated

import typer

from stages.report.page import print_summary
from stages.run.context import DEFAULT_CONFIG
from stages.run.run import open_run


def main(config_file: Annotated[Path, typer.Option("--config")] = DEFAULT_CONFIG) -> None:
    """Print a finished run's figures once more."""
    print_summary(open_run(config_file))
