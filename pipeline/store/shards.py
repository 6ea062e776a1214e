"""The one place that writes and opens a shard: Parquet in row groups, a manifest beside it, published atomically."""

import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import OpdError, one_line
from schemas.manifest import FORMAT, READABLE, Manifest, differences, place_of
from schemas.tables import TABLES, Column, arrow_schema, writer_options

METADATA_KEY = b"opd"
COMPRESSION_LEVEL = 3
HOST = re.sub(r"\W", "-", socket.gethostname())


def manifest_path(shard: Path) -> Path:
    """The JSON manifest that lies beside a shard."""
    return shard.with_suffix(".json")


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a temporary name in `path`'s folder; on success fsync it and rename it to `path`, else remove it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary = temporary_name(path)
        temporary.touch()
    except OSError as error:
        raise OpdError(f"{path}: cannot write here: {error.strerror}") from error
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OpdError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that says which process of which machine, and which of its threads, is writing it."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{threading.get_ident()}.tmp")


def sweep(path: Path) -> None:
    """Remove what killed writers of `path`, a file or a folder, left; only of this machine, whose processes we can tell dead
    from alive."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{HOST}.*.tmp"):
        if not _alive(int(leftover.name.split(".")[-3])):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, but alive
    return True


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """fsync a folder's files and the folder, before it is renamed into place."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with publish(path) as temporary:
        temporary.write_text(text)


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def versions(*others: str) -> dict[str, str]:
    """The versions that can change a shard's content, those of other packages too."""
    packages = ("numpy", "pyarrow", "tokenizers", "torch", "transformers", *others)
    return {name: importlib.metadata.version(name) for name in packages}


