"""The tables that training reads, opened and checked against each other."""

from pathlib import Path

from pipeline.store.shards import Shard, open_shard
from schemas.config import Objective
from schemas.errors import OpdError
from train.stream import Triple


def open_triple(rollouts: Path, units: Path, weights: Path, objective: Objective) -> Triple:
    """Rollouts, units and weights of the same responses. Raises OpdError when one is missing or damaged, was made from
    others than these, or lacks what the objective reads."""
    sampled = open_shard(rollouts, "rollouts")
    made_from = {"rollouts": sampled.manifest.sha256}
    aligned = open_shard(units, "units", inputs=made_from)
    check_log_z(objective, aligned)
    weighed = open_shard(weights, "weights", inputs={**made_from, "units": aligned.manifest.sha256})
    return sampled, aligned, weighed


def check_log_z(objective: Objective, units: Shard) -> None:
    """Raise OpdError when the objective reads raw logits, and the scores, another run's perhaps, have no log Z."""
    if objective.unit_score == "mean_logit" and not units.manifest.identity["log_z"]:
        raise OpdError(
            f"{units.path}: `objective.unit_score: mean_logit` reads the column t_log_z, which is null here: the scores were "
            "made without `scores.log_z: true`; score these rollouts with it, or choose another `objective.recipe`"
        )
