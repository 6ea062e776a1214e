"""Rollouts of another student, re-tokenised for this student, so that one teacher pass serves both."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.align.roles import Roles
from pipeline.align.segments import STAND_IN, Segments, list_offsets, offsets_of, read_by, sampled_tokens
from pipeline.align.tokens import Spelling, TokenBytes
from pipeline.align.units import MASKED, Tokens, align
from pipeline.align.vocabularies import same_ids
from schemas.tables import arrow_schema


def retokenise(
    rollouts: pa.Table,
    behavior: tuple[TokenBytes, np.ndarray],
    student: tuple[TokenBytes, np.ndarray],
    tokenizer: Tokenizer,
    roles: Roles,
    prompts: list[np.ndarray],
) -> pa.Table:
    """The same responses as if this student had written them.

    Args:
        rollouts: schema `rollouts`, in the tokens of the policy that sampled them.
        behavior, student: token bytes and int32 stop ids of that policy and of this student.
        tokenizer, roles: this student's, the tokenizer for texts (`text_tokenizer`).
        prompts: this student's ids of each response's rendered prompt.
    Returns:
        Schema `rollouts`; `response` and names are unchanged, so scores of the one are scores of the other. Ids are this
        tokenizer's own, unless ids mean the same to both. `behavior_logp` is the foreign policy's: a unit's log-prob (a
        stretch in which the two tokenizers share no border) is spread evenly over its tokens, so that sums over whole
        units are exact; `sampler_logp` likewise where the response has one. A role that this student can't say is left out.
        A response is cut where the two stop spelling the same text, and then has no stop.
    """
    schema = arrow_schema("rollouts")
    lengths = np.array([len(ids) for ids in prompts], np.int64)
    replaced = {"prompt_ids": _lists(np.concatenate([*prompts, np.zeros(0, np.int32)]), lengths)}
    if not same_ids(behavior[0], student[0]):
        replaced |= _retold(rollouts, behavior, student, tokenizer, roles)
    return pa.table({name: replaced.get(name, rollouts[name]) for name in schema.names}).cast(schema)


def positions(rollouts: pa.Table) -> pa.ChunkedArray:
    """int32, tokens of each prompt and response together: what the context must have."""
    return pc.add(*(pc.list_value_length(rollouts[name]) for name in ("prompt_ids", "response_ids")))


def _retold(
    rollouts: pa.Table,
    behavior: tuple[TokenBytes, np.ndarray],
    student: tuple[TokenBytes, np.ndarray],
    tokenizer: Tokenizer,
    roles: Roles,
) -> dict[str, pa.Array]:
    """The columns that tokens decide."""
    tokens, stop = student
    sampled, segments, stopped = sampled_tokens(rollouts, *behavior)
    own = read_by(tokenizer, tokens, roles, rollouts, segments)
    kept = rollouts["sampler_logp"].combine_chunks().is_valid()
    given = [_flat(rollouts, "behavior_logp"), _flat_sampler(rollouts)]
    (behavior_logp, sampler_logp), of_segment, whole = _spread(rollouts, sampled, segments, own, given)
    stops = stopped & whole
    counts = np.add.reduceat(of_segment, segments.offsets[:-1]) if len(rollouts) else of_segment
    lengths = np.diff(own.offsets)
    keep = np.arange(len(own.ids)) - np.repeat(own.offsets[:-1], lengths) < np.repeat(of_segment, lengths)
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
        "segments": _segments(rollouts, segments, of_segment),
        "broken": _broken(rollouts),
    }


def _segments(rollouts: pa.Table, segments: Segments, tokens: np.ndarray) -> pa.Array:
    """The same segments with this student's numbers of tokens."""
    listed = rollouts["segments"].combine_chunks()
    given = np.repeat(listed.is_valid().to_numpy(zero_copy_only=False), np.diff(segments.offsets))
    return _with(listed, "tokens", tokens[given])


def _broken(rollouts: pa.Table) -> pa.Array:
    """The same places, where this student's tokens spell the stand-ins themselves."""
    listed = rollouts["broken"].combine_chunks()
    return _with(listed, "raw", np.full(len(listed.flatten()), STAND_IN))


def _with(listed: pa.ListArray, name: str, values: np.ndarray) -> pa.ListArray:
    """Lists of structs with other values in one int32 field."""
    inner, fields = listed.flatten(), list(listed.type.value_type)
    columns = [pa.array(values, pa.int32()) if field.name == name else inner.field(field.name) for field in fields]
    structs = pa.StructArray.from_arrays(columns, fields=fields)
    offsets = pa.array(offsets_of(listed), pa.int32())
    return pa.ListArray.from_arrays(offsets, structs, type=listed.type, mask=pc.invert(listed.is_valid()))


def _lists(values: np.ndarray, lengths: np.ndarray, mask: pa.BooleanArray | None = None) -> pa.ListArray:
    return pa.ListArray.from_arrays(list_offsets(lengths), pa.array(values), mask=mask)


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
    rollouts: pa.Table, sampled: Spelling, segments: Segments, own: Spelling, given: list[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Log-probs of the sampled tokens, as log-probs of our own ones.

    Args:
        given: several log-probs of the sampled tokens, those of stops among them, flat.
    Returns:
        float32 (own tokens,) of each; int64 (segments,), how many of each segment's own tokens have one; bool (responses,),
        whether these and the sampled ones spell the same text to its end.
    """
    # The sampled tokens' log-probs without those of the stops.
    counts = np.diff(sampled.offsets[segments.offsets])
    start = _last(rollouts) + 1 - rollouts["response_ids"].combine_chunks().value_lengths().to_numpy()
    index = np.arange(len(sampled.ids)) - np.repeat(sampled.offsets[segments.offsets[:-1]] - start, counts)
    ours, theirs = (Tokens(side.offsets, side.ends) for side in (own, sampled))
    units = align(ours, theirs, np.minimum(own.exact, sampled.exact), np.zeros(len(segments), bool))
    at = sampled.offsets[units.row] + units.t_start
    compared = units.kind != MASKED
    # A text that the two spell otherwise ends the response; a role that one can't say is only left out.
    lost = np.zeros(len(segments), bool)
    lost[units.row[~compared]] = True
    lost &= ~segments.is_role
    before = np.cumsum(lost) - lost
    cut = before > before[segments.offsets[segments.row]]
    compared &= ~cut[units.row]

    def spread(flat: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(flat[index].astype(np.float64))])
        mean = (total[at + units.t_len] - total[at]) / np.maximum(units.s_len, 1)
        return np.repeat(np.where(compared, mean, 0.0), units.s_len).astype(np.float32)

    of_segment = np.bincount(units.row[compared], units.s_len[compared], len(segments)).astype(np.int64)
    whole = np.ones(len(rollouts), bool)
    whole[segments.row[lost]] = False
    return [spread(flat) for flat in given], of_segment, whole
