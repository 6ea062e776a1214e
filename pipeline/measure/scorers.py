"""Is a response right? What judges it, a line of SCORERS each, and scorers of one's own.

A reference is read before a response is judged, and what can't be read (a word where numbers are compared) or isn't there is
not measured: that is another thing than wrong. `references_problem` tells of such references before anything is sampled.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import own_code
from pipeline.measure import answers, math_answers
from pipeline.measure.answers import extract, final
from pipeline.measure.code_tests import Tests, read_tests
from pipeline.measure.sandbox import Limits, walls
from pipeline.prompts import variables
from pipeline.sources import gym_metadata, gym_verifies, kind_of
from schemas.config import Judged
from schemas.config.evaluate import SCORERS as OPTIONS
from schemas.config.options import OWN_CODE
from schemas.errors import OpdError, excerpt

Row = Mapping[str, Any]
Scored = tuple[str, bool | None]
"""The answer that a response gives, and whether that is right; None: it can't be told."""


@dataclass(frozen=True)
class Scorer:
    """Judges a response to a prompt.

    Attributes:
        judge: of a response and its `prompts` row.
        at_once: how many responses are judged at once, where it works in processes of its own.
    """

    judge: Callable[[str, Row], Scored]
    at_once: int = 1

    def __call__(self, response: str, row: Row) -> Scored:
        return self.judge(response, row)

    def all(self, responses: Sequence[str], rows: Sequence[Row]) -> list[Scored]:
        """Of each response and its row, in order."""
        if self.at_once == 1:
            return [self.judge(*pair) for pair in zip(responses, rows, strict=True)]
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self.judge, responses, rows))


@dataclass(frozen=True)
class Judge:
    """How one kind of scorer judges.

    Attributes:
        read: what an answer to a `prompts` row with a reference is compared with; None where that can't be read.
        answer: the answer in (the response after its thinking, the row), empty where there is none.
        judge: of (answer, what was read, the row): what to show, and whether it is right. It sees no empty answer.
        takes: what references it reads, for messages.
        processes: whether it works in processes of its own, so that responses are judged side by side.
    """

    read: Callable[[Row], Any]
    answer: Callable[[str, Row], str]
    judge: Callable[[str, Any, Row], tuple[str, bool]]
    takes: str
    processes: bool = False


def scorer(config: Judged, source: str, cores: int | None = None) -> Scorer:
    """The scorer that `evaluate.scorer` names, for prompts of `prompts.source`.

    Args:
        cores: that it may keep busy, so that a program's time limit is not that of many beside it; None: all that this
            process may use.
    Raises:
        OpdError: it is a function of one's own that isn't there (`own_code.load`), a package or the sandbox that it needs is
            missing.
    """
    if OWN_CODE.fullmatch(config.scorer):
        return own(config)
    by = SCORERS[config.scorer](config, source)

    def score(response: str, row: Row) -> Scored:
        answer = by.answer(final(response), row)
        gold = None if row["answer"] is None else by.read(row)
        if gold is None:
            return answer, None
        return by.judge(answer, gold, row) if answer else (answer, False)

    return Scorer(score, (cores or len(os.sched_getaffinity(0))) if by.processes else 1)


def references_problem(
    config: Judged, source: str, rows: Sequence[Row], of: str, section: str = "evaluate"
) -> str | None:
    """How many references of `prompts` rows the scorer can't read, with an example; None where it can read all that there are.

    Rows without a reference don't count, and a scorer of one's own reads as it likes.

    Args:
        of: what the rows are, for the message.
        section: where in the config the scorer is, likewise.
    Raises:
        OpdError: there are references, and it can read none of them; or as `scorer` does.
    """
    if config.scorer not in SCORERS:
        return None
    by = SCORERS[config.scorer](config, source)
    given = [row for row in rows if row["answer"] is not None]
    unread = [row for row in given if by.read(row) is None]
    if not unread:
        return None
    example = f"{unread[0]['prompt_id']}: {excerpt(unread[0]['answer'], 80) or 'nothing'!r}"
    takes = f"`{section}.scorer: {config.scorer}` reads {by.takes}"
    if len(unread) == len(given):
        raise OpdError(
            f"{takes}, and so none of the {len(given)} references of {of}, such as {example}; use another "
            "scorer (`opd config` lists them), or `answer_field: null` to measure no accuracy"
        )
    return f"{takes}, and so not {len(unread)} of {len(given)} references of {of}: not measured, as {example}"


