"""Engines: which code runs a model's forward passes. `engine` in the config names one; nothing else here knows which.

A new engine is a class that has the methods of `Teacher` or of `Sampler` and is a context manager, its name in `TEACHERS` or
in `SAMPLERS`, and in `schemas.config.model.Model.engine`.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from pipeline.infer import sample, score, vllm
from pipeline.infer.forward import check_head, head
from pipeline.infer.memory import free, scoring
from pipeline.infer.sample import Response
from pipeline.infer.score import Candidates, Scores
from pipeline.prepared import PreparedModel
from schemas.errors import OpdError


class Teacher(Protocol):
    """Scores responses that are there already. A student does so too, where its own log-probs are wanted of responses that
    it did not sample."""

    def score(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        candidates: Candidates,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Scores:
        """Score a row group.

        Args:
            prompts, responses: token ids, row by row; a response may be empty, a prompt not.
            candidates: which are kept.
            advance: called with the number of scored tokens.
        Returns:
            rows of response 0, one for each of its tokens, its end row, rows of response 1, ... Nats.
        Raises:
            OpdError: a single response is more than memory holds, or what the model gives is not a number.
        """


class Sampler(Protocol):
    """Samples responses."""

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        """Sample one response per prompt, until one of the model's stop ids or the last token.

        Args:
            prompts: token ids, none empty.
            seeds: one per prompt, 64 bits: a response depends on nothing else of its call.
            temperature: 0 is greedy.
            top_k: how many of the likeliest ids to record at each position.
            advance: called with the number of finished responses.
        Raises:
            OpdError: a single response is more than memory holds, or what the model gives is not a number.
        """


@dataclass(frozen=True)
class Opening:
    """What an engine is opened for.

    Attributes:
        model: what it runs.
        longest: tokens of the longest prompt and response together.
        size: of a batch: padded tokens for a teacher, responses for a sampler.
        say: called with a line for the person watching.
    """

    model: PreparedModel
    longest: int
    size: int
    say: Callable[[str], None]


def read_model(model: PreparedModel) -> Any:
    """The whole `transformers` model; raises OpdError where `head` doesn't give its logits."""
    check_head(model.model, model.ref.source)
    return model.model


def _opened_model(opening: Opening) -> Any:
    """The same, for sequences as long; raises OpdError as `check_rope` does too."""
    model = read_model(opening.model)
    check_rope(model.config.get_text_config(), opening.model.ref.source, opening.longest)
    return model


def check_rope(config: Any, name: str, longest: int) -> None:
    """Refuse rotary embeddings whose factors `transformers` takes by the furthest position of a call (Phi-3's `longrope`,
    `dynamic`): neighbours in a batch, and a start that is read before the rest, would change a row's log-probs.

    Args:
        config: of the text model.
        longest: tokens of the longest prompt and response together.
    Raises:
        OpdError: that is more than the factors are the same for.
    """
    told = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or by kind of layer.
    for rope in [told] if "rope_type" in told else filter(None, told.values()):
        kind = rope.get("rope_type", "default")
        if kind != "longrope" and "dynamic" not in kind:
            continue
        limit = rope["original_max_position_embeddings"] if kind == "longrope" else config.max_position_embeddings
        if longest > limit:
            raise OpdError(
                f"model {name}: with its positions (`{kind}`) `transformers` gives other log-probs to all rows of a batch "
                f"once one is longer than {limit} tokens, and prompt and response take up to {longest}; exact are at most "
                f"{limit} together (lower rollouts.max_new_tokens, take shorter prompts), or `engine: vllm`"
            )


def _check_numbers(model: str, *arrays: np.ndarray) -> None:
    # -inf is what a model gives to what it rules out.
    if not all((array < np.inf).all() for array in arrays):
        raise OpdError(f"model {model} gives log-probs that are not numbers; take bfloat16 or float32 as its `dtype`")


def _told(model: PreparedModel) -> str:
    return f"{model.ref.source} in {model.dtype}"


# ---- teachers ----


