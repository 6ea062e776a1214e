"""Bytes of tokens and minimal aligned units (design, section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hard_texts import CUT_BYTES, HARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_units import Unit, agreed_bytes, reference_units
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.align.tokens import (
    TokenBytes,
    encode_texts,
    from_table,
    spell,
    text_tokenizer,
    token_bytes,
    vocabulary_table,
)
from pipeline.align.units import KINDS, Tokens, Units, align
from schemas.errors import OpdError


@dataclass(frozen=True)
class Response:
    """A response as both sides spell it: tokens as bytes, the student's without its stop."""

    student: list[bytes]
    teacher: list[bytes]
    text: bytes
    stop: bool = False


def token_list(tokens: list[bytes]) -> TokenBytes:
    """A vocabulary whose id i is the i-th of some byte strings."""
    none = np.zeros(len(tokens), bool)
    return TokenBytes("list", pa.array(tokens, pa.large_binary()), none, none)


def shard(responses: Sequence[Response]) -> tuple[Tokens, Tokens, np.ndarray, np.ndarray]:
    """Arguments of `align` for responses, made as the pipeline makes them."""

    texts = pa.array([response.text for response in responses], pa.large_binary())

    def side(rows: list[list[bytes]]) -> tuple[Tokens, np.ndarray]:
        vocabulary = token_list([token for row in rows for token in row])
        ids, offsets = np.arange(len(vocabulary), dtype=np.int32), np.cumsum([0, *map(len, rows)])
        ends, exact = vocabulary.ends(ids, offsets, texts)
        return Tokens(offsets, ends), exact

    student, s_limit = side([response.student for response in responses])
    teacher, t_limit = side([response.teacher for response in responses])
    return student, teacher, np.minimum(s_limit, t_limit), np.array([response.stop for response in responses], bool)


def per_response(units: Units, count: int) -> list[list[Unit]]:
    """Units response by response, in the reference's form."""
    rows: list[list[Unit]] = [[] for _ in range(count)]
    columns = (units.s_start, units.s_len, units.t_start, units.t_len, units.byte_start, units.byte_end)
    assert np.all(np.diff(units.row) >= 0), "units must be in the order of the responses"
    for row, kind, *numbers in zip(units.row, units.kind, *columns, strict=True):
        rows[row].append((KINDS[kind], *map(int, numbers)))
    return rows


def aligned(responses: Sequence[Response]) -> list[list[Unit]]:
    return per_response(align(*shard(responses)), len(responses))


def units_of(student: str | bytes, teacher: str | bytes, text: str | None = None, stop: bool = False) -> list[Unit]:
    """Units of one response whose tokens are written with bars between them; by default the text is the student's."""
    s, t = ([] if not x else (x.encode() if isinstance(x, str) else x).split(b"|") for x in (student, teacher))
    return aligned([Response(s, t, b"".join(s) if text is None else text.encode(), stop)])[0]


# Named edges, by hand: (kind, s_start, s_len, t_start, t_len, byte_start, byte_end)


def test_two_adjacent_mismatches_do_not_swallow_the_next_token() -> None:
    assert units_of("hap|py| today", "ha|pp|y| today") == [("n:m", 0, 2, 0, 3, 0, 5), ("1:1", 2, 1, 3, 1, 5, 11)]


def test_a_number_then_the_stop_token() -> None:
    expected = [("1:1", 0, 1, 0, 1, 0, 2), ("n:m", 1, 2, 1, 2, 2, 5), ("stop", 3, 1, 3, 0, 5, 5)]
    assert units_of("= |12|3", "= |1|23", stop=True) == expected


def test_interleaved_boundaries_are_two_units() -> None:
    assert units_of("a|bc|de|f", "ab|c|d|ef") == [("n:m", 0, 2, 0, 2, 0, 3), ("n:m", 2, 2, 2, 2, 3, 6)]


def test_a_mismatching_tail_without_anchor_is_one_masked_unit_with_the_stop() -> None:
    expected = [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 3, 1, 2, 1, 4)]
    assert units_of("x|yz|w", "x|y|zq", stop=True) == expected


def test_boundaries_that_meet_again_after_a_mismatch_do_not_count() -> None:
    assert units_of("a|b|c|d", "a|X|c|d") == [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 3, 1, 3, 1, 4)]


