"""The files of a model in a local folder: which are read, and that they hold what its config says, all of it and no more."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from schemas.errors import OpdError, one_line, shown

CONFIG, WEIGHTS, INDEX, GENERATION = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
"""Keys of a config.json that are 1 or more in every model that has them."""


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model. Raises OpdError when it is damaged or no object."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise OpdError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # undecodable, no JSON, integers too long or nested too deep
        raise OpdError(f"{path}: not JSON: {one_line(error)}; fetch the model again") from error
    if not isinstance(found, dict):
        raise OpdError(f"{path}: expected an object, found a {type(found).__name__}; fetch the model again")
    return found


def model_config(folder: str | Path) -> dict[str, Any]:
    """The model's config.json; empty when the folder has none. Raises OpdError when it is damaged, or a count is none."""
    path = Path(folder) / CONFIG
    found = json_object(path) if path.is_file() else {}
    for section in filter(lambda part: isinstance(part, dict), (found, found.get("text_config", {}))):
        for key in COUNTS:
            value = section.get(key)
            if value is not None and (type(value) is not int or value < 1):
                raise OpdError(
                    f"{path}: `{key}` is a whole number of at least 1, found {shown(value, 60)}; repair it, or "
                    "fetch the model again"
                )
    return found


def weight_files(source: str, folder: Path) -> list[Path]:
    """The safetensors files that the model's weights are read from.

    Raises OpdError when there are none, and for what would have others read, which lie elsewhere or are no part of what
    identifies the model: an index that names one outside the folder, an adapter, a config that says where they are or which
    code of the hub runs them.
    """
    config = model_config(folder)
    if "transformers_weights" in config:
        raise OpdError(
            f"model {source!r}: {folder / CONFIG} has `transformers_weights`; name the weights {WEIGHTS} instead"
        )
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(config.get(key)):
            raise OpdError(
                f"model {source!r}: {folder / CONFIG} wants code of the hub, `{key}: {config[key]}`; remove that key"
            )
    if (adapter := folder / "adapter_config.json").exists():
        raise OpdError(
            f"model {source!r}: {adapter}: an adapter of other weights; merge it into them and save the result"
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise OpdError(f"model {source!r}: {folder} holds neither {WEIGHTS} nor {INDEX}")
    places = json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise OpdError(f"model {source!r}: {index}: no `weight_map` of tensors to files; fetch the model again")
    names = sorted(set(map(str, places.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise OpdError(f"model {source!r}: {index} names {name!r}, which is no safetensors file of that folder")
    return [folder / name for name in names]


def check_values(source: str, folder: Path) -> None:
    """Read every weight, a tensor in memory at a time: about 0.4 s for a GB on a slow core, a quarter of its sha256.

    Raises OpdError when a file is damaged or a tensor holds NaN.
    """
    import torch  # noqa: PLC0415 - seconds to import; table stages don't need it
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    for path in weight_files(source, folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it isn't iterable
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and tensor.numel():
                        wide = tensor.float() if tensor.itemsize == 1 else tensor
                        if torch.aminmax(wide).max.isnan():  # NaN if any is, in one pass without a copy
                            raise OpdError(
                                f"model {source!r}: {path}: {name} holds NaN; whoever made these weights lost them to an "
                                "overflow or a divergence: take an earlier checkpoint"
                            )
        except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
            raise OpdError(f"model {source!r}: {path} is damaged: {one_line(error)}; fetch it again") from error


def check_loaded(source: str, found: dict[str, Any], whole: bool = True) -> None:
    """Refuse what `from_pretrained` would load with random values, or leave out.

    Args:
        found: its `output_loading_info`: without weights that are tied, and those that the architecture declares as ignorable.
        whole: False for a model whose layers were left out on purpose: it may have more weights than it takes.
    Raises:
        OpdError: with the names of weights that are missing, of another shape, or of no place in the model.
    """
    remedy = f"its {CONFIG} and its weights are not of the same model, or one of them is incomplete: fetch it again"
    if found["missing_keys"]:
        raise OpdError(f"model {source!r}: its weights lack {_named(found['missing_keys'])}; {remedy}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise OpdError(
            f"model {source!r}: {name} is {_shape(stored)} in its weights, and by its {CONFIG} {_shape(wanted)}; {remedy}"
        )
    if whole and found["unexpected_keys"]:
        raise OpdError(
            f"model {source!r}: its weights hold {_named(found['unexpected_keys'])}, which have no place in a model of its "
            f"{CONFIG}; {remedy}"
        )


def check_generation(folder: Path) -> None:
    """Raise OpdError when the model's generation_config.json is damaged or names ends that are no ids."""
    path = folder / GENERATION
    ends = json_object(path).get("eos_token_id") if path.is_file() else None
    for value in ends if isinstance(ends, list) else [ends]:
        if value is not None and (type(value) is not int or value < 0):
            raise OpdError(f"{path}: `eos_token_id` is an id or a list of ids, found {shown(ends, 60)}; repair it")


def _named(keys: Collection[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(sorted(keys)[:most]) + more


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "a scalar"
