"""Push: a checkpoint, a cache or a run's shards to the hub, or to a folder or a bucket."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import fsspec
import typer
from rich.table import Table

from pipeline.models import IDENTITY_FILES, ORIGIN, TOKENIZER_FILES, ModelRef, is_unchanged
from pipeline.store import cache as store
from pipeline.store.records import read_record
from pipeline.store.shards import read_manifest
from schemas.errors import OpdError, one_line
from schemas.manifest import PHASE, PLACED, Manifest
from schemas.secrets import masked
from stages.run import console
from stages.run.card import HUB_ID
from stages.run.run import Run, config_text
from stages.tools.cache import damage
from stages.tools.folders import files_of, megabytes, open_folder

CARD = "README.md"
CHECKPOINT_FILES = (*IDENTITY_FILES, *TOKENIZER_FILES, ORIGIN, CARD)
"""All that is sent of a checkpoint: what its reference has a digest of, its teacher and its card. Training states are none."""
RUN_FILES = (".parquet", ".json", ".origin")
"""Endings of what is sent of a run beside its config; of its folders `checkpoint`, `train`, `logs`, ... nothing is."""
AT_ONCE = 200
"""Files of a commit."""

Content = Path | bytes


@dataclass(frozen=True)
class Parcel:
    """What is sent.

    Attributes:
        kind: of the repository that it makes.
        files: what lies under which name there: files of here, or their content; what vouches for others comes after them.
        named_by_content: whether a file that is there already, as large, is the same one.
    """

    kind: Literal["model", "dataset"]
    files: dict[str, Content]
    named_by_content: bool = False

    @property
    def bytes(self) -> int:
        """Size of all."""
        return sum(map(size_of, self.files.values()))


def size_of(content: Content) -> int:
    """Bytes of a file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def main(
    path: Annotated[Path, typer.Argument(help="a checkpoint's folder, a cache, or a run's folder or name")],
    destination: Annotated[
        str,
        typer.Argument(
            help="hf://user/name or user/name on the hub, or an fsspec location: file://, s3://, gs://, ..."
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="on the hub: a repository that others don't see")] = False,
) -> None:
    """Send a checkpoint with its model card, the cache, or a run's shards as a data set, to the hub or a folder.

    What is sent is verified first, every byte of it. Of a run that is its config and all tables, the prompts, reference answers
    and responses among them; of a cache, responses with their prompts' ids and reference answers: whether others may see them
    is yours to know. Training states are never sent.
    """
    repository = repository_of(destination)
    if repository is None and private:
        raise OpdError(f"--private: {masked(destination)} is no repository of the hub; give hf://user/name")
    parcel = parcel_of(path)
    send: Callable[..., dict[str, int]] = partial(to_location, location=destination)
    if repository is not None:
        send = partial(to_hub, repository=repository, private=private)
    with console.progress("push", len(parcel.files), "files") as advance:
        sent = send(parcel, advance=advance)
    _print(parcel, sent, masked(destination))


def repository_of(destination: str) -> str | None:
    """The hub's name of a repository; None for another location. Raises OpdError for what is neither."""
    if destination.startswith("hf://"):
        name = re.sub(r"^hf://(datasets/|models/)?", "", destination).rstrip("/")
        if not HUB_ID.fullmatch(name):
            raise OpdError(f"{destination}: expected hf://user/name")
        return name
    if "://" in destination or destination.startswith(("/", "./", "../", "~")):
        return None
    if HUB_ID.fullmatch(destination):
        return destination
    raise OpdError(
        f"{destination}: expected hf://user/name or user/name on the hub, or a location with its protocol, such as "
        "file:///shared/scores or s3://bucket/scores"
    )


# ---- what is sent ----


