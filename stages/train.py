"""Train: one round on its shards, from the last checkpoint to the next."""

import json
from contextlib import ExitStack
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock

from pipeline.lm import check_head
from pipeline.models import ModelRef
from pipeline.shards import open_shard, versions, write_text
from schemas.config import TRAIN_OPERATION, Config
from schemas.manifest import digest
from stages import console, layout
from stages.context import DEFAULT_CONFIG, ConfigOption, Speaker, ThreadsOption, policy, read_config, teacher
from train.adapters import attach
from train.checkpoint import export, load_state, trained
from train.distributed import gather, processes, rank, ranks_here, shard
from train.layers import recompute
from train.loop import Progress, train_round
from train.stream import Triple, count_batches


class Parallel(StrEnum):
    """How several processes train one model; not part of the config, for it leaves the result as it is."""

    ddp = "ddp"
    fsdp = "fsdp"


def main(
    round_index: Annotated[int, typer.Option("--round", min=0, help="number of the round")] = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
    parallel: Annotated[
        Parallel, typer.Option(help="under torchrun, each rank holds the model (ddp), or a part of it (fsdp)")
    ] = Parallel.ddp,
) -> None:
    """Train the student for one round and export a checkpoint that `from_pretrained` loads.

    Started with torchrun, its processes share every step's responses; how many there are, and --parallel, change only
    the last bits of what is trained.
    """
    config = read_config(config_file)
    torch.manual_seed(config.seed)
    folder = layout.checkpoint_folder(config, round_index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with processes(), ExitStack() as held:
        first = rank() == 0
        console.threads(threads and max(1, threads // ranks_here()))
        if first:
            held.enter_context(FileLock(folder.parent / ".train.lock"))  # a killed run may have left its trainer behind
        else:
            held.enter_context(console.silence())
        gather([])  # nobody reads the state before the lock is ours
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
        # Adapters are of the run's first weights: merged ones, rounded once a round, are for those who load a checkpoint.
        base = policy(config, 0) if config.train.lora else student
        model = base.load(device="cpu" if parallel is Parallel.fsdp else None)
        check_head(model, base.ref.source)
        if config.train.lora:
            attach(model, config.train.lora)
        if config.train.gradient_checkpointing:
            recompute(model)
        if parallel is Parallel.fsdp:
            shard(model)
        steps = count_batches(shards, config.train.batch_size) * config.train.epochs
        state = folder.parent / "train"
        previous = layout.checkpoint_folder(config, round_index - 1).parent / "train" / "state.safetensors"
        last: dict[str, float] = {}
        with console.progress(f"round-{round_index} train", steps, "steps") as advance:

            def report(figures: dict[str, float]) -> None:
                last.update(figures)
                advance(1)

            train_round(
                model,
                torch.from_numpy(student.stop.astype("int64")).to(model.device),
                shards,
                config,
                round_index,
                Progress(before=round_index * steps, total=config.rollouts.rounds * steps),
                previous if round_index else None,
                state / "state.safetensors",
                state / "metrics.jsonl",
                identity,
                report,
            )
        if not first:
            return
        del model
        final = trained(base.load(device="cpu"), load_state(state / "state.safetensors")[0], config.train)
        ref = export(
            final, student.tokenizer, folder, model_card(config, student, identity), f"{config.run} round {round_index}"
        )
        write_text(layout.policy_file(config, round_index + 1), ref.model_dump_json(indent=1) + "\n")
    if last:
        console.say(
            f"round-{round_index} train: loss {last['loss']:.3f}, sampled KL {last['sampled_kl']:.3f}, in {folder}"
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


def model_card(config: Config, student: Speaker, identity: dict[str, Any]) -> str:
    """The exported folder's README: where the model comes from and what made it."""
    scorer: ModelRef = teacher(config).ref
    front = json.dumps({"base_model": config.student.model, "library_name": "transformers", "tags": ["distillation"]})
    return f"""---
{front}
---

# {config.run}

{config.student.model} after on-policy distillation from {config.teacher.model}, offline: its own rollouts, scored once
by the teacher.

| | |
|---|---|
| teacher | `{config.teacher.model}`, weights `{scorer.weights[:16]}` |
| started from | `{student.ref.source}`, weights `{student.ref.weights[:16]}` |
| objective | `{json.dumps(config.objective.model_dump())}` |
| weights | `{json.dumps(config.weights.model_dump())}` |
| rollouts | `{json.dumps(config.rollouts.model_dump())}` |
| optimiser | `{json.dumps(config.train.model_dump(mode="json"))}` |
| data | `{digest(identity["weights"])[:16]}` |
| versions | `{json.dumps(versions())}` |
"""


if __name__ == "__main__":
    console.run(main)
