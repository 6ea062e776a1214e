"""Log-probs that a policy gives to rollouts that another one sampled."""

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.align.segments import list_offsets, sampled_tokens
from pipeline.infer.engines import Teacher
from pipeline.infer.score import Candidates
from pipeline.prepared import PreparedModel
from pipeline.store.shards import Shard
from schemas.tables import arrow_schema


def longest(rollouts: Shard) -> int:
    """Tokens of the longest prompt and response together; 0 of none."""
    lengths = (
        sum(group[name].combine_chunks().value_lengths().to_numpy() for name in ("prompt_ids", "response_ids"))
        for group in rollouts.row_groups(["prompt_ids", "response_ids"])
    )
    return max((int(np.max(each, initial=0)) for each in lengths), default=0)


def identity(policy: PreparedModel) -> dict[str, Any]:
    """What decides the log-probs that it gives."""
    told = {"policy": policy.ref.identity(), "dtype": policy.dtype, "stop_ids": policy.stop.tolist()}
    # Which all shards were made with that name none.
    return told | ({} if policy.config.engine == "transformers" else {"engine": policy.config.engine})


def policy_table(policy: Teacher, student: PreparedModel, rollouts: pa.Table) -> pa.Table:
    """Rows of schema `policy`, nats: of each sampled token and, where the response stopped, of stopping.

    Args:
        policy: `student`, opened.
        rollouts: a row group.
    Raises:
        OpdError: a single response is more than memory holds.
    """
    sampled, segments, stopped = sampled_tokens(rollouts, student.vocabulary, student.stop)
    responses_at = sampled.offsets[segments.offsets]
    responses = np.split(sampled.ids, responses_at[1:-1])
    prompts = [np.array(ids, np.int32) for ids in rollouts["prompt_ids"].to_pylist()]
    scored = policy.score(prompts, responses, Candidates(mass=0, k_max=0))
    # The row after the last token is that of stopping; a truncated response has no use for it. A role that is a stop token
    # ends a turn that another one follows.
    counts = np.diff(responses_at) + 1
    keep = np.ones(len(scored.logp), bool)
    keep[np.cumsum(counts)[~stopped] - 1] = False
    ends_turn = np.repeat(segments.is_role & (segments.tokens == 1), segments.tokens) & np.isin(
        sampled.ids, student.stop
    )
    stops = np.insert(ends_turn, responses_at[1:], False)
    logp = np.where(stops, scored.stop_logp, scored.logp)
    schema = arrow_schema("policy")
    logps = pa.ListArray.from_arrays(
        list_offsets(counts - ~stopped), pa.array(logp[keep]), type=schema.field("policy_logp").type
    )
    return pa.table({"rollout_id": rollouts["rollout_id"], "policy_logp": logps}, schema=schema)
