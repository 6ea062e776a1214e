"""Policy: log-probs of the phase's policy over rollouts that another policy sampled."""

from pipeline.infer.engines import open_teacher
from pipeline.infer.policy_logps import identity, longest, policy_table
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    policy,
)
from stages.run.run import open_run


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Teacher-force the phase's policy on a shard of rollouts; for weights of rollouts that it did not sample itself."""
    run = open_run(config_file, "policy", phase)
    console.threads(threads)
    place = run.phase(phase)[shard]
    rollouts, student = place.rollouts, policy(run, place.phase.number)
    inputs = place.inputs("policy")
    with (
        open_teacher(student, longest(rollouts), run.settings.scores.batch_tokens, console.say) as scorer,
        console.progress(f"{phase} policy", rollouts.rows, "responses") as advance,
        open_writer(place.path("policy"), "policy", identity(student), inputs, decided=run.decided) as writer,
    ):
        for group in rollouts.row_groups():
            writer.write(policy_table(scorer, student, group))
            advance(len(group))


if __name__ == "__main__":
    console.run(main)
