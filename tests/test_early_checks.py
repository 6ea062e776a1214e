"""What is found before it costs: every key against values that are none, what can't be together, what models can't do."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
from transformers import LlamaForCausalLM

from pipeline.align.tokens import TokenBytes, token_bytes
from pipeline.models import load_tokenizer
from schemas.config import Config, Section, parse_config, section, variants
from schemas.errors import OpdError
from stages import also, fit, models, prompts
from stages.models import check_embedding
from stages.tools.config import main as config_keys

MINIMAL: dict[str, Any] = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a/b"}, "teacher": {"model": "c/d"}}
Key = tuple[tuple[str, ...], dict[str, Any], Any]
"""Place, keys beside it that make it one, annotation."""


def keys(kind: type[Section] = Config, place: tuple[str, ...] = ()) -> Iterator[Key]:
    """Every key that holds a value."""
    for name, field in kind.model_fields.items():
        for tag, recipe in variants(field.annotation).items():
            of_recipe = {"recipe": "my:loss" if ":" in tag else tag}
            yield from (((name, key), of_recipe, inner.annotation) for key, inner in recipe.model_fields.items())
        if below := section(field.annotation):
            named = ("x",) if name == "also" else ()
            for inner, beside, annotation in keys(below, (*place, name, *named)):
                yield inner, {"source": "p.jsonl"} | beside if named else beside, annotation
        elif not variants(field.annotation):
            yield (*place, name), {}, field.annotation


KEYS = {".".join(place) + "".join(f" of {beside[k]}" for k in beside if k == "recipe"): (place, beside, annotation)
        for place, beside, annotation in keys()}  # fmt: skip


def refusal(values: dict[str, Any]) -> str | None:
    try:
        parse_config(values, "c.yaml")
    except OpdError as error:
        return str(error)
    return None


def changed(place: tuple[str, ...], value: Any, **beside: Any) -> dict[str, Any]:
    """The minimal config with a value at a place."""
    whole = json.loads(json.dumps(MINIMAL))
    inner = whole
    for part in place[:-1]:
        inner = inner.setdefault(part, {})
    inner |= {**beside, place[-1]: value}
    return whole


def holds(annotation: Any, *kinds: type) -> bool:
    """Whether some value of these kinds fits a key."""
    return annotation in kinds or any(holds(part, *kinds) for part in get_args(annotation))


NOTHING = [math.inf, -math.inf, math.nan, 1e300, 10**30, -(10**30), "1e300", "nan", "fast"]


@pytest.mark.parametrize("name", KEYS)
def test_every_key_refuses_what_is_no_value_of_it(name: str) -> None:
    """Numbers that are none or beyond all proportion, truth values, text, and for text the empty one."""
    place, beside, annotation = KEYS[name]
    wrong: list[Any] = ["text"] if annotation == dict[str, Any] else [{"a": {"b": 1}}]
    if holds(annotation, int, float) and not holds(annotation, bool):
        wrong += [*NOTHING, -1, "", True, [True]]
    if holds(annotation, int) and not holds(annotation, float, bool):
        wrong += [0.5, math.pi]
    if holds(annotation, str) and not holds(annotation, dict) and place[-1] != "system":
        wrong += ["", [""], 3.5, True]
    for value in wrong:
        told = refusal(changed(place, value, **beside))
        # Whatever else is wrong with it, the key is named.
        assert told and place[-1] in told, (name, value, told)


def test_the_table_has_every_key() -> None:
    assert len(KEYS) > 150 and {"run", "train.betas", "rollouts.top_p", "evaluate.also.x.count"} < set(KEYS)
    numbers = [name for name, (_, _, annotation) in KEYS.items() if holds(annotation, int, float)]
    assert len(numbers) > 90


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("run", "..", "`run`: string should match"),
        ("seed", -1, "greater than or equal to 0"),
        ("student.stop", [""], "`student.stop.0`: string should have at least 1 character"),
        ("student.prompt", "", "at least 1 character"),
        (
            "prompts.splits.train",
            100,
            "`rollouts.prompts: 128` is more than `prompts.splits.train` holds, which is 100",
        ),
        ("prompts.splits.test", 0, "`evaluate.split: test` needs held-out prompts"),
        ("rollouts.temperature", 0, "greater than or equal to 0.01"),
        ("rollouts.temperature", 1e-30, "greater than or equal to 0.01"),
        ("rollouts.temperature", 1e4, "less than or equal to 100"),
        ("rollouts.top_p", 0, "greater than 0"),
        ("rollouts.shard_size", 0, "greater than or equal to 1"),
        ("rollouts.max_new_tokens", [16, 10**13], "numbers go up to 1e+12"),
        ("scores.k_max", 0, "greater than or equal to 1"),
        ("train.learning_rate", 0, "greater than 0"),
        ("train.learning_rate", 4, "less than or equal to 1"),
        ("train.learning_rate", math.nan, "finite number"),
        ("train.betas", [0.9, 1.0], "`train.betas.1`: input should be less than 1"),
        ("train.weight_decay", 100, "less than or equal to 10"),
        ("train.lora.targets", [], "at least 1 item"),
        ("objective.tau", 0, "greater than or equal to 0.01"),
        ("coverage.min_compared", 1.01, "less than or equal to 1"),
        ("weights.gate.truncated", -0.1, "greater than or equal to 0"),
        ("evaluate.kl_items", 301, "is more than `prompts.splits.test` holds"),
        ("evaluate.samples", 0, "greater than or equal to 1"),
        ("evaluate.temperature", 0.7, "`temperature: 0.7` means nothing to the one greedy answer of `samples: 1`"),
        ("evaluate.also", {"test": {"source": "p.jsonl"}}, "is none of the splits' examples, train, dev, test"),
        ("evaluate.also", {"a/b": {"source": "p.jsonl"}}, "names a set 'a/b'"),
    ],
)
def test_what_one_may_well_write(place: str, value: Any, message: str) -> None:
    told = refusal(changed(tuple(place.split(".")), value))
    assert (
        told
        and message in told
        and place.rsplit(".", maxsplit=1)[-1] in told.replace("prompts.splits.test", "split test")
    ), told


def test_rounds_of_another_run_ask_for_no_prompts() -> None:
    assert refusal(changed(("prompts", "splits"), {"train": 1}) | {"reuse": ["runs/x"]}) is None


# ---- what files and models tell ----


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tiny models and a file of prompts; a context of 40 tokens, a vocabulary of 257 and 260 ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    for name in tiny.saved_pair(tmp_path):
        with_config(tmp_path / name, max_position_embeddings=40)
    rows = [{"prompt": f"{i} ab?", "answer": str(i)} for i in range(30)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def with_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def written(**changes: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "run": "r",
        "prompts": {"source": "p.jsonl", "splits": {"examples": 1, "train": 16, "test": 4}},
        "student": {"model": str(Path("student").absolute())},
        "teacher": {"model": str(Path("teacher").absolute())},
        "rollouts": {"rounds": 2, "prompts": 8, "max_new_tokens": [8, 16]},
        "evaluate": {"kl_items": 2},
    }
    for name, keys_of in changes.items():
        values[name] = values.get(name, {}) | keys_of
    Path("c.yaml").write_text(json.dumps(values))
    return Path("c.yaml")


def prepared(where: Path) -> None:
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollouts": {"max_new_tokens": 40}},
            r"`rollouts.max_new_tokens: 40` leaves no room .* student.model .* 40 tok",
        ),
        (
            {"rollouts": {"max_new_tokens": 8, "top_k": 300}},
            r"`rollouts.top_k: 300` is more than .* student.model .* 257",
        ),
        ({"prompts": {"splits": {"train": 30}}}, r"p\.jsonl holds 30 different prompts, but prompts.splits asks for"),
        (
            {"evaluate": {"also": {"b": {"source": "p.jsonl", "count": 31}}}},
            r"evaluate\.also\.b, .* holds 30 different",
        ),
        ({"prompts": {"source": "p.jsonl", "prompt_field": "question"}}, r"no field 'question'"),
        ({"prompts": {"source": "data/missing.jsonl"}}, r"data/missing\.jsonl: no such file"),
        ({"evaluate": {"also": {"b": {"source": "missing.csv.gz", "count": 1}}}}, r"missing\.csv\.gz: no such file"),
    ],
)
def test_a_check_of_the_config_looks_into_local_files(place: Path, changes: dict[str, Any], message: str) -> None:
    config_keys(written())
    with pytest.raises(OpdError, match=message):
        config_keys(written(**changes))


def test_prompts_are_fitted_into_both_models_before_anything_is_sampled(place: Path) -> None:
    """Each round's prompts with its own horizon, those of evaluation with the longest; the teacher's with what only it sees."""
    where = written()
    prepared(where)
    fit.main(where)
    found = json.loads(Path("runs/r/fit.json").read_text())
    assert {
        role: (one["context"], one["response"]) for role, one in found.items() if role in ("student", "teacher")
    } == {
        "student": (40, 16),
        "teacher": (40, 16),
    }
    assert found["student"]["prompt"] == len("10 ab?") and found["teacher"]["prompt"] < found["student"]["prompt"]
    shown = {"model": str(place / "teacher"), "prompt": "{{ 'x' * 20 }}{{ prompt }}"}
    with pytest.raises(OpdError, match=r"prompt p\d+: 2\d tokens for .*teacher, but its context leaves room for 24"):
        fit.main(written(teacher=shown))
    # Where the teacher isn't asked for the KL and rounds are short, it fits.
    fit.main(written(teacher=shown, rollouts={"max_new_tokens": [4, 12]}, evaluate={"kl_items": 0}))
    with pytest.raises(OpdError, match=r"student, but its context leaves room for 1"):
        fit.main(written(rollouts={"max_new_tokens": [8, 39]}))
    with pytest.raises(OpdError, match=r"`rollouts.top_k: 258`"):
        fit.main(written(rollouts={"top_k": 258}))


def test_the_teachers_answers_have_a_length_of_their_own(place: Path) -> None:
    """The student as given stands for what `sft` makes of it; only its prompt must fit before the teacher's answer."""
    prepared(written())
    fit.main(written(sft={"prompts": 2, "max_new_tokens": 34}))
    fit.main(written(sft={"prompts": 0, "max_new_tokens": 36}))
    with pytest.raises(OpdError, match=r"for .*teacher, but its context leaves room for 4;"):
        fit.main(written(sft={"prompts": 2, "max_new_tokens": 36}))


