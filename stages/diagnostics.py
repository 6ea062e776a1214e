"""Diagnostics: what a report of on-policy distillation should say of a phase, in one JSON file."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import polars as pl

from pipeline.measure.diagnostics import (
    ADVANTAGE,
    Spread,
    Sums,
    clipped,
    compared,
    credit,
    distance,
    entropy,
    kinds,
    measure,
    ratio,
    ratios,
    texts,
)
from pipeline.store.records import write_record
from pipeline.store.shards import read_manifest
from pipeline.weights.sampler import lost
from schemas.config import Candidates, Config, Own, consistency
from schemas.config.objective import Clipped, Dpca, DpcaAdditive, ExOpd, RaoBlackwell, Recipe, Vopd
from schemas.diagnostics import (
    Coverage,
    Diagnostics,
    Distance,
    Drift,
    Loss,
    Outcomes,
    Ratios,
    Sampling,
    Staleness,
    Support,
    Teacher,
    Training,
)
from schemas.manifest import Manifest, digest
from schemas.outcome import Outcome
from schemas.records import Weighed
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, policy_ref, tuning
from stages.run.results import gate_of, read_metrics, timings
from stages.run.run import Phase, Place, open_run

NORMALISER = "the compared units of the optimiser step"
"""As `train.loop.train_step` does it."""

Frames = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, pl.DataFrame]


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Write the figures of a phase's tables, what made them, and what they cost."""
    run = open_run(config_file, "diagnostics", phase)
    part = run.phase(phase)
    found = diagnose(part)
    write_record(part.diagnostics, found.model_copy(update={"decided": run.decided}))
    if found.teacher.warning:
        console.warn(found.teacher.warning)


def diagnose(phase: Phase) -> Diagnostics:
    """Everything about a phase. Raises OpdError when a shard is missing or was made from another one than lies there."""
    config = phase.run.settings
    objective = config.objective
    clip = objective.clip if isinstance(objective, Clipped) else math.inf
    groups = chain.from_iterable(row_groups(place) for place in phase)
    total = measure(groups, clip, spread_of(objective), clipped_advantage(objective))
    rollouts, scores = (read_manifest(phase[0].path(name)) for name in ("rollouts", "scores"))
    sampling = sampling_of(phase, rollouts, total)
    return Diagnostics(
        phase=phase.name,
        texts=texts(total),
        loss=loss_of(config),
        outcomes=outcomes_of(phase),
        support=support_of(scores),
        sampling=sampling,
        teacher=teacher_of(phase, scores),
        staleness=staleness_of(phase, sampling, total),
        coverage=coverage_of(phase, total),
        entropy=entropy(total, own=sampling.checkpoint is not None),
        credit=credit(total, clipped(total, clipped_kinds(config))),
        training=training_of(phase),
        seconds=seconds_of(phase),
    )


def row_groups(place: Place) -> Iterator[Frames]:
    """Rollouts, scores, units and weights of the same responses, a row group at a time."""
    tables = [place.rollouts, place.scores, place.units, place.weights]
    if place.phase.is_foreign:
        tables.append(place.policy)
    for group in zip(*(shard.row_groups() for shard in tables), strict=True):
        a, b, c, d, *policy = (pl.DataFrame(table) for table in group)
        yield a.with_columns(*(table["policy_logp"] for table in policy)), b, c, d


def clipped_kinds(config: Config) -> tuple[str, ...]:
    """Kinds of unit whose advantages the recipe clips: those of its sampled path, or all that credit sums over."""
    objective = config.objective
    if not isinstance(objective, Clipped) or isinstance(objective, Vopd | RaoBlackwell):
        return ()
    return objective.sampled if config.weights.credit == "immediate" else Clipped.sampled


def clipped_advantage(objective: Recipe) -> pl.Expr:
    """What of a unit's weights the recipe clips, nats, at the policy that the phase starts from."""
    if not isinstance(objective, ExOpd):
        return ADVANTAGE
    student = pl.col("student_logp").cast(pl.Float64)
    from_reference = student - pl.coalesce("reference_logp", "student_logp").cast(pl.Float64)
    return objective.scale * (ADVANTAGE + from_reference) - from_reference


def spread_of(objective: Recipe) -> Spread | None:
    """How the trainer spreads a unit's advantage over its tokens before it clips; None: it clips the unit's own."""
    if not isinstance(objective, Dpca | DpcaAdditive):
        return None
    import torch  # noqa: PLC0415 - seconds to import, and no other recipe needs it here

    from train.objectives import dpca_additive, dpca_multiplicative  # noqa: PLC0415

    credit = dpca_multiplicative if isinstance(objective, Dpca) else dpca_additive
    return lambda *logps: credit(*map(torch.from_numpy, logps)).numpy()


def loss_of(config: Config) -> Loss:
    """What the config has the trainer minimise."""
    objective, weights = config.objective, config.weights
    direction: str | None = None if isinstance(objective, Own) else "reverse"
    tail: str | None = None
    if isinstance(objective, Candidates):
        direction, tail = objective.direction, objective.tail
    elif isinstance(objective, RaoBlackwell):
        tail = "bucket"
    return Loss(
        recipe=objective.recipe,
        direction=direction,
        estimator=objective.estimator,
        tail=tail,
        normaliser=NORMALISER,
        credit=weights.credit,
        weights=weights.scheme,
        truncate=weights.truncate,
        gate={name: factor for name, factor in weights.gate if factor != 1},
        reward=weights.reward,
        reward_coefficient=objective.reward if weights.reward != "none" else 0.0,
        reference_kl=objective.reference_kl,
        reference=objective.reference if objective.refers else None,
    )


