"""Rollouts that were made elsewhere: rows of a log, each a prompt and what was answered, in this student's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.align.segments import told
from pipeline.conversations import Asked, Message, asked, messages_of, reference
from pipeline.prepared import PreparedModel
from pipeline.prompts import json_text
from pipeline.rendering import Renderer
from schemas.errors import OpdError, listed, shown

PROMPTS = ("prompt", "messages", "conversations")
RESPONSES = ("response", "completion")
IDS = ("response_ids", "completion_ids")
LOGPS = ("behavior_logp", "logprobs")
"""What logs call these; the first that a row has is taken."""
OURS = {*PROMPTS, *RESPONSES, *IDS, *LOGPS, "sampler_logp", "loss_mask", "finish_reason", "answer", "tools"}
"""Fields that are read; templates may use a row's others."""

STOPPED, CUT = ("stop", "tool_calls", "function_call", "eos"), ("length", "max_tokens")
"""What servers call the two ways in which a response ends."""

Spans = Literal["all", "last"]


@dataclass(frozen=True)
class Logged:
    """A row of a log.

    Attributes:
        where: file and row, for errors.
        asked: the prompt.
        prompt: its row of schema `prompts`, but for the columns that depend on other rows.
        turns: the assistant's answer and what followed it, up to its last; None where it isn't given as messages.
        text: the answer as text; None where it isn't given so.
        ids: the answer in the student's tokens; None where it isn't given so.
        logps, sampler_logps: nats, one per id; None where they aren't given.
        loss: bool, one per id, which of them the student wrote; None for all.
        cut: whether it was cut, or ended by the student; None where the row doesn't say.
    """

    where: str
    asked: Asked
    prompt: dict[str, Any]
    turns: list[Message] | None
    text: str | None
    ids: np.ndarray | None
    logps: np.ndarray | None
    sampler_logps: np.ndarray | None
    loss: np.ndarray | None
    cut: bool | None


def read(row: Mapping[str, Any], where: str, spans: Spans) -> Logged:
    """Read a row of a log.

    A row has a prompt (text or messages) and a response: text, messages, or ids of the student's tokens with their log-probs
    where there are; or it is a conversation, whose answers are the response.

    Args:
        spans: of a conversation, whether all of the assistant's messages are answers, or the last alone.
    Raises:
        OpdError: it is malformed; names the field.
    """
    given = {name: value for name, value in row.items() if value is not None}
    prompt, response, ids = (_first(given, names) for names in (PROMPTS, RESPONSES, IDS))
    if response is None and ids is None:  # else the conversation may hold it
        prompt = next((name for name in PROMPTS if name in given and not isinstance(given[name], str)), prompt)
    if prompt is None:
        raise OpdError(f"{where}: has neither of {', '.join(PROMPTS)}; it has {listed(row)}")
    value, turns, text = given[prompt], None, None
    if ids is None and response is not None and isinstance(given[response], str):
        text = given[response]
    elif ids is None and response is not None:
        turns = messages_of(given[response], f"{where}, field {response!r}")
    elif ids is None:
        if isinstance(value, str):
            raise _no_response(where)
        value, turns = _split(messages_of(value, f"{where}, field {prompt!r}"), spans, where)
    if turns and not (turns[0]["role"] == turns[-1]["role"] == "assistant"):
        raise OpdError(f"{where}: a response must begin and end with the assistant's message")
    question = asked(value, given.get("tools"), f"{where}, field {prompt!r}")
    finish = given.get("finish_reason")
    if finish is not None and finish not in STOPPED + CUT:
        raise OpdError(
            f"{where}: `finish_reason` is {shown(finish)}; a response ends by {', '.join(STOPPED)}, or is cut by "
            f"{', '.join(CUT)}; "
            "leave out the row, or the field where the student ended it all the same"
        )
    cut = None if finish is None else finish in CUT
    columns = {
        "prompt": question.prompt,
        "messages": json_text(question.messages),
        "tools": json_text(question.tools),
        "answer": reference(given.get("answer"), f"{where}, field 'answer'"),
        "fields": json_text({name: value for name, value in row.items() if name not in OURS}),
    }
    if ids is None:
        return Logged(where, question, columns, turns, text, None, None, None, None, cut)
    numbers = _numbers(given, ids, np.int64, where)
    logps, sampler, loss = (
        _numbers(given, name, kind, where, len(numbers)) if name else None
        for name, kind in (
            (_first(given, LOGPS), np.float32),
            (_first(given, ("sampler_logp",)), np.float32),
            (_first(given, ("loss_mask",)), np.bool_),
        )
    )
    return Logged(where, question, columns, None, None, numbers, logps, sampler, loss, cut)


def _first(given: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in given), None)


