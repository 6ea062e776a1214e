"""Weights: advantages, credit and importance weights of a shard, as a table."""

import polars as pl
import pyarrow as pa

from pipeline.credit import summary, weigh
from pipeline.shards import open_shard, open_writer
from stages import console, layout
from stages.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, ShardOption, read_config


def main(phase: PhaseOption, shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Recompute the weights of a shard; needs no model."""
    config = read_config(config_file)
    rollouts = open_shard(layout.shard_path(config, phase, "rollouts", shard), "rollouts")
    units = open_shard(
        layout.shard_path(config, phase, "units", shard), "units", inputs={"rollouts": rollouts.manifest.sha256}
    )
    inputs = {"rollouts": rollouts.manifest.sha256, "units": units.manifest.sha256}
    policy = None
    if layout.is_reused(config, phase):  # sampled by another policy than the one that is trained
        policy = open_shard(
            layout.shard_path(config, phase, "policy", shard), "policy", inputs={"rollouts": rollouts.manifest.sha256}
        )
        inputs["policy"] = policy.manifest.sha256
    path = layout.shard_path(config, phase, "weights", shard)
    tables = []
    with open_writer(path, "weights", config.weights.model_dump(), inputs) as writer:
        for index, (sampled, aligned) in enumerate(zip(rollouts.row_groups(), units.row_groups(), strict=True)):
            if policy is not None:
                sampled = sampled.append_column("policy_logp", policy.row_group(index)["policy_logp"])  # noqa: PLW2901
            units_frame, rollouts_frame = (pl.DataFrame(pl.from_arrow(table)) for table in (aligned, sampled))
            table = weigh(units_frame, rollouts_frame, config.weights.scheme, config.weights.gamma)
            writer.write(pa.Table.from_batches(table.to_arrow().to_batches()))
            tables.append(table)
    figures = summary(pl.concat(tables))
    console.say(
        f"{phase} weights: {figures.units:,} units, mean advantage {figures.advantage_mean:.3f} nats, "
        f"effective sample size {100 * figures.ess:.1f} %"
    )


if __name__ == "__main__":
    console.run(main)
