"""A mapping in the YAML file, and how to tell one from a plain value."""

import math
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationInfo, field_validator

LARGEST = 10**12
"""Nothing that one sets is larger; what is has a slipped exponent, and would overflow somewhere."""
Text = Annotated[str, Field(min_length=1)]
"""Text that says something."""


class Section(BaseModel):
    """A mapping in the YAML file; unknown keys are errors, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_truth_values(cls, value: Any, field: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(field.field_name)].annotation
        if any(isinstance(one, bool) for one in _each(value)) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("input should not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _numbers_have_a_size(cls, value: Any) -> Any:
        if any(isinstance(one, int | float) and LARGEST < abs(one) < math.inf for one in _each(value)):
            raise ValueError(f"numbers go up to {LARGEST:.0e}")
        return value


def _each(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, always, where it isn't null or by name; None where it is one of several (`variants`)."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def variants(annotation: Any) -> dict[str, type[Section]]:
    """By tag, the sections of which a field holds one; empty for any other field."""
    marked = [get_args(member) for member in get_args(annotation)]
    return {mark.tag: kind for kind, *marks in filter(None, marked) for mark in marks if isinstance(mark, Tag)}