@dataclass(frozen=True)
class LocalTeacher:
    """Scores from hidden states: whatever runs the model's body, its head and what is kept of the logits are our code.

    Attributes:
        hidden_rows: prompts and responses -> what `score.score` reads.
        logits: (n, d) -> (n, vocab).
        stop: the model's stop ids.
        model: its name and dtype, for errors.
        say: called with a line for the person watching.
    """

    hidden_rows: Callable[..., Iterator[tuple[np.ndarray, list[torch.Tensor]]]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    stop: np.ndarray
    model: str
    say: Callable[[str], None]

    def score(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        candidates: Candidates,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Scores:
        """See `Teacher`."""
        rows = self.hidden_rows(prompts, responses)
        scores = score.score(rows, self.logits, responses, self.stop, candidates, advance, self.say)
        _check_numbers(self.model, scores.log_z, scores.logp)
        return scores


@contextmanager
def _transformers_teacher(opening: Opening) -> Iterator[Teacher]:
    model = _opened_model(opening)
    tokens = max(opening.size, opening.longest)
    takes = scoring(model.config.get_text_config(), model.dtype.itemsize, tokens, score.CHUNK_BYTES)
    if takes > (left := free(model.device)):
        opening.say(
            f"{opening.model.ref.source}: forward passes of {tokens:,} tokens take about {takes / 1e9:.1f} GB beside the "
            f"weights, and {left / 1e9:.1f} GB are free; lower scores.batch_tokens"
            + (f", which one response of {opening.longest:,} tokens exceeds" * (opening.longest > opening.size))
        )
    hidden_rows = partial(score.hidden_rows, model, batch_tokens=opening.size, say=opening.say)
    yield LocalTeacher(hidden_rows, partial(head, model), opening.model.stop, _told(opening.model), opening.say)


@contextmanager
def _vllm_teacher(opening: Opening) -> Iterator[Teacher]:
    # Of a model that vLLM runs we need no more than the head, which is checked the same way.
    prepared, headed = opening.model, opening.model.load(layers=False)
    check_head(headed, prepared.ref.source)
    # At least a token of each sequence that it may have under way, 256 if nobody says otherwise.
    options = {"max_num_batched_tokens": max(opening.size, 256)} | prepared.config.engine_options
    with vllm.open_engine(prepared.ref.path, prepared.dtype, opening.longest, True, options) as llm:
        hidden_rows = partial(vllm.hidden_rows, llm, device=headed.device)
        yield LocalTeacher(hidden_rows, partial(head, headed), prepared.stop, _told(prepared), opening.say)


TEACHERS: Mapping[str, Callable[[Opening], AbstractContextManager[Teacher]]] = {
    "transformers": _transformers_teacher,
    "vllm": _vllm_teacher,
}
"""By `engine` of a model in the config."""


# ---- samplers ----


@dataclass(frozen=True)
class LocalSampler:
    """Samples with a function that takes what `Sampler.sample` does and the model's stop ids; `model` is its name and dtype."""

    draw: Callable[..., list[Response]]
    stop: np.ndarray
    model: str

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        """See `Sampler`."""
        responses = self.draw(
            prompts=prompts,
            seeds=seeds,
            stop=self.stop,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            advance=advance,
        )
        # Once for a call: to look at each step would have a GPU wait.
        _check_numbers(self.model, *(response.behavior_logp for response in responses))
        return responses


@contextmanager
def _transformers_sampler(opening: Opening) -> Iterator[Sampler]:
    draw = partial(sample.sample, _opened_model(opening), batch_size=opening.size)
    yield LocalSampler(draw, opening.model.stop, _told(opening.model))


@contextmanager
def _vllm_sampler(opening: Opening) -> Iterator[Sampler]:
    prepared = opening.model
    prepared.check()
    options = {"max_num_seqs": opening.size} | prepared.config.engine_options
    with vllm.open_engine(prepared.ref.path, prepared.dtype, opening.longest, False, options) as llm:
        yield LocalSampler(partial(vllm.sample, llm), prepared.stop, _told(prepared))


SAMPLERS: Mapping[str, Callable[[Opening], AbstractContextManager[Sampler]]] = {
    "transformers": _transformers_sampler,
    "vllm": _vllm_sampler,
}
"""By `engine` of a model in the config."""


# ---- opening ----


def open_teacher(
    model: PreparedModel, longest: int, batch_tokens: int, say: Callable[[str], None] = lambda _: None
) -> AbstractContextManager[Teacher]:
    """A model as a teacher, run by its engine; ready, and its memory taken, within the context.

    Args:
        longest: tokens of the longest prompt and response together.
        batch_tokens: padded tokens of a forward pass.
        say: called with a line for the person watching.
    Raises:
        OpdError: its engine can't score or isn't installed, or the model can't be loaded or has an unknown head.
    """
    return _engine(TEACHERS, "score", model)(Opening(model, longest, batch_tokens, say))


def open_sampler(
    model: PreparedModel, longest: int, batch_size: int, say: Callable[[str], None] = lambda _: None
) -> AbstractContextManager[Sampler]:
    """A model as a sampler of `batch_size` responses at once; else as `open_teacher`."""
    return _engine(SAMPLERS, "sample", model)(Opening(model, longest, batch_size, say))


def engine_packages(engine: str) -> list[str]:
    """What is installed of an engine beside `transformers`, whose version matters to what it gives; by the names that packages
    are installed by: vLLM for CPUs has another one."""
    return [] if engine == "transformers" else sorted(importlib.metadata.packages_distributions().get(engine, []))


Engine = TypeVar("Engine")


def _engine(engines: Mapping[str, Engine], what: str, model: PreparedModel) -> Engine:
    if (name := model.config.engine) not in engines:
        raise OpdError(
            f"model {model.ref.source}: `engine: {name}` can't {what} responses; those that can: {', '.join(engines)}"
        )
    return engines[name]
