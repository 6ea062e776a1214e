"""The one place that turns token ids into bytes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from schemas.errors import OpdError
from schemas.tables import arrow_schema

SPACE_MARK = "▁"  # SentencePiece's stand-in for a space


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each id of one tokenizer contributes to a text.

    `bytes` is a binary array of shape (vocab,), null where an id has no bytes: special tokens, the unknown token and
    ids past the tokenizer's vocabulary (a model's embedding is often padded).
    """

    name: str
    bytes: pa.LargeBinaryArray
    special: np.ndarray
    """bool (vocab,): ids of special tokens."""
    canonical: np.ndarray
    """bool (vocab,): exactly one id for each byte string; `<0xNN>` only where no other token spells that byte."""
    roles: Mapping[int, str] = field(default_factory=dict)
    """Ids that say something beside text, and what (`pipeline.align.roles.Roles.single`)."""

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def has_bytes(self) -> np.ndarray:
        """bool (vocab,): ids that contribute bytes."""
        return self.bytes.is_valid().to_numpy(zero_copy_only=False)

    def starting_with(self, prefix: bytes) -> np.ndarray:
        """int32 ids whose bytes start with `prefix`, ascending."""
        starts = [value is not None and value.startswith(prefix) for value in self.bytes.to_pylist()]
        return np.flatnonzero(starts).astype(np.int32)

    def concatenate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of a run of ids, and where each ends.

        Args:
            ids: int (n,). Ids outside the vocabulary or without bytes contribute none.
        Returns:
            uint8 (total,) the concatenated bytes; int64 (n,) byte offset at which each id ends.
        """
        inside = (ids >= 0) & (ids < len(self))
        taken = self.bytes.take(pa.array(np.where(inside, ids, 0), mask=~inside))
        data, offsets = flat_bytes(taken)
        return data, offsets[1:]

    def ends(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        texts: pa.Array,
        skip: np.ndarray | None = None,
        broken: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each token ends in its text, and how far the tokens really spell that text.

        Args:
            ids: int32 (tokens,) of all texts one after another. Ids outside the vocabulary have no bytes.
            offsets: int64 (texts + 1,), where each text's ids start.
            texts: string or binary array (texts,).
            skip: int64 (texts,), leading bytes of the tokens that aren't part of the text; none by default.
            broken: characters of the texts that stand for bytes that are no UTF-8: int64 (texts + 1,), where each text's
                start, and of each the byte in its text and how many bytes of the tokens it stands for.
        Returns:
            int64 (tokens,) byte ends; int64 (texts,) bytes up to which the two agree.
        """
        from pipeline.align.walks import byte_ends  # noqa: PLC0415

        data, starts = flat_bytes(self.bytes)
        text, text_starts = flat_bytes(texts)
        skip = np.zeros(len(texts), np.int64) if skip is None else skip
        none = np.zeros(0, np.int64)
        holes, at, raw = (np.zeros(len(texts) + 1, np.int64), none, none) if broken is None else broken
        ends, exact = np.empty(len(ids), np.int64), np.empty(len(texts), np.int64)
        byte_ends(ids, offsets, starts, data, text, text_starts, skip, holes, at, raw, ends, exact)
        return ends, exact


