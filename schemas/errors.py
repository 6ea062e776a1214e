"""The exceptions whose message is written for the person at the terminal."""

from collections.abc import Iterable

from schemas.secrets import masked


class OpdError(Exception):
    """What was given, what was expected, which file or key, and what to do, in one line, without credentials.

    Commands print it without a traceback and exit with its `status`.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class Stopped(OpdError):
    """A SIGTERM was heeded: what was done is saved, and the same command goes on from there."""

    status = 128 + 15  # what a shell reports of a process that SIGTERM ended


def one_line(error: BaseException, length: int = 300) -> str:
    """An exception in one line of bounded length, for the message of another."""
    return excerpt(str(error), length) or type(error).__name__


def shown(value: object, length: int = 120) -> str:
    """A value that was found, as Python writes it, in one line of bounded length."""
    return excerpt(repr(value), length)


def listed(names: Iterable[object], length: int = 300) -> str:
    """Names as Python writes them, parted by commas, in one line of bounded length."""
    return excerpt(", ".join(map(repr, names)), length)


def excerpt(text: str, length: int = 300) -> str:
    """A text in one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
