"""Rollouts: sample the policy of a phase on its prompts."""

from pipeline.infer.engines import open_sampler
from pipeline.infer.rollout_table import responses_of_evaluation, responses_of_round, sampled_tables
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    ShardOption,
    ThreadsOption,
    open_prompts,
    policy,
)
from stages.run.room import check_room, shard_bytes
from stages.run.run import open_run


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Sample responses from the phase's policy, with its own log-probs."""
    run = open_run(config_file, "rollouts", phase)
    console.threads(threads)
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
    decided = run.decided
    identity = {
        "policy": student.ref.identity(),
        "engine": student.config.engine,
        "dtype": student.dtype,
        "prompt": renderer.identity,
        "stop_ids": student.stop.tolist(),
        "sampling": decided.pop("rollouts"),
        "phase": phase,
        **{key: value for key, value in decided.items() if key != "student"},  # whose keys are all told above
    }
    inputs, origin = {"prompts": prompts.shard.manifest.sha256}, {"student": student.ref.source}
    longest = max(map(len, ids)) + options.longest
    check_room(place.phase.folder, shard_bytes(place, "rollouts", len(wanted)), f"{phase} rollouts")
    with (
        open_sampler(student, longest, options.batch_size, console.say) as sampler,
        console.progress(f"{phase} rollouts", len(wanted), "responses") as advance,
        open_writer(place.path("rollouts"), "rollouts", identity, inputs, origin, run.decided) as writer,
    ):
        how = (run.settings.seed, options.longest, options.temperature, options.top_p, options.top_k)
        for table in sampled_tables(sampler, student, wanted, number, ids, *how, advance):
            writer.write(table)


if __name__ == "__main__":
    console.run(main)
