"""Diagnostics: what a report of on-policy distillation should say of a phase, in one JSON file."""

import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.measure.diagnostics import Sums, compared, credit, entropy, kinds, measure, ratio, ratios, texts
from pipeline.store.shards import open_shard, read_manifest, write_text
from schemas.config import Candidates, Config, Own, SampledPath, consistency
from schemas.diagnostics import (
    Coverage,
    Diagnostics,
    Drift,
    Loss,
    Ratios,
    Sampling,
    Staleness,
    Support,
    Teacher,
    Training,
)
from schemas.errors import OpdError
from schemas.manifest import Manifest, digest
from schemas.outcome import Outcome
from stages.run import console, layout
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, read_config, read_ref

NORMALISER = "the compared units of the optimiser step"
"""As `train.loop.train_step` does it."""

Frames = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Write the figures of a phase's tables, what made them, and what they cost."""
    config = read_config(config_file)
    found = diagnose(config, phase)
    write_text(layout.diagnostics_path(config, phase), found.model_dump_json(indent=1) + "\n")
    if found.teacher.warning:
        console.warn(found.teacher.warning)


def read(config: Config, phase: str) -> Diagnostics:
    """What was written. Raises OpdError when it is missing or damaged."""
    path = layout.diagnostics_path(config, phase)
    try:
        return Diagnostics.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise OpdError(f"{path}: missing; run `python -m stages.diagnostics --phase {phase}` first") from error
    except ValueError as error:
        raise OpdError(
            f"{path}: damaged; delete it and run `python -m stages.diagnostics --phase {phase}` again"
        ) from error


def diagnose(config: Config, phase: str) -> Diagnostics:
    """Everything about a phase. Raises OpdError when a shard is missing or was made from another one than lies there."""
    shards = range(layout.shard_count(config, phase))
    clip = config.objective.clip if isinstance(config.objective, SampledPath) else math.inf
    total = measure(chain.from_iterable(row_groups(config, phase, i) for i in shards), clip)
    rollouts, scores = (read_manifest(layout.shard_path(config, phase, name, 0)) for name in ("rollouts", "scores"))
    sampling = sampling_of(config, phase, rollouts)
    return Diagnostics(
        phase=phase,
        texts=texts(total),
        loss=loss_of(config),
        support=support_of(scores),
        sampling=sampling,
        teacher=teacher_of(config, phase, scores),
        staleness=staleness_of(config, phase, sampling, total),
        coverage=coverage_of(config, phase, total),
        entropy=entropy(total, own=sampling.checkpoint is not None),
        credit=credit(total, config.objective.clips),
        training=training_of(config, phase),
        seconds=seconds_of(config, phase),
    )


def row_groups(config: Config, phase: str, shard: int) -> Iterator[Frames]:
    """Rollouts, scores, units and weights of the same responses, a row group at a time."""

    def path(table: str) -> Path:
        return layout.shard_path(config, phase, table, shard)

    rollouts = open_shard(path("rollouts"), "rollouts")
    scores = open_shard(path("scores"), "scores")
    made_from = {"rollouts": rollouts.manifest.sha256}
    units = open_shard(path("units"), "units", inputs={**made_from, "scores": scores.manifest.sha256})
    weights = open_shard(path("weights"), "weights", inputs={**made_from, "units": units.manifest.sha256})
    tables = zip(*(opened.row_groups() for opened in (rollouts, scores, units, weights)), strict=True)
    for a, b, c, d in tables:
        yield pl.DataFrame(a), pl.DataFrame(b), pl.DataFrame(c), pl.DataFrame(d)


def loss_of(config: Config) -> Loss:
    """What the config has the trainer minimise."""
    objective, weights = config.objective, config.weights
    direction: str | None = None if isinstance(objective, Own) else "reverse"
    tail: str | None = None
    if isinstance(objective, Candidates):
        direction, tail = objective.direction, objective.tail
    return Loss(
        recipe=objective.recipe,
        direction=direction,
        estimator=objective.estimator,
        tail=tail,
        normaliser=NORMALISER,
        credit=weights.credit,
        weights=weights.scheme,
        truncate=weights.truncate,
    )


def support_of(scores: Manifest) -> Support:
    """The rule by which candidates were kept when the teacher scored."""
    kept = scores.identity["scores"]
    return Support(of=kept["support"], min_p=kept["min_p"], mass=kept["mass"], k_max=kept["k_max"])


