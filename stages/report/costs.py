"""What a run cost: time by stage, rates, room on disk, what the cache saved, and what sampling and scoring anew would cost."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from schemas.diagnostics import Diagnostics
from stages.run.results import read_metrics
from stages.run.run import Run

JOB = re.compile(r"(?:sft|eval-(?:base|\d+)|round-\d+(?:@\d+)?)-(?P<stage>[a-z]+)|(?P<only>[a-z]+)")
"""A job's name: phase, stage and shard or role; or the stage alone."""
EVALUATED = re.compile(r"eval-\w+-answers")
"""That of the stage `evaluate`."""


def by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """Wall seconds of each stage over all of its jobs; `seconds` by job, as in `summary.json`."""
    found: dict[str, float] = {}
    for job, spent in seconds.items():
        name = JOB.match(job)
        stage = (name["stage"] or name["only"]) if name else job
        stage = "evaluate" if EVALUATED.fullmatch(job) else stage
        found[stage] = found.get(stage, 0.0) + spent
    return found


def room(run: Run) -> dict[str, int]:
    """Bytes on disk by what holds them: the run's tables, checkpoints, training states and all else, and what it links to in
    the cache, which other runs share."""
    found = dict.fromkeys(("tables", "checkpoints", "training states", "all else", "in the cache"), 0)
    for path in run.root.rglob("*"):
        if not path.is_file():
            continue
        if path.is_symlink():
            kind = "in the cache"
        elif "checkpoint" in path.parts:
            kind = "checkpoints"
        elif path.suffix == ".safetensors":
            kind = "training states"
        else:
            kind = "tables" if path.suffix == ".parquet" else "all else"
        found[kind] += path.stat().st_size
    return found


def cost(run: Run, phases: Sequence[Diagnostics], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The page's section on cost.

    Args:
        phases: figures of all phases that have tables.
        seconds: wall seconds by job; empty where nobody took them.
    Returns:
        seconds; stages, seconds by stage; rates, tokens a second by what was done with them, None where it can't be told;
        origins, tokens of the teacher; sampled, of the student; bytes, by `room`; online, as `anew` gives it.
    """
    spent = by_stage(seconds)
    origins = dict(sum((Counter(phase.teacher.tokens) for phase in phases), Counter[str]()))
    sampled = dict(sum((Counter(phase.sampling.tokens) for phase in phases), Counter[str]()))
    sampling = sum(phase.seconds.get("rollouts", 0.0) for phase in phases if "sampled" in phase.sampling.tokens)
    scoring = sum(phase.seconds.get("scores", 0.0) for phase in phases if "scored" in phase.teacher.tokens)
    steps = [step for number in run.rounds for step in read_metrics(run.phase(f"round-{number}"))]
    training = sum(step["seconds"] for step in steps)
    rates = {
        "student's tokens sampled": rate(sampled.get("sampled", 0), sampling),
        "teacher's tokens scored": rate(origins.get("scored", 0), scoring),
        "tokens trained on, prompts included": rate(sum(step["tokens"] for step in steps), training),
    }
    return {
        "seconds": sum(seconds.values()),
        "stages": spent,
        "rates": rates,
        "origins": origins,
        "sampled": sampled,
        "bytes": room(run),
        "online": anew(run, phases, rates),
    }


def anew(run: Run, phases: Sequence[Diagnostics], rates: Mapping[str, float | None]) -> dict[str, Any]:
    """What sampling and scoring a fresh batch at every step would take: online distillation with as many steps as were taken.

    Computed, not measured: steps times batch size responses of this run's mean length, at this run's rates, whose seconds
    include start-up. Only what online would do more is counted: training itself is the same.

    Returns:
        responses, student_tokens, teacher_tokens; seconds of sampling and scoring, None without both rates; here, seconds that
        this run spent on those of its rounds.
    """
    rounds = [phase for phase in phases if phase.phase.startswith("round") and "@" not in phase.phase]
    trained = [phase.training for phase in rounds if phase.training]
    responses = run.config.train.batch_size * sum(training.steps for training in trained)
    per_response = sum(phase.texts.student_tokens for phase in rounds) / max(1, sum(p.texts.responses for p in rounds))
    student_tokens = responses * per_response
    scored = sum(tokens for phase in rounds for tokens in phase.teacher.tokens.values())
    teacher_tokens = responses * scored / max(1, sum(phase.texts.responses for phase in rounds))
    sampling, scoring, _ = rates.values()
    return {
        "responses": responses,
        "student_tokens": round(student_tokens),
        "teacher_tokens": round(teacher_tokens),
        "seconds": student_tokens / sampling + teacher_tokens / scoring if sampling and scoring else None,
        "here": sum(phase.seconds.get(stage, 0.0) for phase in rounds for stage in ("rollouts", "scores")),
    }


def rate(tokens: float, seconds: float) -> float | None:
    """Tokens a second; None of nothing."""
    return tokens / seconds if tokens and seconds else None


def gigabytes(size: float) -> str:
    """A size for people."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
