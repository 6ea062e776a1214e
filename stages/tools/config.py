"""Config: every key with its default and meaning, or whether a file is valid."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from pipeline import own_code
from pipeline.models import model_config
from pipeline.prompts import collect, collect_also
from pipeline.sources import SOURCES, kind_of
from schemas.config import Config, Section, credit_in_part, load_config, overridden, section, variants
from schemas.config.objective import RECIPES
from schemas.errors import OpdError
from stages.run import console
from stages.run.limits import check_limits
from stages.run.run import run_of
from stages.run.workflow import own_code_in

ROLES: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
FILES = ("jsonl", "json", "csv", "parquet")
"""Kinds of sources of prompts that are a file."""
SMALL = 64 << 20
"""Bytes of a file that a check reads through."""


def main(
    check: Annotated[Path | None, typer.Option(help="validate this file instead of listing the keys")] = None,
) -> None:
    """List every config key with its default and meaning (Markdown), or check a file."""
    if check:
        config = load_config(check)
        try:
            check_at_hand(config)
            for reference in own_code_in(config.model_dump(mode="json")):
                own_code.source_digest(reference)
            problems = _of_references(config), credit_in_part(config)
        except OpdError as error:
            raise OpdError(f"{check}: {error}") from error
        for problem in filter(None, problems):
            console.warn(f"{check}: {problem}")
        console.say(f"{check}: valid")
        for otherwise in overridden(config):
            console.say(f"{check}: {otherwise}")
        return
    console.out.print(config_markdown(), markup=False, soft_wrap=True)


def check_at_hand(config: Config) -> None:
    """What can be told at once: of files with prompts, whether they hold enough, of local models what they can't do.

    Raises OpdError as the stages would.
    """
    if is_at_hand(config.prompts.source):
        collect(config.prompts, config.seed)
    collect_also({name: one for name, one in config.evaluate.also.items() if is_at_hand(one.source)}, config.seed)
    for role in ROLES:
        folder = Path(getattr(config, role).model).expanduser()
        if folder.is_dir():
            check_limits(config, role, model_config(folder))


def is_at_hand(source: str) -> bool:
    """Whether a source of prompts can be told of at once: a small file, or one that should be there by its name and isn't."""
    is_file = kind_of(source) in (SOURCES[name] for name in FILES)
    return is_small_file(source) or (is_file and not Path(source).expanduser().exists())


def is_small_file(source: str) -> bool:
    """Whether a source of prompts is a file that is read in a moment."""
    path = Path(source).expanduser()
    return path.is_file() and path.stat().st_size < SMALL


def _of_references(config: Config) -> str | None:
    """What the scorer can't read of the held-out prompts of a run that is there already; raises where that is all of them."""
    run = run_of(config)
    if not run.prompts.exists():
        return None
    from pipeline.measure.scorers import references_problem  # noqa: PLC0415 - it takes a second
    from stages.run.context import open_prompts  # noqa: PLC0415

    split = config.evaluate.split
    return references_problem(config.evaluate, config.prompts.source, open_prompts(run).split(split), f"split {split}")


def config_markdown() -> str:
    """A Markdown table of every config key."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def walk(kind: type[Section], prefix: str) -> None:
        for name, field in kind.model_fields.items():
            below = section(field.annotation)
            if below is not field.annotation and not variants(field.annotation):
                default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
                default += _presets(f"{prefix}{name}", field.default)
                meaning = (field.description or "").replace("|", "\\|")
                lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
            if below:
                by_name = "<name>." if get_origin(field.annotation) is dict else ""
                walk(below, f"{prefix}{name}.{by_name}")
            lines.extend(_of_variants(variants(field.annotation), field.default, f"{prefix}{name}."))

    walk(Config, "")
    return "\n".join(lines)


def _presets(place: str, default: Any) -> str:
    """Which recipes have a key otherwise than by default, and how."""
    found: dict[str, list[str]] = {}
    for tag, kind in RECIPES.items():
        if (value := kind.presets.get(place, default)) != default:
            found.setdefault(f"`{value!r}`", []).append(tag)
    return "".join(f"; {', '.join(tags)}: {value}" for value, tags in found.items())


def _of_variants(kinds: dict[str, type[Section]], default: Any, prefix: str) -> list[str]:
    """Rows of a section that is one of several: each of these, then each key once with the default of every one."""
    rows = []
    described: dict[tuple[str, str], dict[str, list[str]]] = {}
    for tag, kind in kinds.items():
        (by, _), *own = kind.model_fields.items()
        keys = ", ".join(f"`{name}`" for name, _ in own)
        meaning = " ".join((kind.__doc__ or "").split()).replace("|", "\\|")
        chosen = "default" if getattr(default, by) == tag else ""
        rows.append(f"| `{prefix}{by}: {tag}` | {chosen} | {meaning} Keys: {keys} |")
        for name, field in own:
            meaning = (field.description or "").replace("|", "\\|")
            value = f"`{field.get_default(call_default_factory=True)!r}`"
            described.setdefault((name, meaning), {}).setdefault(value, []).append(tag)
    for (name, meaning), values in described.items():
        of_each = "; ".join(f"{', '.join(tags)}: {value}" for value, tags in values.items())
        rows.append(f"| `{prefix}{name}` | {of_each if len(values) > 1 else next(iter(values))} | {meaning} |")
    return rows
