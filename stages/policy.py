"""Policy: log-probs of the phase's policy over rollouts that another policy sampled."""

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
    """Teacher-force the phase's policy on a shard of rollouts; for weights of rollouts that it did not sample itself."""
    run = open_run(config_file, "policy", phase)
    processors.take(threads, run.config.student)
    place = run.phase(phase)[shard]
    write_logps(place, "policy", policy(run, place.phase.number))


if __name__ == "__main__":
    console.run(main)
