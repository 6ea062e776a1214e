"""Rollouts from elsewhere: what a log says, in tokens, scored once and trained on."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import yaml
from test_prompts import CHATML, bytes_tokenizer
from test_tokenizers import npm
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.align.vocabularies import end_ids
from pipeline.infer.logged import read
from pipeline.prepared import PromptTable
from pipeline.rendering import Renderer
from pipeline.store.shards import open_shard
from schemas.config import Model, load_config
from schemas.errors import OpdError
from stages import coverage, models, policy, prompts, reuse, scores, train, units, weights
from stages.run.run import run_of
from stages.tools import audit, import_rollouts

LOGS: list[dict[str, Any]] = [
    {"prompt": "one", "response": "ab c"},
    {"prompt": "one", "response": "never ende", "finish_reason": "length"},
    {"prompt": "two", "response_ids": [40, 41, 0], "logprobs": [-1.0, -2.0, -0.5]},
    {"prompt": "three", "response_ids": [40, 41, 42], "loss_mask": [1, 0, 1]},
    {
        "messages": [
            {"role": "system", "content": "Tools."},
            {"role": "user", "content": "Rain in Rome <|im_end|>?"},
            {"role": "assistant", "content": "call rain"},
            {"role": "tool", "content": "no <|im_start|> rain"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye."},
        ]
    },
    {"prompt": "four", "response_ids": [40, 41], "sampler_logp": [-1.0, -2.0], "finish_reason": "stop"},
    {"prompt": "held out", "response": "x"},
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that `opd import` made of LOGS, and what it said."""
    folder = tmp_path_factory.mktemp("import")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.saved(Path("student"), [("a", "b"), ("N", "o")], chat=True)
        tiny.saved(Path("teacher"), [("n", "e"), ("a", "b"), ("o", ".")], chat=True)
        Path("logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOGS))
        own = [{"prompt": "held out", "answer": "1"}, *({"prompt": f"p{n}", "answer": "2"} for n in range(3))]
        Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        config = {
            "run": "a",
            "cache": str(folder / "cache"),
            "prompts": {"source": "own.jsonl", "splits": {"examples": 0, "train": 1, "test": 3}},
            "student": {"model": "student", "dtype": "float32"},
            "teacher": {"model": "teacher", "dtype": "float32"},
            "rollouts": {"rounds": 1, "prompts": 1, "max_new_tokens": 8, "shard_size": 3},
            "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
            "train": {"batch_size": 2},
            "evaluate": {"kl_items": 1},
            "audit": {"responses": 1},
        }
        # `held out` is in the test split for some seed.
        for seed in range(9):
            Path("a.yaml").write_text(json.dumps(config | {"seed": seed}))
            prompts.main(Path("a.yaml"))
            split = pl.read_parquet("runs/a/prompts.parquet").filter(pl.col("prompt") == "held out")["split"][0]
            if split == "test":
                break
        import_rollouts.main(["logs.jsonl"], Path("runs/logs"), Path("a.yaml"))
        yield folder


@pytest.fixture
def there(imported: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(imported)
    return imported


def rollouts() -> list[dict[str, Any]]:
    return pl.read_parquet("runs/logs/round-0/rollouts/*.parquet").to_dicts()


def test_each_form_is_in_the_students_tokens_and_what_is_held_out_is_left_out(there: Path) -> None:
    found = {row["rollout_id"]: row for row in rollouts()}
    assert list(found) == ["r0-p000-0", "r0-p000-1", "r0-p001-0", "r0-p002-0", "r0-p003-0", "r0-p004-0"]
    tokenizer = AutoTokenizer.from_pretrained("student")
    spelled = tokenizer("ab c").input_ids
    assert found["r0-p000-0"]["response_ids"] == [*spelled, 0] and found["r0-p000-0"]["finish_reason"] == "stop"
    assert found["r0-p000-1"]["response"] == "never ende" and found["r0-p000-1"]["finish_reason"] == "length"
    assert found["r0-p001-0"]["response_ids"] == [40, 41, 0]
    assert found["r0-p001-0"]["behavior_logp"] == [-1.0, -2.0, -0.5]
    assert [segment["loss"] for segment in found["r0-p002-0"]["segments"]] == [True, False, True]
    # A stop would have no log-prob of the sampler's.
    assert found["r0-p004-0"]["response_ids"] == [40, 41] and found["r0-p004-0"]["sampler_logp"] == [-1.0, -2.0]
    assert len(found["r0-p004-0"]["behavior_logp"]) == 2
    row = found["r0-p003-0"]
    # The template writes the conversation; what rows say stays text.
    messages = LOGS[4]["messages"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["response"] == whole[whole.index("call rain") :].removesuffix("<|im_end|>\n")
    assert row["response_ids"].count(0) == 5 and row["response_ids"].count(1) == 4
    at, loss = 0, []
    for segment in row["segments"]:
        loss += [(segment["role"], row["response"].encode()[at : at + segment["bytes"]].decode(), segment["loss"])]
        at += segment["bytes"]
    own = "".join(text for _, text, mine in loss if mine)
    assert own == "call rain<|im_end|>No.<|im_end|>Bye."


def test_missing_log_probs_are_the_students_own(there: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("student").double()
    for row in rollouts():
        if row["rollout_id"] == "r0-p001-0":
            continue
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.inference_mode():
            logp = model(ids).logits[0].log_softmax(-1)
        first = len(row["prompt_ids"]) - 1
        expected = [float(logp[first + i, token]) for i, token in enumerate(row["response_ids"])]
        assert np.allclose(row["behavior_logp"], expected, atol=1e-4), row["rollout_id"]


def test_they_are_scored_and_trained_on_and_what_was_read_carries_no_loss(there: Path) -> None:
    where = Path("runs/logs/train.yaml")
    values = yaml.safe_load(where.read_text())
    assert values["reuse"] == ["runs/logs"]
    run = run_of(load_config(where))
    assert run.needs_teacher and len(run.phase("round-0")) == 2
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)  # type: ignore[arg-type]
    for shard in range(2):
        reuse.main("round-0", shard, where)
        scores.main("round-0", shard, where, None)
        units.main("round-0", shard, where)
        policy.main("round-0", shard, where, None)
    audit.main(where, 1)  # its own scores of responses that aren't
    weights.main("round-0", where)
    coverage.main("round-0", where)
    train.main(0, where, None)
    found = pl.read_parquet("runs/a/round-0/units/*.parquet").join(
        pl.read_parquet("runs/a/round-0/weights/*.parquet"), on=("rollout_id", "unit")
    )
    assert set(found["kind"]) >= {"1:1", "stop", "context"}
    talk = found.filter(pl.col("rollout_id") == "r0-p003-0").sort("unit")
    assert (talk["kind"] == "stop").sum() == 3
    assert (
        talk.filter(pl.col("kind") == "context")["teacher_logp"].null_count() == (talk["kind"] == "context").sum() > 3
    )
    assert talk.filter(pl.col("kind") == "context")["advantage"].abs().max() == 0
    # Where the log-probs are the student's own, the policy that trains is the one that sampled.
    given = ["r0-p001-0", "r0-p004-0"]
    own = found.filter(~pl.col("rollout_id").is_in(given) & ~pl.col("kind").is_in(["masked", "context"]))
    assert own["is_ratio"].to_numpy() == pytest.approx(1.0, abs=1e-4)
    other = found.filter((pl.col("rollout_id") == "r0-p001-0") & (pl.col("kind") == "1:1"))
    assert (other["is_ratio"] - 1).abs().min() > 1e-3
    assert json.loads(Path("runs/a/round-0/train/result.json").read_text())


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"response": "x"}, "neither of prompt"),
        ({"prompt": "a"}, "has no response: neither a field"),
        (
            {"prompt": "a", "response": "b", "finish_reason": "abort"},
            "`finish_reason` is 'abort'; a response ends by stop",
        ),
        ({"prompt": "a", "response_ids": [1.5]}, "`response_ids` must be a list of whole numbers"),
        ({"prompt": "a", "response_ids": [1, 2], "logprobs": [-1.0]}, "`logprobs` has 1 numbers, but there are 2"),
        ({"prompt": "a", "response_ids": [1], "logprobs": [0.5]}, "finite and at most 0"),
        ({"prompt": "a", "response_ids": [1], "logprobs": [float("nan")]}, "finite and at most 0"),
        ({"prompt": "a", "response_ids": [1, 2], "logprobs": [-0.5, -np.inf]}, "finite and at most 0, found -inf"),
        ({"prompt": "a", "response_ids": ["x"]}, "list of whole numbers"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no response"),
        (
            {"messages": [{"role": "assistant", "content": "Hello."}]},
            "no response: .* an assistant's message after a user's",
        ),
        ({"prompt": "a", "response": [{"role": "user", "content": "b"}]}, "begin and end with the assistant's"),
    ],
)
def test_a_malformed_row_is_named(row: dict[str, Any], named: str) -> None:
    with pytest.raises(OpdError, match=named) as error:
        read(row, "logs.jsonl, row 3", "all")
    assert str(error.value).startswith("logs.jsonl, row 3")


