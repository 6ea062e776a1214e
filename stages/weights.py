"""Weights: advantages, credit and importance weights of a phase, as tables."""

from pathlib import Path

from pipeline.weights.phase import Part, compute
from schemas.config import Config
from stages.run import console, layout
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, read_config


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Recompute the weights of a phase's shards, all of which estimators may compare; needs no model."""
    config = read_config(config_file)
    figures = compute([part(config, phase, i) for i in range(layout.shard_count(config, phase))], config.weights)
    console.say(
        f"{phase} weights: {figures.units:,} units, mean advantage {figures.advantage_mean:.3f} nats, "
        f"effective sample size {100 * figures.ess:.1f} %"
    )
    if figures.incomparable:
        console.say(
            f"{phase} weights: {figures.incomparable:,} of {figures.responses:,} responses have no unit that is compared "
            "and carry no loss"
        )


def part(config: Config, phase: str, shard: int) -> Part:
    """The tables of a shard."""

    def path(table: str) -> Path:
        return layout.shard_path(config, phase, table, shard).absolute()

    # Rollouts of another policy need the log-probs of the one that is trained.
    policy = path("policy") if layout.is_foreign(config, phase) else None
    return Part(path("rollouts"), path("units"), policy, path("weights"))


if __name__ == "__main__":
    console.run(main)
