"""The one place that writes and opens a shard: Parquet in row groups, a manifest beside it, published atomically."""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import OpdError
from schemas.manifest import FORMAT, Manifest, differences
from schemas.tables import arrow_schema

METADATA_KEY = b"opd"
COMPRESSION_LEVEL = 3


def manifest_path(shard: Path) -> Path:
    """The JSON manifest that lies beside a shard."""
    return shard.with_suffix(".json")


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a temporary name in `path`'s folder; on success fsync it and rename it to `path`, else remove it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OpdError(f"{path}: cannot write here: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise OpdError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """fsync a folder's files and the folder, before it is renamed into place."""
    for file in folder.iterdir():
        _fsync(file)
    _fsync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with publish(path) as temporary:
        temporary.write_text(text)


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def versions() -> dict[str, str]:
    """The versions that can change a shard's content."""
    packages = ("numpy", "pyarrow", "tokenizers", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in packages}


class ShardWriter:
    """Writes one row group per call; see `open_writer`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema
        self.rows = 0
        self.row_groups = 0

    def write(self, table: pa.Table) -> None:
        """Append `table` as one row group (an empty one too, so that shards stay in step)."""
        self._writer.write_table(table.select(self._schema.names).cast(self._schema), row_group_size=max(1, len(table)))
        self.rows += len(table)
        self.row_groups += 1


@contextmanager
def open_writer(path: Path, kind: str, identity: dict[str, Any], inputs: dict[str, str]) -> Iterator[ShardWriter]:
    """Write a shard of table `kind`; it and its manifest appear under their names only when the block ends well.

    `identity` and `inputs` (name -> sha256) go into footer and manifest and are what `open_shard` checks.
    Raises OpdError when the folder or the disk can't take it.
    """
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "identity": identity,
        "inputs": inputs,
        "versions": versions(),
    }
    schema = arrow_schema(kind)
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True, ensure_ascii=False).encode()}
    with publish(path) as temporary:
        parquet = pq.ParquetWriter(
            temporary,
            schema.with_metadata(metadata),
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            write_page_checksum=True,
        )
        with parquet:
            writer = ShardWriter(parquet, schema)
            yield writer
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

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    def row_group(self, index: int) -> pa.Table:
        """One row group."""
        with pq.ParquetFile(self.path) as file:
            return file.read_row_group(index)

    def row_groups(self) -> Iterator[pa.Table]:
        """The row groups in order, one in memory at a time."""
        with pq.ParquetFile(self.path) as file:
            for index in range(file.num_row_groups):
                yield file.read_row_group(index)

    def read(self) -> pa.Table:
        """The whole table."""
        with pq.ParquetFile(self.path) as file:
            return file.read()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a shard. Raises OpdError when it is missing or damaged."""
    where = manifest_path(path)
    try:
        text = where.read_text()
    except FileNotFoundError as error:
        state = "was left unfinished" if path.exists() else "does not exist"
        raise OpdError(
            f"{path}: this shard {state} (no manifest {where.name}); run the stage that writes it"
        ) from error
    except UnicodeDecodeError as error:
        raise OpdError(f"{where}: this manifest is damaged; delete it and its shard and run again") from error
    return Manifest.parse(text, str(where))


def open_shard(
    path: Path, kind: str, identity: dict[str, Any] | None = None, inputs: dict[str, str] | None = None
) -> Shard:
    """Open a shard after checking every byte of it against its manifest, and the manifest against what is asked for.

    `identity` and `inputs` name the fields the reader depends on; fields it does not name are not compared.
    Raises OpdError for a missing, damaged or foreign shard, with a field-by-field difference.
    """
    path = Path(path)
    manifest = read_manifest(path)
    asked: dict[str, Any] = {"format": FORMAT, "kind": kind}
    found: dict[str, Any] = {"format": manifest.format, "kind": manifest.kind}
    for name, wanted in (("identity", identity or {}), ("inputs", inputs or {})):
        asked[name] = wanted
        found[name] = {key: value for key, value in getattr(manifest, name).items() if key in wanted}
    if different := list(differences(asked, found)):
        raise OpdError(f"{path}: this shard does not fit what was asked for: {'; '.join(different)}")
    try:
        intact = path.stat().st_size == manifest.bytes and file_digest(path) == manifest.sha256
    except OSError as error:
        raise OpdError(f"{path}: cannot read: {error.strerror}") from error
    if not intact:
        raise OpdError(f"{path}: damaged, its bytes differ from its manifest; delete it and run again")
    return Shard(path, manifest)