def test_nothing_in_common_is_all_masked() -> None:
    assert units_of("ab|c", "x|yz|0", stop=True) == [("masked", 0, 3, 0, 3, 0, 3)]


def test_a_character_split_across_tokens_is_one_unit() -> None:
    euro, smile = "€".encode(), "😀".encode()
    student = b"a|" + euro[:1] + b"|" + euro[1:] + b"|" + smile
    teacher = b"a|" + euro + b"|" + smile[:2] + b"|" + smile[2:3] + b"|" + smile[3:]
    expected = [("1:1", 0, 1, 0, 1, 0, 1), ("n:m", 1, 2, 1, 1, 1, 4), ("n:m", 3, 1, 2, 3, 4, 8)]
    assert units_of(student, teacher) == expected


def test_a_character_split_alike_by_both_gives_units_within_it() -> None:
    assert units_of(b"\xe2|\x82\xac", b"\xe2|\x82|\xac") == [("1:1", 0, 1, 0, 1, 0, 1), ("n:m", 1, 1, 1, 2, 1, 3)]


def test_a_response_cut_within_a_character_masks_the_bytes_past_the_valid_prefix() -> None:
    expected = [("1:1", 0, 1, 0, 1, 0, 2), ("masked", 1, 2, 1, 0, 2, 4)]
    assert units_of(b"ok|\xe2|\x82", "ok", text="ok") == expected


def test_a_token_that_reaches_into_a_cut_character_is_masked_with_its_valid_bytes() -> None:
    expected = [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 1, 1, 1, 1, 4)]
    assert units_of(b"o|k\xe2\x82", "o|k", text="ok") == expected


def test_text_changed_by_a_normaliser_is_masked_from_the_change_on() -> None:
    student = "caf|e\u0301| au| lait"
    assert units_of(student, "caf|é| au| lait", stop=True) == [
        ("1:1", 0, 1, 0, 1, 0, 3),
        ("masked", 1, 4, 1, 3, 3, 14),
    ]


def test_a_teacher_that_drops_a_character_at_the_end_leaves_it_masked() -> None:
    assert units_of("a|\x04", "a", stop=True) == [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 2, 1, 0, 1, 2)]


def test_a_teacher_that_spells_more_than_the_response_masks_the_stop() -> None:
    assert units_of("a", "a|b", stop=True) == [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("stop", "expected"), [(False, []), (True, [("stop", 0, 1, 0, 0, 0, 0)])], ids=["truncated", "stopped"]
)
def test_an_empty_response_has_a_stop_unit_only_if_it_stopped(stop: bool, expected: list[Unit]) -> None:
    assert units_of("", "", stop=stop) == expected


@pytest.mark.parametrize("stop", [False, True])
def test_a_sampled_special_token_is_masked_with_all_that_follows(stop: bool) -> None:
    """It has no bytes and the teacher never read it: it is no part of the unit before it, and the stop isn't scored."""
    expected = [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 1 + stop, 1, 0, 1, 1)]
    assert aligned([Response([b"a", b""], [b"a"], b"a", stop)])[0] == expected


def test_a_space_that_the_teacher_puts_in_front_is_part_of_the_first_unit() -> None:
    expected = [("n:m", 0, 1, 0, 2, 0, 1), ("1:1", 1, 1, 2, 1, 1, 2)]
    assert aligned([Response([b"a", b"b"], [b"", b"a", b"b"], b"ab")])[0] == expected


def test_a_shard_without_responses_has_no_units() -> None:
    assert aligned([]) == []


# Random segmentations


def split(data: bytes, cuts: int) -> list[bytes]:
    """`data` cut after byte i wherever bit i of `cuts` is set; no token is empty."""
    bounds = [0, *(i + 1 for i in range(len(data) - 1) if cuts >> i & 1), *([len(data)] if data else [])]
    return [data[a:b] for a, b in pairwise(bounds)]


BYTES = st.binary(max_size=24) | st.text("aé€😀", max_size=8).map(str.encode)
CUTS = st.integers(0, 2**40 - 1) | st.just(0) | st.just(2**40 - 1)


