"""What an objective reads of the tables."""

from pipeline.store.shards import Shard
from schemas.config import Candidates, Objective
from schemas.errors import OpdError


def check_log_z(objective: Objective, units: Shard) -> None:
    """Raise OpdError when the objective reads raw logits, and the scores, another run's perhaps, have no log Z."""
    raw = isinstance(objective, Candidates) and objective.unit_score == "mean_logit"
    if raw and not units.manifest.identity["log_z"]:
        raise OpdError(
            f"{units.path}: `objective.unit_score: mean_logit` reads the column t_log_z, which is null here: the scores were "
            "made without `scores.log_z: true`; score these rollouts with it, or choose another `objective.recipe`"
        )
