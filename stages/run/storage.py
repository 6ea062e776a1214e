"""With a storage plugin (`--default-storage-provider`) a job has no files but those that its rule declares.

The Snakefile declares what decides which job comes when; a job of a run whose folder all share finds beside it what else its
stage reads. Here is the rest: what stages leave there, and who reads it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snakemake.io import directory, get_flag_value

from pipeline.store.shards import manifest_path
from stages.run.run import Phase, Run

NOTED = ("answers", "scores")
"""Tables that are linked from the cache, with a note of how they came."""
MADE = {
    "answers": ["{phase}/answers/{shard}.origin"],
    "sft": ["sft/train/metrics.jsonl", directory("sft/checkpoint")],
    "scores": ["{phase}/scores/{shard}.origin"],
    "weights": [directory("{phase}/weights")],
    "train": [
        "round-{round}/train/metrics.jsonl",
        directory("round-{round}/train/states"),
        directory("round-{round}/checkpoint"),
    ],
}
"""By rule, what its jobs leave beside what the Snakefile says. No folder lies in another that is read too: Snakemake's copy of
the one would pass for that of the other."""
BEFORE = ("all", "prompts", "also", "models")
"""Rules that read nothing of the run's own."""


def copies_of(run: Run, workflow: Any) -> Path:
    """Where Snakemake has a run's folder for jobs on this machine: its own copy of it, or, without a storage plugin, itself."""
    if workflow.storage_settings.default_storage_provider is None:
        return run.root
    return Path(workflow.modifier.path_modifier.apply_default_storage(str(run.root)))


def declare_all(run: Run, workflow: Any) -> None:
    """Have the rules of a workflow with a storage plugin declare all that their jobs make and read."""
    copies = copies_of(run, workflow)
    for rule in workflow.rules:
        given = list(rule.input)
        rule.set_output(*(_placed(run, pattern) for pattern in MADE.get(rule.name, ())))
        rule.set_input(*(_with_more(run, copies, each, rule.name) for each in given))
        if rule.name not in BEFORE:
            rule.set_input(lambda wildcards, name=rule.name: [*_models(run), *_read(run, name, wildcards)])


def _placed(run: Run, pattern: Any) -> Any:
    path = f"{run.root}/{pattern}"
    return directory(path) if get_flag_value(pattern, "directory") else path


def _with_more(run: Run, copies: Path, given: Any, rule: str) -> Any:
    """What lies beside an input, a file or a function of wildcards."""
    if callable(given):
        return lambda wildcards: [more for path in _list(given(wildcards)) for more in beside(Path(path), rule)]
    path = Path(given)
    return list(beside(run.root / path.relative_to(copies), rule)) if path.is_relative_to(copies) else []


def _list(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Path) else list(given)


def beside(path: Path, rule: str) -> Iterator[str]:
    """What is read with a file: a table's manifest and note, the shards of weights, and, by rules that run it, a checkpoint."""
    if path.suffix == ".parquet":
        yield str(manifest_path(path))
        if path.parent.name in NOTED:
            yield str(path.with_suffix(".origin"))
    if path.name == "weights.json" or (
        path.name == "checkpoint.json" and rule in ("rollouts", "policy", "train", "evaluate")
    ):
        yield str(path.with_suffix(""))


def _models(run: Run) -> Iterator[Path]:
    for role in ("student", "teacher"):
        yield from (run.model_file(role), run.vocabulary(role), manifest_path(run.vocabulary(role)))


def _read(run: Run, rule: str, wildcards: Any) -> Iterator[Path]:
    """Files of the run that a rule's stage reads without the Snakefile's saying so."""
    match rule:
        case "sft":
            yield from map(manifest_path, run.phase("sft").paths("answers"))
        case "units" | "coverage":
            yield run.policy_file(run.phase(wildcards.phase).number)
        case "train":
            number = int(wildcards.round)
            yield from _table(run.prompts)
            for phase in run.trained_on(number):
                yield from map(manifest_path, phase.paths("scores"))  # whether they are audited
            if number:
                yield run.phase(f"round-{number - 1}").states / "states"
        case "diagnostics":
            phase = run.phase(wildcards.phase)
            yield from _policy(phase)
            if phase.kind == "round" and phase.sampled_in == phase:
                yield from (phase.outcome, phase.metrics)
        case "report":
            yield from _of_report(run)


def _of_report(run: Run) -> Iterator[Path]:
    yield from _table(run.prompts)
    for checkpoint in run.checkpoints:
        yield from _table(run.phase(f"eval-{checkpoint}").answers)
    for phase in run.phases:
        for place in phase:
            for name in ("rollouts", "scores", "units"):
                yield from _table(place.path(name))
        yield from (phase.weights, phase.folder / "weights")
        yield from _policy(phase)
    for number in run.rounds:
        phase = run.phase(f"round-{number}")
        yield from (phase.outcome, phase.metrics, phase.coverage)
    if run.config.sft.prompts:
        phase = run.phase("sft")
        yield from (phase.checkpoint.with_suffix(".json"), phase.outcome, phase.metrics)
        for place in phase:
            for name in ("answers", "rollouts"):
                yield from _table(place.path(name))


def _policy(phase: Phase) -> Iterator[Path]:
    for path in phase.paths("policy") if phase.is_foreign else ():
        yield from _table(path)


def _table(path: Path) -> Iterator[Path]:
    yield path
    yield manifest_path(path)
    if path.parent.name in NOTED:
        yield path.with_suffix(".origin")