@st.composite
def responses(draw: st.DrawFn, agreeing: bool = False) -> Response:
    """A response; unless `agreeing`, the student may write past the text and the teacher may read something else."""
    text = draw(BYTES)
    s_bytes = t_bytes = text
    if not agreeing:
        s_bytes += draw(st.just(b"") | st.binary(max_size=4))
        if draw(st.booleans()):
            at, gone = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
            t_bytes = text[:at] + draw(st.binary(max_size=3)) + text[at + gone :]
    teacher = split(t_bytes, draw(CUTS))
    if teacher and draw(st.integers(0, 3)) == 3:
        teacher = [b"", *teacher]  # see `spell`: the space that it left out
    return Response(split(s_bytes, draw(CUTS)), teacher, text, draw(st.booleans()))


@st.composite
def interrupted(draw: st.DrawFn) -> Response:
    """A response in which the student samples tokens without bytes; the text ends at the first, as in the pipeline."""
    row = draw(responses(agreeing=True))
    at, again = draw(st.integers(0, len(row.student))), draw(st.integers(1, 3))
    text = b"".join(row.student[:at])
    return Response([*row.student[:at], *[b""] * again, *row.student[at:]], split(text, draw(CUTS)), text, row.stop)


SHARDS = st.lists(responses(), max_size=8)
many = settings(max_examples=300, deadline=None)


@many
@given(SHARDS)
def test_align_equals_the_brute_force_reference(rows: list[Response]) -> None:
    assert aligned(rows) == [reference_units(row.student, row.teacher, row.text, row.stop) for row in rows]


@many
@given(st.lists(interrupted(), min_size=1, max_size=4))
def test_tokens_without_bytes_are_masked_with_all_that_follows(rows: list[Response]) -> None:
    units = aligned(rows)
    assert units == [reference_units(row.student, row.teacher, row.text, row.stop) for row in rows]
    assert all(row[-1][0] == "masked" for row in units)


@many
@given(SHARDS)
def test_units_partition_tokens_and_bytes(rows: list[Response]) -> None:
    for row, units in zip(rows, aligned(rows), strict=True):
        spans = [(s, s + s_n, t, t + t_n, lo, hi) for _, s, s_n, t, t_n, lo, hi in units]
        flat_ends = [(0, 0, 0), *((s, t, hi) for _, s, _, t, _, hi in spans)]
        assert [(s, t, lo) for s, _, t, _, lo, _ in spans] == flat_ends[:-1], "each starts where the one before it ends"
        assert flat_ends[-1] == (len(row.student) + row.stop, len(row.teacher), len(b"".join(row.student)))
        assert all(kind in ("stop", "masked") or (s_n and t_n) for kind, _, s_n, _, t_n, _, _ in units)
        assert not {"stop", "masked"} & {unit[0] for unit in units[:-1]}, "only the last unit is a stop or masked"


@many
@given(SHARDS)
def test_no_unit_can_be_split(rows: list[Response]) -> None:
    for row, units in zip(rows, aligned(rows), strict=True):
        for kind, s, s_len, t, t_len, start, end in units:
            s_ends = {start + len(b"".join(row.student[s : s + n])) for n in range(1, s_len + 1)}
            t_ends = {start + len(b"".join(row.teacher[t : t + n])) for n in range(1, t_len + 1)}
            agreed = agreed_bytes(b"".join(row.student), b"".join(row.teacher), row.text)
            common = {boundary for boundary in s_ends & t_ends if start < boundary <= agreed}
            assert common == (set() if kind in ("stop", "masked") else {end})
            assert (kind == "1:1") == ((s_len, t_len) == (1, 1) and kind not in ("stop", "masked"))


@many
@given(BYTES, CUTS, st.booleans())
def test_the_same_segmentation_gives_one_to_one_units_and_the_stop(text: bytes, cuts: int, stop: bool) -> None:
    tokens = split(text, cuts)
    kinds = [unit[0] for unit in aligned([Response(tokens, tokens, text, stop)])[0]]
    assert kinds == ["1:1"] * len(tokens) + ["stop"] * stop


@many
@given(SHARDS)
def test_a_response_is_aligned_alike_alone_and_among_others(rows: list[Response]) -> None:
    together = aligned(rows)
    assert together == [aligned([row])[0] for row in rows]
    assert together == aligned(rows[::-1])[::-1]


