"""Prompts from every source, split without overlap; rendering with each model's own template and one BOS."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.prompts import collect
from pipeline.rendering import Renderer
from schemas.config import Model, Prompts, Splits
from schemas.errors import OpdError

SPLITS = Splits(examples=2, train=6, dev=2, test=3)
ROWS = [{"prompt": f"What is {i}?", "answer": i, "level": i % 3} for i in range(20)]


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.zst", "p.parquet"])
def test_files_give_the_same_prompts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_jsonl(path)
    table = collect(Prompts(source=str(path), splits=SPLITS), seed=3)
    reference = collect(Prompts(source=str(write_jsonl(tmp_path / "ref.jsonl")), splits=SPLITS), seed=3)
    assert table.equals(reference)
    assert table["split"].to_pylist() == ["examples"] * 2 + ["test"] * 3 + ["dev"] * 2 + ["train"] * 6
    assert len(set(table["prompt"].to_pylist())) == 13
    assert json.loads(table["fields"][0].as_py()).keys() == {"level"}


def test_duplicates_are_dropped_and_shortage_is_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", ROWS[:5] * 4)
    with pytest.raises(OpdError, match=r"holds 5 different prompts, but prompts\.splits asks for 13"):
        collect(Prompts(source=str(path), splits=SPLITS), seed=0)


def test_a_larger_train_split_changes_nothing_else(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl")
    for source in (str(path), "reasoning-gym:chain_sum"):
        small, large = (
            collect(Prompts(source=source, splits=Splits(examples=2, train=train, dev=2, test=3)), seed=1)
            for train in (3, 13)
        )
        assert large.slice(0, len(small)).equals(small)


def test_options_are_for_generators_and_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=r"is a file, which takes no prompts\.options"):
        collect(Prompts(source=str(write_jsonl(tmp_path / "p.jsonl")), options={"a": 1}), seed=0)


def test_other_field_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"q": f"question {i}", "x": 1} for i in range(20)])
    table = collect(Prompts(source=str(path), prompt_field="q", answer_field=None, splits=SPLITS), seed=0)
    assert table["answer"].null_count == 13


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b'{"prompt": "a", "answer": 1}\n{oops}\n', r"line 2: not JSON"),
        (b"[1]\n", "line 1: expected an object, found list"),
        (b'{"question": "a"}\n', r"has no field 'prompt'; it has 'question'"),
        (b'{"prompt": " ", "answer": 1}\n', "must be non-empty text"),
        (b'{"prompt": 7, "answer": 1}\n', "must be non-empty text, found 7"),
        (b'{"prompt": "\xff", "answer": 1}\n', "not UTF-8"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(OpdError, match=message) as caught:
        collect(Prompts(source=str(path), splits=SPLITS), seed=0)
    assert "p.jsonl" in str(caught.value)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="no such file"):
        collect(Prompts(source=str(tmp_path / "none.jsonl")), seed=0)
    for name in ("p.jsonl.zst", "p.parquet"):
        (tmp_path / name).write_bytes(b"not that")
        with pytest.raises(OpdError, match=r"not zstandard data|not readable as Parquet"):
            collect(Prompts(source=str(tmp_path / name)), seed=0)


def test_reasoning_gym_items_are_disjoint_between_splits_and_seeds() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    config = Prompts(source="reasoning-gym:chain_sum", options=options, splits=Splits(train=200, dev=50, test=100))
    first, second = (collect(config, seed) for seed in (1, 2))
    assert len(set(first["prompt"].to_pylist())) == 354
    shared = set(first["prompt"].to_pylist()) & set(second["prompt"].to_pylist())
    assert len(shared) < 60  # 16,200 possible items: chance gives about 8; shared generator seeds would give nearly all
    assert "expression" in json.loads(first["fields"][0].as_py())
    with pytest.raises(OpdError, match="reasoning-gym:no_such"):
        collect(Prompts(source="reasoning-gym:no_such"), seed=0)


def row(prompt: str = "2 + 2?", answer: str = "4", **fields: Any) -> dict[str, Any]:
    return {"prompt_id": "p0", "prompt": prompt, "answer": answer, "fields": json.dumps(fields)}


def test_chat_models_get_their_template_and_one_bos(smollm2: Any) -> None:
    renderer = Renderer(Model(model="s", system="Be {{ mood }}."), smollm2.tokenizer, [])
    text = renderer.text(row(mood="kind"))
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    (ids,) = renderer.ids([row(mood="kind")], 100)
    assert ids[0] == smollm2.tokenizer.bos_token_id and ids[1] != smollm2.tokenizer.bos_token_id


def test_plain_models_get_examples_and_one_bos(gemma3: Any) -> None:
    template = "{% for e in examples %}Q: {{ e.prompt }} A: {{ e.answer }}\n{% endfor %}Q: {{ prompt }} A:"
    renderer = Renderer(Model(model="g", prompt=template), gemma3.tokenizer, [row("1 + 1?", "2")])
    assert renderer.text(row()) == "Q: 1 + 1? A: 2\nQ: 2 + 2? A:"
    (ids,) = renderer.ids([row()], 100)
    bos = gemma3.tokenizer.bos_token_id
    assert ids[0] == bos and (ids == bos).sum() == 1
    spelled = Renderer(Model(model="g", prompt="<bos>" + template), gemma3.tokenizer, [row("1 + 1?", "2")])
    assert spelled.ids([row()], 100)[0].tolist() == ids.tolist()


def test_rendering_errors_are_told(gemma3: Any, smollm2: Any) -> None:
    with pytest.raises(OpdError, match=r"'colour' is undefined; known names: answer, examples, prompt"):
        Renderer(Model(model="g", prompt="{{ colour }}"), gemma3.tokenizer, []).text(row())
    with pytest.raises(OpdError, match="prompt p0 can't be rendered"):
        Renderer(Model(model="g", prompt="{{ answer + 1 }}"), gemma3.tokenizer, []).text(row())
    with pytest.raises(OpdError, match="not valid Jinja"):
        Renderer(Model(model="g", prompt="{{"), gemma3.tokenizer, [])
    with pytest.raises(OpdError, match="no chat template"):
        Renderer(Model(model="g", chat=True), gemma3.tokenizer, [])
    with pytest.raises(OpdError, match=r"prompt p0: \d+ tokens for s, but its context leaves room for 5"):
        Renderer(Model(model="s"), smollm2.tokenizer, []).ids([row()], 5)


def test_jsonl_reads_as_a_stream(tmp_path: Path) -> None:
    """A large compressed file is decompressed piece by piece."""
    path = tmp_path / "p.jsonl.zst"
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as stream:
        for i in range(20000):
            stream.write(json.dumps({"prompt": f"p{i}", "answer": i, "pad": "x" * 500}).encode() + b"\n")
    path.write_bytes(out.getvalue())
    assert len(collect(Prompts(source=str(path), splits=SPLITS), seed=0)) == 13
