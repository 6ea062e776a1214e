"""What identifies a tokenizer, and what the models stage says of one before anything is sampled with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_units import byte_level, spaced_bpe
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from pipeline.align.texts import PROBES, Side
from pipeline.align.tokens import token_bytes
from pipeline.gguf_package import _read_as_saved
from pipeline.models import ModelRef, context, embedded, load_tokenizer, prepare, reference
from pipeline.store.shards import file_digest
from schemas.errors import OpdError
from schemas.manifest import digest
from stages.models import check_tokenizer
from stages.run import console
from stages.run.card import licence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a byte-level tokenizer and no weights worth reading."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    byte_level().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": []}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def refs_with(folder: Path, name: str, content: Any) -> tuple[ModelRef, ModelRef]:
    """References of a folder and of a copy that has one more file."""
    more = folder.with_name("more")
    shutil.copytree(folder, more)
    (more / name).parent.mkdir(exist_ok=True)
    (more / name).write_text(json.dumps(content))
    return reference("a", folder), reference("a", more)


@pytest.mark.parametrize(
    ("name", "content"),
    [("added_tokens.json", {"12": 257}), ("special_tokens_map.json", {"pad_token": "12"})],
)
def test_tokenizers_that_read_a_text_otherwise_have_another_digest(folder: Path, name: str, content: Any) -> None:
    """Both files matter only beside a config without `added_tokens_decoder`, as older checkpoints have it."""
    plain, more = refs_with(folder, name, content)
    one, other = (load_tokenizer("a", ref.path)("What is 12?").input_ids for ref in (plain, more))
    assert one != other
    assert plain.tokenizer != more.tokenizer and plain.weights == more.weights


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "spiece.model", "additional_chat_templates/tools.jinja"])
def test_all_files_of_a_tokenizer_are_part_of_its_digest(folder: Path, name: str) -> None:
    plain, more = refs_with(folder, name, {})
    assert plain.tokenizer != more.tokenizer and plain.weights == more.weights


def test_an_index_of_weights_is_part_of_their_digest(folder: Path) -> None:
    plain, more = refs_with(folder, "model.safetensors.index.json", {"weight_map": {}})
    assert plain.weights != more.weights and plain.tokenizer == more.tokenizer


def test_a_hub_models_card_comes_with_it_and_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    tiny.saved(hub, [])
    plain = reference("some/model", hub)
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    for name in ("LICENSE", "notes.txt"):
        (hub / name).write_text("text")

    def download(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        for path in {path for pattern in allow_patterns for path in hub.glob(pattern)}:
            (tmp_path / "got").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "got")
        return str(tmp_path / "got")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = prepare("some/model", tmp_path / "cache")
    assert found.identity() == plain.identity() and licence(found) == "apache-2.0"
    assert {path.name for path in hub.iterdir()} - {path.name for path in (tmp_path / "got").iterdir()} == {"notes.txt"}


def test_the_models_type_counts_where_it_decides_on_the_class(folder: Path) -> None:
    def digest_with(model_type: str) -> str:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return reference("a", folder).tokenizer

    assert digest_with("llama") == digest_with("gemma3_text")
    (folder / "tokenizer_config.json").write_text("{}")
    assert digest_with("llama") != digest_with("gemma3_text")


def test_a_prepared_package_keeps_the_digest_that_caches_were_written_under(smollm2: Any, gemma3: Any) -> None:
    """Only files that are there count, so a longer list of them doesn't part a run from scores it already has."""
    for real in (smollm2, gemma3):
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = {name: Path(real.ref.path) / name for name in names}
        assert real.ref.tokenizer == digest({name: file_digest(path) for name, path in files.items() if path.is_file()})
        names = ("config.json", "generation_config.json", "model.safetensors")
        assert real.ref.weights == digest({name: file_digest(Path(real.ref.path) / name) for name in names})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64}}, (131_072, 262_208)),
        ({"model_type": "gpt2", "n_positions": 77, "vocab_size": 9}, (77, 9)),  # by another name
        ({"model_type": "llama", "max_position_embeddings": 7}, (7, 32_000)),
        ({"model_type": "mamba", "vocab_size": 9}, (None, 9)),  # has no positions
        ({"model_type": "of tomorrow"}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_what_a_config_leaves_out_is_what_its_class_says(config: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert (context(config), embedded(config)) == expected


def test_a_converted_tokenizer_gives_a_plain_class_its_inputs(folder: Path) -> None:
    """`PreTrainedTokenizerFast` of transformers 4 gives `token_type_ids` where nobody says otherwise, which models refuse."""
    tokenizer = load_tokenizer("a", folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    _read_as_saved(folder, tokenizer)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["model_input_names"] == ["input_ids", "attention_mask"]


def side(tokenizer: Tokenizer) -> Side:
    return Side(tokenizer, token_bytes(tokenizer, "org/model", 0))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    return said


@pytest.mark.parametrize(
    ("pattern", "content", "probe", "byte"),
    [("  ", " ", "indentation", 2), ("\t", " ", "tabs", 4), ("\r\n", "\n", "CRLF", 3), ("0", "O", "JSON", 17)],
)
def test_a_tokenizer_that_changes_plain_text_is_refused_by_name(
    warnings: list[str], pattern: str, content: str, probe: str, byte: int
) -> None:
    lossy = byte_level(normalizers.Replace(pattern, content))
    with pytest.raises(OpdError, match=rf"teacher.model: the tokenizer of 'org/model'.*{probe}.* at byte {byte};"):
        check_tokenizer("teacher", side(lossy), None)
    assert not warnings


def test_a_normaliser_is_warned_of_only_where_it_changes_a_probe(warnings: list[str]) -> None:
    check_tokenizer("student", side(byte_level(normalizers.NFC())), None)
    assert not warnings
    check_tokenizer("student", side(byte_level(normalizers.NFKC())), None)
    assert [line.split(",")[0] for line in warnings] == [
        f"student: the tokenizer of org/model changes {probe}" for probe in ("CJK", "accents")
    ]


def test_a_tokenizer_that_reads_otherwise_than_its_file_is_told_with_the_probe(warnings: list[str]) -> None:
    """As `transformers` makes of Llama 2's: a space in front only where the text has none."""
    of_file, built = spaced_bpe("always"), spaced_bpe("always")
    built.normalizer = None
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    check_tokenizer("teacher", side(of_file), of_file)
    assert not warnings
    check_tokenizer("teacher", side(built), of_file)
    (line,) = warnings
    assert "reads indentation otherwise than its tokenizer.json" in line


def test_every_probe_is_of_its_own_kind() -> None:
    assert [name for name, text in PROBES.items() if not text.isascii()] == ["CJK", "emoji", "accents"]
