"""Cache: what the shared store of teachers' scores and answers holds, whether it is intact, and who still uses it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.store import cache as store
from schemas.config import Config
from schemas.errors import OpdError
from stages.run import console
from stages.run.run import cache_root

app = typer.Typer(no_args_is_help=True, help=__doc__)
FolderOption = Annotated[Path | None, typer.Option("--cache", help="the cache; $OPD_CACHE or the default otherwise")]
MEGABYTE = 1e6


def _folder(given: Path | None) -> Path:
    folder = given.expanduser().absolute() if given else cache_root(Config.model_fields["cache"].default)
    if not any((folder / kind).is_dir() for kind in store.KINDS):
        raise OpdError(f"{folder}: no cache of scores here (it has no folder `scores`)")
    return folder


def list_entries(
    cache: FolderOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """List the entries: teacher, rows, size, age, and the runs whose links point at them."""
    folder = _folder(cache)
    rows = [_row(entry) for entry in store.entries(folder)]
    if as_json:
        for row in rows:
            console.out.print(json.dumps(row, ensure_ascii=False), markup=False, soft_wrap=True)
        return
    table = Table(title=f"{folder}: teacher scores and answers", title_justify="left")
    for heading in ("entry", "kind", "teacher", "tokens", "MB", "bytes a token", "days", "used by"):
        table.add_column(heading, justify="left" if heading in ("entry", "kind", "teacher", "used by") else "right")
    for row in rows:
        each = f"{row['bytes'] / row['tokens']:.0f}" if row["tokens"] else ""
        size = (f"{row['tokens']:,}", f"{row['bytes'] / MEGABYTE:.2f}", each, f"{row['days']:.1f}")
        table.add_row(row["entry"][:12], row["kind"], row["teacher"], *size, ", ".join(row["runs"]) or "nobody")
    console.out.print(table)
    total = sum(row["bytes"] for row in rows) / MEGABYTE
    console.out.print(f"{len(rows)} entries, {total:.1f} MB; {sum(not row['runs'] for row in rows)} used by nobody")


def _row(entry: store.Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "entry": entry.path.stem,
        "kind": {"rollouts": "answers"}.get(entry.path.parent.name, "scores"),
        "teacher": manifest.origin.get("teacher", "?") if manifest else "unreadable: run `opd cache verify`",
        # A row of scores is a teacher token; the end rows of the responses count too, they are scored like the others.
        "tokens": manifest.figures.get("tokens", manifest.rows) if manifest else 0,
        "bytes": entry.bytes,
        "days": round(entry.days, 2),
        # <run>/<phase>/<table>/<shard>
        "runs": sorted({str(link.parents[2]) for link in entry.users}),
    }


def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="run folders or shards; the whole cache by default")
    ] = None,
    cache: FolderOption = None,
) -> None:
    """Read every byte of every entry (or of the shards below the paths) and compare it with its manifest."""
    if paths:
        for path in paths:
            if not path.exists():
                raise OpdError(f"{path}: no such file or folder")
        files = sorted(
            {f for p in paths for f in (p.rglob("*.parquet") if p.is_dir() else [p]) if f.name != "answers.parquet"}
        )
        found = [store.Entry(file, None, []) for file in files]
        check = store.damage
    else:
        found, check = list(store.entries(_folder(cache))), store.verify
    broken = []
    with console.progress("verify", len(found), "shards") as advance:
        for entry in found:
            if problem := check(entry):
                broken.append(problem)
                console.say(problem)
            advance(1)
    size = sum(entry.bytes for entry in found) / MEGABYTE
    if broken:
        raise OpdError(f"{len(broken)} of {len(found)} shards are damaged; delete each and its manifest and run again")
    console.out.print(f"{len(found)} shards, {size:.1f} MB: every byte is as it was written")


def collect(
    cache: FolderOption = None,
    days: Annotated[float, typer.Option(min=0, help="keep entries younger than this")] = 0.0,
    delete: Annotated[bool, typer.Option("--delete", help="really remove; without it, only say what would go")] = False,
) -> None:
    """Remove entries that no run points at, and what killed writers left behind."""
    folder = _folder(cache)
    unused = [entry for entry in store.entries(folder) if not entry.users and entry.days >= days]
    stray = store.leftovers(folder)
    size = sum(entry.bytes for entry in unused) / MEGABYTE
    if not delete:
        for entry in unused:
            console.out.print(f"{entry.path.stem}  {entry.bytes / MEGABYTE:.2f} MB", markup=False)
        console.out.print(f"{len(unused)} entries ({size:.1f} MB) and {len(stray)} leftovers would go; say --delete")
        return
    gone = [entry for entry in unused if store.remove(folder, entry)]
    for path in stray:
        path.unlink(missing_ok=True)
    console.out.print(f"{len(gone)} entries ({size:.1f} MB) and {len(stray)} leftovers removed")


app.command("ls")(console.reporting(list_entries))
app.command("verify")(console.reporting(verify))
app.command("gc")(console.reporting(collect))