class ShardWriter:
    """Writes one row group per call; see `open_writer`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema
        self.rows = 0
        self.row_groups = 0
        self.figures: dict[str, Any] = {}
        """What the manifest shall say was measured; may be filled until the block ends."""

    def write(self, table: pa.Table) -> None:
        """Append `table` as one row group (an empty one too, so that shards stay in step)."""
        self._writer.write_table(table.select(self._schema.names).cast(self._schema), row_group_size=max(1, len(table)))
        self.rows += len(table)
        self.row_groups += 1


@contextmanager
def open_writer(
    path: Path,
    kind: str,
    identity: dict[str, Any],
    inputs: dict[str, str],
    origin: dict[str, str] | None = None,
    decided: dict[str, Any] | None = None,
) -> Iterator[ShardWriter]:
    """Write a shard of table `kind`; it and its manifest appear under their names only when the block ends well.

    `identity` and `inputs` (name -> sha256) go into footer and manifest and are what `open_shard` checks, as it does the place
    in a run that `path` names; `decided` is what of the config decided the shard, `origin` is for people. Raises OpdError when
    the folder or the disk can't take it.
    """
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "identity": identity,
        "inputs": inputs,
        "origin": origin or {},
        "versions": versions(),
    }
    about |= {name: told for name, told in (("place", place_of(path, kind)), ("decided", decided)) if told is not None}
    schema = arrow_schema(kind)
    with publish(path) as temporary:
        parquet = pq.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            write_page_checksum=True,
            **writer_options(kind),
        )
        with parquet:
            writer = ShardWriter(parquet, schema)
            yield writer
            about["figures"] = writer.figures
            parquet.add_key_value_metadata(
                {METADATA_KEY: json.dumps(about, sort_keys=True, ensure_ascii=False).encode()}
            )
        manifest = Manifest(
            **about,
            rows=writer.rows,
            row_groups=writer.row_groups,
            bytes=temporary.stat().st_size,
            sha256=file_digest(temporary),
        )
        # The old manifest must not vouch for the new shard if we die between the two renames.
        manifest_path(path).unlink(missing_ok=True)
    write_text(manifest_path(path), manifest.dump())


@dataclass(frozen=True)
class Shard:
    """An opened, verified shard."""

    path: Path
    manifest: Manifest
    ends: Mapping[str, int] = field(default_factory=dict)
    """Columns of ids, and how many ids there are: one past the largest."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    def expect(self, identity: dict[str, Any], inputs: dict[str, str] | None = None, **about: Any) -> None:
        """Raise OpdError, with a field-by-field difference, where its manifest isn't that of what is asked for.

        Fields that are not named are not compared.
        """
        wanted = {**about, "identity": identity, "inputs": inputs or {}}
        found = {name: getattr(self.manifest, name) for name in wanted}
        for name in ("identity", "inputs"):
            found[name] = {key: value for key, value in found[name].items() if key in wanted[name]}
        if different := list(differences(wanted, found)):
            raise OpdError(f"{self.path}: this shard does not fit what was asked for: {'; '.join(different)}")

    def row_group_sizes(self) -> list[int]:
        """Rows of each row group, from the footer alone."""
        about = pq.read_metadata(self.path)
        return [about.row_group(index).num_rows for index in range(about.num_row_groups)]

    def row_group(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group, text as dictionaries; read by this thread alone."""
        text = [column.name for column in TABLES[self.manifest.kind] if column.type == pa.string()]
        with self._file(read_dictionary=text) as file:
            return self._complete(file.read_row_group(index, columns=list(columns), use_threads=False), columns)

    def row_groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups in order, one in memory at a time; of all columns, or of some."""
        with self._file() as file:
            for index in range(file.num_row_groups):
                yield self._complete(file.read_row_group(index, columns=columns), columns)

    def read(self) -> pa.Table:
        """The whole table."""
        with self._file() as file:
            return self._complete(file.read())

    @contextmanager
    def _file(self, **options: Any) -> Iterator[pq.ParquetFile]:
        """Each page is compared with its checksum as it is read: that may be long after the shard was opened."""
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True, **options) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise OpdError(f"{self.path}: changed since it was opened, or unreadable: {one_line(error)}") from error

    def _complete(self, table: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
        """With nulls for columns that an earlier format lacks. Raises OpdError for values that no writer makes."""
        if self.manifest.kind not in TABLES:
            return table
        for column in TABLES[self.manifest.kind]:
            if column.name in table.column_names and (column.bounded or column.name in self.ends):
                self._check_values(column, table[column.name])
        if self.manifest.format == FORMAT:
            return table
        for index, given in enumerate(arrow_schema(self.manifest.kind)):
            if given.name not in table.column_names and (columns is None or given.name in columns):
                table = table.add_column(min(index, table.num_columns), given, pa.nulls(len(table), given.type))
        return table

    def _check_values(self, column: Column, values: pa.ChunkedArray) -> None:
        while pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        high = min(column.high, self.ends.get(column.name, math.inf) - 1)
        ends = pc.min_max(values).as_py()
        wrong = [value for value in ends.values() if value is not None and not column.low <= value <= high]
        if pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py():
            wrong.append(math.nan)
        if wrong:
            raise OpdError(
                f"{self.path}: column `{column.name}` holds {wrong[0]!r}, expected {column.low:g} to {high:g}: no writer makes "
                "that; delete the shard and its manifest and run again"
            )


def read_manifest(path: Path) -> Manifest:
    """The manifest of a shard. Raises OpdError when it is missing or damaged, naming the fields that can be told."""
    where = manifest_path(path)
    try:
        text = where.read_text()
    except FileNotFoundError as error:
        state = "was left unfinished" if path.exists() else "does not exist"
        raise OpdError(
            f"{path}: this shard {state} (no manifest {where.name}); run the stage that writes it"
        ) from error
    except OSError as error:
        raise OpdError(f"{where}: cannot read: {error.strerror}; delete it and its shard and run again") from error
    except UnicodeDecodeError as error:
        raise OpdError(f"{where}: this manifest is damaged; delete it and its shard and run again") from error
    try:
        return Manifest.parse(text)
    except ValueError as error:
        changed = "; ".join(_changed(path, text))
        raise OpdError(
            f"{where}: this manifest is damaged or was edited{changed and f' ({changed})'}; "
            "delete it and its shard and run again"
        ) from error


def _changed(path: Path, text: str) -> list[str]:
    """Where a manifest that isn't intact differs from its shard, as far as both can be read."""
    try:
        stated = json.loads(text)
        facts = _facts(path) | {"sha256": file_digest(path), "bytes": path.stat().st_size}
        stated_self = stated.pop("self", None)
    except (ValueError, RecursionError, TypeError, AttributeError, OSError, OpdError):
        return []
    return list(differences(facts, stated)) or [f"self: found {stated_self!r}"]


def _facts(path: Path) -> dict[str, Any]:
    """What the Parquet file itself says of the fields of its manifest. Raises OpdError when it is no shard of ours."""
    try:
        with pq.ParquetFile(path) as file:
            about = json.loads((file.metadata.metadata or {})[METADATA_KEY])
            return about | {"rows": file.metadata.num_rows, "row_groups": file.num_row_groups}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise OpdError(f"{path}: not a shard of this project, its footer has no readable `opd` entry") from error


def open_shard(
    path: Path,
    kind: str,
    identity: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    whole: bool = True,
) -> Shard:
    """Open a shard after checking every byte of it against its manifest, and the manifest against what is asked for.

    `identity` and `inputs` name the fields the reader depends on; fields it does not name are not compared. Where in a run it
    lies must be where it was written, as far as path and manifest tell. Without `whole`, of the shard itself only size and
    footer are read: for one of several processes, another of which reads all of it before any goes on.
    Raises OpdError for a missing, damaged or foreign shard, with a field-by-field difference.
    """
    shard = Shard(Path(path), read_manifest(Path(path)))
    if shard.manifest.format not in READABLE:
        shard.expect({}, format=FORMAT)
    shard.expect({}, kind=kind)
    check_place(shard.path, shard.manifest)
    shard.expect(identity or {}, inputs or {})
    check_content(shard.path, shard.manifest, whole)
    return shard


def check_place(path: Path, manifest: Manifest) -> None:
    """Raise OpdError where a shard lies where another one belongs."""
    lies, told = place_of(path, manifest.kind) or {}, manifest.place or {}
    both = lies.keys() & told.keys()
    if different := list(differences({name: lies[name] for name in both}, {name: told[name] for name in both})):
        raise OpdError(
            f"{path}: this shard belongs to another place ({'; '.join(different)}); delete it and its manifest and run "
            "again"
        )


def check_content(path: Path, manifest: Manifest, whole: bool = True) -> None:
    """Compare a file, if `whole` byte by byte, with its manifest. Raises OpdError naming what differs."""
    stated = {name: value for name, value in manifest.model_dump().items() if value is not None}
    try:
        facts = {"bytes": path.stat().st_size} | ({"sha256": file_digest(path)} if whole else {})
    except OSError as error:
        raise OpdError(f"{path}: cannot read: {error.strerror}") from error
    if different := list(differences({name: stated[name] for name in facts}, facts)):
        raise OpdError(
            f"{path}: damaged, its bytes differ from its manifest ({'; '.join(different)}); delete it and run again"
        )
    facts = _facts(path)
    if different := list(
        differences(facts, {name: stated.get(name, "nothing") for name in stated if name not in ("bytes", "sha256")})
    ):
        raise OpdError(f"{path}: its manifest is not its own: {'; '.join(different)}; delete both and run again")
    schema = pq.read_schema(path)
    wanted = arrow_schema(manifest.kind) if manifest.kind in TABLES else schema
    later = {f.name for f in wanted if f.nullable} - set(schema.names) if manifest.format < FORMAT else set()
    expected = {f.name: str(f.type) for f in wanted if f.name not in later}
    if different := list(differences(expected, {f.name: str(f.type) for f in schema})):
        raise OpdError(f"{path}: its columns are not those of a {manifest.kind} table: {'; '.join(different)}")
