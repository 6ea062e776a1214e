"""Rollouts of another student, re-tokenised for this student, so that one teacher pass serves both."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.align.student_view import sampled_tokens
from pipeline.align.tokens import Spelling, TokenBytes, spell
from pipeline.align.units import MASKED, Tokens, align
from pipeline.align.vocabularies import same_ids
from schemas.tables import arrow_schema


def retokenise(
    rollouts: pa.Table,
    behavior: tuple[TokenBytes, np.ndarray],
    student: tuple[TokenBytes, np.ndarray],
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
) -> pa.Table:
    """The same responses as if this student had written them.

    Args:
        rollouts: schema `rollouts`, in the tokens of the policy that sampled them.
        behavior, student: token bytes and int32 stop ids of that policy and of this student.
        tokenizer: this student's, for texts (`text_tokenizer`).
        prompts: this student's ids of each response's rendered prompt.
    Returns:
        Schema `rollouts`; `response` and names are unchanged, so scores of the one are scores of the other. Ids are this
        tokenizer's own, unless ids mean the same to both. `behavior_logp` is the foreign policy's: a unit's log-prob (a
        stretch in which the two tokenizers share no border) is spread evenly over its tokens, so that sums over whole
        units are exact; `sampler_logp` likewise where the response has one. A response is cut where the two stop spelling the
        same text, and then has no stop.
    """
    schema = arrow_schema("rollouts")
    lengths = np.array([len(ids) for ids in prompts], np.int64)
    replaced = {"prompt_ids": _lists(np.concatenate([*prompts, np.zeros(0, np.int32)]), lengths)}
    if not same_ids(behavior[0], student[0]):
        replaced |= _retold(rollouts, behavior, student, tokenizer)
    return pa.table({name: replaced.get(name, rollouts[name]) for name in schema.names}).cast(schema)


def _retold(
    rollouts: pa.Table,
    behavior: tuple[TokenBytes, np.ndarray],
    student: tuple[TokenBytes, np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, pa.Array]:
    """The columns that tokens decide."""
    tokens, stop = student
    sampled, stopped = sampled_tokens(rollouts, *behavior)
    own = spell(tokenizer, tokens, rollouts["response"].to_pylist())
    kept = rollouts["sampler_logp"].combine_chunks().is_valid()
    given = [_flat(rollouts, "behavior_logp"), _flat_sampler(rollouts)]
    (behavior_logp, sampler_logp), counts, whole = _spread(rollouts, sampled, own, given)
    stops = stopped & whole
    lengths = np.diff(own.offsets)
    keep = np.arange(len(own.ids)) - np.repeat(own.offsets[:-1], lengths) < np.repeat(counts, lengths)
    ends, lasts = np.cumsum(counts)[stops], _last(rollouts)[stops]

    def with_stops(logps: np.ndarray, sampled: np.ndarray, mask: pa.BooleanArray | None = None) -> pa.ListArray:
        return _lists(np.insert(logps[keep], ends, sampled[lasts]), counts + stops, mask)

    # Which of the stop ids stands there does not matter: stopping is one event.
    ids = np.insert(own.ids[keep], ends, stop[0])
    schema = arrow_schema("rollouts")
    return {
        "response_ids": _lists(ids, counts + stops),
        "behavior_logp": with_stops(behavior_logp, given[0]),
        "sampler_logp": with_stops(sampler_logp, given[1], pc.invert(kept)),
        "top_id": pa.nulls(len(rollouts), schema.field("top_id").type),
        "finish_reason": pa.array(np.where(stops, "stop", "length"), pa.string()),
    }


def _lists(values: np.ndarray, lengths: np.ndarray, mask: pa.BooleanArray | None = None) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values), mask=mask)


def _flat(rollouts: pa.Table, column: str) -> np.ndarray:
    values: np.ndarray = rollouts[column].combine_chunks().flatten().to_numpy()
    return values


def _flat_sampler(rollouts: pa.Table) -> np.ndarray:
    """`sampler_logp`, flat; `behavior_logp` at the tokens of responses that have none."""
    lengths = rollouts["response_ids"].combine_chunks().value_lengths().to_numpy()
    kept = rollouts["sampler_logp"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    flat = _flat(rollouts, "behavior_logp").copy()
    flat[np.repeat(kept, lengths)] = _flat(rollouts, "sampler_logp")
    return flat


def _last(rollouts: pa.Table) -> np.ndarray:
    """Index of each response's last token in the flat ids."""
    return np.cumsum(rollouts["response_ids"].combine_chunks().value_lengths().to_numpy()) - 1


def _spread(
    rollouts: pa.Table, sampled: Spelling, own: Spelling, given: list[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Log-probs of the sampled tokens, as log-probs of our own ones.

    Args:
        given: several log-probs of the sampled tokens, those of stops among them, flat.
    Returns:
        float32 (own tokens,) of each; int64 (responses,), how many of each response's own tokens have one; bool (responses,),
        whether these and the sampled ones spell the same text to its end.
    """
    lengths = np.diff(sampled.offsets)
    # The sampled tokens' log-probs without those of the stops.
    start = _last(rollouts) + 1 - rollouts["response_ids"].combine_chunks().value_lengths().to_numpy()
    index = np.arange(len(sampled.ids)) - np.repeat(sampled.offsets[:-1], lengths) + np.repeat(start, lengths)
    ours, theirs = (Tokens(side.offsets, side.ends) for side in (own, sampled))
    units = align(ours, theirs, np.minimum(own.exact, sampled.exact), np.zeros(len(lengths), bool))
    at = sampled.offsets[units.row] + units.t_start
    compared = units.kind != MASKED

    def spread(flat: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(flat[index].astype(np.float64))])
        mean = (total[at + units.t_len] - total[at]) / np.maximum(units.s_len, 1)
        return np.repeat(np.where(compared, mean, 0.0), units.s_len).astype(np.float32)

    counts = np.bincount(units.row[compared], units.s_len[compared], len(lengths)).astype(np.int64)
    masked = np.zeros(len(lengths), bool)
    masked[units.row[~compared]] = True
    return [spread(flat) for flat in given], counts, ~masked
