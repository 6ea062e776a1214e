"""What stages left that others read: figures of a phase, times of jobs."""

import json
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from pipeline.store.records import read_record
from pipeline.store.shards import file_digest, open_shard
from schemas.diagnostics import Diagnostics
from schemas.errors import OpdError, one_line
from schemas.manifest import PHASE
from schemas.outcome import Outcome
from schemas.records import Evaluation, Gate
from stages.run.run import Phase, Run, command

Found = TypeVar("Found", Diagnostics, Gate)


def read_diagnostics(phase: Phase) -> Diagnostics:
    """What was written. Raises OpdError when it is missing or damaged."""
    return _own(phase, phase.diagnostics, phase.record(phase.diagnostics, Diagnostics, "diagnostics"))


def gate_of(phase: Phase) -> Gate | None:
    """What the coverage gate found, where the phase has been through it."""
    path = phase.coverage
    return _own(phase, path, phase.record(path, Gate, "coverage")) if path.exists() else None


def read_evaluation(phase: Phase) -> tuple[Evaluation, pl.DataFrame]:
    """What was measured of a checkpoint, and by which answers."""
    found = phase.record(phase.result, Evaluation, "evaluate")
    answers = open_shard(phase.answers, "answers")
    if found.answers != answers.manifest.sha256 or f"eval-{found.checkpoint}" != phase.name:
        raise OpdError(
            f"{phase.result}: not of the answers that lie beside it; run `{command('evaluate', phase.name)}` again"
        )
    return found, pl.DataFrame(answers.read())


def read_metrics(phase: Phase) -> list[dict[str, Any]]:
    """Figures of the steps that a phase has trained, once it has; else of those so far. Raises OpdError when damaged."""
    if not phase.metrics.exists():
        return []
    again = command("train" if phase.kind == "round" else phase.kind, phase.name)
    if phase.outcome.exists():
        told = read_record(phase.outcome, Outcome, again).metrics
        if told is not None and told != file_digest(phase.metrics):
            raise OpdError(f"{phase.metrics}: damaged or edited, its bytes are not those that {phase.outcome} tells of")
    try:
        return [json.loads(line) for line in phase.metrics.read_text().splitlines()]
    except ValueError as error:
        raise OpdError(f"{phase.metrics}: damaged; run `{again}` again") from error


def steps_of(phase: Phase) -> pl.DataFrame:
    """The same, a row a step; a column that some steps lack is null there."""
    return pl.DataFrame(read_metrics(phase), infer_schema_length=None)


def _own(phase: Phase, path: Path, found: Found) -> Found:
    if found.phase != phase.name:
        raise OpdError(f"{path}: of phase {found.phase}, expected {phase.name}; delete it and run its stage again")
    return found


def timings(run: Run, *prefixes: str) -> dict[str, float]:
    """Wall seconds of the jobs whose names start so, from Snakemake's benchmark files; empty when run by hand."""
    files = sorted((run.root / "timings").glob("*.tsv"))
    return {path.stem: _seconds(path) for path in files if path.stem.startswith(prefixes)}


def stage_seconds(run: Run) -> dict[str, float]:
    """Wall seconds of each stage, summed over phases and shards; empty when run by hand."""
    found: dict[str, float] = {}
    for job, seconds in timings(run, "").items():
        phase = PHASE.match(job)
        stage = (job[phase.end() + 1 :] if phase else job).partition("-")[0]
        if stage == "answers" and phase and phase["of_eval"]:  # what they are called by their job
            stage = "evaluate"
        found[stage] = found.get(stage, 0.0) + seconds
    return found


def _seconds(path: Path) -> float:
    try:
        return float(pl.read_csv(path, separator="\t")["s"][0])
    except (pl.exceptions.PolarsError, LookupError, ValueError, TypeError) as error:
        raise OpdError(f"{path}: no times of Snakemake's: {one_line(error)}; delete it") from error
