"""A mapping in the YAML file, and how to tell one from a plain value."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping in the YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, always or where it isn't null."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