@many
@given(SHARDS)
def test_align_is_deterministic_and_leaves_its_arguments_alone(rows: list[Response]) -> None:
    arguments = shard(rows)
    first, second = (per_response(align(*arguments), len(rows)) for _ in range(2))
    assert first == second == aligned(rows)


def dual_pointer_chunks(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Chunks of arXiv 2606.09456: advance the side whose decoded prefix is shorter, equal prefixes close a chunk."""
    chunks, s, t, s_from, t_from, s_read, t_read = [], 0, 0, 0, 0, b"", b""
    while s < len(student) or t < len(teacher):
        if len(s_read) <= len(t_read):
            s_read, s = s_read + student[s], s + 1
        else:
            t_read, t = t_read + teacher[t], t + 1
        if s_read == t_read:
            chunks.append((s_from, s - s_from, t_from, t - t_from))
            s_from, t_from = s, t
    return chunks


@many
@given(responses(agreeing=True))
def test_agreeing_texts_give_the_dual_pointer_chunks(row: Response) -> None:
    units = aligned([row])[0]
    assert [unit[1:5] for unit in units if unit[0] != "stop"] == dual_pointer_chunks(row.student, row.teacher)
    assert [unit[0] for unit in units].count("stop") == row.stop


@many
@given(
    st.lists(st.tuples(st.lists(BYTES, max_size=5), BYTES | st.none(), st.integers(0, 24)), max_size=6),
    st.integers(0, 3),
)
def test_ends_and_the_leading_bytes_that_agree(rows: list[tuple[list[bytes], bytes | None, int]], skip: int) -> None:
    """Each row: tokens, and how its text goes on (None: ends) after some bytes of theirs, the first `skip` left out."""
    joined = [b"".join(tokens)[skip:] for tokens, _, _ in rows]
    texts = [(a[:keep] + (b or b"")) for a, (_, b, keep) in zip(joined, rows, strict=True)]
    flat = [token for tokens, _, _ in rows for token in tokens]
    offsets = np.cumsum([0, *(len(tokens) for tokens, _, _ in rows)])
    ids = np.arange(len(flat), dtype=np.int32)
    ends, exact = token_list(flat).ends(ids, offsets, pa.array(texts, pa.large_binary()), np.full(len(rows), skip))
    assert ends.tolist() == [
        max(end - skip, 0) for tokens, _, _ in rows for end in np.cumsum([len(t) for t in tokens]).astype(int).tolist()
    ]
    assert exact.tolist() == [agreed_bytes(a, b) for a, b in zip(joined, texts, strict=True)]


def test_a_token_that_goes_on_as_the_next_text_does_agrees_only_with_its_own() -> None:
    vocabulary = token_list([b"abcd", b"cd"])
    ids, offsets = np.array([0, 1], np.int32), np.array([0, 1, 2])
    ends, exact = vocabulary.ends(ids, offsets, pa.array(["ab", "cd"]))
    assert ends.tolist() == [4, 2]
    assert exact.tolist() == [2, 2]


# Real tokenizers


@dataclass(frozen=True, repr=False)
class Speller:
    """A real tokenizer as the pipeline uses it."""

    tokenizer: Any
    encoder: Tokenizer
    vocabulary: TokenBytes
    spelled: list[bytes | None]
    ids: dict[bytes, int]
    unreadable: Callable[[str], bytes]
    """What is left of a text's bytes once the tokenizer has read it."""

    def encode(self, texts: Sequence[str]) -> list[list[bytes]]:
        """Tokens of texts as bytes."""
        ids, offsets = encode_texts(self.encoder, list(texts))
        assert self.vocabulary.has_bytes[ids].all(), "an encoding holds only ids that contribute bytes"
        return [[self.spelled[i] or b"" for i in ids[a:b]] for a, b in pairwise(offsets)]

    def greedy(self, data: bytes) -> list[bytes] | None:
        """Raw bytes as tokens, the longest first; None when no token spells the next byte."""
        tokens: list[bytes] = []
        while data:
            token = next((data[:n] for n in range(min(len(data), 32), 0, -1) if data[:n] in self.ids), None)
            if token is None:
                return None
            tokens.append(token)
            data = data[len(token) :]
        return tokens


LOST_CONTROLS = "\x04\x06\x13\x14\x16\x1d"
"""SmolLM2's vocabulary has no token for these, and its tokenizer drops them without a word."""
LOST_BYTES = LOST_CONTROLS.encode() + b"\xc0\xc1\xf1\xf2" + bytes(range(0xF5, 0x100))


@pytest.fixture(scope="module")
def spellers(smollm2: Any, gemma3: Any) -> dict[str, Speller]:
    def speller(model: Any, name: str, unreadable: Callable[[str], bytes]) -> Speller:
        spelled = model.vocabulary.bytes.to_pylist()
        ids = {token: i for i, token in enumerate(spelled) if token and model.vocabulary.canonical[i]}
        return Speller(model.tokenizer, model.encoder, model.vocabulary, spelled, ids, unreadable)

    return {
        "smollm2": speller(smollm2, "smollm2", lambda text: text.encode().translate(None, LOST_BYTES)),
        "gemma3": speller(gemma3, "gemma3", lambda text: text.replace("▁", " ").encode()),
    }


NAMES = ("smollm2", "gemma3")
DIRECTIONS = [("smollm2", "gemma3"), ("gemma3", "smollm2")]


def valid_prefix(data: bytes) -> str:
    """The longest prefix of `data` that is a text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def test_there_are_enough_hard_texts() -> None:
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS) >= 300
    assert max(map(len, HARD_TEXTS)) == 100_000
    for data in CUT_BYTES:
        with pytest.raises(UnicodeDecodeError):
            data.decode()


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_spells_its_text_or_the_first_difference_is_known(spellers: dict[str, Speller], name: str) -> None:
    speller = spellers[name]
    ids, offsets = encode_texts(speller.encoder, HARD_TEXTS)
    data, ends = speller.vocabulary.concatenate(ids)
    starts = np.concatenate([[0], ends])[offsets]
    wanted = [text.encode() for text in HARD_TEXTS]
    _, agreed = speller.vocabulary.ends(ids, offsets, pa.array(HARD_TEXTS))
    for text, (a, b), count in zip(HARD_TEXTS, pairwise(starts), agreed, strict=True):
        read = data[a:b].tobytes()
        assert read == speller.unreadable(text), repr(text[:80])
        assert count == agreed_bytes(read, text.encode()), repr(text[:80])
    exact = sum(int(count) == len(text) for count, text in zip(agreed, wanted, strict=True))
    assert 0.9 * len(HARD_TEXTS) < exact < len(HARD_TEXTS), "some texts are lost to either tokenizer, most are not"


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_any_text_between_real_tokenizers(
    spellers: dict[str, Speller], student: str, teacher: str, texts: list[str]
) -> None:
    both = zip(texts, spellers[student].encode(texts), spellers[teacher].encode(texts), strict=True)
    rows = [Response(s, t, text.encode()) for text, s, t in both]
    assert aligned(rows) == [reference_units(row.student, row.teacher, row.text, row.stop) for row in rows]


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(0, 30), stop=st.booleans())
def test_random_token_sequences_between_real_tokenizers(
    spellers: dict[str, Speller], student: str, teacher: str, seed: int, length: int, stop: bool
) -> None:
    """What a model of random weights would sample: any ids, broken characters included."""
    known = [token for token in spellers[student].spelled if token]
    picks = np.random.default_rng(seed).integers(0, len(known), length)
    sampled = [known[i] for i in picks]
    text = valid_prefix(b"".join(sampled))
    row = Response(sampled, spellers[teacher].encode([text])[0], text.encode(), stop)
    assert aligned([row])[0] == reference_units(row.student, row.teacher, row.text, row.stop)


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
def test_hard_texts_between_real_tokenizers(spellers: dict[str, Speller], student: str, teacher: str) -> None:
    both = zip(HARD_TEXTS, spellers[student].encode(HARD_TEXTS), spellers[teacher].encode(HARD_TEXTS), strict=True)
    rows = [Response(s, t, text.encode(), stop=i % 2 == 0) for i, (text, s, t) in enumerate(both)]
    for row, units in zip(rows, aligned(rows), strict=True):
        assert units == reference_units(row.student, row.teacher, row.text, row.stop), row.text[:80]
        exact = b"".join(row.student) == b"".join(row.teacher) == row.text
        assert exact != any(unit[0] == "masked" for unit in units), row.text[:80]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokenizer_on_both_sides_gives_only_one_to_one_units(spellers: dict[str, Speller], name: str) -> None:
    rows = [Response(tokens, tokens, b"".join(tokens), stop=True) for tokens in spellers[name].encode(HARD_TEXTS)]
    for row, units in zip(rows, aligned(rows), strict=True):
        assert [unit[0] for unit in units] == ["1:1"] * len(row.student) + ["stop"], row.text[:80]


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
def test_cut_bytes_between_real_tokenizers(spellers: dict[str, Speller], student: str, teacher: str) -> None:
    """The teacher reads the valid prefix, the student's tokens spell the raw bytes; the rest is masked."""
    spelt = [(data, tokens) for data in CUT_BYTES if (tokens := spellers[student].greedy(data)) is not None]
    assert len(spelt) > 0.75 * len(CUT_BYTES)
    texts = [valid_prefix(data) for data, _ in spelt]
    read = spellers[teacher].encode(texts)
    rows = [Response(s, t, text.encode()) for (_, s), t, text in zip(spelt, read, texts, strict=True)]
    for row, (data, _), units in zip(rows, spelt, aligned(rows), strict=True):
        assert units == reference_units(row.student, row.teacher, row.text, row.stop), data
        kind, *_, start, end = units[-1]
        assert kind == "masked" and start <= len(row.text) < end == len(data), data


def test_characters_that_smollm2_drops_are_masked(spellers: dict[str, Speller]) -> None:
    tokens = spellers["smollm2"].encode([f"a{char}b" for char in LOST_CONTROLS])
    assert tokens == [[b"a", b"b"]] * len(LOST_CONTROLS)
    for char in LOST_CONTROLS:
        text = f"a{char}b"
        (student,) = spellers["gemma3"].encode([text])
        units = aligned([Response(student, [b"a", b"b"], text.encode(), stop=True)])[0]
        assert units == [("1:1", 0, 1, 0, 1, 0, 1), ("masked", 1, 3, 1, 1, 1, 3)], repr(char)


def test_gemma_spells_marks_of_other_tokenizers_as_themselves_and_its_own_as_a_space(
    spellers: dict[str, Speller],
) -> None:
    gemma = spellers["gemma3"]
    assert b"".join(gemma.encode(["ĠaĊ"])[0]) == "ĠaĊ".encode()
    assert gemma.spelled[gemma.tokenizer.convert_tokens_to_ids("▁the")] == b" the"
    assert gemma.encode(["a▁b"]) == gemma.encode(["a b"]) == [[b"a", b" b"]]
    smollm2 = spellers["smollm2"]
    assert b"".join(smollm2.encode(["▁aĠ"])[0]) == "▁aĠ".encode()
    assert smollm2.spelled[smollm2.tokenizer.convert_tokens_to_ids("Ġthe")] == b" the"


@pytest.mark.parametrize("name", NAMES)
def test_look_alikes_of_special_tokens_are_plain_text(spellers: dict[str, Speller], name: str) -> None:
    speller = spellers[name]
    special = {token: i for token, i in speller.tokenizer.get_vocab().items() if speller.vocabulary.special[i]}
    assert {"smollm2": "<|im_end|>", "gemma3": "<eos>"}[name] in special
    for token, index in list(special.items())[:99]:
        assert speller.tokenizer(token, add_special_tokens=False).input_ids == [index]
        assert b"".join(speller.encode([token])[0]) == token.encode()


def test_an_encoding_holds_no_bos_even_where_the_tokenizer_adds_one(spellers: dict[str, Speller]) -> None:
    gemma = spellers["gemma3"]
    ids, _ = encode_texts(gemma.encoder, ["Hi there", ""])
    assert gemma.tokenizer("Hi there").input_ids == [gemma.tokenizer.bos_token_id, *ids]


@pytest.mark.parametrize("name", NAMES)
def test_special_and_padded_ids_have_no_bytes(spellers: dict[str, Speller], name: str) -> None:
    speller, size = spellers[name], len(spellers[name].tokenizer)
    padded = token_bytes(speller.tokenizer, name, size + 64)
    assert len(padded) == size + 64
    assert padded.special.sum() > 0
    assert not padded.has_bytes[padded.special].any()
    assert not padded.has_bytes[size:].any() and not padded.canonical[size:].any()
    assert padded.bytes[:size].equals(speller.vocabulary.bytes[:size])


@pytest.mark.parametrize("name", NAMES)
def test_exactly_one_id_is_canonical_for_each_byte_string(spellers: dict[str, Speller], name: str) -> None:
    speller = spellers[name]
    chosen = [token for token, kept in zip(speller.spelled, speller.vocabulary.canonical, strict=True) if kept]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == set(speller.spelled) - {None}
    names = {token: i for token, i in speller.tokenizer.get_vocab().items() if token.startswith("<0x")}
    for token, index in names.items():  # `<0x41>` gives way to `A`; `<0xE2>` has no rival
        byte = bytes.fromhex(token[3:5])
        assert speller.spelled[index] == byte
        assert speller.vocabulary.canonical[index] == (speller.spelled.count(byte) == 1), token


def test_gemma_has_byte_tokens(spellers: dict[str, Speller]) -> None:
    gemma = spellers["gemma3"]
    assert {bytes([byte]) for byte in range(256)} <= gemma.ids.keys()
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.ids[b"\xe2"]) == "<0xE2>"
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.ids[b"A"]) == "A"


