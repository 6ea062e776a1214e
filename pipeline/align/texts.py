"""Two tokenizers on the same texts: units without any model, for inspection and coverage figures."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipeline.align.tokens import Spelling, TokenBytes, encode_texts, spell, text_tokenizer
from pipeline.align.units import KINDS, MASKED, Tokens, Units, align

PROBES = {
    "indentation": "    if x:\n        for y in x:\n            print(y)\n",
    "tabs": "all:\tfirst\n\t@echo $$HOME\n\t\tdone\n",
    "CRLF": "one\r\ntwo\r\n\r\nthree",
    "JSON": '{"a": [1, -2.5e+10, null],\n  "b": {"c": "\\"\\\\\\n"}}\n',
    "digits": "0123456789 10 200 3,000.00 1e-9 2024-02-29",
    "punctuation": 'Don\'t! (a+b)*c = ~d; `e` <f> & #g | h^i % @j _k_ "l" [m]? $n/o',
    "CJK": "今天天气很好，我们去公园。東京タワー、ガギグ。안녕하세요",
    "emoji": "😀 👍🏽 🇩🇪 ❤\ufe0f 👩\u200d👩\u200d👧",
    "accents": "naïve café – „Straße“, Übung… Съешь ещё, Ξεσκεπάζω",
}
"""Plain text by what is special about it, for a look at a tokenizer before anything is sampled with it."""


@dataclass(frozen=True)
class Side:
    """A tokenizer and the bytes of its tokens."""

    tokenizer: Any
    tokens: TokenBytes

    @cached_property
    def encoder(self) -> Tokenizer:
        """Its copy for texts (see `text_tokenizer`), made once: copying a large vocabulary takes seconds."""
        return text_tokenizer(self.tokenizer, self.tokens.name)

    def spell(self, texts: list[str]) -> Spelling:
        """Encode texts without special tokens; look-alikes stay text."""
        return spell(self.encoder, self.tokens, texts)


@dataclass(frozen=True)
class Aligned:
    """Units of many texts (see `Units`), both spellings, and int64 (texts,) how many bytes of each are in no unit that is
    compared: past a difference, or not UTF-8."""

    units: Units
    student: Spelling
    teacher: Spelling
    masked_bytes: np.ndarray


def align_texts(student: Side, teacher: Side, data: list[bytes]) -> Aligned:
    """Align two tokenizers on raw bytes, all texts at once.

    Only the longest valid UTF-8 prefix of a text is encoded; the rest belongs to its masked unit, as does all from the
    first token border before a byte that one side does not spell.
    """
    texts = [valid_prefix(raw) for raw in data]
    ours, theirs = student.spell(texts), teacher.spell(texts)
    exact = np.minimum(ours.exact, theirs.exact)
    no_stop = np.zeros(len(data), bool)
    units = align(Tokens(ours.offsets, ours.ends), Tokens(theirs.offsets, theirs.ends), exact, no_stop)
    units = _cover(units, np.array([len(raw) for raw in data], np.int64))
    compared = units.kind != MASKED
    reached = np.bincount(units.row[compared], (units.byte_end - units.byte_start)[compared], len(data)).astype(
        np.int64
    )
    return Aligned(units, ours, theirs, np.array([len(raw) for raw in data]) - reached)


def valid_prefix(raw: bytes) -> str:
    """The longest prefix that is UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


def unit_rows(aligned: Aligned, text: int) -> list[dict[str, Any]]:
    """The units of one text as JSON-able rows."""
    units = aligned.units
    first, last = np.searchsorted(units.row, [text, text + 1])
    names = ("s_start", "s_len", "t_start", "t_len", "byte_start", "byte_end")
    return [
        {"kind": KINDS[units.kind[i]], **{name: int(getattr(units, name)[i]) for name in names}}
        for i in range(first, last)
    ]


def _cover(units: Units, size: np.ndarray) -> Units:
    """Let each text's masked unit reach its last byte; a text whose rest no token spells gets one without tokens."""
    end = np.zeros(len(size), np.int64)
    np.maximum.at(end, units.row, units.byte_end)
    byte_end = np.where(units.kind == MASKED, size[units.row], units.byte_end)
    has_masked = np.bincount(units.row[units.kind == MASKED], minlength=len(size)) > 0
    bare = np.flatnonzero((end < size) & ~has_masked)
    s_done, t_done = np.zeros(len(size), np.int64), np.zeros(len(size), np.int64)
    np.maximum.at(s_done, units.row, units.s_start + units.s_len)
    np.maximum.at(t_done, units.row, units.t_start + units.t_len)
    none = np.zeros(len(bare), np.int64)
    columns = {
        "row": np.concatenate([units.row, bare]),
        "kind": np.concatenate([units.kind, np.full(len(bare), MASKED, np.int8)]),
        "s_start": np.concatenate([units.s_start, s_done[bare]]),
        "s_len": np.concatenate([units.s_len, none]),
        "t_start": np.concatenate([units.t_start, t_done[bare]]),
        "t_len": np.concatenate([units.t_len, none]),
        "byte_start": np.concatenate([units.byte_start, end[bare]]),
        "byte_end": np.concatenate([byte_end, size[bare]]),
    }
    order = np.argsort(columns["row"], kind="stable")
    return Units(**{name: values[order] for name, values in columns.items()})


@dataclass(frozen=True)
class Misspelt:
    """A probe that a tokenizer doesn't spell: which, the first byte that differs, the text from there and what is read."""

    probe: str
    byte: int
    text: str
    read: str

    @property
    def plain(self) -> bool:
        """Whether the probe is ASCII, of which every text is full."""
        return PROBES[self.probe].isascii()

    def __str__(self) -> str:
        return f"{self.probe}, where it reads {self.read!r} for {self.text!r} at byte {self.byte}"


def misspelt(side: Side, shown: int = 12) -> list[Misspelt]:
    """The probes that a tokenizer doesn't spell exactly, with `shown` bytes from the first difference."""
    spelling, found = side.spell(list(PROBES.values())), []
    for index, (name, text) in enumerate(PROBES.items()):
        raw, at = text.encode(), int(spelling.exact[index])
        first, last = spelling.offsets[index : index + 2]
        end = int(spelling.ends[last - 1]) if last > first else 0
        if at == len(raw) == end:
            continue
        read = side.tokens.concatenate(spelling.ids[first:last])[0].tobytes()
        rest = read[len(read) - (end - at) :]
        found.append(Misspelt(name, at, raw[at:][:shown].decode(errors="ignore"), rest[:shown].decode(errors="ignore")))
    return found


def read_otherwise(side: Side, other: Tokenizer) -> list[str]:
    """Names of the probes that another form of a tokenizer encodes to other ids."""
    probes = list(PROBES.values())
    (a, a_at), (b, b_at) = (
        encode_texts(encoder, probes) for encoder in (side.encoder, text_tokenizer(other, side.tokens.name))
    )
    rows = zip(PROBES, np.split(a, a_at[1:-1]), np.split(b, b_at[1:-1]), strict=True)
    return [probe for probe, ours, theirs in rows if not np.array_equal(ours, theirs)]
