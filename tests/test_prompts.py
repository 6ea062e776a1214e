"""Prompts from every source, split without overlap; rendering with each model's own template and one BOS."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import sources
from pipeline.align.tokens import text_tokenizer
from pipeline.conversations import Asked, asked, reference
from pipeline.prepared import PromptTable
from pipeline.prompts import collect
from pipeline.rendering import Renderer
from pipeline.store.shards import open_shard, open_writer
from schemas.config import Model, Prompts, Splits
from schemas.errors import OpdError

SPLITS = Splits(examples=2, train=6, dev=2, test=3)
ROWS = [{"prompt": f"What is {i}?", "answer": i, "level": i % 3} for i in range(20)]


def compressed(text: str, suffix: str) -> bytes:
    packed: dict[str, Callable[[bytes], bytes]] = {".zst": zstandard.compress, ".gz": gzip.compress}
    return packed.get(suffix, bytes)(text.encode())


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(compressed(text, path.suffix))
    return path


def write_rows(path: Path) -> None:
    kind = path.name.removesuffix(path.suffix) if path.suffix in (".gz", ".zst") else path.name
    if kind.endswith("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
        path.write_bytes(compressed(out.getvalue(), path.suffix))
    elif kind == "list.json":
        path.write_bytes(compressed(json.dumps(ROWS, indent=1), path.suffix))
    elif kind.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        write_jsonl(path)


FILES = ("p.jsonl", "p.jsonl.zst", "p.jsonl.gz", "p.parquet", "p.json", "list.json", "list.json.gz", "saved")
CSV = ("p.csv", "p.csv.gz", "p.csv.zst")


@pytest.mark.parametrize("name", [*FILES, *CSV])
def test_files_give_the_same_prompts(tmp_path: Path, name: str) -> None:
    """Of cells of a CSV all are text."""
    path = tmp_path / name
    write_rows(path)
    table = collect(Prompts(source=str(path), splits=SPLITS), seed=3)
    reference = collect(Prompts(source=str(write_jsonl(tmp_path / "ref.jsonl")), splits=SPLITS), seed=3)
    if name in CSV:
        fields = [json.loads(text) for text in reference["fields"].to_pylist()]
        texts = [json.dumps({key: str(value) for key, value in row.items()}) for row in fields]
        reference = reference.set_column(reference.schema.get_field_index("fields"), "fields", pa.array(texts))
    assert table.to_pylist() == reference.to_pylist()
    assert table["split"].to_pylist() == ["examples"] * 2 + ["test"] * 3 + ["dev"] * 2 + ["train"] * 6
    assert len(set(table["prompt"].to_pylist())) == 13
    assert json.loads(table["fields"][0].as_py()).keys() == {"level"}


def test_rows_are_drawn_as_ever(tmp_path: Path) -> None:
    """The first of equal ones, in the order of one permutation: what is prepared stays what it was."""
    rows = [{"prompt": f"What is {i % 20}?", "answer": i} for i in range(35)]
    table = collect(Prompts(source=str(write_jsonl(tmp_path / "p.jsonl", rows)), splits=SPLITS), seed=3)
    order = np.random.default_rng(3).permutation(20)[:13]
    assert table["answer"].to_pylist() == [str(i) for i in order]
    assert table["prompt_id"].to_pylist() == [f"p{i:03}" for i in range(13)]


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end anywhere within what is read at a time, and one that is longer."""
    rows = [*ROWS, {"prompt": "long " * 100, "answer": "[}]"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    for chunk in (1, 2, 7, 64):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        assert list(sources.SOURCES["json"].rows(str(tmp_path / "list.json"), {}, 0, 0)) == rows


def test_saved_splits_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from stages.run.workflow import local_files

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": data, "b": data.select(range(5))}).save_to_disk(tmp_path / "saved")
    config = Prompts(source=str(tmp_path / "saved"), options={"split": "a"}, splits=SPLITS)
    assert len(collect(config, seed=0)) == 13
    with pytest.raises(OpdError, match=r"has no split 'train'; set prompts\.options\.split: a, b"):
        collect(config.model_copy(update={"options": {}}), seed=0)
    with pytest.raises(OpdError, match="whose only option is `split`, found name"):
        collect(config.model_copy(update={"options": {"name": "x"}}), seed=0)
    found = {Path(path).relative_to(tmp_path / "saved").as_posix() for path in local_files(config.source)}
    assert {"dataset_dict.json", "a/state.json", "b/data-00000-of-00001.arrow"} <= found

    asked_for: list[dict[str, Any]] = []
    read: list[int] = []

    def rows() -> Any:
        for i in range(100_000):
            read.append(i)
            yield {"prompt": f"p{i}", "answer": "1"}

    def load(source: str, **options: Any) -> Any:
        asked_for.append(options)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "SHUFFLE_BUFFER", 50)
    streamed = config.model_copy(update={"source": "o/n", "options": {"streaming": True}})
    first, again, other = (collect(streamed, seed).to_pylist() for seed in (0, 0, 1))
    assert first == again and first != other and asked_for[0] == {"split": "train", "streaming": True}
    assert len({row["prompt"] for row in first}) == 13 and max(read) < 3000


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


def test_one_field_holds_one_thing() -> None:
    with pytest.raises(ValueError, match="`answer_field` and `tools_field` must differ, found q, q, tools"):
        Prompts(source="p.csv", prompt_field="q", answer_field="q")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b'{"prompt": "a", "answer": 1}\n{oops}\n', r"line 2: not JSON"),
        (b"[1]\n", "line 1: expected an object, found list"),
        (b'{"question": "a"}\n', r"has no field 'prompt'; it has 'question'"),
        (b'{"prompt": " ", "answer": 1}\n', "must be non-empty text"),
        (b'{"prompt": 7, "answer": 1}\n', "must be non-empty text or a list of messages, found 7"),
        (b'{"prompt": "\xff", "answer": 1}\n', "not UTF-8"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(OpdError, match=message) as caught:
        collect(Prompts(source=str(path), splits=SPLITS), seed=0)
    assert "p.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"question,answer\na,1\n", r"row 0: has no field 'prompt'; it has 'question', 'answer'"),
        ("p.csv", b"prompt,answer\na,1\nb\n", "line 3: 1 cells, but the header has 2: prompt, answer"),
        ("p.csv", b"prompt,prompt\na,1\n", "two columns have the same name"),
        ("p.csv", b'prompt,answer\n"a,1\n', "line 2: not CSV"),
        ("p.csv", b"prompt,answer\n,1\n", "row 0, field 'prompt' must be non-empty text"),
        ("p.json", b'[{"prompt": "a", "answer": 1}, {"prompt"', "row 1: not JSON"),
        ("p.json", b'[{"prompt": "a", "answer": 1}, 3]', "row 1: expected an object, found int"),
        ("p.json", b'{"prompt": "a",\n "answer": 1}', "line 1: not JSON"),
        ("p.jsonl.gz", b"not that", "not gzip data, or cut"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "not gzip data, or cut"),
    ],
)
def test_other_broken_files_are_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OpdError, match=message) as caught:
        collect(Prompts(source=str(tmp_path / name), splits=SPLITS), seed=0)
    assert name in str(caught.value)


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
    given = {name: fields.pop(name, None) for name in ("messages", "tools")}
    texts = {name: None if value is None else json.dumps(value, ensure_ascii=False) for name, value in given.items()}
    return {"prompt_id": "p0", "prompt": prompt, "answer": answer, **texts, "fields": json.dumps(fields)}


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
    with pytest.raises(OpdError, match=r"'colour' is undefined; known names: answer, examples, messages, prompt"):
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