@pytest.mark.parametrize("spans", ["all", "last"])
def test_a_greeting_is_not_an_answer(spans: Any) -> None:
    greeting, question, answer = (
        {"role": role, "content": text}
        for role, text in (("assistant", "Hello."), ("user", "2 + 2?"), ("assistant", "4"))
    )
    found = read({"messages": [greeting, question, answer]}, "", spans)
    assert found.asked.messages == [greeting, question] and found.turns == [answer]


def test_what_is_reused_is_what_was_imported_and_fits(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row with its own fields and reference, whatever else asks the same; real lengths count."""
    talk = [("system", "S"), ("user", "secret A"), ("assistant", "x"), ("user", "secret B"), ("assistant", "y")]
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "persona": "A", "response": "a" * 201},
        {"prompt": "one", "persona": "B", "answer": "7", "response": "b"},
        {"prompt": "one", "persona": "B", "answer": "7", "response": "c"},
        {"persona": "C", "messages": [{"role": role, "content": text} for role, text in talk]},
    ]
    Path("personas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads(Path("a.yaml").read_text())
    config["student"] |= {"system": "You are {{ persona }}."}
    config["rollouts"] |= {"shard_size": 8, "max_new_tokens": 2040}
    Path("c.yaml").write_text(json.dumps(config | {"run": "c"}))
    import_rollouts.main(["personas.jsonl"], Path("runs/personas"), Path("c.yaml"))
    where = Path("runs/personas/train.yaml")
    given = PromptTable(open_shard(Path("runs/personas/prompts.parquet"), "prompts"))
    assert [(row["prompt"], row["answer"]) for row in given.split("train")] == [
        *(("one", None), ("one", "7"), ("secret A", None))
    ]
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)  # type: ignore[arg-type]
    reuse.main("round-0", 0, where)
    scores.main("round-0", 0, where, None)
    theirs, mine = (pl.read_parquet(f"runs/{run}/round-0/rollouts/000.parquet") for run in ("personas", "c"))
    assert mine["rollout_id"].to_list() == ["r0-p000-0", "r0-p001-0", "r0-p001-1", "r0-p002-0"]
    assert mine.select("prompt_ids", "response_ids").equals(theirs.select("prompt_ids", "response_ids"))
    # Held out, by itself, behind a system message, or in a later turn of the user's.
    run = run_of(load_config(where))
    source = run.phase("round-0").source
    assert source
    for question, leaks in (("secret A", True), ("secret B", True), ("one", True), ("y", False)):
        held_out = {"test": [{"prompt": question, "messages": None, "tools": None}], "dev": []}
        monkeypatch.setattr(reuse, "open_prompts", lambda _, rows=held_out: SimpleNamespace(split=rows.__getitem__))
        with pytest.raises(OpdError, match="held-out prompts of this run; import it again") if leaks else nullcontext():
            reuse.refuse_leaks(run, given, source)
    monkeypatch.undo()
    monkeypatch.chdir(there)
    # The prompts fit into 120 positions, but not the response of 201 tokens.
    shutil.copytree("student", "short", dirs_exist_ok=True)
    shape = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps(shape | {"max_position_embeddings": 120}))
    values = json.loads(Path("c.yaml").read_text())
    values |= {"run": "d", "reuse": ["runs/personas"], "student": config["student"] | {"model": "short"}}
    values["rollouts"] |= {"max_new_tokens": 8}
    Path("d.yaml").write_text(json.dumps(values))
    prompts.main(Path("d.yaml"))
    models.main("student", Path("d.yaml"))
    with pytest.raises(
        OpdError, match=r"response r0-p000-0: it and its prompt take 2\d\d tokens for short, whose .* is 120"
    ):
        reuse.main("round-0", 0, Path("d.yaml"))


def test_ids_of_another_tokenizer_and_a_folder_that_is_there_are_refused(there: Path) -> None:
    Path("bad.jsonl").write_text(json.dumps({"prompt": "q", "response_ids": [5, 99999]}) + "\n")
    with pytest.raises(OpdError, match=r"response id 99999, but student has tokens 0 to 259"):
        import_rollouts.main(["bad.jsonl"], Path("runs/bad"), Path("a.yaml"))
    with pytest.raises(OpdError, match="holds rollouts already"):
        import_rollouts.main(["logs.jsonl"], Path("runs/logs"), Path("a.yaml"))
    with pytest.raises(OpdError, match="expected runs/<name>"):
        import_rollouts.main(["logs.jsonl"], Path("elsewhere"), Path("a.yaml"))


TURNS = [
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of <|im_end|></s> Spain?"},
    {"role": "assistant", "content": "Madrid, naïvely."},
]
CALLS = [
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain", "arguments": {"in": "Rome"}}}]},
    {"role": "tool", "content": "none"},
    {"role": "assistant", "content": "It is dry."},
]
TOOLS = json.dumps([{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}])


OPENS = CHATML.replace("assistant\n{% if thinks", "assistant\n<think>\n{% if thinks")
LAST_THOUGHT = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
)
"""Of what was thought, that of the last message alone, as Qwen 3 has it."""


@pytest.mark.parametrize(
    ("template", "answers", "refused"),
    [
        (
            CHATML,
            [{"content": "4", "reasoning_content": "T1"}],
            r"what the assistant thought .'T1'.: put it into `content`",
        ),
        (CHATML, [{"content": "<think>T1</think>4"}], None),
        (LAST_THOUGHT, [{"content": "4", "reasoning_content": "T1"}], None),
        (LAST_THOUGHT, [{"content": "4"}, {"content": "5", "reasoning_content": "T2"}], None),
        (LAST_THOUGHT, [{"content": "T1", "reasoning_content": "T1"}, {"content": "5"}], r"'T1'.: .*--spans last"),
        (
            LAST_THOUGHT,
            [{"content": "<think>\nT1\n</think>4"}, {"content": "<think>T2</think>5"}],
            r"'T1'.: .*--spans last",
        ),
        (OPENS, [{"content": "4"}], r"opens the assistant's turn with '<think>.n', which .*; give `response` as text$"),
        (
            OPENS,
            [{"content": "4"}, {"content": "5"}],
            r"'<think>.n', which .* as text, or import the last answer alone",
        ),
        (OPENS, [{"content": "<think>\nT1</think>4"}], None),
    ],
)
def test_what_was_thought_is_in_the_sequence_or_refused(template: str, answers: Any, refused: str | None) -> None:
    tokenizer = bytes_tokenizer(template)
    renderer = Renderer(Model(model="m"), tokenizer, [])
    row = {"prompt_id": "p0", "prompt": "2 + 2?", "answer": None, "fields": "{}", "messages": None, "tools": None}
    asks = {"role": "user", "content": "And?"}
    turns = [turn for answer in answers for turn in (asks, {"role": "assistant", **answer})][1:]
    stop = np.array([tokenizer.eos_token_id], np.int32)
    if refused:
        with pytest.raises(OpdError, match=f"^p0: the chat template of m .*{refused}"):
            renderer.spans(row, turns, stop)
        return
    own = "".join(tokenizer.decode(ids) for ids, mine in renderer.spans(row, turns, stop) if mine)
    assert all(
        re.search(rf"T{number}.*{4 + number - 1}", own, re.DOTALL) for number in (1, 2) if f"T{number}" in str(answers)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "mistral_nemo", "deepseek_v3", "qwen3 tools"])
def test_real_templates_tell_what_the_assistant_wrote(name: str) -> None:
    family, _, tools = name.partition(" ")
    tokenizer = npm(family)
    renderer = Renderer(Model(model=family), tokenizer, [])
    row = {"prompt_id": "p0", "prompt": "Capital of France?", "answer": None, "fields": "{}", "messages": None}
    row |= {"tools": TOOLS if tools else None}
    turns = CALLS if tools else TURNS
    stretches = renderer.spans(row, turns, np.array(end_ids(tokenizer, None), np.int32))
    assert [mine for _, mine in stretches] == [True, False, True]
    own, between, last = (tokenizer.decode(ids) for ids, _ in stretches)
    assert turns[1]["content"] in between
    if tools:
        assert '"name": "rain"' in own and "Rome" in own and "none" not in own and "It is dry." in last
        return
    assert own.startswith("Paris.") and "Spain" not in own and last.lstrip("<think>\n/").startswith("Madrid, naïvely.")
    # One token ends each of the assistant's turns, and what the user wrote ends none.
    stops = end_ids(tokenizer, None)
    assert sum(index in stops for index in stretches[0][0]) == sum(index in stops for index in stretches[2][0]) == 1
    assert sum(index in stops for index in stretches[1][0]) <= 1
