"""Scores: have the teacher score a rollout shard, unless the cache holds the answer already."""

from functools import partial
from pathlib import Path

from pipeline.infer.shard_scores import ShardScores
from pipeline.store.cache import fetch_or_make
from pipeline.store.shards import read_manifest
from stages.run import console, processors
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    open_prompts,
    policy,
    prompts_of,
    teacher,
)
from stages.run.provenance import scored_tokens, write_provenance
from stages.run.room import check_room, shard_bytes
from stages.run.run import BASE, open_run


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Score a shard of rollouts with the teacher, once; the shard in the run is a link into the cache."""
    run = open_run(config_file, "scores", phase)
    processors.take(threads, run.config.teacher)
    place = run.phase(phase)[shard]
    prompts = open_prompts(run)
    models = teacher(run), policy(run, BASE)
    wanted = ShardScores(run.settings, place.rollouts, prompts, *models, prompts_of(place.phase))
    link = place.path("scores")

    def make(path: Path) -> None:
        check_room(run.cache, shard_bytes(place, "scores", place.rollouts.rows), f"{phase} scores")
        wanted.write(path, partial(console.progress, f"{phase} scores"), console.say)

    found = fetch_or_make(
        run.cache, wanted.identity, wanted.inputs, make, link, run.settings.cache_remote, keys=run.cache_keys
    )
    if found:
        console.say(f"{phase} scores: found in the cache, no teacher token scored ({link.resolve().name})")
    tokens = scored_tokens(read_manifest(link), place.rollouts.rows)
    write_provenance(place, "scores", tokens, "cache" if found else "scored")


if __name__ == "__main__":
    console.run(main)
