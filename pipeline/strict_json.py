"""JSON that comes from outside. Python reads more than JSON is, and fails on some that is: both are refused in one line."""

import json
import math
from typing import Any

DEEPEST = 100
"""Levels of lists and objects in each other; what walks a row by recursion must come back."""


class RefusedError(ValueError):
    """JSON of a form, with content that no table or text can hold; one line says what."""


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, in one line, for what isn't JSON or is refused."""
    return _read(text, 0, whole=True)[0]


def parse_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at an offset, and the offset behind it.

    Raises json.JSONDecodeError where there is none, which more text may mend, and RefusedError where none can.
    """
    return _read(text, at, whole=False)


def _read(text: str, at: int, whole: bool) -> tuple[Any, int]:
    try:
        found, end = (_DECODER.decode(text), len(text)) if whole else _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise RefusedError(_TOO_DEEP) from error
    except (json.JSONDecodeError, RefusedError):
        raise
    except ValueError as error:  # Python's own limit on digits
        raise RefusedError("a whole number has more than 4,300 digits; write it as text") from error
    opened = text.count("[", at, end) + text.count("{", at, end)
    if opened > DEEPEST and _depth(found) > DEEPEST:
        raise RefusedError(_TOO_DEEP)
    if text.find("\\ud", at, end) >= 0 or text.find("\\uD", at, end) >= 0:
        _refuse_half_characters(found)
    return found, end


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RefusedError(f"the number {text[:40]} is larger than any float; write it as text")
    return value


def _constant(text: str) -> Any:
    raise RefusedError(f"{text} is not JSON; write null where there is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RefusedError(f"an object has the key {next(n for n in names if names.count(n) > 1)!r:.80} twice")
    return found


def _depth(value: Any) -> int:
    """Levels of lists and objects in each other."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode-escape").decode()
        raise RefusedError(f"{half} is a lone surrogate, half a character; write both halves or none") from error


_TOO_DEEP = f"lists and objects are nested more than {DEEPEST} deep"
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
