"""Which teacher tokens the student can say too, and which tokens stop a response."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.align.tokens import TokenBytes
from schemas.errors import OpdError


def pair_ids(teacher: TokenBytes, student: TokenBytes) -> np.ndarray:
    """The shared vocabulary as one array: int32 (teacher vocab,), teacher id -> student id, -1 where there is none.

    Two tokens are the same when both say the same role, or else exactly when their bytes are; of several ids with equal bytes
    only the canonical one pairs.
    """

    def table(tokens: TokenBytes, name: str) -> pl.DataFrame:
        frame = pl.DataFrame({"bytes": tokens.bytes, name: np.arange(len(tokens), dtype=np.int32)})
        return frame.filter(pl.Series(tokens.canonical & tokens.has_bytes))

    shared = table(teacher, "teacher").join(table(student, "student"), on="bytes")
    pairs = np.full(len(teacher), -1, np.int32)
    pairs[shared["teacher"].to_numpy()] = shared["student"].to_numpy()
    says = {role: index for index, role in student.roles.items()}
    for index, role in teacher.roles.items():
        if role in says:
            pairs[index] = says[role]
    return pairs


def same_ids(teacher: TokenBytes, student: TokenBytes) -> bool:
    """Whether every id means the same to both, as in models of one family (whose embeddings may be padded differently).

    Such a teacher can read the sampled ids themselves; a text may be spelled in more than one way, and the sampled one
    needn't be the tokenizer's own.
    """
    size = min(len(teacher), len(student))
    same = teacher.bytes[:size].equals(student.bytes[:size]) and np.array_equal(
        teacher.special[:size], student.special[:size]
    )
    return same and not any((side.has_bytes | side.special)[size:].any() for side in (teacher, student))


def stop_ids(tokens: TokenBytes, end_ids: Sequence[int], strings: Sequence[str]) -> np.ndarray:
    """int32 ids that end a response, ascending: the model's own end tokens and every token that starts with a stop string.

    A stop string that only several tokens together spell is not seen before its first token is complete, so one that no
    single token starts with is an error.
    """
    ids = [np.asarray(end_ids, np.int32)]
    for string in strings:
        found = tokens.starting_with(string.encode())
        if not len(found):
            raise OpdError(f"stop string {string!r}: no token of {tokens.name} starts with it; choose a shorter one")
        ids.append(found)
    merged = np.unique(np.concatenate(ids))
    if not len(merged):
        raise OpdError(f"{tokens.name} has no end token; give it `stop` strings in the config")
    return merged


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """The model's own end tokens: `generation_config.eos_token_id`, the tokenizer's EOS and its template's end of turn."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
    # Chat models whose EOS is not the end of turn (Gemma, Llama 3): the template says what closes a turn.
    template = str(tokenizer.chat_template or "")
    # In gpt-oss' format <|end|> ends a message, such as the thinking, after which the same turn goes on.
    end = "<|return|>" if "<|channel|>" in template else "<|end|>"
    for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", end):
        index = tokenizer.convert_tokens_to_ids(name)
        if name in template and index is not None and index != tokenizer.unk_token_id:
            ids.add(index)
    return sorted(index for index in ids if index is not None)
