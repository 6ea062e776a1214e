"""Policy: log-probs of the phase's policy over rollouts that another policy sampled."""

from pipeline.infer.engines import open_teacher
from pipeline.infer.policy_logps import longest, policy_table
from pipeline.store.shards import open_shard, open_writer
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
    identity = {"policy": student.ref.identity(), "dtype": student.dtype, "stop_ids": student.stop.tolist()}
    if student.config.engine != "transformers":  # which all shards were made with that name none
        identity["engine"] = student.config.engine
    inputs = {"rollouts": rollouts.manifest.sha256}
    path = layout.shard_path(config, phase, "policy", shard)
    with (
        open_teacher(student, longest(rollouts), config.scores.batch_tokens, console.say) as scorer,
        console.progress(f"{phase} policy", rollouts.rows, "responses") as advance,
        open_writer(path, "policy", identity, inputs) as writer,
    ):
        for group in rollouts.row_groups():
            writer.write(policy_table(scorer, student, group))
            advance(len(group))


if __name__ == "__main__":
    console.run(main)