def parcel_of(path: Path) -> Parcel:
    """What of a path is sent, verified. Raises OpdError where it is nothing that is, or damaged."""
    if (path / "config.json").is_file():
        return checkpoint_parcel(path)
    if any((path / kind).is_dir() for kind in store.KINDS) and not (path / "config.yaml").is_file():
        return cache_parcel(path)
    try:
        run = open_folder(path)
    except OpdError as error:
        raise OpdError(
            f"{path}: nothing to push: expected a checkpoint's folder (round-<r>/checkpoint), a cache, or a run's folder"
        ) from error
    return run_parcel(run)


def checkpoint_parcel(folder: Path) -> Parcel:
    """A checkpoint: what `from_pretrained` reads, and its card."""
    reference = folder.absolute().with_suffix(".json")
    ref = read_record(reference, ModelRef, "snakemake")
    if not is_unchanged(ref.model_copy(update={"path": str(folder)})):
        raise OpdError(f"{folder}: its files are not those that {reference} tells of; train that round again")
    if not (folder / CARD).is_file():
        raise OpdError(f"{folder}: has no model card, {CARD}; train that round again")
    files = sorted({file for pattern in CHECKPOINT_FILES for file in folder.glob(pattern)})
    return Parcel("model", {file.relative_to(folder).as_posix(): file for file in files})


def cache_parcel(folder: Path) -> Parcel:
    """A cache's entries, as `cache_remote` looks for them."""
    files: dict[str, Content] = {}
    manifests = []
    for entry in store.entries(folder):
        if problem := store.verify(entry):
            raise OpdError(f"{problem}; nothing was sent")
        manifests.append(read_manifest(entry.path))
        for file in (file for file in store.files_of(entry.path) if file.exists()):
            files[file.relative_to(folder).as_posix()] = file
    if not files:
        raise OpdError(f"{folder}: an empty cache, nothing to push")
    counts = Counter(
        manifest.origin.get("teacher", manifest.origin.get("student", "unknown")) for manifest in manifests
    )
    models = ", ".join(f"`{name}` ({count} entries)" for name, count in counts.items())
    text = (
        f"Scores, answers and rollouts of [offline-opd]: {len(manifests)} entries, {_rows(manifests)} rows, of {models}.\n\n"
        "An entry is named by the digest of all that determines it; `cache_remote: <this location>` has a run find them.\n"
    )
    of = {kind: f"{kind}/*.parquet" for kind in store.KINDS if any(name.startswith(f"{kind}/") for name in files)}
    return Parcel("dataset", files | {CARD: card("teacher scores", of, text)}, named_by_content=True)


def run_parcel(run: Run) -> Parcel:
    """A run's shards with their manifests, and its records, as `reuse` reads them."""
    found = [file for file in files_of(run.root) if is_sent(file.relative_to(run.root))]
    shards = [file for file in found if file.suffix == ".parquet"]
    if not shards:
        raise OpdError(f"{run.root}: a run without shards, nothing to push")
    # A manifest is read with its shard, and after it there.
    checked = [file for file in found if file.suffix == ".parquet" or not file.with_suffix(".parquet").exists()]
    for file in checked:
        if problem := damage(file):
            raise OpdError(f"{problem}; nothing was sent")
    files: dict[str, Content] = {
        file.relative_to(run.root).as_posix(): file
        for file in sorted(found, key=lambda file: file.suffix != ".parquet")
    }
    files["config.yaml"] = masked(config_text(run.config)).encode()
    tables = {file.parent.name for file in shards if file.parent.name in (*PLACED, "scores")}
    of = {table: f"round-*/{table}/*.parquet" for table in (*PLACED, "scores") if table in tables}
    config = run.config
    text = (
        f"Rollouts of `{config.student.model}` scored by `{config.teacher.model}`, run `{config.run}` of offline-opd: "
        f"{len(shards)} shards, {_rows([read_manifest(file) for file in shards])} rows.\n\n"
        "Another student learns from them without the teacher: download this folder, and `reuse: [<folder>]`.\n"
    )
    return Parcel("dataset", files | {CARD: card(config.run, of, text)})


