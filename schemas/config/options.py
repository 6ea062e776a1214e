"""Keys that take one of several names: what each name means, which keys beside it it reads, and code of one's own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from schemas.config.section import Section

OWN_CODE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)
"""`module:function`, a function of the user's own; all of the text must match."""


@dataclass(frozen=True)
class Option:
    """What a key can be set to by name.

    Attributes:
        doc: its meaning, for the key's description.
        reads: keys of the same section that it reads and that not every other option does.
    """

    doc: str
    reads: tuple[str, ...] = ()


def describe(options: Mapping[str, Option]) -> str:
    """Every option with its meaning, for a key's description."""
    return " | ".join(f"{name}: {option.doc}" for name, option in options.items())


def one_of(options: Mapping[str, Option], own_code: bool = False) -> Callable[[str], str]:
    """A pydantic validator that takes the names of `options`, and `module:function` where `own_code` may stand in."""

    def check(value: str) -> str:
        if value not in options and not (own_code and OWN_CODE.fullmatch(value)):
            raise ValueError(f"takes {', '.join(options)}" + (", or module:function of your own" if own_code else ""))
        return value

    return check


def refuse_unread(section: Section, key: str, options: Mapping[str, Option]) -> None:
    """Raise ValueError when a key that only other options of `key` read isn't at its default."""
    chosen = getattr(section, key)
    read = options[chosen].reads if chosen in options else ()
    for name in dict.fromkeys(name for option in options.values() for name in option.reads):
        value = getattr(section, name)
        if name not in read and value != type(section).model_fields[name].default:
            readers = [option for option in options if name in options[option].reads]
            raise ValueError(
                f"`{name}: {value}` means nothing to `{key}: {chosen}`; it is of {key}: {', '.join(readers)}"
            )