# Conversations

USER, REPLY = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21", "tool_call_id": "c1"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi.", Asked("Hi.")),
        ([USER], Asked("Hi.")),
        ([USER, REPLY], Asked("Hi.", answer="Hello.")),
        ([SYSTEM, USER], Asked("Hi.", [SYSTEM, USER])),
        (
            [USER, REPLY, {"role": "user", "content": "And?"}],
            Asked("And?", [USER, REPLY, {"role": "user", "content": "And?"}]),
        ),
        ([{"role": "developer", "content": "Be kind."}, USER], Asked("Hi.", [SYSTEM, USER])),
        (  # ShareGPT
            [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
            ],
            Asked("Hi.", [SYSTEM, USER], answer="Hello."),
        ),
        (  # with calls as LLaMA-Factory has them
            [
                {"from": "human", "value": "Hi."},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "21"},
            ],
            Asked("Hi.", [USER, CALLING, {"role": "tool", "content": "21"}]),
        ),
        (  # arguments as text, ids, and what Arrow fills in
            [
                USER | {"tool_calls": None},
                {"role": "assistant", "tool_calls": [{"id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'}]},
                RESULT | {"name": None},
            ],
            Asked("Hi.", [USER, CALLING | {"tool_calls": [CALL | {"id": "c1"}]}, RESULT]),
        ),
        (  # thoughts, parts
            [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]},
                REPLY | {"thinking": "Polite."},
                USER,
            ],
            Asked("Hi.", [USER, REPLY | {"reasoning_content": "Polite."}, USER]),
        ),
        ([USER, CALLING], Asked("Hi.", answer='[{"name": "weather", "arguments": {"city": "Oslo"}}]')),
    ],
)
def test_conversations_have_one_form(value: Any, expected: Asked) -> None:
    assert asked(value, None, "here") == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (7, "7"),
        (72.0, "72"),
        (1e-05, "0.00001"),
        (0.5, "0.5"),
        (-3e20, "-300000000000000000000"),
        (True, "True"),
        ([{"from": "gpt", "value": "Paris"}], "Paris"),
        ([1, 2], "[1, 2]"),
        (None, None),
        ("7.0", "7.0"),
    ],
)
def test_reference_answers_are_texts(given: Any, text: str | None) -> None:
    assert reference(given, "here") == text


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ('{"prompt": "a"}\n{oops\n', {}, "nor a dataset the hub gives us: .*[Jj][Ss][Oo][Nn]"),
        ('{"prompt": "a"}\n', {"split": ["train"]}, r"prompts\.options\.split: expected the name of one split, found"),
        ('{"prompt": "a"}\n', {"name": 3}, "nor a dataset the hub gives us: "),
    ],
)
def test_what_datasets_cannot_read_is_told(
    content: str, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a broken file; options that it takes badly."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/p.jsonl").write_text(content)
    with pytest.raises(OpdError, match=said):
        collect(Prompts(source=str(tmp_path / "data"), options=options, splits=SPLITS), seed=0)


