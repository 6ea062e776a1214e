"""The `opd` command: every stage as a subcommand, and what one asks of the tool itself.

A command's module, and torch with it, is imported when that command is called; help is read from its source.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

STAGES = (
    "prompts",
    "also",
    "models",
    "fit",
    "answers",
    "retokenise",
    "sft",
    "reuse",
    "rollouts",
    "scores",
    "units",
    "policy",
    "reference",
    "outcomes",
    "weights",
    "coverage",
    "train",
    "diagnostics",
    "evaluate",
    "report",
)
TOOLS = (
    "init",
    "run",
    "doctor",
    "import",
    "align",
    "support",
    "audit",
    "plan",
    "cache",
    "schema",
    "config",
    "recipes",
    "summary",
    "inspect",
    "compare",
    "push",
)
PANELS = {
    **dict.fromkeys(STAGES, "Stages (the Snakefile runs them in order)"),
    **dict.fromkeys(TOOLS, "Ask"),
}
MODULES = {
    **{name: f"stages.{name}" for name in STAGES},
    **{name: f"stages.tools.{name}" for name in TOOLS},
    "report": "stages.report.page",
    "import": "stages.tools.import_rollouts",
}


class Commands(TyperGroup):
    """Knows its commands by name, and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the Snakefile's order."""
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What help shows of a command."""
        if cmd_name not in MODULES:
            return None
        return TyperCommand(cmd_name, help=described(MODULES[cmd_name]), rich_help_panel=PANELS[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, (loaded(name) if command is not None and name in MODULES else command), rest


def described(module: str) -> str:
    """First paragraph of what a module's `main` says of itself, or the module where it has several commands."""
    source = (Path(__file__).parents[2] / module.replace(".", "/")).with_suffix(".py")
    tree = ast.parse(source.read_text())
    main = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return (ast.get_docstring(next(main, tree)) or "").partition("\n\n")[0].replace("\n", " ")


def loaded(name: str) -> Any:
    """The click command of a module."""
    from stages.run import console  # noqa: PLC0415

    module = importlib.import_module(MODULES[name])
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(console.reporting(module.main))
    return typer.main.get_command(app)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(help=(__doc__ or "").partition("\n\n")[0])
def start() -> None:
    """Before any command."""
    from stages.run import console  # noqa: PLC0415

    console.quiet_libraries()


def main() -> None:
    """Entry point of the console command."""
    app()
