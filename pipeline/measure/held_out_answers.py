"""A student's answers to held-out prompts, and which of them are right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.infer.engines import Sampler
from pipeline.infer.rollout_table import texts as texts_of
from pipeline.infer.sample import seed_of
from pipeline.measure.scorers import Scorer
from pipeline.prepared import PreparedModel
from schemas.config import Config


def held_out_answers(
    sampler: Sampler,
    student: PreparedModel,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[np.ndarray],
    judge: Scorer,
    config: Config,
    advance: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """`evaluate.samples` responses per prompt: the greedy one, or as many sampled ones.

    A response's random stream is of its prompt and its place among the prompt's, not of the checkpoint: before and after are
    sampled from the same uniforms, which makes their difference the surer.

    Args:
        sampler: `student`, opened.
        rows: of schema `prompts`.
        prompts: their rendered token ids.
        judge: what says whether a response is right.
        advance: called with the number of finished responses.
    Returns:
        A row a response, those of a prompt together: prompt_id, sample, prompt, reference, response, answer, right (null
        where it can't be told), stopped.
    Raises:
        OpdError: a single response is more than memory holds.
    """
    options = config.evaluate
    wanted = [(row, ids, sample) for row, ids in zip(rows, prompts, strict=True) for sample in range(options.samples)]
    responses = sampler.sample(
        [ids for _, ids, _ in wanted],
        [seed_of(config.seed, "evaluate", row["prompt_id"], sample) for row, _, sample in wanted],
        config.rollouts.longest,
        temperature=options.temperature if options.samples > 1 else 0,
        top_p=options.top_p if options.samples > 1 else 1,
        advance=advance,
    )
    texts = [said["response"] for said in texts_of(student, responses)]
    judged = judge.all(texts, [row for row, _, _ in wanted])
    return pl.DataFrame(
        {
            "prompt_id": [row["prompt_id"] for row, _, _ in wanted],
            "sample": [sample for _, _, sample in wanted],
            "prompt": [row["prompt"] for row, _, _ in wanted],
            "reference": [row["answer"] for row, _, _ in wanted],
            "response": texts,
            "answer": [answer for answer, _ in judged],
            "right": [right for _, right in judged],
            "stopped": [response.stopped for response in responses],
        },
        schema_overrides={"reference": pl.String, "right": pl.Boolean},  # also where all are null
    )
