"""Rollouts: sample the policy of a phase on its prompts, unless the cache has what that gives."""

from pathlib import Path

from pipeline.infer.engines import engine_packages, open_sampler
from pipeline.infer.rollout_table import asked_digest, sampled_by, sampled_tables
from pipeline.infer.sample import DRAWS
from pipeline.infer.wanted import responses_of_evaluation, responses_of_round
from pipeline.store.cache import found_or_made
from pipeline.store.shards import open_shard, open_writer, versions
from stages.run import console, processors
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    open_prompts,
    policy,
)
from stages.run.provenance import write_sampled
from stages.run.room import check_room, shard_bytes
from stages.run.run import open_run


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Sample responses from the phase's policy, with its own log-probs; the shard in the run is a copy of the cache's."""
    run = open_run(config_file, "rollouts", phase)
    processors.take(threads, run.config.student)
    part, options = run.phase(phase), run.settings.rollouts
    place, number = part[shard], part.number
    prompts = open_prompts(run)
    student = policy(run, number)
    mine = slice(shard * options.shard_responses, (shard + 1) * options.shard_responses)
    if part.kind == "round":
        wanted = responses_of_round(run.settings, prompts, number, mine)
    else:
        wanted = responses_of_evaluation(run.settings, prompts, phase.removeprefix("eval-"), run.kl_items, mine)
    renderer = student.renderer(prompts)
    ids = renderer.ids([one.prompt for one in wanted], student.context - options.longest)
    # Neither the run's name nor how many other responses it has: what another run sampled in the same way is the same.
    by = sampled_by(student, renderer)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    what = by | {
        "checkpoint": number,
        "sampling": sampling | {"max_new_tokens": options.longest},
        "seed": run.settings.seed,
        # These move the last bits of log-probs, and with them a token now and then.
        "computed": {
            "batch_size": options.batch_size,
            "attn_implementation": student.config.attn_implementation,
            "engine_options": student.config.engine_options,
            "versions": versions(*engine_packages(student.config.engine)),
            "draws": DRAWS,
        },
    }
    asked, origin = {"asked": asked_digest(wanted, ids)}, {"student": student.ref.source}

    def make(path: Path) -> None:
        check_room(run.cache, shard_bytes(place, "rollouts", len(wanted)), f"{phase} rollouts")
        longest = max(map(len, ids)) + options.longest
        with (
            open_sampler(student, longest, options.batch_size, console.say) as sampler,
            console.progress(f"{phase} rollouts", len(wanted), "responses") as advance,
            open_writer(path, "rollouts", what, asked, origin) as writer,
        ):
            tokens, how = 0, (run.settings.seed, options.batch_size, options.longest)
            tables = sampled_tables(sampler, student, wanted, number, ids, *how, **sampling, advance=advance)
            for table in tables:
                tokens += len(table["response_ids"].combine_chunks().flatten())
                writer.write(table)
            writer.figures["tokens"] = tokens

    decided = run.decided
    identity = by | {
        "sampling": decided.pop("rollouts"),
        "phase": phase,
        **{key: value for key, value in decided.items() if key != "student"},  # whose keys are all told above
    }
    inputs = {"prompts": prompts.shard.manifest.sha256}
    remote = run.settings.cache_remote
    with found_or_made(run.cache, what, asked, make, remote, "sampled", run.cache_keys) as (entry, found):
        sampled = open_shard(entry, "rollouts", what, asked)
        check_room(part.folder, sampled.manifest.bytes, f"{phase} rollouts")
        with open_writer(place.path("rollouts"), "rollouts", identity, inputs, origin, run.decided) as writer:
            for group in sampled.row_groups():
                writer.write(group)
        write_sampled(place, entry, found)
    if found:
        tokens = sampled.manifest.figures["tokens"]
        console.say(f"{phase} rollouts: {tokens:,} tokens found in the cache, none sampled ({entry.name})")


if __name__ == "__main__":
    console.run(main)
