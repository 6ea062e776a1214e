"""Where everything of a run lies. The Snakefile and the stages both ask here, so a path has one home.

A run has phases: `round-<r>`, whose rollouts are trained on, and `eval-<c>`, whose held-out rollouts measure
checkpoint c. Both sample from checkpoint number <r> or <c>: 0 is the student as given, n what n rounds made of it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from schemas.config import Config
from schemas.errors import OpdError


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
    """A shard of a table of a phase. Raises OpdError when there is no such phase."""
    parse_phase(phase)
    return run_folder(config) / phase / table / f"{shard:03}.parquet"


def coverage_path(config: Config, phase: str) -> Path:
    """What the coverage gate measured."""
    return run_folder(config) / phase / "coverage.json"


def diagnostics_path(config: Config, phase: str) -> Path:
    """The figures of a phase."""
    return run_folder(config) / phase / "diagnostics.json"


def phases(config: Config) -> list[str]:
    """The phases that have tables, in the order of the run."""
    rounds = config.rollouts.rounds
    named = ["eval-0", *(f"round-{r}" for r in range(rounds)), f"eval-{rounds}"]
    return [phase for phase in named if shard_count(config, phase)]


def provenance_path(scores: Path) -> Path:
    """How a run came by the scores that this link points at."""
    return scores.with_suffix(".origin")


def shard_count(config: Config, phase: str) -> int:
    """How many shards the tables of a phase have."""
    kind, number = parse_phase(phase)
    sources = reused(config)
    if kind == "round" and number < len(sources):
        return sources[number].count()
    responses = config.rollouts.prompts * config.rollouts.samples if kind == "round" else kl_items(config)
    return -(-responses // config.rollouts.shard_size)


def parse_phase(phase: str) -> tuple[str, int]:
    """`round-1` -> ("round", 1). Raises OpdError for anything else."""
    kind, _, number = phase.partition("-")
    if kind not in ("round", "eval") or not number.isdigit():
        raise OpdError(f"--phase {phase!r}: expected round-<number> or eval-<number>")
    return kind, int(number)


def kl_items(config: Config) -> int:
    """Prompts on which the on-policy reverse KL is measured; it takes a teacher, so none by default when scores are reused."""
    return config.evaluate.kl_items if config.evaluate.kl_items is not None else 0 if config.reuse else 100


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
        folders = sorted(run.glob("round-*"), key=lambda f: int(f.name.removeprefix("round-"))) or [run]
        scored = [folder for folder in folders if list((folder / "scores").glob("*.parquet"))]
        if not scored:
            raise OpdError(f"reuse: {given}: no folder with scored rollouts (round-<r>/rollouts and round-<r>/scores)")
        sources += [Source(run, folder) for folder in scored]
    return sources[: config.rollouts.rounds]


def is_reused(config: Config, phase: str) -> bool:
    """Whether a phase's rollouts and scores come from another run."""
    kind, number = parse_phase(phase)
    return kind == "round" and number < len(reused(config))


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
