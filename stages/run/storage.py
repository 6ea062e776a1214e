"""With a storage plugin (`--default-storage-provider`) a job has no files but those that its rule declares.

The Snakefile declares what decides which jobs there are and when; where all share a run's folder, a stage finds beside that
what else it reads. Here is the rest, which only a workflow with storage declares: what stages leave there, and who reads it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snakemake.io import directory

from pipeline.store.shards import manifest_path
from stages.run.run import Phase, Run

NOTED = ("answers", "rollouts", "scores")
"""Tables that come from the cache, with a note of how they came; rollouts of `sft` are made from its answers."""
FILES = {
    "answers": ["{phase}/answers/{shard}.origin"],
    "rollouts": ["{phase}/rollouts/{shard}.origin"],
    "sft": ["sft/train/metrics.jsonl"],
    "scores": ["{phase}/scores/{shard}.origin"],
    "train": ["round-{round}/train/metrics.jsonl"],
}
FOLDERS = {
    "sft": ["sft/checkpoint"],
    "weights": ["{phase}/weights"],
    "train": ["round-{round}/train/states", "round-{round}/checkpoint"],
}
"""By rule, what its jobs leave beside what the Snakefile says. No folder lies in another one: Snakemake would take its copy of
a part for the whole."""
BEFORE = ("all", "prompts", "also", "models")
"""Rules that read nothing of the run's own."""
RUN_THE_STUDENT = ("rollouts", "policy", "reference", "train", "evaluate")
"""Those that need a checkpoint's weights, not its reference alone."""


def copies_of(run: Run, workflow: Any) -> Path:
    """Where Snakemake has a run's folder for jobs on this machine: its own copy of it, or, without a storage plugin, itself."""
    if workflow.storage_settings.default_storage_provider is None:
        return run.root
    return Path(workflow.modifier.path_modifier.apply_default_storage(str(run.root)))


def declare_all(run: Run, workflow: Any) -> None:
    """Have the rules of a workflow with a storage plugin declare all that their jobs leave and read."""
    copies = copies_of(run, workflow)
    for rule in workflow.rules:
        name, given = rule.name, list(rule.input)
        rule.set_output(*(f"{run.root}/{pattern}" for pattern in FILES.get(name, ())))
        rule.set_output(*(directory(f"{run.root}/{pattern}") for pattern in FOLDERS.get(name, ())))
        rule.set_input(*(_with_input(run, copies, each, name) for each in given))
        if name not in BEFORE:
            rule.set_input(lambda wildcards, name=name: list(_read(run, name, wildcards)))


def _with_input(run: Run, copies: Path, given: Any, rule: str) -> Any:
    """What is read with an input, a path among the copies or a function of wildcards."""
    if callable(given):
        return lambda wildcards: [more for path in _listed(given(wildcards)) for more in _beside(path, rule)]
    path = Path(given)  # of the user's own there is no copy
    return list(_beside(run.root / path.relative_to(copies), rule)) if path.is_relative_to(copies) else []


def _listed(given: Any) -> list[Path]:
    return [Path(path) for path in ([given] if isinstance(given, str | Path) else given)]


def _beside(path: Path, rule: str = "") -> Iterator[Path]:
    """A table's manifest and note, the shards of weights, a checkpoint."""
    if path.suffix == ".parquet":
        yield manifest_path(path)
        if path.parent.name in NOTED and path.parts[-3:-1] != ("sft", "rollouts"):
            yield path.with_suffix(".origin")
    elif path.name == "weights.json" or (path.name == "checkpoint.json" and rule in RUN_THE_STUDENT):
        yield path.with_suffix("")


def _read(run: Run, rule: str, wildcards: Any) -> Iterator[Path]:
    """Files of the run that a rule's stage reads and the Snakefile doesn't name."""
    for role in ("student", "teacher"):
        yield from (run.model_file(role), *_table(run.vocabulary(role)))
    match rule:
        case "sft":
            for path in run.phase("sft").paths("answers"):
                yield from _beside(path)
        case "units" | "coverage":
            yield run.policy_file(run.phase(wildcards.phase).number)
        case "train":
            number = int(wildcards.round)
            yield from _table(run.prompts)
            for phase in run.trained_on(number):
                for path in phase.paths("scores"):
                    yield from _beside(path)  # whether they were audited
                yield from _beside_units(phase)
            if number:
                yield run.phase(f"round-{number - 1}").states / "states"
            if run.config.train.lora:  # which adapts what the rounds began with
                yield run.policy_file(0)
                yield from _beside(run.policy_file(0), rule)
        case "diagnostics":
            phase = run.phase(wildcards.phase)
            yield from _beside_units(phase)
            if phase.kind == "round" and not phase.is_foreign:
                yield from (phase.outcome, phase.metrics)
        case "report":
            yield from _of_report(run)


def _of_report(run: Run) -> Iterator[Path]:
    """All that the run has but weights of models."""
    yield from _table(run.prompts)
    for checkpoint in run.checkpoints:
        yield from _table(run.phase(f"eval-{checkpoint}").answers)
    for phase in run.phases:
        for path in (path for name in ("rollouts", "scores", "units") for path in phase.paths(name)):
            yield from _table(path)
        yield from (phase.weights, *_beside(phase.weights), *_beside_units(phase))
    for phase in (run.phase(f"round-{number}") for number in run.rounds):
        yield from (phase.outcome, phase.metrics, phase.coverage)
    if run.config.sft.prompts:
        phase = run.phase("sft")
        yield from (phase.checkpoint.with_suffix(".json"), phase.outcome, phase.metrics)
        for path in (path for name in ("answers", "rollouts") for path in phase.paths(name)):
            yield from _table(path)


def _beside_units(phase: Phase) -> Iterator[Path]:
    """What its weights are made from beside rollouts and units."""
    for path in (path for name in phase.beside for path in phase.paths(name)):
        yield from _table(path)


def _table(path: Path) -> Iterator[Path]:
    yield from (path, *_beside(path))
