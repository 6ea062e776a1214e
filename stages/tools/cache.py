"""Cache: what the shared store of scores, answers and rollouts holds, whether it is intact, and who still uses it."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.models import ModelRef, is_unchanged
from pipeline.store import cache as store
from pipeline.store.shards import file_digest
from pipeline.store.signatures import check_signature, sign, signature_path
from schemas.config import Config
from schemas.errors import OpdError, one_line
from schemas.manifest import stated
from stages.run import console
from stages.run.context import located
from stages.run.run import cache_root

app = typer.Typer(no_args_is_help=True, help=__doc__)
FolderOption = Annotated[Path | None, typer.Option("--cache", help="the cache; $OPD_CACHE or the default otherwise")]
KeyOption = Annotated[
    list[Path] | None, typer.Option(help="an Ed25519 key in PEM (`cache_keys`); several are tried in turn")
]
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
    """List the entries: what scored or sampled, tokens, size, age, and the runs whose links point at them.

    Of rollouts runs hold copies, which point at nothing.
    """
    folder = _folder(cache)
    rows = [_row(entry) for entry in store.entries(folder)]
    if as_json:
        for row in rows:
            console.out.print(json.dumps(row, ensure_ascii=False), markup=False, soft_wrap=True)
        return
    table = Table(title=f"{folder}: scores, answers and rollouts", title_justify="left")
    for heading in ("entry", "kind", "model", "tokens", "MB", "bytes a token", "days", "used by"):
        table.add_column(heading, justify="left" if heading in ("entry", "kind", "model", "used by") else "right")
    for row in rows:
        each = f"{row['bytes'] / row['tokens']:.0f}" if row["tokens"] else ""
        size = (f"{row['tokens']:,}", f"{row['bytes'] / MEGABYTE:.2f}", each, f"{row['days']:.1f}")
        table.add_row(
            row["entry"][:12], row["kind"], row["teacher"] or row["student"], *size, ", ".join(row["runs"]) or "nobody"
        )
    console.out.print(table)
    total = sum(row["bytes"] for row in rows) / MEGABYTE
    console.out.print(f"{len(rows)} entries, {total:.1f} MB; {sum(not row['runs'] for row in rows)} used by nobody")


def _row(entry: store.Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "entry": entry.path.stem,
        "kind": {"rollouts": "answers", "sampled": "rollouts"}.get(entry.path.parent.name, "scores"),
        "teacher": manifest.origin.get("teacher") if manifest else "unreadable: run `opd cache verify`",
        "student": manifest.origin.get("student", "?") if manifest else None,
        # A row of scores is a teacher token; the end rows of the responses count too, they are scored like the others.
        "tokens": manifest.figures.get("tokens", manifest.rows) if manifest else 0,
        "bytes": entry.bytes,
        "days": round(entry.days, 2),
        # <run>/<phase>/<table>/<shard>
        "runs": sorted({str(link.parents[2]) for link in entry.users}),
    }


def verify(
    paths: Annotated[list[Path] | None, typer.Argument(help="run folders or files; the whole cache by default")] = None,
    cache: FolderOption = None,
    key: KeyOption = None,
) -> None:
    """Read every byte of every entry, or of all that runs below the paths hold, and compare it with its digest; with keys, ask
    for the signature of one of them on every entry."""
    if key and paths:
        raise OpdError("--key: entries of the cache are signed; give keys, or runs and files")
    if paths:
        for path in paths:
            if not path.exists():
                raise OpdError(f"{path}: no such file or folder")
        files = sorted({file for path in paths for file in (held(path) if path.is_dir() else [path])})
        checks = {file: partial(damage, file) for file in files}
        size = sum(file.stat().st_size for file in files if file.exists())
    else:
        found = list(store.entries(_folder(cache)))
        checks = {entry.path: partial(_wrong_with, entry, key or []) for entry in found}
        size = sum(entry.bytes for entry in found)
    broken = []
    with console.progress("verify", len(checks), "files") as advance:
        for check in checks.values():
            if problem := check():
                broken.append(problem)
                console.say(problem)
            advance(1)
    if broken:
        signed = " or not signed" if key else ""
        raise OpdError(
            f"{len(broken)} of {len(checks)} files are damaged{signed}; delete each and its manifest and run again"
        )
    what = "shards" if all(file.suffix == ".parquet" for file in checks) else "files"
    console.out.print(f"{len(checks)} {what}, {size / MEGABYTE:.1f} MB: every byte is as it was written")


def _wrong_with(entry: store.Entry, keys: list[Path]) -> str | None:
    """What is wrong with an entry, or with its signature where keys are given."""
    if (problem := store.verify(entry)) or not keys:
        return problem
    try:
        check_signature(entry.path, keys)
    except OpdError as error:
        return str(error)
    return None


def sign_entries(key: KeyOption, cache: FolderOption = None) -> None:
    """Sign the intact entries that have no signature yet, your own, with a private key."""
    signed = 0
    for entry in store.entries(_folder(cache)):
        if signature_path(entry.path).exists():
            continue
        if problem := store.verify(entry):
            raise OpdError(problem)
        sign(entry.path, key or [])
        signed += 1
    console.out.print(f"{signed} entries signed")


def held(folder: Path) -> Iterator[Path]:
    """All below a folder that can be verified: shards, records, notes, metrics, training states.

    A checkpoint's files are its reference's, `checkpoint.json`; a shard's manifest is the shard's.
    """
    for path in folder.rglob("*"):
        of_itself = path.suffix in (".parquet", ".origin") or path.match("state-*.safetensors")
        of_itself |= path.match("state-*/part-*.safetensors")
        is_record = (
            path.suffix == ".json" and path.parent.name != "checkpoint" and not path.with_suffix(".parquet").exists()
        )
        if of_itself or is_record or path.name == "metrics.jsonl":
            yield path


def damage(path: Path) -> str | None:
    """What is wrong with a file of a run, after reading every byte of it; None when nothing is."""
    if path.suffix == ".parquet":
        return store.damage(store.Entry(path, None, []))
    try:
        if path.suffix == ".safetensors":
            from train.checkpoint import load_state  # noqa: PLC0415 - seconds to import

            load_state(path)
        elif path.name == "metrics.jsonl":
            outcome = path.with_name("result.json")
            if outcome.exists() and stated(outcome.read_text())["metrics"] not in (None, file_digest(path)):
                return f"{path}: damaged, its bytes are not those that {outcome.name} tells of"
        else:
            told = stated(path.read_text())
            if "weights" in told and "tokenizer" in told:  # a model's reference
                model = located(path, ModelRef.model_validate(told))
                if not is_unchanged(model):
                    return f"{model.path}: the model's files are not those that {path} tells of"
    except (ValueError, OSError, KeyError) as error:
        return f"{path}: damaged or edited: {one_line(error)}"
    except OpdError as error:
        return str(error)
    return None


def collect(
    cache: FolderOption = None,
    days: Annotated[float, typer.Option(min=0, help="keep entries younger than this")] = 0.0,
    delete: Annotated[bool, typer.Option("--delete", help="really remove; without it, only say what would go")] = False,
) -> None:
    """Remove entries that no run points at, and what killed writers left behind.

    Of rollouts runs hold copies: their entries go too, and another run samples again. Say --days to keep the young ones.
    """
    folder = _folder(cache)
    unused = [(entry, entry.bytes) for entry in store.entries(folder) if not entry.users and entry.days >= days]
    stray = store.leftovers(folder)
    if not delete:
        for entry, size in unused:
            console.out.print(f"{entry.path.stem}  {size / MEGABYTE:.2f} MB", markup=False)
        console.out.print(f"{_counted(unused)} and {len(stray)} leftovers would go; say --delete")
        return
    gone = [(entry, size) for entry, size in unused if store.remove(folder, entry)]
    for path in stray:
        path.unlink(missing_ok=True)
    console.out.print(f"{_counted(gone)} and {len(stray)} leftovers removed")


def _counted(entries: list[tuple[store.Entry, int]]) -> str:
    return f"{len(entries)} entries ({sum(size for _, size in entries) / MEGABYTE:.1f} MB)"


app.command("ls")(console.reporting(list_entries))
app.command("verify")(console.reporting(verify))
app.command("sign")(console.reporting(sign_entries))
app.command("gc")(console.reporting(collect))
