"""Where everything of a run lies. The Snakefile and the stages both ask here, so a path has one home.

A run has phases: `round-<r>`, whose rollouts are trained on, and `eval-<c>`, whose held-out rollouts measure
checkpoint c. Both sample from checkpoint number <r> or <c>: 0 is the student as given, n what n rounds made of it.
"""

import os
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


def shard_count(config: Config, phase: str) -> int:
    """How many shards the tables of a phase have."""
    kind, _ = parse_phase(phase)
    responses = config.rollouts.prompts * config.rollouts.samples if kind == "round" else config.evaluate.kl_items
    return -(-responses // config.rollouts.shard_size)


def parse_phase(phase: str) -> tuple[str, int]:
    """`round-1` -> ("round", 1). Raises OpdError for anything else."""
    kind, _, number = phase.partition("-")
    if kind not in ("round", "eval") or not number.isdigit():
        raise OpdError(f"--phase {phase!r}: expected round-<number> or eval-<number>")
    return kind, int(number)


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
