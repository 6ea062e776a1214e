"""Evaluate: accuracy of a checkpoint's greedy answers on held-out prompts, and its on-policy reverse KL to the teacher."""

import json
from typing import Annotated, Any

import polars as pl
import typer

from pipeline.infer.engines import open_sampler, read_model
from pipeline.measure.answers import wilson
from pipeline.measure.greedy_answers import greedy_answers
from pipeline.prepared import PreparedModel
from pipeline.store.shards import publish, write_text
from schemas.config import Config
from stages.run import console, layout
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, open_prompts, policy, read_config
from stages.run.rounds import open_shards
from train.on_policy_kl import on_policy_kl

NO_KL: dict[str, Any] = {"reverse_kl": None, "sampled_kl": None, "kl_responses": 0, "kl_tokens": 0}
"""In place of `on_policy_kl` where the teacher isn't at hand."""


def main(
    checkpoint: Annotated[int, typer.Option(min=0, help="0 is the student as given, n what n rounds made of it")],
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Measure a checkpoint on the held-out split; writes result.json and the answers beside it."""
    config = read_config(config_file)
    console.threads(threads)
    student = policy(config, checkpoint)
    phase = f"eval-{checkpoint}"
    folder = layout.run_folder(config) / phase
    answers = answered(student, config, phase)
    with publish(folder / "answers.parquet") as temporary:
        answers.write_parquet(temporary)
    kl = NO_KL
    if layout.kl_items(config):
        # Candidates and units are the trainer's, so it is its own forward pass, whatever the engine.
        kl = on_policy_kl(read_model(student), student.stop, open_shards(config, phase), config)
    right = int(answers["right"].sum())
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "split": config.evaluate.split,
        "items": len(answers),
        "right": right,
        "accuracy": right / max(1, len(answers)),
        "accuracy_95": wilson(right, len(answers)),
        "stopped": float(answers["stopped"].mean()),  # type: ignore[arg-type]
        **kl,
    }
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    nats = result["reverse_kl"]
    measured = "not measured" if nats is None else f"{nats:.3f} nats per token"
    console.say(
        f"{phase}: {right}/{len(answers)} right ({100 * result['accuracy']:.1f} %), on-policy reverse KL {measured}"
    )


def answered(student: PreparedModel, config: Config, phase: str) -> pl.DataFrame:
    """The student's greedy answers to every held-out prompt; its engine is closed when they are there."""
    prompts = open_prompts(config)
    rows = prompts.split(config.evaluate.split)
    new = config.rollouts.max_new_tokens
    ids = student.renderer(prompts).ids(rows, student.context - new)
    longest = max(map(len, ids), default=0) + new
    with (
        open_sampler(student, longest, config.rollouts.batch_size, console.say) as sampler,
        console.progress(f"{phase} answers", len(rows), "responses") as advance,
    ):
        return greedy_answers(sampler, student, rows, ids, config, advance)


if __name__ == "__main__":
    console.run(main)
