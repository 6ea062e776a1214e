"""Rollouts: sample the policy of a phase on its prompts."""

from typing import Any

import pyarrow as pa

from pipeline.align.texts import valid_prefix
from pipeline.infer.sample import Response, seed_of
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.shards import open_writer
from schemas.config import Config
from schemas.errors import OpdError
from schemas.tables import arrow_schema
from stages.run import console, engines, layout
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

ROW_GROUP = 256
"""Responses per row group: what later stages hold in memory at once."""


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
    size = config.rollouts.shard_size
    jobs = responses_of(config, prompts, phase)[shard * size : (shard + 1) * size]
    if not jobs:
        raise OpdError(f"--shard {shard}: phase {phase} has {layout.shard_count(config, phase)} shards")
    limit = student.context - config.rollouts.max_new_tokens
    renderer = student.renderer(prompts)
    ids = renderer.ids([row for row, _ in jobs], limit)
    path = layout.shard_path(config, phase, "rollouts", shard)
    options = config.rollouts
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
    longest = max(map(len, ids)) + options.max_new_tokens
    with (
        engines.sampler(student, config, longest) as sample,
        console.progress(f"{phase} rollouts", len(jobs), "responses") as advance,
        open_writer(path, "rollouts", identity, inputs, {"student": student.ref.source}) as writer,
    ):
        for start in range(0, len(jobs), ROW_GROUP):
            chunk = jobs[start : start + ROW_GROUP]
            names = [f"{kind[0]}{number}-{row['prompt_id']}-{n}" for row, n in chunk]
            responses = sample(
                prompts=ids[start : start + ROW_GROUP],
                seeds=[seed_of(config.seed, name) for name in names],
                stop=student.stop,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                advance=advance,
            )
            rows = [
                _row(name, number, job, prompt, response, student, options.temperature != 1 or options.top_p != 1)
                for name, job, prompt, response in zip(names, chunk, ids[start:], responses, strict=False)
            ]
            writer.write(pa.Table.from_pylist(rows, schema=arrow_schema("rollouts")))


def responses_of(config: Config, prompts: PromptTable, phase: str) -> list[tuple[dict[str, Any], int]]:
    """(prompt row, sample number) of every response of a phase. Rounds walk through `train`, starting over at its end."""
    kind, number = layout.parse_phase(phase)
    if kind == "eval":
        held_out = prompts.split(config.evaluate.split)
        items = layout.kl_items(config)
        if len(held_out) < items:
            raise OpdError(
                f"{prompts.shard.path}: holds {len(held_out)} prompts of split {config.evaluate.split}, but the config's "
                f"evaluation takes {items}; run `python -m stages.prompts` again"
            )
        return [(row, 0) for row in held_out[:items]]
    train = prompts.split("train")
    first = number * config.rollouts.prompts
    chosen = [train[(first + i) % len(train)] for i in range(config.rollouts.prompts)]
    return [(row, n) for row in chosen for n in range(config.rollouts.samples)]


def _row(
    name: str,
    number: int,
    job: tuple[dict[str, Any], int],
    prompt: Any,
    response: Response,
    student: PreparedModel,
    warped: bool,
) -> dict[str, Any]:
    prompt_row, sample_number = job
    return {
        "rollout_id": name,
        "prompt_id": prompt_row["prompt_id"],
        "sample": sample_number,
        "round": number,
        "prompt_ids": prompt,
        "response_ids": response.ids,
        "response": response_text(student, response),
        "behavior_logp": response.behavior_logp,
        "sampler_logp": response.sampler_logp if warped else None,
        "top_id": list(response.top_id) if response.top_id.size else None,
        "finish_reason": "stop" if response.stopped else "length",
        "answer": prompt_row["answer"],
    }


def response_text(student: PreparedModel, response: Response) -> str:
    """The longest valid UTF-8 prefix of the response's bytes, up to the first special token."""
    ids = response.ids[: len(response.ids) - response.stopped]
    without_bytes = ~student.vocabulary.has_bytes[ids]
    text_ids = ids[: int(without_bytes.argmax())] if without_bytes.any() else ids
    return valid_prefix(student.vocabulary.concatenate(text_ids)[0].tobytes())


if __name__ == "__main__":
    console.run(main)
