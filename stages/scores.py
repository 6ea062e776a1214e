"""Scores: have the teacher score a rollout shard, unless the cache holds the answer already."""

from functools import partial
from pathlib import Path

from pipeline.infer.shard_scores import ShardScores
from pipeline.store.cache import fetch_or_make
from pipeline.store.shards import open_shard, read_manifest
from stages.run import console, layout
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    open_prompts,
    policy,
    read_config,
    teacher,
)
from stages.run.provenance import write_provenance


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Score a shard of rollouts with the teacher, once; the shard in the run is a link into the cache."""
    config = read_config(config_file)
    console.threads(threads)
    rollouts = open_shard(layout.shard_path(config, phase, "rollouts", shard), "rollouts")
    wanted = ShardScores(config, rollouts, open_prompts(config), teacher(config), policy(config, 0))
    link = layout.shard_path(config, phase, "scores", shard)

    def make(path: Path) -> None:
        wanted.write(path, partial(console.progress, f"{phase} scores"), console.say)

    found = fetch_or_make(layout.cache_folder(config), wanted.identity, wanted.inputs, make, link, config.cache_remote)
    if found:
        console.say(f"{phase} scores: found in the cache, no teacher token scored ({link.resolve().name})")
    write_provenance(link, read_manifest(link), rollouts.rows, "cache" if found else "scored")


if __name__ == "__main__":
    console.run(main)
