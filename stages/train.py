"""Train: one round on its shards, from the last checkpoint to the next."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from filelock import FileLock

from pipeline.lm import check_head
from pipeline.shards import open_shard, write_text
from schemas.config import TRAIN_OPERATION, Config
from stages import console, layout
from stages.card import model_card
from stages.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, policy, read_config
from train.adapters import attach
from train.checkpoint import export, final_state, trained
from train.distributed import processes, rank, ranks_here, shard, wait_for_all
from train.layers import recompute
from train.loop import Progress, train_round
from train.stream import Triple, count_steps
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
    config = read_config(config_file)
    torch.manual_seed(config.seed)
    folder = layout.checkpoint_folder(config, round_index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with processes(), ExitStack() as held:
        console.threads(threads and max(1, threads // ranks_here()))
        first = rank() == 0
        # A killed run may have left its trainer behind.
        held.enter_context(FileLock(folder.parent / ".train.lock") if first else console.silence())
        wait_for_all()  # nobody reads the states before the lock is ours
        shards = open_shards(config, f"round-{round_index}")
        student = policy(config, round_index)
        identity = {
            "student": student.ref.identity(),
            "dtype": student.dtype,
            "weights": [weights.manifest.sha256 for _, _, weights in shards],
            "objective": config.objective.model_dump(),
            "train": config.train.model_dump(mode="json", exclude=TRAIN_OPERATION),
            "rounds": config.rollouts.rounds,
            "seed": config.seed,
        }
        # Adapters belong to the weights that the run began with: those of a checkpoint, where they are merged, are rounded.
        base = policy(config, 0) if config.train.lora else student
        model = base.load(device="cpu" if parallel is Parallel.fsdp else None)
        check_head(model, base.ref.source)
        if config.train.lora:
            attach(model, config.train.lora)
        if config.train.gradient_checkpointing:
            recompute(model)
        if parallel is Parallel.fsdp:
            shard(model)
        steps = count_steps(shards, config.train.batch_size) * config.train.epochs
        progress = Progress(before=round_index * steps, total=config.rollouts.rounds * steps)
        about = config.model_dump(mode="json")
        last: dict[str, float] = {}
        with (
            stop_on_sigterm() as stop_asked,
            trackers(config.train.trackers if first else (), layout.run_folder(config), config.run, about) as track,
            console.progress(f"round-{round_index} train", steps, "steps") as advance,
        ):

            def report(figures: dict[str, float]) -> None:
                step = int(figures["step"])
                track({k: v for k, v in figures.items() if k not in ("step", "steps")}, progress.before + step)
                advance(1, detail(figures), already=0 if last else step)
                last.update(figures)

            train_round(
                model,
                torch.from_numpy(student.stop.astype("int64")).to(model.device),
                shards,
                config,
                round_index,
                progress,
                states_folder(config, round_index - 1) if round_index else None,
                states_folder(config, round_index),
                identity,
                report,
                workers,
                stop_asked,
                console.say,
            )
        if not first:
            return
        del model
        model = trained(base.load(device="cpu"), final_state(states_folder(config, round_index))[0], config.train)
        card = model_card(config, round_index, student, shards, states_folder(config, round_index) / "metrics.jsonl")
        ref = export(model, student.tokenizer, folder, card, f"{config.run} round {round_index}")
        write_text(layout.policy_file(config, round_index + 1), ref.model_dump_json(indent=1) + "\n")
    if last:
        console.say(
            f"round-{round_index} train: loss {last['loss']:.3f}, sampled KL {last['sampled_kl']:.3f}, in {folder}"
        )


def states_folder(config: Config, round_index: int) -> Path:
    """Where a round's training states and metrics lie."""
    return layout.checkpoint_folder(config, round_index).parent / "train"


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """While it is open a SIGTERM, as schedulers send it before they pre-empt, only makes the yielded function say True."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def detail(figures: dict[str, float]) -> str:
    """A step's figures for the progress bar."""
    ess = [f"ESS {figures['ess']:.2f}"] if "ess" in figures else []
    return ", ".join(
        [
            f"loss {figures['loss']:.3f}",
            f"KL {figures['sampled_kl']:.3f}",
            *ess,
            f"{figures['tokens_per_second']:,.0f} tokens/s",
            f"data wait {100 * figures['data_wait']:.0f} %",
        ]
    )


def open_shards(config: Config, phase: str) -> list[Triple]:
    """The rollouts, units and weights of a phase, each checked against the one it was made from."""
    triples = []
    for number in range(layout.shard_count(config, phase)):
        rollouts = open_shard(layout.shard_path(config, phase, "rollouts", number), "rollouts")
        made_from = {"rollouts": rollouts.manifest.sha256}
        units = open_shard(layout.shard_path(config, phase, "units", number), "units", inputs=made_from)
        weights = open_shard(
            layout.shard_path(config, phase, "weights", number),
            "weights",
            inputs={**made_from, "units": units.manifest.sha256},
        )
        triples.append((rollouts, units, weights))
    return triples


if __name__ == "__main__":
    console.run(main)