def sampling_of(config: Config, phase: str, rollouts: Manifest) -> Sampling:
    """Who sampled; where rollouts are reused, as the run they come from has it on record."""
    _, number = layout.parse_phase(layout.sampled_in(phase))
    reused = layout.is_reused(config, phase)
    made = read_manifest(layout.reused(config)[number].shard("rollouts", 0)) if reused else rollouts
    identity = made.identity
    policy: dict[str, str] = identity.get("policy", {})
    settings: dict[str, Any] = identity.get("sampling", {})
    return Sampling(
        checkpoint=None if reused else layout.parse_phase(identity["phase"])[1],
        source=made.origin.get("student"),
        weights=policy.get("weights"),
        tokenizer=policy.get("tokenizer"),
        template=digest(identity["prompt"]) if policy else None,
        engine=identity.get("engine"),
        dtype=identity.get("dtype"),
        temperature=settings.get("temperature"),
        top_p=settings.get("top_p"),
        max_new_tokens=settings.get("max_new_tokens"),
        seed=identity.get("seed"),
    )


def teacher_of(config: Config, phase: str, scores: Manifest) -> Teacher:
    """Who scored, from the scores themselves, and whether the student was tuned on that teacher's samples."""
    return Teacher(
        source=scores.origin.get("teacher"),
        weights=scores.identity["teacher"]["weights"],
        tokenizer=scores.identity["teacher"]["tokenizer"],
        template=digest(scores.identity["prompt"]),
        reads=scores.identity["reads"],
        engine=scores.identity["engine"],
        dtype=scores.identity["dtype"],
        tokens=teacher_tokens(config, phase),
        student_tuned_on=config.student.tuned_on,
        warning=consistency(config),
    )


def teacher_tokens(config: Config, phase: str) -> dict[str, int]:
    """Teacher tokens by how the run came by their scores: `scored` by it, found in the `cache`, or `reused from <run>`.

    None for a replayed round, which has them already.
    """
    found: dict[str, int] = {}
    if layout.sampled_in(phase) != phase:
        return found
    for index in range(layout.shard_count(config, phase)):
        path = layout.provenance_path(layout.shard_path(config, phase, "scores", index))
        about: dict[str, Any] = {"origin": "unknown", "teacher_tokens": 0}
        if path.exists():
            about = json.loads(path.read_text())
        found[about["origin"]] = found.get(about["origin"], 0) + about["teacher_tokens"]
    return found


def staleness_of(config: Config, phase: str, sampling: Sampling, total: Sums) -> Staleness:
    """The policy that sampled against the checkpoint that the phase starts from."""
    _, number = layout.parse_phase(phase)
    trained = read_ref(layout.policy_file(config, number), "train" if number else "models", weights=False)
    units, responses, log_ratio = ratios(total)
    return Staleness(
        rounds_behind=None if sampling.checkpoint is None else number - sampling.checkpoint,
        same_weights=sampling.weights == trained.weights,
        units=units,
        responses=responses,
        log_ratio=log_ratio,
    )


def coverage_of(config: Config, phase: str, total: Sums) -> Coverage:
    """Kinds of unit, and what the gate found where the phase has one."""
    path = layout.coverage_path(config, phase)
    gate: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return Coverage(
        kinds=kinds(total),
        dropped_mass=ratio(total["dropped_mass"], compared(total)),
        **{name: gate.get(name) for name in ("compared", "one_to_one", "shared_mass")},
    )


def training_of(config: Config, phase: str) -> Training | None:
    """First and last of the steps that the round has taken, and what ended it."""
    metrics = layout.run_folder(config) / phase / "train" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    if not lines:
        return None
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    _, number = layout.parse_phase(phase)
    outcome = layout.outcome_path(config, number)
    ended = Outcome.model_validate_json(outcome.read_text()) if outcome.exists() else None
    return Training(
        steps=len(lines),
        budget=int(last["steps"]),
        ended=ended and ended.ended,
        sampled_kl_first=first["sampled_kl"],
        sampled_kl_last=last["sampled_kl"],
        first=ratios_of(first),
        last=ratios_of(last),
    )


def ratios_of(step: dict[str, float]) -> Drift:
    """What the trainer measured at a step."""
    return Drift(
        units=Ratios(ess=step["ess"], chi2=step["chi2"]),
        responses=Ratios(ess=step["response_ess"], chi2=step["response_chi2"]),
        since_start=Ratios(ess=step["drift_ess"], chi2=step["drift_chi2"]),
    )


def seconds_of(config: Config, phase: str) -> dict[str, float]:
    """Wall seconds of each stage of a phase, summed over its shards."""
    found: dict[str, float] = {}
    for job, seconds in timings(config, f"{phase}-").items():
        stage = job.removeprefix(f"{phase}-").split("-")[0]
        found[stage] = found.get(stage, 0.0) + seconds
    return found


def timings(config: Config, *prefixes: str) -> dict[str, float]:
    """Wall seconds of the jobs whose names start so, from Snakemake's benchmark files; empty when run by hand."""
    files = sorted((layout.run_folder(config) / "timings").glob("*.tsv"))
    return {
        path.stem: float(pl.read_csv(path, separator="\t")["s"][0]) for path in files if path.stem.startswith(prefixes)
    }


if __name__ == "__main__":
    console.run(main)