def test_references_of_other_sets_are_read_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i}?", "answer": "a word" if i % 2 else str(i)} for i in range(6)]
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    also.main(written(evaluate={"also": {"w": {"source": "words.jsonl", "count": 6}}}))
    told = r"`evaluate\.also\.w\.scorer: source` reads numbers .*and so not 3 of 6 references of w: not measured"
    assert re.search(told, " ".join(capsys.readouterr().err.split()))
    also.main(written(evaluate={"also": {"w": {"source": "words.jsonl", "count": 6, "scorer": "exact"}}}))
    assert "not measured" not in capsys.readouterr().err


def tokens_of(folder: Path) -> TokenBytes:
    return token_bytes(load_tokenizer("org/model", folder), "org/model", 0)


def test_ids_past_the_embedding_are_refused_where_text_is_read_as_them(place: Path) -> None:
    tokens, stop = tokens_of(place / "student"), np.array([0])
    check_embedding("student", tokens, stop, 257)
    check_embedding("student", tokens, stop, None)
    with pytest.raises(
        OpdError, match=r"student\.model: the tokenizer of 'org/model' has ids up to 256, .* has 250 rows"
    ):
        check_embedding("student", tokens, stop, 250)
    with pytest.raises(OpdError, match=r"has ids up to 300"):
        check_embedding("student", tokens, np.array([0, 300]), 257)
    model = LlamaForCausalLM.from_pretrained(place / "student")
    model.resize_token_embeddings(250)
    model.save_pretrained(place / "student")
    with pytest.raises(OpdError, match=r"embedding has 250 rows; resize it"):
        models.main("student", written())


def test_a_prompt_with_a_special_token_past_the_embedding_is_named(place: Path) -> None:
    """As an image's placeholder in a text model of its family; a tokenizer that has one is no fault by itself."""
    tokenizer = load_tokenizer("student", place / "student")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(place / "student")
    prepared(written())
    fit.main(written())
    with pytest.raises(OpdError, match=r"prompt p\d+: token 257 of student\.model .* which has 257 rows"):
        fit.main(written(student={"model": str(place / "student"), "prompt": "<image>{{ prompt }}"}))


@pytest.mark.parametrize(
    ("stop", "message"), [("\u20ac\u20ac", "no token of .* starts with it"), ("ab", "no token of")]
)
def test_stops_that_no_token_starts_with_are_refused_by_the_models_stage(place: Path, stop: str, message: str) -> None:
    with pytest.raises(OpdError, match=message):
        models.main("student", written(student={"model": str(place / "student"), "stop": [stop]}))
