"""Train: one round on its shards, from the last checkpoint to the next."""

import json
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock

from pipeline.lm import check_head
from pipeline.models import ModelRef
from pipeline.shards import open_shard, versions, write_text
from schemas.config import Config
from schemas.manifest import digest
from stages import console, layout
from stages.context import DEFAULT_CONFIG, ConfigOption, Speaker, ThreadsOption, policy, read_config, teacher
from train.checkpoint import export
from train.loop import Progress, train_round
from train.stream import Triple, count_batches


def main(
    round_index: Annotated[int, typer.Option("--round", min=0, help="number of the round")] = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Train the student for one round and export a checkpoint that `from_pretrained` loads."""
    config = read_config(config_file)
    console.threads(threads)
    torch.manual_seed(config.seed)
    folder = layout.checkpoint_folder(config, round_index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".train.lock"):  # a killed run may have left its trainer behind
        shards = open_shards(config, f"round-{round_index}")
        student = policy(config, round_index)
        identity = {
            "student": student.ref.identity(),
            "dtype": student.dtype,
            "weights": [weights.manifest.sha256 for _, _, weights in shards],
            "objective": config.objective.model_dump(),
            "train": config.train.model_dump(mode="json", exclude={"save_every"}),
            "rounds": config.rollouts.rounds,
            "seed": config.seed,
        }
        model = student.load()
        check_head(model, student.ref.source)
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
        ref = export(
            model, student.tokenizer, folder, model_card(config, student, identity), f"{config.run} round {round_index}"
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
| weights | `{json.dumps(config.weights.identity())}` |
| rollouts | `{json.dumps(config.rollouts.model_dump())}` |
| optimiser | `{json.dumps(config.train.model_dump(mode="json"))}` |
| data | `{digest(identity["weights"])[:16]}` |
| versions | `{json.dumps(versions())}` |
"""


if __name__ == "__main__":
    console.run(main)
