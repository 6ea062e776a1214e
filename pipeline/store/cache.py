"""The content-addressed store of what models said: an entry's name is the digest of all that determines it.

    <cache>/<kind>/<digest>.parquet, .json      an entry and its manifest, of one of the `KINDS`
    <cache>/scores/<digest>.audit               of scores that could not be audited when they were made: a later audit
    <cache>/<kind>/<digest>.sig                 the signature of an entry's manifest, where entries are signed
    <cache>/<kind>/<digest>.lock                held while an entry is made or removed; the kernel frees it with its holder
    <cache>/users/<digest>/<link digest>        text files, each the path of a link that a run holds to the entry

Runs link to scores and answers, and copy what their students sampled. Nothing in an entry depends on where the cache lies, so
it may be moved, copied or shared through any `fsspec` location.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from pipeline.store.records import read_record
from pipeline.store.shards import (
    Shard,
    check_content,
    manifest_path,
    open_shard,
    publish,
    read_manifest,
    sweep,
    temporary_name,
    write_text,
)
from pipeline.store.signatures import check_signature, sign, signature_path, signing_key
from schemas.errors import OpdError
from schemas.manifest import Manifest, digest
from schemas.records import Audited
from schemas.secrets import resolved


def responses_digest(rollouts: Shard) -> str:
    """sha256 of what the teacher reads of the rollouts: names and texts, and roles between them, in their row groups."""
    running = hashlib.sha256()
    for group in rollouts.row_groups(["rollout_id", "response", "segments"]):
        rows = zip(*(group[column].to_pylist() for column in ("rollout_id", "response", "segments")), strict=True)
        for name, text, segments in rows:
            running.update(f"{name}\0{len(text)}\0{text}\0".encode())
            if segments is not None:
                told = [(each["role"], each["bytes"], each["text"]) for each in segments]
                running.update(f"{json.dumps(told)}\0".encode())
        running.update(b"\1")
    return running.hexdigest()


def lists_digest(rollouts: Shard, column: str) -> str:
    """sha256 of a column of lists of numbers, and of where each list ends."""
    running = hashlib.sha256()
    for group in rollouts.row_groups():
        values = group[column].combine_chunks()
        while pa.types.is_list(values.type):
            running.update(pc.fill_null(values.value_lengths(), 0).to_numpy().tobytes())
            values = values.flatten()
        running.update(values.to_numpy().tobytes() + b"\1")
    return running.hexdigest()


KINDS = {"scores": "scores", "rollouts": "rollouts", "sampled": "rollouts"}
"""Tables of entries by their folder: scores, the teacher's answers, and what students sampled."""


def entry_name(identity: dict[str, Any], inputs: dict[str, str]) -> str:
    """sha256 (hex) of what determines an entry."""
    return digest({"identity": identity, "inputs": inputs})


def entry_path(cache: Path, identity: dict[str, Any], inputs: dict[str, str], kind: str = "scores") -> Path:
    """Where the entry of a kind with this identity and these inputs lies, whether or not it exists yet."""
    return cache / kind / f"{entry_name(identity, inputs)}.parquet"


def fetch_or_make(
    cache: Path,
    identity: dict[str, Any],
    inputs: dict[str, str],
    make: Callable[[Path], None],
    link: Path,
    remote: str | None = None,
    kind: str = "scores",
    keys: Sequence[Path] = (),
) -> bool:
    """Point `link`, the shard's name in the run, at an entry, and its manifest's beside it at the entry's.

    Arguments and errors as of `found_or_made`. Returns whether the entry was there already.
    """
    with found_or_made(cache, identity, inputs, make, remote, kind, keys) as (entry, found):
        use(cache, entry, link)
    return found