@pytest.mark.parametrize(
    "given", [[WEATHER], json.dumps([WEATHER]), [{"type": "function", "function": WEATHER}], [json.dumps(WEATHER)]]
)
def test_tools_have_one_form(given: Any) -> None:
    wanted = [{"type": "function", "function": WEATHER}]
    assert asked("Hi.", given, "here") == Asked("Hi.", tools=wanted)
    assert asked("Hi.", [], "here") == asked("Hi.", "", "here") == Asked("Hi.")


@pytest.mark.parametrize(
    ("value", "tools", "message"),
    [
        ([], None, "must be non-empty text or a list of messages"),
        (["Hi."], None, "message 0: expected an object with `role` and `content`, found 'Hi.'"),
        ([{"content": "Hi."}], None, "message 0: no `role`"),
        ([USER, {"role": "narrator", "content": "x"}], None, "message 1: unknown role 'narrator'; known are system"),
        ([USER, SYSTEM], None, "the message to answer has the role 'system'"),
        ([USER, REPLY, REPLY], None, "the message to answer has the role 'assistant'"),
        ([SYSTEM, REPLY], None, "no user's message"),
        ([{"role": "user", "content": " "}], None, "message 0: no text in its `content`"),
        ([USER, {"role": "tool"}], None, "message 1: no text in its `content`"),
        ([USER, {"role": "assistant", "content": ""}], None, "neither says, thinks nor calls"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], None, "a part of type 'image'; only text"),
        ([USER, CALLING | {"tool_calls": [{"arguments": {}}]}, RESULT], None, "a tool call needs a `name`"),
        ([USER | {"tool_calls": [CALL]}], None, "only the assistant has `tool_calls`"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            None,
            "arguments of 'f' is not JSON",
        ),
        ("Hi.", "hammer", "`tools` is not JSON"),
        ("Hi.", [{"parameters": {}}], "a tool is a JSON schema with a `name`"),
    ],
)
def test_malformed_conversations_are_told(tmp_path: Path, value: Any, tools: Any, message: str) -> None:
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": value, "answer": 1, "tools": tools}]
    )
    with pytest.raises(OpdError, match=message) as caught:
        collect(Prompts(source=str(path), splits=SPLITS), seed=0)
    assert f"{path}, row 1, field 'prompt'" in str(caught.value)


