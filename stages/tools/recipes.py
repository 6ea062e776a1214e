"""Recipes: where each is from, what it presets, which keys it reads, and where it departs from its source."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from schemas.config import Config, Recipe, section
from schemas.config.objective import RECIPES
from schemas.errors import OpdError
from stages.run import console

HEADINGS = ("recipe", "source", "presets", "reads", "departs from its source")


def main(
    name: Annotated[str | None, typer.Argument(help="one recipe, in full; all when left out")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="all of them as docs/recipes.md has them")] = False,
) -> None:
    """Print every recipe: its source, what it presets, the keys that it reads, and where it departs from its source."""
    if name is not None and name not in RECIPES:
        raise OpdError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    if markdown:
        console.out.print(recipes_markdown(), markup=False, soft_wrap=True)
        return
    grid = Table(show_lines=True) if name is None else Table(title=name, title_justify="left", show_header=False)
    if name is None:
        for heading in HEADINGS:
            grid.add_column(heading, no_wrap=heading == "recipe")
        for tag, kind in RECIPES.items():
            grid.add_row(*(escape("\n".join(lines)) for lines in row(tag, kind)))
    else:
        for heading, text in in_full(RECIPES[name]):
            grid.add_row(escape(heading), escape(text))
    console.out.print(grid)


def row(tag: str, kind: type[Recipe]) -> tuple[list[str], ...]:
    """A recipe's lines under each of HEADINGS."""
    return [tag], [kind.source], written(kind.presets), reads(kind), list(kind.departs)


def in_full(kind: type[Recipe]) -> list[tuple[str, str]]:
    """What there is to say of one recipe, by heading; keys with their meaning."""
    presets = [
        (f"presets {place}", f"{_yaml(value)}; {_yaml(_default(place))} without this recipe")
        for place, value in kind.presets.items()
    ]
    own = [
        (f"objective.{name}", f"{_yaml(field.default)}: {field.description}")
        for name, field in kind.model_fields.items()
        if name != "recipe"
    ]
    departs = [("departs", text) for text in kind.departs]
    meaning = " ".join((kind.__doc__ or "").split())
    return [("meaning", meaning), ("source", kind.source), *presets, *own, ("reads too", _beside(kind)), *departs]


def reads(kind: type[Recipe]) -> list[str]:
    """The keys of `objective` that a recipe and not every one reads, or has otherwise, with its defaults, and what it reads
    beside them."""
    every = {name: field.default for name, field in Recipe.model_fields.items()}
    fields = {name: field.default for name, field in kind.model_fields.items() if name != "recipe"}
    own = {name: default for name, default in fields.items() if name not in every or default != every[name]}
    return [*written(own), _beside(kind)]


def _beside(kind: type[Recipe]) -> str:
    """What of the other sections changes the loss; all of it is weighed."""
    told = {"weights": True, "weights.credit": kind.reads_credit, "candidates": kind.reads_candidates}
    return ", ".join(name for name, is_read in told.items() if is_read)


def written(values: Mapping[str, Any]) -> list[str]:
    """Keys and values as a config has them."""
    return [f"{place}: {_yaml(value)}" for place, value in values.items()]


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True, width=1000)).partition("\n")[0]


def _default(place: str) -> Any:
    name, _, key = place.partition(".")
    kind = section(Config.model_fields[name].annotation)
    return kind.model_fields[key].default if kind else None


def recipes_markdown() -> str:
    """A Markdown table of every recipe."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for tag, kind in RECIPES.items():
        name, source, presets, keys, departs = row(tag, kind)
        cells = (_code(name), source, _code(presets), [*_code(keys[:-1]), keys[-1]], departs)
        lines.append("| " + " | ".join("<br>".join(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _code(lines: list[str]) -> list[str]:
    return [f"`{line}`" for line in lines]
