"""Every stage of a run in one process, as Snakemake would call them: imports, most of a tiny run's time, happen once."""

from pathlib import Path

from schemas.config import load_config
from stages import (
    also,
    answers,
    coverage,
    diagnostics,
    evaluate,
    fit,
    models,
    outcomes,
    policy,
    prompts,
    reference,
    retokenise,
    rollouts,
    scores,
    sft,
    train,
    units,
    weights,
)
from stages.report import page as report
from stages.run.run import Phase, Run, run_of


def stages_of(where: Path) -> None:
    """Run them all, in order, in the working directory."""
    run = run_of(load_config(where))
    prompts.main(where)
    if run.config.evaluate.also:
        also.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)
    fit.main(where)
    if run.config.sft.prompts:
        for place in run.phase("sft"):
            answers.main(place.number, where, None)
            retokenise.main(place.number, where)
        sft.main(where, None)
    measured(run, {"base", 0}, where)
    for number in run.rounds:
        for phase in run.trained_on(number):
            if phase.is_foreign:
                for place in phase:
                    policy.main(phase.name, place.number, where, None)
                    if phase.needs_reference:
                        reference.main(phase.sampled_in.name, place.number, where, None)
                weights.main(phase.name, where)  # outcomes are those of the phase that sampled
            else:
                tables(phase, where)
        coverage.main(f"round-{number}", where)
        train.main(number, where, None)
        measured(run, {number + 1}, where)
    for phase in run.phases:
        diagnostics.main(phase.name, where)
    report.main(where)


def measured(run: Run, among: set[int | str], where: Path) -> None:
    """The evaluation of these of the checkpoints that are evaluated."""
    for checkpoint in run.checkpoints:
        if checkpoint in among:
            if run.config.evaluate.kl_items:
                tables(run.phase(f"eval-{checkpoint}"), where)
            evaluate.main(str(checkpoint), where, None)


def tables(phase: Phase, where: Path) -> None:
    """What a phase that samples has before it is trained on or evaluated."""
    for place in phase:
        rollouts.main(phase.name, place.number, where, None)
        scores.main(phase.name, place.number, where, None)
        units.main(phase.name, place.number, where)
        if phase.needs_reference:
            reference.main(phase.name, place.number, where, None)
        if phase.is_judged:
            outcomes.main(phase.name, place.number, where)
    weights.main(phase.name, where)