def test_conversations_are_found_by_their_form_and_are_the_same_where_all_of_them_is(tmp_path: Path) -> None:
    """A conversation of one question is that question; what the assistant said last is the answer, unless a field has one."""
    rows: list[dict[str, Any]] = [
        {"messages": [USER, REPLY]},
        {"messages": [SYSTEM, USER, REPLY], "answer": "mine"},
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Other."}]},
        {"messages": [SYSTEM, USER], "tools": [WEATHER], "answer": None, "level": 3},
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Same."}]},
        {"prompt": "Hi.", "answer": "text"},
    ]
    config = Prompts(source=str(write_jsonl(tmp_path / "p.jsonl", rows)), splits=Splits(examples=0, train=2, test=1))
    with pytest.raises(OpdError, match="holds 3 different prompts, but"):
        collect(config.model_copy(update={"splits": SPLITS}), 0)
    found = sorted(collect(config, seed=0).drop_columns(["prompt_id", "split"]).to_pylist(), key=str)
    messages, tools = json.dumps([SYSTEM, USER]), json.dumps([{"type": "function", "function": WEATHER}])
    wanted = [
        {"prompt": "Hi.", "messages": None, "tools": None, "answer": "Hello.", "fields": "{}"},
        {"prompt": "Hi.", "messages": messages, "tools": None, "answer": "mine", "fields": "{}"},
        {"prompt": "Hi.", "messages": messages, "tools": tools, "answer": None, "fields": '{"level": 3}'},
    ]
    assert found == sorted(wanted, key=str)
    nothing = config.model_copy(update={"answer_field": None, "tools_field": None})
    with pytest.raises(OpdError, match="holds 2 different"):
        collect(nothing, 0)
    lone = write_jsonl(tmp_path / "lone.jsonl", [{"prompt": [SYSTEM, USER]}])
    with pytest.raises(OpdError, match="row 0: has no field 'answer'"):
        collect(Prompts(source=str(lone), splits=Splits(examples=0, train=1, test=0)), 0)


def test_prompts_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """Any of them, in any order, from row groups of a few; not those of others."""
    names = [f"p{i:03}" for i in range(10)]
    splits = ["test"] * 3 + ["train"] * 7
    table = pa.table({"prompt_id": names, "split": splits, "prompt": names, "fields": ["{}"] * 10})
    for column in ("messages", "tools", "answer"):
        table = table.append_column(column, pa.nulls(10, pa.string()))
    path = tmp_path / "prompts.parquet"
    with open_writer(path, "prompts", {}, {}) as writer:
        for start in range(0, 10, 4):
            writer.write(table.slice(start, 4))
    prompts = PromptTable(open_shard(path, "prompts"))
    train = prompts.split("train")
    assert [row["prompt"] for row in train] == names[3:] and len(train) == 7 and len(prompts.split("dev")) == 0
    assert train[-1]["prompt_id"] == "p009" and [row["prompt_id"] for row in train[1:3]] == ["p004", "p005"]
    assert [row["prompt_id"] for row in prompts.take(["p007", "p001", "p007"])] == ["p007", "p001", "p007"]
    assert train[0] == {**table.to_pylist()[3]}
    with pytest.raises(OpdError, match=r"prompts\.parquet: holds no prompt 'p010'"):
        prompts.take(["p001", "p010"])
    with pytest.raises(IndexError):
        train[7]


# Templates: a tokenizer of bytes, with a template of one's own

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinks is defined and thinks is false %}<think></think>"
    "{% endif %}{% endif %}"
)
TOOLS = (
    CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    + "{{ tools | tojson }}"
)


