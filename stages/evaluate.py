"""Evaluate: accuracy of a checkpoint's greedy answers on held-out prompts, and its on-policy reverse KL to the teacher."""

import json
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer

from pipeline.infer.forward import check_head
from pipeline.infer.sample import sample
from pipeline.measure.answers import bootstrap_ratio, wilson
from pipeline.measure.scorers import identity, scorer
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.shards import publish, write_text
from schemas.config import Config, Strict1to1
from stages.rollouts import response_text
from stages.run import console, layout
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    ThreadsOption,
    open_prompts,
    policy,
    read_config,
)
from stages.train import open_shards
from train.policy import unit_logps
from train.recipes import candidate_kl, one_to_one
from train.stream import batches, count_steps

NO_KL: dict[str, Any] = {"reverse_kl": None, "sampled_kl": None, "kl_responses": 0, "kl_tokens": 0}
"""In place of `on_policy_kl` where the teacher isn't at hand."""
NO_REFERENCE = "accuracy not measured (no reference answers)"


def main(
    checkpoint: Annotated[int, typer.Option(min=0, help="0 is the student as given, n what n rounds made of it")],
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Measure a checkpoint on the held-out split; writes result.json and the answers beside it."""
    config = read_config(config_file)
    console.threads(threads)
    prompts = open_prompts(config)
    student = policy(config, checkpoint)
    model = student.load()
    check_head(model, student.ref.source)
    phase = f"eval-{checkpoint}"
    folder = layout.run_folder(config) / phase
    answers = greedy_answers(model, student, prompts, config, phase)
    with publish(folder / "answers.parquet") as temporary:
        answers.write_parquet(temporary)
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "split": config.evaluate.split,
        **identity(config.evaluate),
        "items": len(answers),
        **accuracy(answers["right"]),
        "stopped": float(answers["stopped"].mean()),  # type: ignore[arg-type]
        **(on_policy_kl(model, student, config, phase) if layout.kl_items(config) else NO_KL),
    }
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    kl, share = result["reverse_kl"], result["accuracy"]
    right = f"{result['right']}/{result['judged']} right ({100 * share:.1f} %)" if result["judged"] else NO_REFERENCE
    measured = "not measured" if kl is None else f"{kl:.3f} nats per token"
    console.say(f"{phase}: {right}, on-policy reverse KL {measured}")


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


def greedy_answers(
    model: Any, student: PreparedModel, prompts: PromptTable, config: Config, phase: str
) -> pl.DataFrame:
    """One greedy response per held-out prompt: prompt_id, prompt, reference, response, answer, right (null where it can't be
    told), stopped."""
    score = scorer(config.evaluate, config.prompts.source)
    rows = prompts.split(config.evaluate.split)
    new = config.rollouts.max_new_tokens
    ids = student.renderer(prompts).ids(rows, student.context - new)
    with console.progress(f"{phase} answers", len(rows), "responses") as advance:
        responses = sample(
            model,
            ids,
            [0] * len(rows),
            student.stop,
            new,
            temperature=0,
            batch_size=config.rollouts.batch_size,
            advance=advance,
        )
    texts = [response_text(student, response) for response in responses]
    scored = [score(text, row) for text, row in zip(texts, rows, strict=True)]
    return pl.DataFrame(
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "prompt": [row["prompt"] for row in rows],
            "reference": [row["answer"] for row in rows],
            "response": texts,
            "answer": [answer for answer, _ in scored],
            "right": [right for _, right in scored],
            "stopped": [response.stopped for response in responses],
        },
        schema_overrides={"reference": pl.String, "right": pl.Boolean},  # also where all are null
    )


@torch.inference_mode()
def on_policy_kl(model: Any, student: PreparedModel, config: Config, phase: str) -> dict[str, Any]:
    """Reverse KL of the checkpoint to the teacher on its own held-out rollouts, nats per comparable student token.

    `reverse_kl`: at 1:1 units and stops the KL over the teacher's candidates, the realised token and one class for the
    rest (exact up to what that class hides, so a lower bound); at longer units the sampled log-ratio. `sampled_kl`: the
    log-ratio everywhere, unbiased and noisier. Intervals: bootstrap over responses.
    """
    stop = torch.from_numpy(student.stop.astype(np.int64)).to(model.device)
    shards, size = open_shards(config, phase), config.train.batch_size
    steps = batches(shards, size, config.train.micro_batch_tokens, config.seed, range(count_steps(shards, size)))
    exact = Strict1to1(tail="bucket")
    sums: dict[str, list[float]] = {"kl": [], "sampled": [], "tokens": []}
    for step in steps:
        for part in (part.to(model.device) for part in step.parts):
            logps = unit_logps(model, part, stop)
            sampled = logps.unit - part.teacher_logp
            one = one_to_one(part)
            kl = torch.where(one, candidate_kl(logps, part, exact, one), sampled)
            for row in range(len(part.responses)):
                mine = part.response_of_unit == row
                sums["kl"].append(float(kl[mine].sum()))
                sums["sampled"].append(float(sampled[mine].sum()))
                sums["tokens"].append(float(part.s_len[mine].sum()))
    kl_sum, sampled_sum, tokens = (np.array(sums[name]) for name in ("kl", "sampled", "tokens"))
    total = max(1.0, tokens.sum())
    return {
        "reverse_kl": float(kl_sum.sum() / total),
        "reverse_kl_95": bootstrap_ratio(kl_sum, tokens, config.seed),
        "sampled_kl": float(sampled_sum.sum() / total),
        "sampled_kl_95": bootstrap_ratio(sampled_sum, tokens, config.seed),
        "kl_responses": len(tokens),
        "kl_tokens": int(tokens.sum()),
    }


if __name__ == "__main__":
    console.run(main)
