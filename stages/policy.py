"""Policy: log-probs of the phase's policy over rollouts that another policy sampled."""

from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.align.student_view import sampled_tokens
from pipeline.infer.forward import check_head, head
from pipeline.infer.score import hidden_rows, score
from pipeline.store.shards import open_shard, open_writer
from schemas.tables import arrow_schema
from stages.run import console, layout
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    policy,
    read_config,
)


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Teacher-force the phase's policy on a shard of rollouts; for weights of rollouts that it did not sample itself."""
    config = read_config(config_file)
    console.threads(threads)
    _, number = layout.parse_phase(phase)
    rollouts = open_shard(layout.shard_path(config, phase, "rollouts", shard), "rollouts")
    student = policy(config, number)
    model = student.load()
    check_head(model, student.ref.source)
    identity = {"policy": student.ref.identity(), "dtype": student.dtype, "stop_ids": student.stop.tolist()}
    inputs = {"rollouts": rollouts.manifest.sha256}
    path = layout.shard_path(config, phase, "policy", shard)
    with (
        console.progress(f"{phase} policy", rollouts.rows, "responses") as advance,
        open_writer(path, "policy", identity, inputs) as writer,
    ):
        for group in rollouts.row_groups():
            sampled, stopped = sampled_tokens(group, student.vocabulary, student.stop)
            responses = np.split(sampled.ids, sampled.offsets[1:-1])
            prompts = [np.array(ids, np.int32) for ids in group["prompt_ids"].to_pylist()]
            rows = hidden_rows(model, prompts, responses, config.scores.batch_tokens, console.say)
            scored = score(rows, partial(head, model), responses, student.stop, mass=0, k_max=0)
            # The row after the last token is that of stopping; a truncated response has no use for it.
            counts = np.diff(sampled.offsets) + 1
            keep = np.ones(len(scored.logp), bool)
            keep[np.cumsum(counts)[~stopped] - 1] = False
            offsets = pa.array(np.concatenate([[0], np.cumsum(counts - ~stopped)]), pa.int32())
            schema = arrow_schema("policy")
            logps = pa.ListArray.from_arrays(
                offsets, pa.array(scored.logp[keep]), type=schema.field("policy_logp").type
            )
            writer.write(pa.table({"rollout_id": group["rollout_id"], "policy_logp": logps}, schema=schema))
            advance(len(group))


if __name__ == "__main__":
    console.run(main)
