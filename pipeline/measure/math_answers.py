"""Whether two answers have the same value: fractions, sets, intervals, expressions, by math-verify."""

import functools
import importlib
import logging
import re
import threading
from typing import Any

from schemas.errors import OpdError

SECONDS = 5
MARKED = re.compile(r"(?<!\\)\$[^$]+(?<!\\)\$|\\boxed|\\\(|\\\[")
"""What says by itself where the mathematics in a text is."""
TEXT = re.compile(r"\\(?:begin|end|text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
WORD = re.compile(r"[^\W\d_]{2,}")


def library() -> Any:
    """math-verify. Raises OpdError when it isn't installed."""
    try:
        module = importlib.import_module("math_verify")
    except ImportError as error:
        raise OpdError("`evaluate.scorer: math` needs a package: pip install 'offline-opd[math]'") from error
    logging.getLogger("math_verify").setLevel(
        logging.CRITICAL
    )  # it warns of answers that it can't read, and of no timeout
    return module


@functools.lru_cache(maxsize=4096)
def reference(text: str) -> tuple[Any, ...]:
    """What math-verify reads of a reference; empty where that is nothing.

    One that marks no mathematics is all of it, unless it has words: then what stands out in it is read, mostly a number.
    """
    bare = text.strip().rstrip(".")
    if not MARKED.search(text) and not WORD.search(TEXT.sub(" ", bare)):
        return tuple(_read("$" + re.sub(r"(?<!\\)\$", "", bare) + "$"))
    return tuple(_read(text))


def judged(gold: tuple[Any, ...], answer: str) -> tuple[str, bool]:
    """The answer that math-verify finds in a text, as it is written there, and whether it has the value of a `reference`."""
    found = _read(answer)
    right = bool(found) and bool(library().verify(list(gold), found, timeout_seconds=_timeout()))
    return (str(found[-1]) if found else ""), right


def _read(text: str) -> list[Any]:
    return list(library().parse(text, parsing_timeout=_timeout()))


def _timeout() -> int | None:
    """Its timeouts are signals, which only the main thread can ask for."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
