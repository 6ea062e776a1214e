"""Evaluate: accuracy of a checkpoint's greedy answers on held-out prompts, and its on-policy reverse KL to the teacher."""

import json
from typing import Annotated, Any

import polars as pl
import typer

from pipeline.infer.engines import open_sampler, read_model
from pipeline.measure.answers import wilson
from pipeline.measure.greedy_answers import greedy_answers
from pipeline.measure.scorers import identity
from pipeline.prepared import PreparedModel
from pipeline.store.shards import publish, write_text
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, open_prompts, policy
from stages.run.rounds import open_shards
from stages.run.run import BASE, Phase, open_run
from train.on_policy_kl import FIGURES, on_policy_kl

NO_REFERENCE = "accuracy not measured (no reference answers)"
NO_KL: dict[str, Any] = {**dict.fromkeys(FIGURES), "kl_responses": 0, "kl_tokens": 0}
"""In place of `on_policy_kl` where the teacher isn't at hand."""


def main(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="0 is what the rounds start from, n what n rounds made of it; base: the student before `sft`"
        ),
    ],
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Measure a checkpoint on the held-out split; writes result.json and the answers beside it."""
    run = open_run(config_file, "evaluate", f"eval-{checkpoint}")
    console.threads(threads)
    config, phase = run.settings, run.phase(f"eval-{checkpoint}")
    student = policy(run, phase.number)
    answers = answered(student, phase)
    with publish(phase.folder / "answers.parquet") as temporary:
        answers.write_parquet(temporary)
    kl = NO_KL
    if run.kl_items:
        # Candidates and units are the trainer's, so it is its own forward pass, whatever the engine.
        kl = on_policy_kl(read_model(student), student.stop, open_shards(phase), config)
    result: dict[str, Any] = {
        "checkpoint": "base" if phase.number == BASE else phase.number,
        "split": config.evaluate.split,
        **identity(config.evaluate),
        "items": len(answers),
        **accuracy(answers["right"]),
        "stopped": float(answers["stopped"].mean()),  # type: ignore[arg-type]
        **kl,
    }
    write_text(phase.folder / "result.json", json.dumps(result, indent=1) + "\n")
    nats, share = result["reverse_kl"], result["accuracy"]
    right = f"{result['right']}/{result['judged']} right ({100 * share:.1f} %)" if result["judged"] else NO_REFERENCE
    measured = "not measured" if nats is None else f"{nats:.3f} nats per token"
    console.say(f"{phase.name}: {right}, on-policy reverse KL {measured}")


def accuracy(right: pl.Series) -> dict[str, Any]:
    """How many answers have a reference (`judged`), how many of these are right, their share and its interval.

    Args:
        right: bool, null where there is no reference.
    Returns:
        All but `judged` is None where no answer can be judged: not measured is not 0.
    """
    judged = right.drop_nulls()
    if judged.is_empty():
        return {"judged": 0, "right": None, "accuracy": None, "accuracy_95": None}
    count = int(judged.sum())
    return {
        "judged": len(judged),
        "right": count,
        "accuracy": count / len(judged),
        "accuracy_95": wilson(count, len(judged)),
    }


def answered(student: PreparedModel, phase: Phase) -> pl.DataFrame:
    """The student's greedy answers to every held-out prompt; its engine is closed when they are there."""
    config = phase.run.settings
    prompts = open_prompts(phase.run)
    rows = prompts.split(config.evaluate.split)
    new = config.rollouts.longest
    ids = student.renderer(prompts).ids(rows, student.context - new)
    longest = max(map(len, ids), default=0) + new
    with (
        open_sampler(student, longest, config.rollouts.batch_size, console.say) as sampler,
        console.progress(f"{phase.name} answers", len(rows), "responses") as advance,
    ):
        return greedy_answers(sampler, student, rows, ids, config, advance)


if __name__ == "__main__":
    console.run(main)