def identity(config: Judged) -> dict[str, Any]:
    """What decides which responses are right: the scorer's name, what it reads, and the digest of one's own code."""
    if OWN_CODE.fullmatch(config.scorer):
        return {"scorer": config.scorer, "scorer_code": own_code.source_digest(config.scorer)}
    reads = OPTIONS[config.scorer].reads
    return {"scorer": config.scorer, **{name: getattr(config, name) for name in reads}}


def by_source(config: Judged, source: str) -> Judge:
    """The source's own judgement of the extracted answer (`sources.Source.verify`); `equality` where it has none."""
    verify = kind_of(source).verify
    if verify is None:
        return equality(config, source)
    return _verified(config, lambda answer, row: verify(source, answer, row))


def by_reasoning_gym(config: Judged, source: str) -> Judge:
    """The judgement of the reasoning-gym task that a row names, wherever the row comes from."""

    def verify(answer: str, row: Row) -> bool:
        fields = variables(row)
        name = fields.get("source_dataset") or gym_metadata(row).get("source_dataset")
        return bool(name) and gym_verifies(str(name), answer, row)

    return _verified(config, verify, "references of rows whose `source_dataset` names their reasoning-gym task, ")


def _verified(config: Judged, verify: Callable[[str, Row], bool], of: str = "") -> Judge:
    """By a verifier, for rows whose own reference passes it after the same extraction: else no response could."""

    def read(row: Row) -> Row | None:
        found = extract(row["answer"], config.extract)
        return row if found and verify(found, row) else None

    return Judge(
        read,
        lambda text, _: extract(text, config.extract),
        lambda answer, _, row: (answer, verify(answer, row)),
        f"{of}references that their verifier takes through `evaluate.extract: {config.extract}`",
    )


def equality(config: Judged, source: str) -> Judge:
    """Whether the extracted answer is what is extracted from the reference, as text.

    Fractions have several spellings, so those aren't judged by this.
    """
    numbers = config.extract == "last_number"

    def read(row: Row) -> str | None:
        found = extract(row["answer"], config.extract)
        return None if not found or (numbers and "/" in found) else found

    return Judge(
        read,
        lambda text, _: extract(text, config.extract),
        lambda answer, gold, _: (answer, answer == gold),
        "numbers (`math` reads fractions and other expressions, `exact` and `choice` words)" if numbers else "texts",
    )


def exact(config: Judged, source: str) -> Judge:
    """Whether all of the answer is the reference, runs of space as one."""

    def normal(text: str) -> str:
        spaced = " ".join(text.split())
        return spaced.casefold() if config.ignore_case else spaced

    return Judge(
        lambda row: normal(row["answer"]) or None,
        lambda text, _: " ".join(text.split()),
        lambda answer, gold, _: (answer, normal(answer) == gold),
        "texts",
    )


def regex(config: Judged, source: str) -> Judge:
    """Whether what the pattern finds last in the answer is what it finds last in the reference, else all of that."""
    pattern = re.compile(config.pattern or "")

    def found(text: str) -> str:
        *_, last = (None, *pattern.finditer(text))
        return "" if last is None else ((last[1] if pattern.groups else last[0]) or "").strip()

    return Judge(
        lambda row: found(row["answer"]) or row["answer"].strip() or None,
        lambda text, _: found(text),
        lambda answer, gold, _: (answer, answer == gold),
        "texts",
    )


