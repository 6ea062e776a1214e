"""Engines: which code runs a model's forward passes. The stages that score and sample ask here; nothing else knows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline.infer import sample, score, vllm
from pipeline.infer.forward import check_head, head
from pipeline.prepared import PreparedModel
from schemas.config import Config
from stages.run import console


@contextmanager
def scorer(
    speaker: PreparedModel, config: Config, longest: int
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any], Any | None]]:
    """What `pipeline.infer.score.score` needs of a model.

    Args:
        longest: tokens of the longest prompt and response together.
    Yields:
        A function of prompts and responses to their hidden states, one of these to logits, and the whole `transformers`
        model where that is the engine.
    """
    on_vllm = speaker.config.engine == "vllm"
    # Of a model that vLLM runs we need no more than the head, which is checked the same way.
    model = speaker.load(layers=not on_vllm)
    check_head(model, speaker.ref.source)
    if not on_vllm:
        budget = config.scores.batch_tokens
        yield partial(score.hidden_rows, model, batch_tokens=budget, say=console.say), partial(head, model), model
        return
    # At least a token of each sequence that it may have under way, 256 if nobody says otherwise.
    options = {"max_num_batched_tokens": max(config.scores.batch_tokens, 256)} | speaker.config.engine_options
    with vllm.open_engine(speaker.ref.path, speaker.dtype, longest, True, options) as llm:
        yield partial(vllm.hidden_rows, llm, device=model.device), partial(head, model), None


@contextmanager
def sampler(speaker: PreparedModel, config: Config, longest: int) -> Iterator[Callable[..., list[sample.Response]]]:
    """`pipeline.infer.sample.sample` without its first argument and its batch size; `longest` as in `scorer`."""
    size = config.rollouts.batch_size
    if speaker.config.engine == "transformers":
        model = speaker.load()
        check_head(model, speaker.ref.source)
        yield partial(sample.sample, model, batch_size=size)
        return
    speaker.check()
    options = {"max_num_seqs": size} | speaker.config.engine_options
    with vllm.open_engine(speaker.ref.path, speaker.dtype, longest, False, options) as llm:
        yield partial(vllm.sample, llm)
