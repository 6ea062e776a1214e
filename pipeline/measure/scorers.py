"""Is a response right? What judges it, a line of SCORERS each, and scorers of one's own."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline import own_code
from pipeline.measure.answers import extract
from pipeline.prompts import variables
from pipeline.sources import kind_of
from schemas.config import Judged
from schemas.config.options import OWN_CODE
from schemas.errors import OpdError

Scorer = Callable[[str, Mapping[str, Any]], tuple[str, bool | None]]
"""Of a response and its `prompts` row: the answer that it gives, and whether that is right; None: it can't be told."""


def scorer(config: Judged, source: str) -> Scorer:
    """The scorer that `evaluate.scorer` names, for prompts of `prompts.source`.

    Raises OpdError when it is a function of one's own that isn't there (`own_code.load`).
    """
    return (own if OWN_CODE.fullmatch(config.scorer) else SCORERS[config.scorer])(config, source)


def identity(config: Judged) -> dict[str, str]:
    """What decides which responses are right: the scorer's name, what it reads, and the digest of one's own code."""
    if OWN_CODE.fullmatch(config.scorer):
        return {"scorer": config.scorer, "scorer_code": own_code.source_digest(config.scorer)}
    return {"scorer": config.scorer, "extract": config.extract}


def by_source(config: Judged, source: str) -> Scorer:
    """The source's own judgement of the extracted answer (`sources.Source.verify`); `equality` where it has none."""
    verify = kind_of(source).verify
    if verify is None:
        return equality(config, source)
    return _of_answers(config, lambda answer, row: verify(source, answer, row))


def equality(config: Judged, source: str) -> Scorer:
    """Whether the extracted answer is what is extracted from the reference."""
    return _of_answers(config, lambda answer, row: answer == extract(row["answer"], config.extract))


def _of_answers(config: Judged, is_right: Callable[[str, Mapping[str, Any]], bool]) -> Scorer:
    """Judges extracted answers: none is wrong, and without a reference nothing can be told."""

    def score(response: str, row: Mapping[str, Any]) -> tuple[str, bool | None]:
        answer = extract(response, config.extract)
        return answer, None if row["answer"] is None else bool(answer) and is_right(answer, row)

    return score


def own(config: Judged, source: str) -> Scorer:
    """A function of (response, reference answer or None, what templates know of the prompt), which gives True, False or None.

    The answer shown is the response without outer space.
    """
    judge = own_code.load(config.scorer, "evaluate.scorer")

    def score(response: str, row: Mapping[str, Any]) -> tuple[str, bool | None]:
        right = judge(response, row["answer"], variables(row))
        if right is not None and not isinstance(right, bool | np.bool_):
            raise OpdError(
                f"`evaluate.scorer`: {config.scorer} must give True, False or None (can't be told), but gave {right!r} for "
                f"prompt {row['prompt_id']}"
            )
        return response.strip(), None if right is None else bool(right)

    return score


SCORERS: dict[str, Callable[[Judged, str], Scorer]] = {
    "source": by_source,
    "equality": equality,
}
"""What makes each `evaluate.scorer`, of the section and `prompts.source`; what they mean is in `schemas.config.evaluate`."""
