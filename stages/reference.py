"""Reference: log-probs of the run's first policy over a later round's rollouts, for a loss that refers to it."""

from stages.run import console, processors
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    policy,
)
from stages.run.run import open_run
from stages.run.teacher_forced import write_logps


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Teacher-force the policy that the first round started from on a shard of rollouts (`objective.reference: initial`)."""
    run = open_run(config_file, "reference", phase)
    processors.take(threads, run.config.student)
    place = run.phase(phase)[shard]
    write_logps(place, "reference", policy(run, 0))


if __name__ == "__main__":
    console.run(main)