def bytes_tokenizer(template: str | None = CHATML) -> Any:
    """A byte each, but for `<|im_start|>`, `<|im_end|>` (special) and `<think>`, `</think>` (not)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def rendered(row: dict[str, Any], template: str | None = CHATML, **config: Any) -> str:
    return Renderer(Model(model="m", **config), bytes_tokenizer(template), []).text(row)


TURNS = row("And?", messages=[SYSTEM, USER, REPLY, {"role": "user", "content": "And?"}])


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"


def test_a_conversation_is_rendered_whole_and_the_config_has_the_last_word() -> None:
    """`prompt` is of the last user message; `system` takes the place of the row's own, which it may take in."""
    before = ("user", "Hi."), ("assistant", "Hello.")
    assert rendered(TURNS) == chatml(("system", "Be kind."), *before, ("user", "And?"))
    hint = rendered(TURNS, prompt="{{ prompt }} ({{ answer }})", system="Hint.")
    assert hint == chatml(("system", "Hint."), *before, ("user", "And? (4)"))
    both = rendered(TURNS, system="{{ system }} And brief: {{ messages | length }}.")
    assert both == chatml(("system", "Be kind. And brief: 4."), *before, ("user", "And?"))
    assert rendered(row(system="of the field"), system="{{ system }}").startswith(
        "<|im_start|>system\nof the field<|im_end|>"
    )
    assert rendered(row(), system="a{{ system }}b").startswith("<|im_start|>system\nab<|im_end|>")


def test_options_of_the_template_and_a_prefill() -> None:
    plain = Renderer(Model(model="m"), bytes_tokenizer(), [])
    off = Renderer(Model(model="m", chat_template_kwargs={"thinks": False}), bytes_tokenizer(), [])
    begun = Renderer(Model(model="m", prefill="<think>\nIt is {{ answer }},"), bytes_tokenizer(), [])
    assert off.text(TURNS) == plain.text(TURNS) + "<think></think>"
    assert begun.text(TURNS) == plain.text(TURNS) + "<think>\nIt is 4,"
    assert begun.ids([TURNS], 1000)[0].tolist()[-10] == begun._tokenizer.convert_tokens_to_ids("<think>")
    assert len({json.dumps(renderer.identity) for renderer in (plain, off, begun)}) == 3
    assert rendered(row(), None, prefill=" So:") == "2 + 2? So:"
    with pytest.raises(OpdError, match=r"reads no 'enable_thinking', so .* names that it reads: thinks"):
        rendered(row(), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(OpdError, match="reads no 'messages'"):
        rendered(row(), chat_template_kwargs={"messages": []})
    with pytest.raises(OpdError, match="`chat_template_kwargs` needs a chat template"):
        rendered(row(), None, chat_template_kwargs={"thinks": False})
    with pytest.raises(ValueError, match="`chat_template_kwargs` needs a chat template, but `chat` is false"):
        Model(model="m", chat=False, chat_template_kwargs={"thinks": False})


CALLED = row("Hi.", messages=[USER, CALLING, RESULT], tools=[{"type": "function", "function": WEATHER}])
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]
LAST_TURN = "{% for m in messages[-1:] %}" + CHATML.partition("%}")[2]
JSON_TOOLS = TOOLS.replace(
    "m.tool_calls | tojson", "m.tool_calls[0].function.name ~ ': ' + m.tool_calls[0].function.arguments"
)