def _split(messages: list[Message], spans: Spans, where: str) -> tuple[list[Message], list[Message]]:
    """What was asked, and what was answered; what the assistant says before any user (a greeting) is part of the former."""
    roles = [message["role"] for message in messages]
    asked_at = roles.index("user") if "user" in roles else len(roles)
    answers = [number for number in range(asked_at, len(roles)) if roles[number] == "assistant"]
    if not answers:
        raise _no_response(where)
    first = answers[0] if spans == "all" else answers[-1]
    return messages[:first], messages[first : answers[-1] + 1]


def _no_response(where: str) -> OpdError:
    return OpdError(
        f"{where}: has no response: neither a field {', '.join(RESPONSES + IDS)} nor an assistant's message after a user's"
    )


_NUMBERS = {np.int64: "whole numbers", np.bool_: "0 and 1", np.float32: "numbers"}


def _numbers(given: Mapping[str, Any], name: str, kind: Any, where: str, count: int | None = None) -> np.ndarray:
    """A list of numbers; log-probs at most 0 and finite."""
    try:
        values = np.asarray(given[name])
        kinds = {np.int64: "iu", np.bool_: "iub"}.get(kind, "iuf")
        if values.ndim != 1 or (values.size and values.dtype.kind not in kinds):
            raise ValueError
        with np.errstate(over="ignore"):  # what is infinite then is refused below
            found = values.astype(kind)
        if kind is not np.float32 and not np.array_equal(found, values):  # beyond 64 bits, or neither 0 nor 1
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise OpdError(
            f"{where}: `{name}` must be a list of {_NUMBERS[kind]}, found {str(given[name])[:80]}"
        ) from error
    if count is not None and len(found) != count:
        raise OpdError(f"{where}: `{name}` has {len(found)} numbers, but there are {count} response ids")
    if kind is np.float32 and len(wrong := found[~(np.isfinite(found) & (found <= 1e-3))]):
        raise OpdError(f"{where}: `{name}` must be log-probs, finite and at most 0, found {wrong[0]}")
    return found


@dataclass(frozen=True)
class Told:
    """A logged response in the student's tokens.

    Attributes:
        ids: int32, the final stop left out.
        stopped: whether the student ended it.
        loss: bool, one per id; None for all.
    """

    ids: np.ndarray
    stopped: bool
    loss: np.ndarray | None


def in_tokens(logged: Logged, prompt: Mapping[str, Any], student: PreparedModel, renderer: Renderer) -> Told:
    """The response in the student's tokens.

    Text is read as text; what the tokenizer has as special tokens is not looked for in it. Messages are written by the
    student's chat template. Unless the row says that they were cut, the student ended both. Ids are taken as they are; where
    the row says that the student ended them, and they lack a stop token and log-probs, it is added.

    Args:
        prompt: of schema `prompts`.
        renderer: of the student's prompts.
    Raises:
        OpdError: the template can't write the conversation as one sequence, or an id is not in the vocabulary.
    """
    if logged.text is not None:
        ids = student.text_tokenizer.encode(logged.text, add_special_tokens=False).ids
        return Told(np.asarray(ids, np.int32), not logged.cut, None)
    if logged.turns is not None:
        stretches = renderer.spans(prompt, logged.turns, student.stop)
        every = np.concatenate([np.asarray(ids, np.int32) for ids, _ in stretches])
        loss = np.repeat([mine for _, mine in stretches], [len(ids) for ids, _ in stretches])
        return Told(every[:-1], not logged.cut, None if loss.all() else loss[:-1])
    assert logged.ids is not None
    size = len(student.vocabulary)
    foreign = logged.ids[(logged.ids < 0) | (logged.ids >= size)]
    if len(foreign):
        raise OpdError(
            f"{logged.where}: response id {foreign[0]}, but {student.ref.source} has tokens 0 to {size - 1}; are they another "
            "tokenizer's? give text instead"
        )
    stopped = len(logged.ids) > 0 and bool(np.isin(logged.ids[-1], student.stop))
    if stopped and logged.cut:
        raise OpdError(
            f"{logged.where}: was cut by its `finish_reason`, but its last id {logged.ids[-1]} is a stop token"
        )
    kept = len(logged.ids) - stopped
    mask = logged.loss
    # A stop that carries no loss is nothing to train on.
    own_stop = stopped and (mask is None or bool(mask[-1]))
    has_logps = logged.logps is not None or logged.sampler_logps is not None
    added = not stopped and logged.cut is False and not has_logps
    return Told(logged.ids[:kept].astype(np.int32), own_stop or added, None if mask is None else mask[:kept])


def columns_of(told_ones: Sequence[Told], student: PreparedModel) -> list[dict[str, Any]]:
    """Columns `response`, `segments` and `broken` of schema `rollouts`, by response."""
    ids = [one.ids for one in told_ones]
    loss = None
    if any(one.loss is not None for one in told_ones):
        loss = np.concatenate([np.ones(len(one.ids), bool) if one.loss is None else one.loss for one in told_ones])
    offsets = np.cumsum([0, *map(len, ids)])
    flat = np.concatenate([np.zeros(0, np.int32), *ids])
    return list(told(flat, offsets, student.vocabulary, student.roles, loss))
