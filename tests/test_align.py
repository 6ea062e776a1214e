"""`opd align`, `opd support` and the coverage gate, on the two real tokenizers."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hard_texts import CUT_BYTES, HARD_TEXTS
from typer.testing import CliRunner

from pipeline.align.texts import Side, align_texts, unit_rows
from pipeline.measure.coverage import measure, shares, shortfalls, unit_classes
from pipeline.models import load_tokenizer
from schemas.config import Coverage
from schemas.tables import arrow_schema
from stages.tools import align, support
from stages.tools.cli import app


@pytest.fixture(scope="module")
def sides(smollm2: Any, gemma3: Any) -> tuple[Side, Side]:
    return smollm2.side, gemma3.side


@pytest.fixture
def opened(smollm2: Any, gemma3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the two tokenizers opened; what opening them gives, `test_align_prints_json_...` shows."""
    sides = {real.ref.path: real.side for real in (smollm2, gemma3)}
    for command in (align, support):
        monkeypatch.setattr(command, "open_side", sides.__getitem__)


def opd(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("swap", [False, True])
def test_units_cover_every_byte_of_any_input(sides: tuple[Side, Side], swap: bool) -> None:
    student, teacher = sides[::-1] if swap else sides
    data = [text.encode() for text in HARD_TEXTS] + CUT_BYTES
    aligned = align_texts(student, teacher, data)
    for index, raw in enumerate(data):
        rows, at, s, t = unit_rows(aligned, index), 0, 0, 0
        for row in rows:
            assert (row["byte_start"], row["s_start"], row["t_start"]) == (at, s, t)
            at, s, t = row["byte_end"], s + row["s_len"], t + row["t_len"]
        assert at == len(raw)
        assert s == aligned.student.offsets[index + 1] - aligned.student.offsets[index]
        assert t == aligned.teacher.offsets[index + 1] - aligned.teacher.offsets[index]
        masked = sum(row["byte_end"] - row["byte_start"] for row in rows if row["kind"] == "masked")
        assert masked == aligned.masked_bytes[index]
        assert [row["kind"] for row in rows].count("masked") <= 1


def test_a_cut_character_is_masked_and_not_read_as_a_replacement(sides: tuple[Side, Side]) -> None:
    """What decoding with replacement would teach: U+FFFD, three bytes that the student never said."""
    raw = "The price is 5 €".encode()[:-1]
    (unit,) = [row for row in unit_rows(align_texts(*sides, [raw]), 0) if row["kind"] == "masked"]
    assert raw[unit["byte_start"] :].endswith(b"\xe2\x82") and unit["byte_end"] == len(raw)
    read = sides[1].spell([raw.decode(errors="replace")])
    assert sides[1].tokens.concatenate(read.ids)[0].tobytes().endswith("\N{REPLACEMENT CHARACTER}".encode())


def test_cost_of_extremes_is_their_share(sides: tuple[Side, Side]) -> None:
    """Ten thousand empty or one-token responses and one of 100,000 characters, in one call."""
    data = [b"", b"a"] * 5000 + [("word " * 20_000).encode()]
    aligned = align_texts(*sides, data)
    assert aligned.masked_bytes.sum() == 0
    assert sum(row["byte_end"] - row["byte_start"] for row in unit_rows(aligned, 10_000)) == 100_000
    assert unit_rows(aligned, 0) == [] and len(unit_rows(aligned, 1)) == 1


def test_same_tokenizer_gives_only_one_to_one(sides: tuple[Side, Side]) -> None:
    for side in sides:
        aligned = align_texts(side, side, [text.encode() for text in HARD_TEXTS])
        kinds = {row["kind"] for i in range(len(HARD_TEXTS)) for row in unit_rows(aligned, i)}
        assert kinds <= {"1:1", "masked"}


@pytest.mark.slow
def test_align_prints_json_for_text_file_and_lines(smollm2: Any, gemma3: Any, tmp_path: Path) -> None:
    pair = ("--teacher", gemma3.ref.path, "--student", smollm2.ref.path)
    one = json.loads(opd("align", *pair, "--text", "naïve <|im_end|> 42", "--json"))
    assert one["masked_bytes"] == 0 and one["units"][-1]["byte_end"] == len("naïve <|im_end|> 42".encode())
    assert one["student_tokens"] == sum(row["s_len"] for row in one["units"]) > 8  # the look-alike is several tokens
    raw = tmp_path / "cut.bin"
    raw.write_bytes("漢字".encode()[:-1])
    cut = json.loads(opd("align", *pair, "--file", str(raw), "--json"))
    assert cut["masked_bytes"] == 2 and cut["units"][-1]["byte_end"] == 5
    lines = tmp_path / "in.jsonl"
    rows = [{"id": 7, "text": "naïve <|im_end|> 42"}, {"id": "b", "b64": base64.b64encode(raw.read_bytes()).decode()}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    first, second = (json.loads(line) for line in opd("align", *pair, "--jsonl", str(lines)).splitlines())
    assert first == {"id": 7, **one} and second == {"id": "b", **cut}
    shown = opd("align", *pair, "--text", "The answer is 115.")
    assert "The| answer| is|" in shown and "0 bytes masked" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give exactly one of --text, --file and --jsonl, found 0"),
        (("--text", "a", "--file", "b"), "found 2"),
        (("--file", "/no/such/file"), "--file /no/such/file: No such file"),
        (("--jsonl", "bad.jsonl"), "--jsonl bad.jsonl, line 2"),
    ],
)
def test_align_says_what_is_wrong(
    gemma3: Any, smollm2: Any, opened: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    message: str, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"id": 1, "text": "fine"}\n{"id": 2}\n')
    command = ["align", "--teacher", gemma3.ref.path, "--student", smollm2.ref.path, *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and message in done.output + capfd.readouterr().err


def test_support_counts_both_vocabularies(smollm2: Any, gemma3: Any, opened: None) -> None:
    found = json.loads(opd("support", "--teacher", gemma3.ref.path, "--student", smollm2.ref.path, "--json"))
    assert found["teacher"]["shared"] == found["student"]["shared"] == 46_145
    assert found["teacher"]["ids"] == 262_144 and found["student"]["ids"] == 49_152
    assert "special" in found["student"]["not_shared"]
    values = {v for v in smollm2.vocabulary.bytes.to_pylist() if v is not None}
    other = {v for v in gemma3.vocabulary.bytes.to_pylist() if v is not None}
    assert found["teacher"]["shared"] == len(values & other)


def test_matching_by_string_would_miss_and_mistake_tokens(smollm2: Any, gemma3: Any) -> None:
    """What matching vocabulary strings after `Ġ -> ▁` finds, against bytes: fewer pairs, and wrong ones."""
    ours, theirs = smollm2.tokenizer.get_vocab(), gemma3.tokenizer.get_vocab()
    by_string = {(ours[token], theirs[token.replace("Ġ", "▁")]) for token in ours if token.replace("Ġ", "▁") in theirs}
    s_bytes, t_bytes = smollm2.vocabulary.bytes.to_pylist(), gemma3.vocabulary.bytes.to_pylist()
    wrong = [(s, t) for s, t in by_string if s_bytes[s] is not None and s_bytes[s] != t_bytes[t]]
    right = [(s, t) for s, t in by_string if s_bytes[s] is not None and s_bytes[s] == t_bytes[t]]
    assert wrong and len(right) < 46_145


def test_classes_of_text(smollm2: Any) -> None:
    pieces = ["12", " 7", "-", " \n", "naïve", "word", "3a", "+5"]
    ids = [smollm2.tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    stop = smollm2.tokenizer.eos_token_id
    rollouts = pa.table(
        {"response_ids": pa.array([[i for piece in ids for i in piece] + [stop]], pa.list_(pa.int32()))}
    )
    units = pa.table({"s_len": pa.array([*map(len, ids), 1], pa.int32())})
    expected = ["digits", "digits", "other", "whitespace", "non-ASCII", "other", "other", "digits", "template"]
    assert unit_classes(units, rollouts, smollm2.vocabulary).to_list() == expected


def test_the_gate_compares_each_share(smollm2: Any) -> None:
    ids = smollm2.tokenizer("one two three four", add_special_tokens=False).input_ids
    rollouts = pa.table({"response_ids": pa.array([ids], pa.list_(pa.int32()))})
    kinds = ["1:1", "n:m", "masked"]
    lengths = [1, 2, len(ids) - 3]
    logp = [[float(np.log(0.6))], [float(np.log(0.3))], []]
    dropped = [float(np.log(0.2)), float(np.log(0.1)), None]
    columns = {"kind": kinds, "s_len": lengths, "cand_logp": logp, "dropped_logp": dropped}
    schema = pa.schema([arrow_schema("units").field(name) for name in columns])
    found = shares(measure([(pa.table(columns, schema=schema), rollouts)], smollm2.vocabulary))
    assert found["compared"] == pytest.approx(3 / len(ids)) and found["one_to_one"] == pytest.approx(1 / len(ids))
    assert found["shared_mass"] == pytest.approx(0.9 / 1.2)
    assert shortfalls(found, Coverage(min_compared=0.5, min_one_to_one=0.2, min_shared_mass=0.7)) == []
    (line,) = shortfalls(found, Coverage(min_compared=0.5, min_one_to_one=0.2, min_shared_mass=0.8))
    assert line == "shared_mass is 75.0 %, coverage.min_shared_mass is 80.0 %"


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_tokenizer_of_known_class_is_the_same_without_torch(name: str, request: pytest.FixtureRequest) -> None:
    real = request.getfixturevalue(name)
    kind = type(real.tokenizer).__name__
    again = load_tokenizer(real.ref.source, real.ref.path, kind)
    assert type(again) is type(real.tokenizer)
    assert again.backend_tokenizer.to_str() == real.tokenizer.backend_tokenizer.to_str()
    assert again.special_tokens_map == real.tokenizer.special_tokens_map
    assert again.chat_template == real.tokenizer.chat_template
    assert again("a b").input_ids == real.tokenizer("a b").input_ids
    # Table stages start in a second because of it.
    load = "from pipeline.models import load_tokenizer; load_tokenizer(*sys.argv[1:])"
    command = [sys.executable, "-c", f"import sys; {load}; print('torch' in sys.modules)"]
    done = subprocess.run([*command, real.ref.source, real.ref.path, kind], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
