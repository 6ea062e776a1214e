"""Greedy answers to held-out prompts, and which of them are right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.infer.engines import Sampler
from pipeline.infer.rollout_table import response_text
from pipeline.measure.scorers import scorer
from pipeline.prepared import PreparedModel
from schemas.config import Config


def greedy_answers(
    sampler: Sampler,
    student: PreparedModel,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[np.ndarray],
    config: Config,
    advance: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """One greedy response per prompt.

    Args:
        sampler: `student`, opened.
        rows: of schema `prompts`.
        prompts: their rendered token ids.
        advance: called with the number of finished responses.
    Returns:
        prompt_id, prompt, reference, response, answer, right (null where it can't be told), stopped.
    Raises:
        OpdError: a single response is more than memory holds.
    """
    seeds = [0] * len(rows)  # no draw
    responses = sampler.sample(prompts, seeds, config.rollouts.longest, temperature=0, advance=advance)
    texts = [response_text(student, response) for response in responses]
    scored = scorer(config.evaluate, config.prompts.source).all(texts, rows)
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