def outcomes_of(phase: Phase) -> Outcomes | None:
    """What the phase's weights were told of its responses."""
    if not phase.is_judged:
        return None
    found = phase.record(phase.weights, Weighed, "weights")
    unknown = found.responses - found.right - found.wrong
    return Outcomes(right=found.right, wrong=found.wrong, unknown=unknown, rewarded=found.rewarded)


def support_of(scores: Manifest) -> Support:
    """The rule by which candidates were kept when the teacher scored."""
    kept = scores.identity["scores"]
    return Support(of=kept["support"], min_p=kept["min_p"], mass=kept["mass"], k_max=kept["k_max"])


def sampling_of(phase: Phase, rollouts: Manifest, total: Sums) -> Sampling:
    """Who sampled; where rollouts are reused, as the run they come from has it on record."""
    source = phase.source
    made = read_manifest(source.shard("rollouts", 0)) if source else rollouts
    identity = made.identity
    policy: dict[str, str] = identity.get("policy", {})
    settings: dict[str, Any] = identity.get("sampling", {})
    return Sampling(
        checkpoint=None if source else phase.run.phase(identity["phase"]).number,
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
        tokens=sampled_tokens(phase),
        sampler_logp=ratio(total["warped"], total["responses"]),
        warning=lost(phase.name, settings, int(total["warped"]), int(total["responses"])),
    )


def sampled_tokens(phase: Phase) -> dict[str, int]:
    """Student tokens by how the run came by them: `sampled` by it, or found in the `cache`.

    Empty for a replayed round, which has them already, and for what another run sampled.
    """
    found: dict[str, int] = {}
    if phase.is_foreign:
        return found
    for place in phase:
        if note := place.sampled():
            found[note.origin] = found.get(note.origin, 0) + note.tokens
    return found


def teacher_of(phase: Phase, scores: Manifest) -> Teacher:
    """Who scored, from the scores themselves, and whether the student was tuned on that teacher's samples."""
    found = tuning(phase.run)
    return Teacher(
        source=scores.origin.get("teacher"),
        weights=scores.identity["teacher"]["weights"],
        tokenizer=scores.identity["teacher"]["tokenizer"],
        template=digest(scores.identity["prompt"]),
        reads=scores.identity["reads"],
        engine=scores.identity["engine"],
        dtype=scores.identity["dtype"],
        tokens=teacher_tokens(phase),
        student_tuned_on=found and found.source,
        warning=consistency(phase.run.config, found),
    )


def teacher_tokens(phase: Phase) -> dict[str, int]:
    """Teacher tokens by how the run came by their scores: `scored` by it, found in the `cache`, or `reused from <run>`.

    Empty for a replayed round, which has them already.
    """
    found: dict[str, int] = {}
    if phase.sampled_in != phase:
        return found
    for place in phase:
        about = place.linked("scores")
        found[about.origin] = found.get(about.origin, 0) + about.teacher_tokens
    return found


def staleness_of(phase: Phase, sampling: Sampling, total: Sums) -> Staleness:
    """The policy that sampled against the checkpoint that the phase starts from."""
    number = phase.number
    trained = policy_ref(phase.run, number, weights=False)
    return Staleness(
        rounds_behind=None if sampling.checkpoint is None else number - sampling.checkpoint,
        same_weights=sampling.weights == trained.weights,
        units=ratios(total),
        responses=distance(total),
    )


def coverage_of(phase: Phase, total: Sums) -> Coverage:
    """Kinds of unit, and what the gate found where the phase has one."""
    found = gate_of(phase)
    gate: dict[str, Any] = found.model_dump() if found else {}
    return Coverage(
        kinds=kinds(total),
        dropped_mass=ratio(total["dropped_mass"], compared(total)),
        **{name: gate.get(name) for name in ("compared", "one_to_one", "shared_mass")},
    )


def training_of(phase: Phase) -> Training | None:
    """First and last of the steps that the round has taken, and what ended it."""
    steps = read_metrics(phase)
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    outcome = phase.run.phase(f"round-{phase.number}")
    ended = outcome.record(outcome.outcome, Outcome, "train") if outcome.outcome.exists() else None
    return Training(
        steps=len(steps),
        budget=int(last["steps"]),
        ended=ended and ended.ended,
        sampled_kl_first=first["sampled_kl"],
        sampled_kl_last=last["sampled_kl"],
        divergence_first=first.get("divergence"),
        divergence_last=last.get("divergence"),
        first=ratios_of(first),
        last=ratios_of(last),
    )


def ratios_of(step: dict[str, float]) -> Drift:
    """What the trainer measured at a step."""
    return Drift(
        units=Ratios(ess=step["ess"], chi2=step["chi2"]),
        responses=Distance(log_ratio=step["response_log_ratio"], log_ratio_sd=step["response_log_ratio_sd"]),
        since_start=Ratios(ess=step["drift_ess"], chi2=step["drift_chi2"]),
    )


def seconds_of(phase: Phase) -> dict[str, float]:
    """Wall seconds of each stage of a phase, summed over its shards."""
    found: dict[str, float] = {}
    for job, seconds in timings(phase.run, f"{phase.name}-").items():
        stage = job.removeprefix(f"{phase.name}-").split("-")[0]
        found[stage] = found.get(stage, 0.0) + seconds
    return found


if __name__ == "__main__":
    console.run(main)
