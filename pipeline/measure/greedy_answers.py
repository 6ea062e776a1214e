"""Greedy answers to held-out prompts, and which of them are right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.infer.engines import Sampler
from pipeline.infer.rollout_table import response_text
from pipeline.measure.answers import extract, is_right
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
        prompt_id, prompt, reference, response, answer (null: none found), right, stopped.
    Raises:
        OpdError: a single response is more than memory holds.
    """
    seeds = [0] * len(rows)  # no draw
    responses = sampler.sample(prompts, seeds, config.rollouts.max_new_tokens, temperature=0, advance=advance)
    texts = [response_text(student, response) for response in responses]
    given = [extract(text, config.evaluate.extract) for text in texts]
    answered = zip(given, rows, strict=True)
    return pl.DataFrame(
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "prompt": [row["prompt"] for row in rows],
            "reference": [row["answer"] for row in rows],
            "response": texts,
            "answer": given,
            "right": [is_right(a, row, config.prompts.source, config.evaluate.extract) for a, row in answered],
            "stopped": [response.stopped for response in responses],
        }
    )
