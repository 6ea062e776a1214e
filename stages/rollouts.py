"""Rollouts: sample the policy of a phase on its prompts."""

from pipeline.infer.engines import open_sampler
from pipeline.infer.rollout_table import ROW_GROUP, responses_of_evaluation, responses_of_round, rollout_table
from pipeline.infer.sample import seed_of
from pipeline.store.shards import open_writer
from schemas.errors import OpdError
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
)


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Sample responses from the phase's policy, with its own log-probs."""
    config = read_config(config_file)
    console.threads(threads)
    kind, number = layout.parse_phase(phase)
    prompts = open_prompts(config)
    student = policy(config, number)
    if kind == "round":
        every = responses_of_round(config, prompts, number)
    else:
        every = responses_of_evaluation(config, prompts, number, layout.kl_items(config))
    size = config.rollouts.shard_size
    wanted = every[shard * size : (shard + 1) * size]
    if not wanted:
        raise OpdError(f"--shard {shard}: phase {phase} has {layout.shard_count(config, phase)} shards")
    options = config.rollouts
    renderer = student.renderer(prompts)
    ids = renderer.ids([one.prompt for one in wanted], student.context - options.max_new_tokens)
    identity = {
        "policy": student.ref.identity(),
        "engine": student.config.engine,
        "dtype": student.dtype,
        "prompt": renderer.identity,
        "sampling": options.model_dump(include={"temperature", "top_p", "max_new_tokens", "top_k"}),
        "stop_ids": student.stop.tolist(),
        "seed": config.seed,
        "phase": phase,
    }
    inputs = {"prompts": prompts.shard.manifest.sha256}
    path = layout.shard_path(config, phase, "rollouts", shard)
    longest = max(map(len, ids)) + options.max_new_tokens
    with (
        open_sampler(student, longest, options.batch_size, console.say) as sampler,
        console.progress(f"{phase} rollouts", len(wanted), "responses") as advance,
        open_writer(path, "rollouts", identity, inputs, {"student": student.ref.source}) as writer,
    ):
        for start in range(0, len(wanted), ROW_GROUP):
            group = slice(start, start + ROW_GROUP)
            responses = sampler.sample(
                ids[group],
                [seed_of(config.seed, one.rollout_id) for one in wanted[group]],
                options.max_new_tokens,
                options.temperature,
                options.top_p,
                options.top_k,
                advance,
            )
            warped = options.temperature != 1 or options.top_p != 1
            writer.write(rollout_table(wanted[group], number, ids[group], responses, student, warped))


if __name__ == "__main__":
    console.run(main)