@pytest.mark.parametrize(
    ("given", "template", "config", "lost"),
    [
        (TURNS, CHATML, {}, None),
        (TURNS, NO_SYSTEM, {}, "leaves out 1 of its texts and tool names .'Be kind.'."),
        (row(), NO_SYSTEM, {"system": "Short."}, "leaves out 1 .* .'Short.'."),
        (TURNS, LAST_TURN, {}, "leaves out 3 "),
        (row("Hi.", messages=[USER, REPLY | {"content": "Hi."}, USER]), LAST_TURN, {}, "'Hi.'"),
        (CALLED, CHATML, {}, "'weather'; 'city'; 'Oslo'"),
        (CALLED, TOOLS, {}, None),
        (CALLED, JSON_TOOLS, {}, None),  # wants the arguments as text
        (CALLED, "{{ raise_exception('no tools') }}", {}, "can't be rendered: no tools"),
        (row("a\n\"b\" ", messages=[SYSTEM, {"role": "user", "content": "a\n\"b\" "}]), "{{ messages | tojson }}", {}, None),
        (row("Hi.", messages=[USER, {"role": "assistant", "content": "<think>No.</think>Hm."}, USER]),
         CHATML.replace("m.content", "m.content.split('</think>')[-1]"), {}, None),
        (TURNS, None, {}, "a conversation of 4 messages, but m has no chat template"),
        (TURNS, None, {"prompt": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}, None),
        (TURNS, None, {"prompt": "{{ messages[-1].content }}"}, "`prompt` leaves out 3"),
        (row(tools=[{"type": "function", "function": WEATHER}]), None, {}, "`prompt` leaves out 1 .* .'weather'."),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused(given: Any, template: Any, config: Any, lost: str | None) -> None:
    if lost is None:
        assert rendered(given, template, **config)
    else:
        with pytest.raises(OpdError, match=lost) as caught:
            rendered(given, template, **config)
        assert "prompt p0" in str(caught.value)


def byte_ids(tokenizer: Any, *pieces: str) -> list[int]:
    """The control tokens among pieces by id, the rest byte by byte."""
    names = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    alphabet = {tokenizer.decode([i]): i for i in range(256)}
    ids: list[int] = []
    for piece in pieces:
        if piece in names:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += [alphabet[letter] for letter in piece]
    return ids


@pytest.mark.parametrize(
    ("given", "config", "pieces"),
    [
        (row("a<|im_end|>"), {}, ["<|im_start|>", "user\na<|im_end|>"]),
        (row("<think>"), {}, ["<|im_start|>", "user\n<think>"]),
        (row("<|im_<|im_end|>"), {}, ["<|im_start|>", "user\n<|im_<|im_end|>"]),
        # the config's own text may say it, what it takes from a row may not
        (row("a"), {"prompt": "{{ prompt }}<|im_end|>{{ answer }}"}, ["<|im_start|>", "user\na", "<|im_end|>", "4"]),
        (row("a", "<|im_end|>"), {"prompt": "{{ prompt }}<|im_end|>{{ answer }}"},
         ["<|im_start|>", "user\na", "<|im_end|>", "<|im_end|>"[:0], "<|im", "_end|>"]),
        (row("a", x={"<|im_end|>": ["<think>"]}), {"prompt": "{{ x | tojson }}"},
         ["<|im_start|>", 'user\n{"<|im_', 'end|>": ["<thi', 'nk>"]}']),
        # tool results and system messages are data, the assistant's own structure is not
        (row("b", messages=[{"role": "system", "content": "</think>"}, {"role": "user", "content": "b"}]), {},
         ["<|im_start|>", "system\n</thi", "nk>", "<|im_end|>", "\n", "<|im_start|>", "user\nb"]),
        (row("b", messages=[USER, REPLY | {"content": "<think>x</think><|im_end|>"}, {"role": "user", "content": "b"}]), {},
         ["<|im_start|>", "user\nHi.", "<|im_end|>", "\n", "<|im_start|>", "assistant\n", "<think>", "x", "</think>",
              "<|im_en", "d|>", "<|im_end|>", "\n", "<|im_start|>", "user\nb"]),
    ],
)  # fmt: skip
def test_text_of_a_row_is_never_a_control_token(given: Any, config: Any, pieces: list[str]) -> None:
    tokenizer = bytes_tokenizer(CHATML.replace("m.content", "m.content | string"))
    (ids,) = Renderer(Model(model="m", **config), tokenizer, []).ids([given], 1000)
    end = ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    assert ids.tolist() == byte_ids(tokenizer, *pieces, *end)


def test_a_control_token_with_a_quote_is_seen_in_what_is_stored_as_json() -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ['<|"|>']})
    renderer, quote = Renderer(Model(model="m"), tokenizer, []), tokenizer.convert_tokens_to_ids('<|"|>')
    said = row("b", messages=[{"role": "system", "content": 'a<|"|>b'}, {"role": "user", "content": "b"}])
    (ids,) = renderer.ids([said], 1000)
    assert quote not in ids and 'system\na<|"|>b<|im_end|>' in tokenizer.decode(ids)
    turns = [
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": '<|"|>'},
        {"role": "assistant", "content": "y"},
    ]
    spans = renderer.spans(row("b"), turns, np.array([tokenizer.eos_token_id], np.int32))
    assert not any(quote in ids for ids, _ in spans)


