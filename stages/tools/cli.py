"""The `opd` command: every stage as a subcommand, and what one asks of the tool itself."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from schemas.config import Config, Section, load_config, section, variants
from schemas.diagnostics import fields
from schemas.tables import TABLES
from stages import (
    coverage,
    diagnostics,
    evaluate,
    models,
    policy,
    prompts,
    reuse,
    rollouts,
    scores,
    train,
    units,
    weights,
)
from stages.report import page as report
from stages.run import console
from stages.run.context import DEFAULT_CONFIG
from stages.run.run import open_run
from stages.tools import align, audit, cache, plan, support
from train import recipes

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
STAGES = {
    "prompts": prompts,
    "models": models,
    "rollouts": rollouts,
    "reuse": reuse,
    "scores": scores,
    "units": units,
    "policy": policy,
    "weights": weights,
    "coverage": coverage,
    "train": train,
    "diagnostics": diagnostics,
    "evaluate": evaluate,
    "report": report,
}
for name, stage in STAGES.items():
    app.command(name, rich_help_panel="Stages (the Snakefile runs them in order)")(console.reporting(stage.main))


app.command("align", rich_help_panel="Ask")(console.reporting(align.main))
app.command("support", rich_help_panel="Ask")(console.reporting(support.main))
app.command("audit", rich_help_panel="Ask")(console.reporting(audit.main))
app.command("plan", rich_help_panel="Ask")(console.reporting(plan.main))
app.add_typer(cache.app, name="cache", rich_help_panel="Ask")


@app.command(rich_help_panel="Ask")
def schema(table: Annotated[str | None, typer.Argument(help="one table; all when left out")] = None) -> None:
    """Print every column on disk, and every field of `diagnostics.json`: its type, unit, shape and meaning."""
    known = [*TABLES, "diagnostics"]
    if table is not None and table not in known:
        raise typer.Exit(console.fail(ValueError(f"no table {table!r}; there are {', '.join(known)}")))
    for kind in [table] if table else known:
        grid = Table(title=kind, title_justify="left", show_lines=False)
        for heading in ("column", "type", "meaning"):
            grid.add_column(heading, no_wrap=heading == "column")
        if kind == "diagnostics":
            for row in fields():
                grid.add_row(*map(escape, row))
        for column in TABLES.get(kind, ()):
            of = str(column.type).replace("element: ", "").replace(" not null", "")
            grid.add_row(column.name, escape(of) + (" or null" if column.nullable else ""), escape(column.doc))
        console.out.print(grid)


@app.command("config", rich_help_panel="Ask")
def config_keys(
    check: Annotated[Path | None, typer.Option(help="validate this file instead of listing the keys")] = None,
) -> None:
    """List every config key with its default and meaning (Markdown), or check a file."""
    if check:
        with console.errors_for_people():
            recipes.identity(load_config(check).objective)
        console.say(f"{check}: valid")
        return
    console.out.print(config_markdown(), markup=False, soft_wrap=True)


@app.command(rich_help_panel="Ask")
def summary(config_file: Annotated[Path, typer.Option("--config")] = DEFAULT_CONFIG) -> None:
    """Print a finished run's figures once more."""
    with console.errors_for_people():
        report.print_summary(open_run(config_file))


def config_markdown() -> str:
    """A Markdown table of every config key."""
    lines = ["| key | default | meaning |", "|---|---|---|"]

    def walk(kind: type[Section], prefix: str) -> None:
        for name, field in kind.model_fields.items():
            below = section(field.annotation)
            if below is not field.annotation and not variants(field.annotation):
                default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
                meaning = (field.description or "").replace("|", "\\|")
                lines.append(f"| `{prefix}{name}` | {default} | {meaning} |")
            if below:
                walk(below, f"{prefix}{name}.")
            lines.extend(_of_variants(variants(field.annotation), field.default, f"{prefix}{name}."))

    walk(Config, "")
    return "\n".join(lines)


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


def main() -> None:
    """Entry point of the console command."""
    console.quiet_libraries()
    app()
