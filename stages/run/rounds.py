"""A round of training as the run's files tell it: its shards, its budget, what it ended with."""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.prepared import PromptTable
from schemas.errors import OpdError
from schemas.outcome import Outcome
from stages.run.context import prompts_of
from stages.run.run import Phase, Place, Run
from train.distributed import local_rank, ranks_here, together
from train.loop import Progress
from train.shards import check_log_z
from train.stream import Triple


def open_shards(phase: Phase) -> list[Triple]:
    """The rollouts, units and weights of a phase; all ranks open them together.

    Raises OpdError on all of them when a table is missing or damaged or lacks what is read.
    """
    with together():
        places = list(shared(phase))  # each opens its shards once
        prompts = None if local_rank() else prompts_of(phase)
        for place in places:
            check_log_z(phase.run.config.objective, place.units)
            if prompts:
                check_prompts(place, prompts)
        return [(place.rollouts, place.units, place.weights) for place in places]


def shared(phase: Phase) -> Iterator[Place]:
    """The places of a phase, each of which one rank of this machine reads to the last byte. What another machine reads says
    nothing: disks and memory are its own."""
    return (replace(place, whole=place.number % ranks_here() == local_rank()) for place in phase)


def check_prompts(place: Place, prompts: PromptTable) -> None:
    """Raise OpdError when rollouts name a prompt that is none."""
    for group in place.rollouts.row_groups(["prompt_id"]):
        try:
            prompts.take(group["prompt_id"].to_pylist())
        except OpdError as error:
            raise OpdError(f"{place.path('rollouts')}: column `prompt_id`: {error}; run its stage again") from error


def progress_of(run: Run, round_index: int) -> Progress:
    """The budget of a round, its own steps and what the rounds before it left, and its place in the run."""
    own = [planned_steps(run, r) for r in run.rounds]
    before = [read_outcome(run, r) for r in range(round_index)]
    return Progress(
        before=sum(outcome.steps for outcome in before),
        budget=own[round_index] + (before[-1].unspent if before else 0),
        total=sum(own),
    )


def planned_steps(run: Run, round_index: int) -> int:
    """The steps that a round's own rollouts, and those it replays, stand for."""
    responses = sum(phase.responses for phase in run.trained_on(round_index))
    return -(-responses // run.settings.train.batch_size) * run.settings.train.epochs


def read_outcome(run: Run, round_index: int) -> Outcome:
    """What a round ended with. Raises OpdError when that is missing or damaged."""
    phase = run.phase(f"round-{round_index}")
    return phase.record(phase.outcome, Outcome, "train")