def flat_bytes(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """uint8 bytes of all values of a string or binary array, and int64 (values + 1,) where each starts; no copy."""
    large = values.cast(pa.large_binary())
    _, offsets, data = large.buffers()
    starts = (
        np.frombuffer(offsets, np.int64)[large.offset : large.offset + len(large) + 1] if offsets else np.zeros(1, int)
    )
    first, last = int(starts[0]), int(starts[-1])
    flat = np.frombuffer(data, np.uint8)[first:last] if data and last > first else np.zeros(0, np.uint8)
    return flat, starts - first


def token_bytes(tokenizer: Any, name: str, vocab_size: int) -> TokenBytes:
    """Bytes of every id, as the tokenizer's own decoder makes them of its string, added tokens included.

    Args:
        tokenizer: a fast `transformers` tokenizer (anything with `backend_tokenizer`), or a `tokenizers.Tokenizer`.
        name: what to call it in errors.
        vocab_size: the model's vocabulary size; ids past the tokenizer's own get no bytes.
    Raises:
        OpdError: the tokenizer's tokens can't be given exact bytes (WordPiece, Unigram without byte fallback, ...).
    """
    spec = json.loads(_backend(tokenizer, name).to_str())
    spell = _speller(spec, name)
    added = {token["id"]: token for token in spec["added_tokens"]}
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        vocab = {index: token for token, index in model["vocab"].items()}
    else:  # Unigram: a list of (token, score)
        vocab = {index: token for index, (token, _) in enumerate(model["vocab"])}
    size = max(vocab_size, max(vocab | added.keys(), default=-1) + 1)
    spelled: list[bytes | None] = [None] * size
    special = np.zeros(size, bool)
    for index, token in vocab.items():
        if index != model.get("unk_id") and token != model.get("unk_token"):
            spelled[index] = spell(token)
    for index, token in added.items():
        special[index] = token["special"]
        spelled[index] = None if token["special"] else spell(token["content"])
    return TokenBytes(name, pa.array(spelled, pa.large_binary()), special, _canonical(spelled, vocab))


@dataclass(frozen=True)
class Spelling:
    """Texts as one tokenizer spells them, flat.

    Attributes:
        ids: int32 (tokens,) of all texts one after another.
        offsets: int64 (texts + 1,), where each text's ids start.
        ends: int64 (tokens,), byte offset in its text at which each token ends.
        exact: int64 (texts,), bytes up to which the tokens spell the text itself; all of it unless a normaliser changed
            or the vocabulary lacks something. Ends past it belong to other bytes.
    """

    ids: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    exact: np.ndarray


def spell(tokenizer: Tokenizer, tokens: TokenBytes, texts: list[str]) -> Spelling:
    """Encode texts without special tokens and find where each token ends in its text.

    Tokenizers that put a space in front of every text (Llama 2, Mistral v1) spell a byte that isn't there; it is left
    out, so that a lone space token in front ends at byte 0.
    """
    ids, offsets = encode_texts(tokenizer, texts)
    wanted = pa.array(texts, pa.large_string())
    ends, exact = tokens.ends(ids, offsets, wanted)
    if tokens.concatenate(encode_texts(tokenizer, ["a"])[0])[0].tobytes() == b" a":
        # Some put it in front of every text, some only where the text has none: per text, whichever spells more of it.
        without, further = tokens.ends(ids, offsets, wanted, np.ones(len(texts), np.int64))
        better = further > exact
        ends = np.where(np.repeat(better, np.diff(offsets)), without, ends)
        exact = np.maximum(exact, further)
    return Spelling(ids, offsets, ends, exact)


def _canonical(spelled: list[bytes | None], vocab: dict[int, str]) -> np.ndarray:
    chosen: dict[bytes, int] = {}
    fallback = {index for index, token in vocab.items() if token.startswith("<0x")}
    ordinary = [index for index in range(len(spelled)) if index not in fallback]
    for index in [*ordinary, *sorted(fallback)]:
        value = spelled[index]
        if value is not None:
            chosen.setdefault(value, index)
    canonical = np.zeros(len(spelled), bool)
    canonical[list(chosen.values())] = True
    return canonical


def vocabulary_table(tokens: TokenBytes, stop: np.ndarray) -> pa.Table:
    """`tokens` and its stop ids as a table of schema `vocabulary`; `from_table` reads it back."""
    ids = np.arange(len(tokens), dtype=np.int32)
    roles = pa.array([tokens.roles.get(index) for index in range(len(tokens))], pa.string())
    columns = [ids, tokens.bytes, tokens.special, tokens.canonical, np.isin(ids, stop), roles]
    return pa.table(columns, schema=arrow_schema("vocabulary"))


def from_table(table: pa.Table, name: str) -> tuple[TokenBytes, np.ndarray]:
    """The token bytes and int32 stop ids that `vocabulary_table` wrote."""
    special, canonical, stop = (table[column].to_numpy() for column in ("special", "canonical", "stop"))
    named = table["role"].combine_chunks()
    at = np.flatnonzero(named.is_valid().to_numpy(zero_copy_only=False))
    roles = dict(zip(at.tolist(), named.take(pa.array(at)).to_pylist(), strict=True))
    tokens = TokenBytes(name, table["bytes"].combine_chunks(), special, canonical, roles)
    return tokens, np.flatnonzero(stop).astype(np.int32)


def text_tokenizer(tokenizer: Any, name: str) -> Tokenizer:
    """A copy of a tokenizer that encodes look-alikes of special tokens as plain text, without padding or truncation.

    Raises OpdError when the tokenizer has no fast (`tokenizer.json`) form.
    """
    given = _backend(tokenizer, name)
    copy = _sharing(given) or Tokenizer.from_str(given.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = True
    return copy


def _sharing(given: Tokenizer) -> Tokenizer | None:
    """A tokenizer with the parts of another one and added tokens of its own; None where these would get other ids.

    To write a vocabulary of 262,144 tokens out and read it again takes seconds.
    """
    copy = Tokenizer(given.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (found := getattr(given, part)) is not None:
            setattr(copy, part, found)
    added = given.get_added_tokens_decoder()
    for special, tokens in groupby((added[number] for number in sorted(added)), key=lambda token: token.special):
        (copy.add_special_tokens if special else copy.add_tokens)(list(tokens))
    same = {n: repr(t) for n, t in copy.get_added_tokens_decoder().items()} == {n: repr(t) for n, t in added.items()}
    return copy if same else None


def _backend(tokenizer: Any, name: str) -> Tokenizer:
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise OpdError(
            f"tokenizer of {name}: {type(tokenizer).__name__} has no fast form (tokenizer.json), "
            "so the bytes of its tokens can't be read; convert it with transformers first"
        )
    return backend


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode texts without special tokens, in parallel batches.

    Returns:
        int32 (tokens,) ids of all texts one after another; int64 (texts + 1,) where each text's ids start.
    """
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    offsets = np.zeros(len(texts) + 1, np.int64)
    ids = [np.asarray(e.ids, np.int32) for e in encoded]
    np.cumsum([len(i) for i in ids], out=offsets[1:])
    return (np.concatenate(ids) if ids else np.zeros(0, np.int32)), offsets


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _speller(spec: dict[str, Any], name: str) -> Callable[[str], bytes]:
    """The function from a token's string to its bytes within a text, chosen by the tokenizer's decoder."""
    decoder = spec["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    model = spec["model"]
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()

        def byte_level(token: str) -> bytes:
            try:
                return bytes(map(alphabet.__getitem__, token))
            except KeyError:  # added as text, so the decoder leaves it as it is
                return token.encode()

        return byte_level
    marks_spaces = "Metaspace" in kinds or any(
        step.get("type") == "Replace" and step["pattern"].get("String") == SPACE_MARK and step["content"] == " "
        for step in steps
    )
    if marks_spaces and model.get("byte_fallback"):
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

        def sentencepiece(token: str) -> bytes:
            return fallback.get(token) or token.replace(SPACE_MARK, " ").encode()

        return sentencepiece
    why = (
        "it has no byte fallback, so characters it doesn't know are lost"
        if marks_spaces
        else f"its decoder ({', '.join(sorted(str(k) for k in kinds))}) doesn't give back the exact bytes of a text"
    )
    raise OpdError(
        f"tokenizer of {name}: {model['type']} tokenizer is not supported: {why}; "
        "byte-level BPE and SentencePiece with byte fallback are"
    )