def choice(config: Judged, source: str) -> Judge:
    """Whether the letter chosen is the reference's."""

    def read(row: Row) -> str | None:
        texts, letters, labels = _options(row)
        reference = row["answer"].strip()
        if reference in labels[: len(letters)]:
            return letters[labels.index(reference)]
        found = answers.named(reference, texts, letters)
        counted = letters[int(reference)] if texts and reference.isdecimal() and int(reference) < len(letters) else ""
        # A number may be an option's index and another one's text: nothing says which is meant.
        return None if found and counted and found != counted else found or counted or None

    return Judge(
        read,
        lambda text, row: answers.choice(text, *_options(row)[:2]),
        lambda answer, gold, _: (answer, answer == gold),
        "letters, texts of options and their indices",
    )


def _options(row: Row) -> tuple[list[str], str, list[str]]:
    """The texts of a row's options, as far as they are told, the letters that they have, and what the data calls them where
    that is told."""
    fields = variables(row)
    given = fields.get("choices", fields.get("options"))
    labels: list[Any] = []
    if isinstance(given, dict):  # ARC has {label: [...], text: [...]}, others {A: ..., B: ...}
        labels = given["label"] if isinstance(given.get("label"), list) else []
        given = given["text"] if isinstance(given.get("text"), list) else [given[name] for name in sorted(given)]
    if not isinstance(given, list):
        lines = re.findall(r"(?:^|\s)[(\[]?([A-J])[)\].:]\s+(.+?)(?=\s*$|\s+[(\[]?[B-J][)\].:]\s)", row["prompt"], re.M)
        named = dict(lines)
        given = [named[letter] for letter in answers.LETTERS[: len(named)] if letter in named]
    texts = [str(text) for text in given]
    letters, told = answers.LETTERS[: len(texts)] or "ABCDE", [str(label) for label in labels[: len(answers.LETTERS)]]
    if set(told) <= set(letters) and len(set(told)) == len(letters):
        return texts, "".join(told), told
    return texts, letters, told


def by_value(config: Judged, source: str) -> Judge:
    """Whether the answer has the reference's value, by math-verify."""
    math_answers.library()
    return Judge(
        lambda row: math_answers.reference(row["answer"]) or None,
        lambda text, _: text.strip(),
        lambda answer, gold, _: math_answers.judged(gold, answer),
        "numbers, expressions, sets and intervals",
    )


def by_tests(config: Judged, source: str) -> Judge:
    """Whether the program in the answer passes the reference's tests, in a sandbox; what is shown is why or why not."""
    walls()
    limits = Limits(config.code_seconds, config.code_memory_mb)

    def judge(program: str, tests: Tests, row: Row) -> tuple[str, bool]:
        verdict = tests.judge(program, limits)
        return verdict.why, verdict.passed

    def read(row: Row) -> Tests | None:
        return read_tests(row["answer"], variables(row).get("entry_point"))

    return Judge(
        read,
        lambda text, _: answers.code(text).strip(),
        judge,
        "Python with assert statements, lists of such, and JSON of what to print for which input",
        processes=True,
    )


def own(config: Judged) -> Scorer:
    """A function of (response, reference answer or None, what templates know of the prompt), which gives True, False or None.

    The answer shown is the response without outer space.
    """
    judge = own_code.load(config.scorer, "evaluate.scorer")

    def score(response: str, row: Row) -> Scored:
        right = judge(response, row["answer"], variables(row))
        if right is not None and not isinstance(right, bool | np.bool_):
            raise OpdError(
                f"`evaluate.scorer`: {config.scorer} must give True, False or None (can't be told), but gave {right!r} for "
                f"prompt {row['prompt_id']}"
            )
        return response.strip(), None if right is None else bool(right)

    return Scorer(score)


SCORERS: dict[str, Callable[[Judged, str], Judge]] = {
    "source": by_source,
    "equality": equality,
    "exact": exact,
    "regex": regex,
    "choice": choice,
    "math": by_value,
    "reasoning-gym": by_reasoning_gym,
    "code": by_tests,
}
"""What makes each `evaluate.scorer`, of the section and `prompts.source`; what they mean is in `schemas.config.evaluate`."""