@contextmanager
def found_or_made(
    cache: Path,
    identity: dict[str, Any],
    inputs: dict[str, str],
    make: Callable[[Path], None],
    remote: str | None = None,
    kind: str = "scores",
    keys: Sequence[Path] = (),
) -> Iterator[tuple[Path, bool]]:
    """An entry that was found, or made exactly once even when several runs ask at the same time; nobody removes it meanwhile.

    Args:
        make: writes the shard to the path it is given.
        remote: an `fsspec` location where entries are looked for before, and copied to after, they are made.
        kind: one of `KINDS`.
        keys: where there are some, an entry that none of them signed is refused, and what is made is signed.
    Yields:
        Where it lies, and whether it was there already. A damaged entry is removed and made again.
    Raises:
        OpdError: the cache or the location can't be written, or an entry's signature is missing or of another key.
    """
    entry = entry_path(cache, identity, inputs, kind)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry):
            found = _intact(entry, identity, inputs) or (
                remote is not None and download(entry, remote) and _intact(entry, identity, inputs)
            )
            if found and keys:
                check_signature(entry, keys)
            if not found:
                if keys:
                    signing_key(keys)  # before the work, not after
                make(entry)
                if keys:
                    sign(entry, keys)
                if remote is not None:
                    upload(entry, remote)
            yield entry, bool(found)
    except PermissionError as error:
        raise OpdError(f"{entry.parent}: cannot write here: {error.strerror}") from error


def _lock(entry: Path, timeout: float = -1) -> FileLock:
    return FileLock(entry.with_suffix(".lock"), timeout=timeout)


def _intact(entry: Path, identity: dict[str, Any], inputs: dict[str, str]) -> bool:
    if not (entry.exists() and manifest_path(entry).exists()):
        return False
    try:
        open_shard(entry, KINDS[entry.parent.name], identity, inputs)
    except OpdError:
        entry.unlink()
        return False
    return True


def use(cache: Path, entry: Path, link: Path) -> None:
    """Point a run's shard and manifest at an entry, and note that it is used there."""
    _note_use(cache, entry, link)
    link_shard(entry, link)


def _note_use(cache: Path, entry: Path, link: Path) -> None:
    link = link.absolute()
    write_text(cache / "users" / entry.stem / digest(str(link))[:16], f"{link}\n")


def link_shard(shard: Path, link: Path) -> None:
    """Point `link` at a shard, and the manifest's name beside it at its manifest."""
    for target, name in ((shard, link), (manifest_path(shard), manifest_path(link))):
        publish_link(target, name)


def publish_link(target: Path, name: Path) -> None:
    """Point `name` at `target`, replacing what was there at once."""
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        sweep(name)
        temporary = temporary_name(name)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(name)
    except OSError as error:
        raise OpdError(f"{name}: cannot write: {error.strerror}") from error


def relink(cache: Path, run: Path) -> int:
    """Point a run's links at this cache where the one they point to is gone, so that a cache can be moved; how many.

    The links keep their times: what was made from them stays up to date.
    """
    moved = 0
    for name in (link for table in ("scores", "answers") for link in run.glob(f"*/{table}/*")):
        if not name.is_symlink() or name.exists():
            continue
        gone = name.readlink()
        target = cache / gone.parent.name / gone.name
        if target.exists():
            times = name.lstat()
            publish_link(target, name)
            os.utime(name, ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)
            if name.suffix == ".parquet":
                _note_use(cache, target, name)
            moved += 1
    return moved


@dataclass(frozen=True)
class Entry:
    """An entry as `opd cache` shows it. `manifest` is None when it can't be read."""

    path: Path
    manifest: Manifest | None
    users: list[Path]

    @property
    def bytes(self) -> int:
        """Size on disk with its manifest."""
        return sum(file.stat().st_size for file in (self.path, manifest_path(self.path)) if file.exists())

    @property
    def days(self) -> float:
        """Since it was written."""
        return (time.time() - self.path.lstat().st_mtime) / 86400


def entries(cache: Path) -> Iterator[Entry]:
    """Every entry of a cache, by kind and name."""
    for path in (path for kind in KINDS for path in sorted((cache / kind).glob("*.parquet"))):
        try:
            manifest = read_manifest(path)
        except OpdError:
            manifest = None
        yield Entry(path, manifest, users(cache, path))


def users(cache: Path, entry: Path) -> list[Path]:
    """The links of runs that still point at an entry."""
    noted = (
        Path(os.fsdecode(note.read_bytes()).rstrip("\n")) for note in sorted((cache / "users" / entry.stem).glob("*"))
    )
    return [link for link in noted if link.is_symlink() and link.resolve() == entry.resolve()]


