"""Weights: advantages, credit and importance weights of a shard, as a table."""

import polars as pl
import pyarrow as pa

from pipeline.credit import summary, weigh
from pipeline.shards import open_shard, open_writer
from stages import console, layout
from stages.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, ShardOption, read_config

UNIT_COLUMNS = ["rollout_id", "unit", "kind", "s_start", "s_len", "teacher_logp"]
VALUE_COLUMNS = ["cand_logp", "tail_logp"]


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
    needed = UNIT_COLUMNS + (VALUE_COLUMNS if config.weights.credit == "gae" else [])
    groups = [table.select(needed) for table in units.row_groups()]
    sampled = [table.select(["rollout_id", "behavior_logp"]) for table in rollouts.row_groups()]
    if policy is not None:
        tokens = [table["policy_logp"] for table in policy.row_groups()]
        sampled = [table.append_column("policy_logp", own) for table, own in zip(sampled, tokens, strict=True)]
    # Some estimators compare responses of the whole shard, so row groups are cut again only when they are written.
    units_frame, rollouts_frame = (
        pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))) for tables in (groups, sampled)
    )
    table = weigh(units_frame, rollouts_frame, config.weights)
    with open_writer(path, "weights", config.weights.model_dump(), inputs) as writer:
        at = 0
        for group in groups:
            writer.write(pa.Table.from_batches(table.slice(at, len(group)).to_arrow().to_batches()))
            at += len(group)
    figures = summary(table)
    console.say(
        f"{phase} weights: {figures.units:,} units, mean advantage {figures.advantage_mean:.3f} nats, "
        f"effective sample size {100 * figures.ess:.1f} %"
    )


if __name__ == "__main__":
    console.run(main)
