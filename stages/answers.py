"""Answers: have the teacher answer the prompts that the student is fine-tuned on, unless the cache has its answers."""

from pathlib import Path

from pipeline.infer.engines import open_sampler
from pipeline.infer.rollout_table import asked_digest, sampled_by, sampled_tables
from pipeline.infer.wanted import answers_of_teacher
from pipeline.store.cache import fetch_or_make
from pipeline.store.shards import open_writer, read_manifest
from stages.run import console, processors
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ShardOption, ThreadsOption, open_prompts, teacher
from stages.run.provenance import write_provenance
from stages.run.run import BASE, open_run


def main(shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG, threads: ThreadsOption = None) -> None:
    """Sample the teacher's answers, in its own tokens, once; the shard in the run is a link into the cache."""
    run = open_run(config_file, "answers", "sft")
    processors.take(threads, run.config.teacher)
    place, options, sft = run.phase("sft")[shard], run.settings.rollouts, run.settings.sft
    prompts, model = open_prompts(run), teacher(run)
    mine = slice(shard * options.shard_responses, (shard + 1) * options.shard_responses)
    wanted = answers_of_teacher(run.settings, prompts, mine)
    renderer = model.renderer(prompts)
    ids = renderer.ids([one.prompt for one in wanted], model.context - options.longest)
    inputs = {"asked": asked_digest(wanted, ids)}
    identity = sampled_by(model, renderer) | {
        "sampling": {
            "max_new_tokens": options.longest,
            "temperature": sft.temperature,
            "top_p": sft.top_p,
        },
        "seed": run.settings.seed,
    }

    def make(path: Path) -> None:
        longest = max(map(len, ids)) + options.longest
        origin = {"teacher": model.ref.source + (f"@{model.config.revision}" if model.config.revision else "")}
        with (
            open_sampler(model, longest, options.batch_size, console.say) as sampler,
            console.progress("sft answers", len(wanted), "answers") as advance,
            open_writer(path, "rollouts", identity, inputs, origin) as writer,
        ):
            tokens = 0
            how = (run.settings.seed, options.batch_size, options.longest, sft.temperature, sft.top_p)
            for table in sampled_tables(sampler, model, wanted, BASE, ids, *how, advance=advance):
                tokens += len(table["response_ids"].combine_chunks().flatten())
                writer.write(table)
            writer.figures["tokens"] = tokens

    link = place.path("answers")
    found = fetch_or_make(
        run.cache, identity, inputs, make, link, run.settings.cache_remote, "rollouts", run.cache_keys
    )
    tokens = read_manifest(link).figures["tokens"]
    write_provenance(place, "answers", tokens, "cache" if found else "sampled")
    if found:
        console.say(f"sft answers: found in the cache, none sampled ({link.resolve().name})")


if __name__ == "__main__":
    console.run(main)
