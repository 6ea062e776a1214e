"""How stages meet the person at the terminal: errors in one line, progress with rate and time left."""

import gc
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from schemas.errors import OpdError

console = Console(stderr=True, highlight=False)
"""For people: progress, results, errors."""
out = Console(highlight=False)
"""For what a command was asked to print."""

REPORT_EVERY, MAX_REPORT_EVERY = 10.0, 1800.0
"""Seconds between progress lines where the output is no terminal, at first and in the end."""
REPORT = re.compile(r"[^:]+: (?P<done>[\d,]+)/(?P<total>[\d,]+), .* left$")
"""Such a line,"""
RATE = re.compile(r"[^:]+: (?P<amount>[\d,]+) (?P<unit>.+) in [\d.]+ s \([\d.,]+/s\)$")
"""and the one at its end, as `stages.run.terminal` reads them in logs."""
WARNING = "warning: "
AGAIN = "OPD_RUN"
"""Variable of the environment with the command by which `opd run` was called, for Snakemake that it calls."""
is_stage = False
"""Whether this process is a stage's command and nothing else, as Snakemake starts it."""


def fail(error: Exception) -> int:
    """Print an error for a person; the exit status to leave with."""
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    return error.status if isinstance(error, OpdError) else OpdError.status


def warn(text: str) -> None:
    """Print what a person should know before going on."""
    console.print(Text.assemble((WARNING, "bold yellow"), text), soft_wrap=True)


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turn OpdError, a full disk and out-of-permission writes into one line and an exit status."""
    try:
        yield
    except OpdError as error:
        raise typer.Exit(fail(error)) from error
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise typer.Exit(fail(OpdError(f"{where}{error.strerror or error}"))) from error


def run(main: Callable[..., Any]) -> None:
    """Run a stage's `main` as a command."""
    global is_stage  # noqa: PLW0603
    is_stage = True
    quiet_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reporting(main))
    gc.freeze()
    gc.enable()
    try:
        app()
    finally:
        gc.freeze()  # an interpreter that ends looks through all that is left, twice: the system takes it back in any case


def reporting(main: Callable[..., Any]) -> Callable[..., Any]:
    """`main` with `errors_for_people` around it, its signature kept for typer."""
    import functools  # noqa: PLC0415

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with errors_for_people():
            return main(*args, **kwargs)

    return wrapped


def quiet_libraries() -> None:
    """Silence library chatter that tells our users nothing they can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torch", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Advance(Protocol):
    """Called with the amount just done, and with what to show beside it."""

    def __call__(self, amount: int, detail: str = "", already: int = 0) -> None:
        """`already`: what was done before this process began, which tells nothing of its rate."""


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """A function to call with the amount just done; shows a bar on a terminal and a line now and then elsewhere.

    Lines come the more rarely the longer it takes: some hundreds in a week.
    """
    began = time.perf_counter()
    before = done = 0

    def figures(detail: str) -> str:
        """Rate, details and time left; the mean rate, since single steps may take minutes."""
        rate = done / max(1e-9, time.perf_counter() - began)
        left = timedelta(seconds=round((total - before - done) / max(rate, 1e-9)))
        return ", ".join(filter(None, (f"{rate:,.{1 if rate >= 1 else 3}f} {unit}/s", detail, f"{left} left")))

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(label, total=total, figures="")

            def advance(amount: int, detail: str = "", already: int = 0) -> None:
                nonlocal before, done
                before, done = before + already, done + amount
                bars.update(task, completed=before + done, figures=figures(detail))

            yield advance
    else:
        last = began

        def advance(amount: int, detail: str = "", already: int = 0) -> None:
            nonlocal before, done, last
            before, done = before + already, done + amount
            now = time.perf_counter()
            due = min(MAX_REPORT_EVERY, max(REPORT_EVERY, (now - began) / 20))
            if now - last >= due and before + done < total:
                last = now
                say(f"{label}: {before + done:,}/{total:,}, {figures(detail)}")

        yield advance
    seconds = time.perf_counter() - began
    say(f"{label}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):,.1f}/s)")


@contextmanager
def silence() -> Iterator[None]:
    """Show nothing of what comes: another process says it. Errors that leave this are shown again."""
    console.quiet = True
    try:
        yield
    finally:
        console.quiet = False


def say(text: str) -> None:
    """A line for the person watching."""
    console.print(text, markup=False, soft_wrap=True)
    sys.stderr.flush()
