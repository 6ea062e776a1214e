"""Train: one round on its shards, from the last checkpoint to the next."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Annotated

import torch
import typer
from filelock import FileLock

from pipeline.infer.forward import check_head
from pipeline.store.shards import write_text
from schemas.config import Config
from schemas.outcome import Outcome
from stages.run import console
from stages.run.card import model_card
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, policy
from stages.run.rounds import open_shards, progress_of
from stages.run.run import open_run
from train import recipes
from train.adapters import attach
from train.checkpoint import export, final_state, trained
from train.distributed import processes, rank, ranks_here, shard, wait_for_all
from train.layers import recompute
from train.loop import train_round
from train.trackers import trackers


class Parallel(StrEnum):
    """How several processes train one model; no key of the config, for it leaves the result as it is."""

    ddp = "ddp"
    fsdp = "fsdp"


def main(
    round_index: Annotated[int, typer.Option("--round", min=0, help="number of the round")] = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
    workers: Annotated[int, typer.Option(min=0, help="threads that read ahead; they change no result")] = 1,
    parallel: Annotated[
        Parallel, typer.Option(help="under torchrun, each process holds the model (ddp), or a part of it (fsdp)")
    ] = Parallel.ddp,
) -> None:
    """Train the student for one round and export a checkpoint that `from_pretrained` loads.

    SIGTERM saves and leaves after the step under way, with exit status 143; the same command then goes on.

    Processes that torchrun starts share every step's responses. How many there are, and --parallel, change only the last
    bits of what is trained, and may change whenever a round is resumed.
    """
    run = open_run(config_file, "train")
    config, part = run.settings, run.phase(f"round-{round_index}")
    torch.manual_seed(config.seed)
    folder = run.checkpoint(round_index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with processes(), ExitStack() as held:
        console.threads(threads and max(1, threads // ranks_here()))
        first = rank() == 0
        # A killed run may have left its trainer behind.
        held.enter_context(FileLock(folder.parent / ".train.lock") if first else console.silence())
        wait_for_all()  # nobody reads the states before the lock is ours
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
        # Adapters belong to the weights that the run began with: those of a checkpoint, where they are merged, are rounded.
        base = policy(run, 0) if config.train.lora else student
        model = base.load(device="cpu" if parallel is Parallel.fsdp else None)
        check_head(model, base.ref.source)
        if config.train.lora:
            attach(model, config.train.lora)
        if config.train.gradient_checkpointing:
            recompute(model)
        if parallel is Parallel.fsdp:
            shard(model)
        about = run.config.model_dump(mode="json")
        last: dict[str, float] = {}
        with (
            stop_on_sigterm() as stop_asked,
            trackers(config.train.trackers if first else (), run.root, run.config.run, about) as track,
            console.progress(f"round-{round_index} train", progress.budget, "steps") as advance,
        ):

            def report(figures: dict[str, float]) -> None:
                step = int(figures["step"])
                track({k: v for k, v in figures.items() if k not in ("step", "steps")}, progress.before + step)
                advance(1, detail(figures), already=0 if last else step)
                last.update(figures)

            outcome = train_round(
                model,
                torch.from_numpy(student.stop.astype("int64")).to(model.device),
                shards,
                config,
                round_index,
                progress,
                run.phase(f"round-{round_index - 1}").states if round_index else None,
                part.states,
                identity,
                report,
                workers,
                stop_asked,
                console.say,
            )
        if not first:
            return
        write_text(part.outcome, outcome.model_dump_json(indent=1) + "\n")
        del model
        model = trained(base.load(device="cpu"), final_state(part.states)[0], config.train)
        card = model_card(run, round_index, student, shards, part.states / "metrics.jsonl")
        ref = export(model, student.tokenizer, folder, card, f"{run.config.run} round {round_index}")
        write_text(run.policy_file(round_index + 1), ref.model_dump_json(indent=1) + "\n")
    if last:
        console.say(f"round-{round_index} train: {nats(last)}, in {folder}")
    if reason := ended(config, round_index, outcome):
        console.say(reason)


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


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """While it is open a SIGTERM, as schedulers send it before they pre-empt, only makes the yielded function say True."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


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


if __name__ == "__main__":
    console.run(main)
