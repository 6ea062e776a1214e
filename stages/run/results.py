"""What stages left that others read: figures of a phase, times of jobs."""

from pathlib import Path

import polars as pl

from schemas.diagnostics import Diagnostics
from schemas.errors import OpdError, one_line
from stages.run.run import Phase, Run


def read_diagnostics(phase: Phase) -> Diagnostics:
    """What was written. Raises OpdError when it is missing or damaged."""
    path = phase.diagnostics
    try:
        return Diagnostics.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise OpdError(f"{path}: missing; run `python -m stages.diagnostics --phase {phase.name}` first") from error
    except ValueError as error:
        raise OpdError(
            f"{path}: damaged; delete it and run `python -m stages.diagnostics --phase {phase.name}` again"
        ) from error


def timings(run: Run, *prefixes: str) -> dict[str, float]:
    """Wall seconds of the jobs whose names start so, from Snakemake's benchmark files; empty when run by hand."""
    files = sorted((run.root / "timings").glob("*.tsv"))
    return {path.stem: _seconds(path) for path in files if path.stem.startswith(prefixes)}


def _seconds(path: Path) -> float:
    try:
        return float(pl.read_csv(path, separator="\t")["s"][0])
    except (pl.exceptions.PolarsError, LookupError, ValueError, TypeError) as error:
        raise OpdError(f"{path}: no times of Snakemake's: {one_line(error)}; delete it") from error
