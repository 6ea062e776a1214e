"""Reading the file; errors name the key and say what it takes."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.config.reuse import INHERITED, inherit, stored_config
from schemas.config.root import Config
from schemas.config.section import section
from schemas.errors import OpdError


def parse_config(values: Any, where: str) -> Config:
    """Validate a mapping read from `where` (a file's name), with what it takes from the run that it reuses.

    Raises OpdError naming each wrong key.
    """
    if not isinstance(values, dict):
        raise OpdError(f"{where}: expected a mapping of keys, found {type(values).__name__}")
    try:
        return Config.model_validate(inherit(values, where))
    except ValidationError as error:
        wrong = [_explain(e) for e in error.errors()]
        taken = [name for name in INHERITED if name not in values and any(f"`{name}" in text for text in wrong)]
        if taken and (stored := stored_config(values)):
            gone = "" if stored.is_file() else ", which isn't there"
            wrong.append(f"what a run with `reuse` doesn't name comes from {stored}{gone}")
        raise OpdError(f"{where}: " + "; ".join(wrong)) from error


def load_config(path: str | Path) -> Config:
    """Read a YAML file. Raises OpdError naming the file, and the line or key that is wrong."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OpdError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OpdError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_config(values, str(path))


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Config
        for part in error["loc"][:-1]:
            known = section(known.model_fields[part].annotation)  # type: ignore[assignment]
        return f"unknown key `{key}`; known keys here: {', '.join(known.model_fields)}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"`{key}`: {message[:1].lower()}{message[1:]}, found {error['input']!r}"
