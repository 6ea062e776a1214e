"""Train: one round on its shards, from the last checkpoint to the next."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipeline.infer.audit import unaudited
from pipeline.store.shards import manifest_path
from schemas.config import Config
from schemas.errors import OpdError
from schemas.outcome import Outcome
from stages.run import console
from stages.run.card import model_card
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, policy
from stages.run.rounds import open_shards, progress_of
from stages.run.run import Phase, Run, open_run
from stages.run.training import (
    Parallel,
    ParallelOption,
    Training,
    WorkersOption,
    only_trainer,
    publish_checkpoint,
    train,
)
from train import recipes
from train.checkpoint import is_finished, newest_state
from train.distributed import rank
from train.states import drop_states, states


def main(
    round_index: Annotated[int, typer.Option("--round", min=0, help="number of the round")] = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
    workers: WorkersOption = 1,
    parallel: ParallelOption = Parallel.ddp,
) -> None:
    """Train the student for one round and export a checkpoint that `from_pretrained` loads.

    SIGTERM saves and leaves after the step under way, with exit status 143; the same command then goes on.

    Processes that torchrun starts share every step's responses. How many there are, and --parallel, change only the last
    bits of what is trained, and may change whenever a round is resumed.
    """
    run = open_run(config_file, "train")
    config, part = run.settings, run.phase(f"round-{round_index}")
    if config.audit.required:
        for phase in run.trained_on(round_index):
            check_audited(phase.paths("scores"))
    with only_trainer(part, threads):
        job = job_of(run, round_index)
        for number in dropped(run, job):
            console.say(f"round-{number} train: again, for its optimiser's state, which was dropped")
            train_again(job_of(run, number), workers, parallel)
        torch.manual_seed(config.seed)
        outcome, last = train(job, detail, workers, parallel)
        if rank():
            return
        publish_checkpoint(job, outcome, model_card(run, round_index), f"{run.config.run} round {round_index}")
        for number in range(round_index):  # what this round began with is of no more use than to begin it anew
            drop_states(run.phase(f"round-{number}").states)
    if last:
        console.say(f"round-{round_index} train: {nats(last)}, in {part.checkpoint}")
    if reason := ended(config, round_index, outcome):
        console.say(reason)


def job_of(run: Run, round_index: int) -> Training:
    """What a round trains."""
    config, part = run.settings, run.phase(f"round-{round_index}")
    shards = [triple for phase in run.trained_on(round_index) for triple in open_shards(phase)]
    student = policy(run, round_index)
    progress = progress_of(run, round_index)
    identity = {
        "student": student.ref.identity(),
        "dtype": student.dtype,
        "weights": [weights.manifest.sha256 for _, _, weights in shards],
        "budget": progress.budget,
        **{key: value for key, value in run.decided.items() if key != "student"},
        "objective": recipes.identity(config.objective),  # one's own by its source too
    }
    # Adapters belong to the weights that the rounds began with: those of a checkpoint, where they are merged, are rounded.
    base = policy(run, 0) if config.train.lora else student
    start_from = run.phase(f"round-{round_index - 1}").states if round_index else None
    return Training(part, config, student, base, shards, progress, start_from, identity)


def train_again(job: Training, workers: int, parallel: Parallel) -> None:
    """Train a finished round for its optimiser's state. What else it left stays, metrics with their seconds too: later rounds
    were made from it."""
    metrics, kept = job.phase.metrics, kept_metrics(job.phase)
    if rank() == 0 and not kept.exists():
        metrics.rename(kept)
    torch.manual_seed(job.config.seed)
    try:
        train(job, detail, workers, parallel)
    finally:
        # Of a round that is under way the metrics belong to its state, and wait.
        if rank() == 0 and (is_finished(job.phase.states) or not states(job.phase.states)):
            kept.replace(metrics)


def kept_metrics(phase: Phase) -> Path:
    """Where a round's metrics lie while it is trained again."""
    return phase.metrics.with_name(".metrics.kept.jsonl")


def dropped(run: Run, job: Training) -> range:
    """The rounds whose optimiser state a round needs to begin, but which was dropped when a later one had its own, or is being
    made again since."""

    def has_state(phase: Phase) -> bool:
        return is_finished(phase.states) and not kept_metrics(phase).exists()

    end = first = job.phase.number
    while first and not has_state(run.phase(f"round-{first - 1}")):
        first -= 1
    begins = first < end and newest_state(job.phase.states, job.identity) is None
    return range(first if begins else end, end)


def ended(config: Config, round_index: int, outcome: Outcome) -> str | None:
    """Why a round ended early, for people; None when it did not."""
    if outcome.ended == "budget":
        return None
    bound, left = config.train.min_ess, outcome.unspent
    last = round_index + 1 == config.rollouts.rounds
    return (
        f"round-{round_index} train: ended after {outcome.steps} of {outcome.budget} steps: the effective sample size of the "
        f"policy over the one that the round started from fell to {outcome.ess:.3f}, below train.min_ess = {bound:g}; "
        + (
            f"{left} steps are left over"
            if last
            else f"round-{round_index + 1} samples afresh and has {left} steps more"
        )
    )


def nats(figures: dict[str, float]) -> str:
    """What a step says of the distance to the teacher, and the rest of its loss, for people. The loss itself mixes the two."""
    names = {"sampled_kl": "sampled KL", "divergence": "divergence", "surrogate": "surrogate"}
    return ", ".join(f"{name} {figures[key]:.3f}" for key, name in names.items() if key in figures)


def detail(figures: dict[str, float]) -> str:
    """A step's figures for the progress bar."""
    return ", ".join(
        [
            nats(figures),
            f"ESS {figures['ess']:.2f}",
            f"{figures['tokens_per_second']:,.0f} tokens/s",
            f"data wait {100 * figures['data_wait']:.0f} %",
        ]
    )


def check_audited(scores: Iterable[Path]) -> None:
    """Raise OpdError for a shard of scores that is there and could not be audited."""
    for path in scores:
        if manifest_path(path).exists() and (why := unaudited(path)):
            raise OpdError(
                f"{path}: these scores could not be audited ({why}); run `opd audit` where there is more memory or with a "
                "smaller `audit.dtype`, or train on them with `audit.required: false`"
            )


if __name__ == "__main__":
    console.run(main)
