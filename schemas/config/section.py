"""A mapping in the YAML file, and how to tell one from a plain value."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Tag


class Section(BaseModel):
    """A mapping in the YAML file; unknown keys are errors, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, always, where it isn't null or by name; None where it is one of several (`variants`)."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def variants(annotation: Any) -> dict[str, type[Section]]:
    """By tag, the sections of which a field holds one; empty for any other field."""
    marked = [get_args(member) for member in get_args(annotation)]
    return {mark.tag: kind for kind, *marks in filter(None, marked) for mark in marks if isinstance(mark, Tag)}