def is_sent(path: Path) -> bool:
    """Whether a file of a run, by its path in it, is a shard or a record: of no checkpoint, and no training state."""
    *folders, name = path.parts
    placed = not folders or folders[0] == "models" or bool(PHASE.fullmatch(folders[0]))
    return placed and path.suffix in RUN_FILES and not {"checkpoint", "train"} & {*folders, Path(name).stem}


def card(name: str, tables: dict[str, str], text: str) -> bytes:
    """A data set's card; the hub and `load_dataset` have a configuration for each table."""
    configs = [{"config_name": table, "data_files": pattern} for table, pattern in tables.items()]
    front = json.dumps({"tags": ["on-policy-distillation"], "configs": configs}, ensure_ascii=False)
    load = f'```python\ndatasets.load_dataset("<this repository>", "{next(iter(tables), "")}")\n```\n'
    return f"---\n{front}\n---\n\n# {name}\n\n{text}\n{load}".encode()


def _rows(manifests: Iterable[Manifest]) -> str:
    return f"{sum(manifest.rows for manifest in manifests):,}"


# ---- how ----


def to_location(parcel: Parcel, location: str, advance: Callable[[int], None]) -> dict[str, int]:
    """Copy to an fsspec location, each file under a temporary name first; bytes of what was sent, by name."""
    sent = {}
    try:
        fs, root = fsspec.core.url_to_fs(str(Path(location).expanduser()) if location.startswith("~") else location)
        for name, content in parcel.files.items():
            target = f"{root.rstrip('/')}/{name}"
            size = size_of(content)
            there = parcel.named_by_content and name != CARD and fs.exists(target) and fs.size(target) == size
            if not there:
                folder, _, last = target.rpartition("/")
                fs.makedirs(folder, exist_ok=True)
                part = f"{folder}/.{last}.part"
                if isinstance(content, bytes):
                    fs.pipe_file(part, content)
                else:
                    fs.put_file(str(content.resolve()), part)
                fs.mv(part, target)
                sent[name] = size
            advance(1)
    except (OSError, ValueError, ImportError) as error:
        raise OpdError(masked(f"{location}: cannot write: {one_line(error)}")) from error
    return sent


def to_hub(parcel: Parcel, repository: str, private: bool, advance: Callable[[int], None]) -> dict[str, int]:
    """Commit to a repository of the hub, which is made where there is none; bytes of what was sent, by name.

    Raises OpdError where the hub refuses it, or the repository is public and `private` is asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    api = HfApi()
    try:
        api.create_repo(repository, repo_type=parcel.kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository, repo_type=parcel.kind).private:
            raise OpdError(f"--private: {repository} is there already and public; nothing was sent")
        every = list(parcel.files.items())
        for part in (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)):
            operations = [
                CommitOperationAdd(name, io.BytesIO(content) if isinstance(content, bytes) else str(content.resolve()))
                for name, content in part
            ]
            api.create_commit(
                repository, operations, commit_message=f"{len(part)} files of offline-opd", repo_type=parcel.kind
            )
            advance(len(part))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OpdError(
            f"{repository}: the hub takes no {parcel.kind} of that name from here ({one_line(error)}); check the name, the "
            "network and HF_TOKEN, which must allow writing"
        ) from error
    return {name: size_of(content) for name, content in parcel.files.items()}


def _print(parcel: Parcel, sent: dict[str, int], destination: str) -> None:
    table = Table(title=f"sent to {destination}, a {parcel.kind}", title_justify="left")
    for heading in ("what", "files", "size"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    groups: dict[str, list[int]] = {}
    for name, size in sent.items():
        groups.setdefault(name.partition("/")[0] if "/" in name else name, []).append(size)
    for group, sizes in groups.items():
        table.add_row(group, str(len(sizes)), megabytes(sum(sizes)))
    console.out.print(table)
    here = len(parcel.files) - len(sent)
    already = f"; {here} were there already" if here else ""
    console.out.print(f"{len(sent)} files, {megabytes(sum(sent.values()))}{already}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    console.run(main)