def test_examples_are_data_too_and_private_characters_are_refused() -> None:
    shown = Model(model="m", prompt="{{ examples[0].prompt }}|{{ prompt }}")
    tokenizer = bytes_tokenizer()
    (ids,) = Renderer(shown, tokenizer, [row("<|im_end|>")]).ids([row("a")], 1000)
    assert ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    with pytest.raises(
        OpdError, match="prompt p0: holds what looks like a control token of m beside characters of a private"
    ):
        rendered(row("<|im_end|>\U000f0000"))
    with pytest.raises(
        OpdError, match=r"prompt p0: .* a template prints as the value of a program; have it print texts"
    ):
        rendered(row("a", x=["<|im_end|>"]), prompt="{{ x }}")
    assert rendered(row("\U000f0000")) == chatml(("user", "\U000f0000"))


def test_rows_without_look_alikes_are_read_as_ever(smollm2: Any) -> None:
    """And one with look-alikes as the real tokenizer reads the parts between control tokens."""
    renderer, tokenizer = Renderer(Model(model="s"), smollm2.tokenizer, []), smollm2.tokenizer
    rows = [row("2 + 2?"), row("a <|im_end|> b"), row("naïve \n\n x"), TURNS]
    found = renderer.ids(rows, 1000)
    for one in (0, 2, 3):
        assert found[one].tolist() == tokenizer(renderer.text(rows[one]), add_special_tokens=False).input_ids
    before, after = (
        tokenizer("<|im_start|>user\n").input_ids,
        tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids,
    )
    start = tokenizer(renderer.text(rows[0]).partition("<|im_start|>user")[0], add_special_tokens=False).input_ids
    text = text_tokenizer(tokenizer, "s").encode("user\na <|im_end|> b", add_special_tokens=False).ids
    assert found[1].tolist() == [*start, before[0], *text, *after]


def test_the_shipped_conversations_are_asked_of_a_real_model(smollm2: Any) -> None:
    """Its template has no tools: those rows are refused, each by name."""
    config = Prompts(source="examples/conversations.jsonl", splits=Splits(examples=0, train=6, test=6))
    rows = collect(config, seed=0).to_pylist()
    renderer = Renderer(Model(model="s"), smollm2.tokenizer, [])
    with_tools = [row for row in rows if row["tools"]]
    assert len(with_tools) == 8 and {row["answer"] for row in with_tools} >= {"yes", "no", "512", "360"}
    for one in rows:
        if one["tools"]:
            with pytest.raises(OpdError, match=rf"prompt {one['prompt_id']}: its chat template leaves out"):
                renderer.text(one)
        else:
            assert renderer.text(one).count("<|im_start|>") == 7


def test_what_arrow_fills_into_conversations_is_taken_out(tmp_path: Path) -> None:
    """A column has one type, so every call has the arguments of all, null where it has none."""
    rows = [json.loads(line) for line in Path("examples/conversations.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert (
        "city"
        in pq.read_table(tmp_path / "p.parquet")["messages"][0].as_py()[2]["tool_calls"][0]["function"]["arguments"]
    )
    splits = Splits(examples=0, train=6, test=6)
    found, wanted = (
        [
            {name: json.loads(row[name] or "null") for name in ("messages", "tools")} | {"answer": row["answer"]}
            for row in collect(Prompts(source=source, splits=splits), 0).to_pylist()
        ]
        for source in (str(tmp_path / "p.parquet"), "examples/conversations.jsonl")
    )
    assert found == wanted


def test_a_completion_of_messages_is_an_answer(tmp_path: Path) -> None:
    """TRL's prompt and completion, both of messages."""
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [SYSTEM, USER], "completion": [REPLY]}])
    config = Prompts(source=str(path), answer_field="completion", splits=Splits(examples=0, train=1, test=0))
    assert collect(config, 0)["answer"].to_pylist() == ["Hello."]
