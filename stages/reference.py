"""Reference: log-probs of the run's first policy over a later round's rollouts, for a loss that refers to it."""

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
    """Teacher-force the policy that the first round started from on a shard of rollouts (`objective.reference: initial`)."""
    run = open_run(config_file, "reference", phase)
    console.threads(threads)
    place = run.phase(phase)[shard]
    rollouts, student = place.rollouts, policy(run, 0)
    path, inputs = place.path("reference"), place.inputs("reference")
    with (
        open_teacher(student, longest(rollouts), run.settings.scores.batch_tokens, console.say) as scorer,
        console.progress(f"{phase} reference", rollouts.rows, "responses") as advance,
        open_writer(path, "reference", identity(student), inputs, decided=run.decided) as writer,
    ):
        for group in rollouts.row_groups():
            writer.write(policy_table(scorer, student, group).rename_columns(["rollout_id", "reference_logp"]))
            advance(len(group))


if __name__ == "__main__":
    console.run(main)