# Small tokenizers


def byte_level(normalizer: Any = None) -> Tokenizer:
    """Byte-level BPE without merges, with a special token: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def spaced_bpe(front: str) -> Tokenizer:
    """BPE that spells a space as ▁ and puts one in front of a text: always, or if there is none yet (Metaspace)."""
    tokens = ["▁", "a", "b", "▁a", "▁▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True))
    if front == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram(byte_fallback: bool) -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.ByteFallback()] * byte_fallback
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Metaspace(prepend_scheme="never")])
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (word_piece(), "WordPiece"),
        (unigram(byte_fallback=False), "no byte fallback"),
        (word_level(), "WordLevel"),
        (object(), "no fast form"),
    ],
    ids=["wordpiece", "unigram", "wordlevel", "slow"],
)
def test_a_tokenizer_without_exact_bytes_is_refused_by_name(tokenizer: Any, why: str) -> None:
    with pytest.raises(OpdError, match=rf"org/some-model.*{why}"):
        token_bytes(tokenizer, "org/some-model", 0)


def test_a_unigram_tokenizer_with_byte_fallback_is_read() -> None:
    tokenizer = unigram(byte_fallback=True)
    vocabulary = token_bytes(tokenizer, "small", 0)
    assert vocabulary.bytes[1:4].to_pylist() == [b" ", b"a", b"\x00"]
    text = "a €a"
    ids, _ = encode_texts(text_tokenizer(tokenizer, "small"), [text])
    assert vocabulary.concatenate(ids)[0].tobytes() == text.encode()


@pytest.mark.parametrize(
    ("front", "text", "ends"),
    [
        ("always", "ab", [1, 2]),
        ("always", "b", [0, 1]),
        ("always", " a", [0, 2]),
        ("always", "  b", [1, 2, 3]),
        ("always", "", []),
        ("always", "é a", [0, 1, 2, 4]),
        ("missing", "ab", [1, 2]),
        ("missing", "b a", [0, 1, 3]),
        ("missing", "", []),
        ("missing", " a", [2]),
        ("missing", "  b", [2, 3]),
    ],
)
def test_a_space_put_in_front_of_a_text_is_no_byte_of_it(front: str, text: str, ends: list[int]) -> None:
    tokenizer = spaced_bpe(front)
    encoder, vocabulary = text_tokenizer(tokenizer, "small"), token_bytes(tokenizer, "small", 0)
    alone, among = spell(encoder, vocabulary, [text]), spell(encoder, vocabulary, ["a a", text, "", "b"])
    assert alone.ends.tolist() == ends
    assert alone.exact.tolist() == [len(text.encode())]
    assert among.exact.tolist() == [3, len(text.encode()), 0, 1]
    assert among.ends[slice(*among.offsets[1:3])].tolist() == ends


def test_the_unknown_token_of_bpe_has_no_bytes() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(tokenizer, "small", 0).bytes.to_pylist() == [None, b"a"]


def test_the_unknown_token_of_unigram_has_no_bytes() -> None:
    assert not token_bytes(unigram(byte_fallback=True), "small", 0).has_bytes[0]


@pytest.mark.parametrize("kind", ["byte level", "space marks"])
def test_added_tokens_have_the_bytes_that_the_decoder_gives(kind: str) -> None:
    """Gemma 3 adds runs of ▁ that stand for indentation; all that byte level can't mean as bytes is text."""
    tokenizer = byte_level() if kind == "byte level" else spaced_bpe("always")
    added = ["▁▁▁▁", "<think>", "a b", "\t\t", "naïve", "中", "Ġx", "<0x41>", "end▁of"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    frame, vocabulary = tokenizer.token_to_id("b"), token_bytes(tokenizer, "small", 0)
    for token in added:
        index = tokenizer.token_to_id(token)
        wanted = tokenizer.decode([frame, index, frame], skip_special_tokens=False)
        found = vocabulary.concatenate(np.array([frame, index, frame]))[0].tobytes()
        assert found.decode(errors="replace") == wanted, token


def test_a_special_token_typed_as_text_is_read_byte_by_byte() -> None:
    tokenizer = byte_level()
    assert tokenizer.encode("<end>").ids == [256]
    ids, _ = encode_texts(text_tokenizer(tokenizer, "small"), ["<end>"])
    assert token_bytes(tokenizer, "small", 0).concatenate(ids)[0].tobytes() == b"<end>"
    assert tokenizer.encode("<end>").ids == [256], "the tokenizer itself is left as it was"


def test_nfd_text_under_an_nfc_tokenizer_is_masked_from_the_first_accent() -> None:
    tokenizer = byte_level(normalizers.NFC())
    vocabulary, texts = token_bytes(tokenizer, "nfc", 0), ["caf\u0065\u0301 au lait", "café au lait"]
    ids, offsets = encode_texts(text_tokenizer(tokenizer, "nfc"), texts)
    read = [[vocabulary.bytes[int(i)].as_py() for i in ids[a:b]] for a, b in pairwise(offsets)]
    assert [b"".join(tokens).decode() for tokens in read] == ["café au lait"] * 2
    student = [split(text.encode(), -1) for text in texts]
    rows = [Response(s, t, text.encode(), stop=True) for s, t, text in zip(student, read, texts, strict=True)]
    nfd, nfc = aligned(rows)
    assert nfd == [*(("1:1", i, 1, i, 1, i, i + 1) for i in range(3)), ("masked", 3, 12, 3, 10, 3, 14)]
    assert [unit[0] for unit in nfc] == ["1:1"] * 13 + ["stop"]


def test_ids_outside_the_vocabulary_contribute_no_bytes() -> None:
    vocabulary = token_bytes(byte_level(), "small", 300)
    a, b = (vocabulary.bytes.to_pylist().index(char) for char in (b"a", b"b"))
    data, ends = vocabulary.concatenate(np.array([256, a, -1, 299, 10_000, b, 256]))
    assert data.tobytes() == b"ab"
    assert ends.tolist() == [0, 1, 1, 1, 1, 2, 2]
    data, ends = vocabulary.concatenate(np.zeros(0, np.int32))
    assert (len(data), len(ends)) == (0, 0)


def test_ids_are_found_by_the_bytes_they_start_with() -> None:
    vocabulary = token_bytes(unigram(byte_fallback=True), "small", 300)
    assert vocabulary.starting_with(b"a").tolist() == [2, 3 + ord("a")]
    assert vocabulary.starting_with(b"aa").tolist() == []
    assert vocabulary.starting_with(b"").tolist() == np.flatnonzero(vocabulary.has_bytes).tolist()


def test_a_vocabulary_survives_its_table() -> None:
    vocabulary, stop = token_bytes(byte_level(), "small", 300), np.array([10, 256], np.int32)
    again, stop_again = from_table(vocabulary_table(vocabulary, stop), "small")
    assert again.bytes.equals(vocabulary.bytes)
    assert (again.special == vocabulary.special).all() and (again.canonical == vocabulary.canonical).all()
    assert stop_again.tolist() == stop.tolist()
