"""A round of training as the run's files tell it: its shards, its budget, what it ended with."""

from schemas.config import Config
from schemas.errors import OpdError
from schemas.outcome import Outcome
from stages.run import layout
from train.loop import Progress
from train.shards import open_triple
from train.stream import Triple


def open_shards(config: Config, phase: str) -> list[Triple]:
    """The rollouts, units and weights of a phase. Raises OpdError as `open_triple` does."""
    triples = []
    for number in range(layout.shard_count(config, phase)):
        rollouts, units, weights = (
            layout.shard_path(config, phase, table, number) for table in ("rollouts", "units", "weights")
        )
        triples.append(open_triple(rollouts, units, weights, config.objective))
    return triples


def progress_of(config: Config, round_index: int) -> Progress:
    """The budget of a round, its own steps and what the rounds before it left, and its place in the run."""
    own = [planned_steps(config, r) for r in range(config.rollouts.rounds)]
    before = [read_outcome(config, r) for r in range(round_index)]
    return Progress(
        before=sum(outcome.steps for outcome in before),
        budget=own[round_index] + (before[-1].unspent if before else 0),
        total=sum(own),
    )


def planned_steps(config: Config, round_index: int) -> int:
    """The steps that a round's own rollouts, and those it replays, stand for."""
    responses = sum(layout.response_count(config, phase) for phase in layout.trained_on(config, round_index))
    return -(-responses // config.train.batch_size) * config.train.epochs


def read_outcome(config: Config, round_index: int) -> Outcome:
    """What a round ended with. Raises OpdError when that is missing or damaged."""
    path = layout.outcome_path(config, round_index)
    try:
        return Outcome.model_validate_json(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise OpdError(f"{path}: {what}; run `python -m stages.train --round {round_index}` again") from error
