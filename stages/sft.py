"""Sft: fine-tune the student on the teacher's answers; the first round samples from what that makes of it."""

import torch

from schemas.config import CrossEntropy
from schemas.errors import OpdError
from stages.run import console
from stages.run.card import sft_card
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, policy
from stages.run.rounds import shared
from stages.run.run import BASE, open_run
from stages.run.training import (
    Parallel,
    ParallelOption,
    Training,
    WorkersOption,
    only_trainer,
    publish_checkpoint,
    train,
)
from train.distributed import rank, together
from train.loop import Progress
from train.stream import Tables, count_steps


def main(
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
    workers: WorkersOption = 1,
    parallel: ParallelOption = Parallel.ddp,
) -> None:
    """Fine-tune the student as given on the teacher's answers, and export a checkpoint that `from_pretrained` loads.

    The loss of a step is the mean of -log p over the tokens of its answers, each answer's stop included, which is one event
    whichever of its stop tokens the student takes. Killed, stopped and spread over processes it goes on as `train` does.
    """
    run = open_run(config_file, "sft")
    part = run.phase("sft")
    settings = run.settings
    optimiser = settings.sft.optimiser(settings.train)
    config = settings.model_copy(update={"train": optimiser, "objective": CrossEntropy()})
    torch.manual_seed(settings.seed)
    with only_trainer(part, threads):
        with together():
            shards: list[Tables] = [(place.rollouts,) for place in shared(part)]
        budget = count_steps(shards, optimiser.batch_size) * optimiser.epochs
        if not budget:
            raise OpdError(
                f"{part.folder}: none of the teacher's answers is left to train on; look at sft/rollouts/*.json, whose figures "
                "count those that are right (`sft.right_only`) and those that are too long"
            )
        student = policy(run, BASE)
        identity = {
            "student": student.ref.identity(),
            "dtype": student.dtype,
            "rollouts": [rollouts.manifest.sha256 for rollouts, *_ in shards],
            **{key: value for key, value in run.decided.items() if key != "student"},
        }
        progress = Progress(0, budget, budget)
        job = Training(part, config, student, student, shards, progress, None, identity, "sft")
        outcome, last = train(job, detail, workers, parallel)
        if rank():
            return
        publish_checkpoint(job, outcome, sft_card(run), f"{run.config.run} sft")
    if last:
        console.say(f"sft: cross-entropy {last['loss']:.3f} nats per token, in {part.checkpoint}")


def detail(figures: dict[str, float]) -> str:
    """A step's figures for the progress bar."""
    return (
        f"cross-entropy {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"data wait {100 * figures['data_wait']:.0f} %"
    )


if __name__ == "__main__":
    console.run(main)
