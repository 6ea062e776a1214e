"""Reading the file; errors name the key and say what it takes."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.config.objective import recipe_of
from schemas.config.presets import presets_of
from schemas.config.reuse import INHERITED, inherit, stored_config
from schemas.config.root import Config
from schemas.config.section import Section, section, variants
from schemas.config.strict_yaml import read_yaml
from schemas.errors import OpdError, excerpt, shown


def parse_config(values: Any, where: str) -> Config:
    """Validate a mapping read from `where` (a file's name), with what it takes from the run that it reuses.

    Raises OpdError naming each wrong key.
    """
    if not isinstance(values, dict):
        raise OpdError(f"{where}: expected a mapping of keys, found {type(values).__name__}")
    whole = inherit(values, where)
    try:
        return Config.model_validate(whole)
    except ValidationError as error:
        errors = error.errors()
        wrong = [_explain(e) for e in errors[:MOST_ERRORS]]
        taken = [name for name in INHERITED if name not in values and any(f"`{name}" in text for text in wrong)]
        if taken and (stored := stored_config(values)):
            gone = "" if stored.is_file() else ", which isn't there"
            wrong.append(f"what a run with `reuse` doesn't name comes from {stored}{gone}")
        wrong.extend(_presets_in(wrong, whole))
        if len(errors) > MOST_ERRORS:
            wrong.append(f"and {len(errors) - MOST_ERRORS} more")
        raise OpdError(f"{where}: " + "; ".join(wrong)) from error


def load_config(path: str | Path) -> Config:
    """Read a YAML file. Raises OpdError naming the file, and the line or key that is wrong."""
    return parse_config(read_yaml(Path(path)), str(path))


def _presets_in(wrong: list[str], values: dict[str, Any]) -> list[str]:
    """Whose the values are that an error names and the file doesn't."""
    applied = [
        f"{place}: {value}"
        for place, value in presets_of(values).items()
        if any(f"`{name}: {value}`" in text for text in wrong for name in (place, place.rpartition(".")[2]))
    ]
    recipe = recipe_of(values.get("objective", {}))
    return [f"`{', '.join(applied)}` is what `objective.recipe: {recipe}` presets"] if applied else []


MOST_ERRORS = 5
"""Wrong keys that are named; who has more begins with these."""
RENAMED = {"objective.support": "tail"}
"""Keys of earlier versions, and what they are called in the same section now."""


def _explain(error: Any) -> str:
    key, holder, recipe = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        name = RENAMED.get(key)
        now = f", which is `{name}` now" if name in holder.model_fields else ""
        here = f"here, with `recipe: {recipe}`" if recipe else "here"
        return f"unknown key `{excerpt(key, 80)}`{now}; known keys {here}: {', '.join(holder.model_fields)}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    message, found = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "union_tag_invalid":
        key, message, found = (
            f"{key}.recipe",
            f"input should be {error['ctx']['expected_tags']}",
            error["ctx"]["tag"],
        )
    if not key:
        return message
    return f"`{key}`: {message[:1].lower()}{message[1:]}, found {shown(found)}"


def _place(loc: tuple[Any, ...]) -> tuple[str, type[Section], str | None]:
    """A key as one writes it, the section that it belongs into, and the recipe if that is the section of one.

    Pydantic lists a recipe's tag among the keys.
    """
    names: list[str] = []
    holder: type[Section] = Config
    inside: type[Section] | None = Config
    choices: dict[str, type[Section]] = {}
    recipe = None
    for part in loc:
        if part in choices:
            inside, choices, recipe = choices[part], {}, part
            continue
        names.append(str(part))
        if inside is not None:
            holder, field = inside, inside.model_fields.get(part)
            inside, choices = (section(field.annotation), variants(field.annotation)) if field else (None, {})
    return ".".join(names), holder, recipe
