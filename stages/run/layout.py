"""Where everything of a run lies. The Snakefile and the stages both ask here, so a path has one home.

A run has phases: `round-<r>`, whose rollouts are trained on, and `eval-<c>`, whose held-out rollouts measure
checkpoint c. Both sample from checkpoint number <r> or <c>: 0 is the student as given, n what n rounds made of it. With
`rollouts.replay` there is also `round-<r>@<q>`: the rollouts of round q as round r sees them, whose checkpoint weighs them.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.store.shards import read_manifest
from schemas.config import Config
from schemas.config.reuse import scored_rounds
from schemas.errors import OpdError

PHASE = re.compile(r"eval-(?P<of_eval>\d+)|round-(?P<of_round>\d+)(@\d+)?")

KL_ITEMS = 100
"""Prompts that the on-policy reverse KL is measured on, at most, where the config doesn't say."""


def run_folder(config: Config) -> Path:
    """runs/<run>, below the working directory."""
    return Path("runs") / config.run


def cache_folder(config: Config) -> Path:
    """The cache that runs share."""
    return cache_root(config.cache)


def cache_root(configured: str) -> Path:
    """The configured cache, unless OPD_CACHE says otherwise."""
    return Path(os.environ.get("OPD_CACHE", configured)).expanduser().absolute()


def shard_path(config: Config, phase: str, table: str, shard: int) -> Path:
    """A shard of a table of a phase. Raises OpdError when there is no such phase.

    A replayed round has its own `policy` and `weights`; all that does not depend on the policy in training is the original's.
    """
    parse_phase(phase)
    home = phase if table in ("policy", "weights") else sampled_in(phase)
    return run_folder(config) / home / table / f"{shard:03}.parquet"


def coverage_path(config: Config, phase: str) -> Path:
    """What the coverage gate measured."""
    return run_folder(config) / phase / "coverage.json"


def diagnostics_path(config: Config, phase: str) -> Path:
    """The figures of a phase."""
    return run_folder(config) / phase / "diagnostics.json"


def phases(config: Config) -> list[str]:
    """The phases that have tables, in the order of the run."""
    rounds = config.rollouts.rounds
    trained = [phase for r in range(rounds) for phase in trained_on(config, r)]
    return [phase for phase in ("eval-0", *trained, f"eval-{rounds}") if shard_count(config, phase)]


def trained_on(config: Config, round_index: int) -> list[str]:
    """The phases that a round trains on: its own, and the rounds before it that it replays."""
    first = max(0, round_index - config.rollouts.replay)
    return [f"round-{round_index}", *(f"round-{round_index}@{q}" for q in range(first, round_index))]


def sampled_in(phase: str) -> str:
    """The phase that a phase's rollouts come from: another one's where it replays them."""
    trained, _, replayed = phase.partition("@")
    return f"round-{replayed}" if replayed else trained


def states_folder(config: Config, round_index: int) -> Path:
    """Where a round's training states, metrics and outcome lie."""
    return run_folder(config) / f"round-{round_index}" / "train"


def outcome_path(config: Config, round_index: int) -> Path:
    """What a round of training ended with (`schemas.outcome`)."""
    return states_folder(config, round_index) / "result.json"


def provenance_path(scores: Path) -> Path:
    """How a run came by the scores that this link points at."""
    return scores.with_suffix(".origin")


def shard_count(config: Config, phase: str) -> int:
    """How many shards the tables of a phase have."""
    kind, number = parse_phase(sampled_in(phase))
    sources = reused(config)
    if kind == "round" and number < len(sources):
        return sources[number].count()
    responses = config.rollouts.prompts * config.rollouts.samples if kind == "round" else kl_items(config)
    return -(-responses // config.rollouts.shard_size)


def response_count(config: Config, phase: str) -> int:
    """How many responses the shards of a round have together: as the config plans them, or as they lie there when reused."""
    if is_reused(config, phase):
        _, number = parse_phase(sampled_in(phase))
        source = reused(config)[number]
        return sum(read_manifest(source.shard("rollouts", i)).rows for i in range(source.count()))
    return config.rollouts.prompts * config.rollouts.samples


def parse_phase(phase: str) -> tuple[str, int]:
    """`round-1` -> ("round", 1), `round-1@0` too: kind and number of its checkpoint. Raises OpdError for anything else."""
    if not (found := PHASE.fullmatch(phase)):
        raise OpdError(f"--phase {phase!r}: expected round-<number>, eval-<number> or round-<number>@<earlier round>")
    return phase.partition("-")[0], int(found["of_eval"] or found["of_round"])


def kl_items(config: Config) -> int:
    """Prompts on which the on-policy reverse KL is measured; it takes a teacher, so none by default when scores are reused."""
    if config.evaluate.kl_items is not None:
        return config.evaluate.kl_items
    return 0 if config.reuse else min(KL_ITEMS, config.held_out)


def needs_teacher(config: Config) -> bool:
    """Whether the teacher itself is needed; its tokens' bytes suffice when every score is reused."""
    return kl_items(config) > 0 or config.rollouts.rounds > len(reused(config))


@dataclass(frozen=True)
class Source:
    """Rollouts and scores of another run: its folder, and that of one round in it (the same for a plain dataset)."""

    run: Path
    folder: Path

    def shard(self, table: str, shard: int) -> Path:
        """A shard of its `rollouts` or `scores`."""
        return self.folder / table / f"{shard:03}.parquet"

    def count(self) -> int:
        """How many shards it has."""
        return len(list((self.folder / "rollouts").glob("*.parquet")))


def reused(config: Config) -> list[Source]:
    """The rounds that come from other runs, in order; at most as many as the run has.

    A source is a run's folder, or any folder with `rollouts/`, `scores/`, `prompts.parquet` and
    `models/*-vocabulary.parquet`. Raises OpdError when it has no scored rounds.
    """
    sources: list[Source] = []
    for given in config.reuse:
        run = Path(given).expanduser()
        if not (scored := scored_rounds(run)):
            raise OpdError(f"reuse: {given}: no folder with scored rollouts (round-<r>/rollouts and round-<r>/scores)")
        sources += [Source(run, folder) for folder in scored]
    return sources[: config.rollouts.rounds]


def is_reused(config: Config, phase: str) -> bool:
    """Whether a phase's rollouts and scores come from another run."""
    kind, number = parse_phase(sampled_in(phase))
    return kind == "round" and number < len(reused(config))


def is_foreign(config: Config, phase: str) -> bool:
    """Whether another policy than the one that the phase trains sampled its rollouts."""
    return is_reused(config, phase) or sampled_in(phase) != phase


def model_file(config: Config, role: str) -> Path:
    """The prepared model's reference: role is `student` or `teacher`."""
    return run_folder(config) / "models" / f"{role}.json"


def vocabulary_path(config: Config, role: str) -> Path:
    """Bytes of every token of the student or teacher, and which of them stop."""
    return run_folder(config) / "models" / f"{role}-vocabulary.parquet"


def policy_file(config: Config, number: int) -> Path:
    """Reference of checkpoint `number` of the student."""
    return model_file(config, "student") if number == 0 else checkpoint_folder(config, number - 1).with_suffix(".json")


def checkpoint_folder(config: Config, round_index: int) -> Path:
    """The folder in `save_pretrained` format that a round ends with."""
    return run_folder(config) / f"round-{round_index}" / "checkpoint"