def damage(entry: Entry) -> str | None:
    """What is wrong with a shard, after reading every byte of it; None when nothing is."""
    try:
        check_content(entry.path, read_manifest(entry.path))
    except OpdError as error:
        return str(error)
    return None


def verify(entry: Entry) -> str | None:
    """`damage` of an entry, or that it lies under a name that isn't its own."""
    if problem := damage(entry):
        return problem
    try:
        if audit_note(entry.path).exists():
            read_record(audit_note(entry.path), Audited, "opd audit")
    except OpdError as error:
        return str(error)
    manifest = read_manifest(entry.path)
    named = entry_path(Path(), manifest.identity, manifest.inputs, entry.path.parent.name).name
    return None if named == entry.path.name else f"{entry.path}: its content belongs under the name {named}"


def audit_note(scores: Path) -> Path:
    """Where a later audit of an entry of scores, or of a link to it, lies (`schemas.records.Audited`)."""
    return scores.resolve().with_suffix(".audit")


def remove(cache: Path, entry: Entry) -> bool:
    """Remove an entry unless a run is using or making it now; whether it is gone."""
    try:
        with _lock(entry.path, timeout=0):
            if users(cache, entry.path):
                return False
            # The manifest first: without it the rest counts as unfinished.
            for path in reversed(files_of(entry.path)):
                path.unlink(missing_ok=True)
            notes = cache / "users" / entry.path.stem
            for note in notes.glob("*"):
                note.unlink()
            if notes.is_dir():
                notes.rmdir()
    except Timeout:
        return False
    return True


def leftovers(cache: Path, older_than_days: float = 1.0) -> list[Path]:
    """Temporary files of writers that died on any machine, and manifests, audits and signatures without an entry."""
    old = time.time() - older_than_days * 86400
    folders = [cache / kind for kind in KINDS]
    beside = (path for folder in folders for name in ("*.json", "*.audit", "*.sig") for path in folder.glob(name))
    lone = (path for path in beside if not path.with_suffix(".parquet").exists())
    unfinished = (path for folder in folders for path in folder.glob(".*.tmp"))
    return [path for path in (*unfinished, *lone) if path.lstat().st_mtime < old]


def _remote(entry: Path, remote: str) -> tuple[Any, str]:
    """A file system and the folder in it that holds entries of this one's kind."""
    try:
        address = resolved(remote)
    except KeyError as error:
        raise OpdError(
            f"cache_remote {remote}: the environment has no variable {error}; set it where stages run"
        ) from error
    fs, root = fsspec.core.url_to_fs(address)
    return fs, f"{root}/{entry.parent.name}"


def files_of(entry: Path) -> tuple[Path, ...]:
    """What an entry may consist of: itself, its signature, the note of a later audit, and the manifest, last, since it
    vouches for the rest."""
    return entry, signature_path(entry), audit_note(entry), manifest_path(entry)


def upload(entry: Path, remote: str) -> None:
    """Copy an entry to an `fsspec` location, in the order of `files_of`."""
    try:
        fs, folder = _remote(entry, remote)
        fs.makedirs(folder, exist_ok=True)
        for file in (file for file in files_of(entry) if file.exists()):
            part = f"{folder}/.{file.name}.{os.getpid()}.part"
            fs.put_file(str(file), part)
            fs.mv(part, f"{folder}/{file.name}")
    except (OSError, ValueError, ImportError) as error:
        raise OpdError(f"cache_remote {remote}: cannot write: {error}") from error


def download(entry: Path, remote: str) -> bool:
    """Copy an entry from an `fsspec` location; whether it has it. What arrives is checked when it is opened."""
    try:
        fs, folder = _remote(entry, remote)
        if not fs.exists(f"{folder}/{manifest_path(entry).name}"):
            return False
        for file in (file for file in files_of(entry) if fs.exists(f"{folder}/{file.name}")):
            with publish(file) as temporary:
                fs.get_file(f"{folder}/{file.name}", str(temporary))
    except (OSError, ValueError, ImportError) as error:
        raise OpdError(f"cache_remote {remote}: cannot read: {error}") from error
    return True
