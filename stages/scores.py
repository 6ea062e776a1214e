"""Scores: have the teacher score a rollout shard, unless the cache holds the answer already."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache import fetch_or_make, responses_digest, tokens_digest
from pipeline.lm import check_head
from pipeline.prompts import Renderer
from pipeline.score import Scores, score
from pipeline.shards import Shard, manifest_path, open_shard, open_writer
from pipeline.support import same_ids
from pipeline.tokens import Spelling, spell, text_tokenizer
from pipeline.view import sampled_tokens
from schemas.config import Config
from schemas.errors import OpdError
from schemas.tables import arrow_schema
from stages import console, layout
from stages.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    PhaseOption,
    PromptTable,
    ShardOption,
    Speaker,
    ThreadsOption,
    open_prompts,
    policy,
    read_config,
    teacher,
)


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Score a shard of rollouts with the teacher, once; the shard in the run is a link into the cache."""
    config = read_config(config_file)
    console.threads(threads)
    prompts = open_prompts(config)
    rollouts = open_shard(layout.shard_path(config, phase, "rollouts", shard), "rollouts")
    speaker, student = teacher(config), policy(config, 0)
    renderer = speaker.renderer(prompts)
    reads_tokens = same_ids(speaker.vocabulary, student.vocabulary)
    identity = {
        "teacher": speaker.ref.identity(),
        "reads": "tokens" if reads_tokens else "text",
        "engine": "transformers",
        "dtype": config.teacher.dtype,
        "prompt": renderer.identity,
        "stop_ids": speaker.stop.tolist(),
        "scores": config.scores.model_dump(),
    }
    limit = speaker.context - config.rollouts.max_new_tokens
    inputs = {
        "responses": responses_digest(rollouts),
        "teacher_prompts": prompts_digest(rollouts, prompts, renderer, limit),
    }
    if reads_tokens:
        inputs["tokens"] = tokens_digest(rollouts)

    def make(path: Path) -> None:
        spelled = teacher_tokens(rollouts, speaker, student if reads_tokens else None)
        write_scores(path, rollouts, spelled, prompts, speaker, renderer, config, identity, inputs, f"{phase} scores")

    entry, cached = fetch_or_make(layout.cache_folder(config), identity, inputs, make)
    if cached:
        console.say(f"{phase} scores: found in the cache, no teacher token scored ({entry.name})")
    link = layout.shard_path(config, phase, "scores", shard)
    for target, name in ((entry, link), (manifest_path(entry), manifest_path(link))):
        publish_link(target, name)


def teacher_tokens(rollouts: Shard, speaker: Speaker, student: Speaker | None) -> list[Spelling]:
    """The responses of each row group as the teacher reads them: as sampled by `student` if given, else re-encoded."""
    if student is not None:
        groups = rollouts.row_groups()
        return [sampled_tokens(group, student.vocabulary, student.stop)[0] for group in groups]
    tokenizer = text_tokenizer(speaker.tokenizer, speaker.ref.source)
    return [spell(tokenizer, speaker.vocabulary, group["response"].to_pylist()) for group in rollouts.row_groups()]


def write_scores(
    path: Path,
    rollouts: Shard,
    spelled: list[Spelling],
    prompts: PromptTable,
    speaker: Speaker,
    renderer: Renderer,
    config: Config,
    identity: dict[str, Any],
    inputs: dict[str, str],
    label: str,
) -> None:
    """Score a rollout shard row group by row group."""
    model = speaker.load()
    check_head(model, speaker.ref.source)
    context = speaker.context
    total = sum(len(spelling.ids) for spelling in spelled)
    with (
        console.progress(label, total, "teacher tokens") as advance,
        open_writer(path, "scores", identity, inputs) as writer,
    ):
        for group, spelling in zip(rollouts.row_groups(), spelled, strict=True):
            rows = [prompts.rows[name] for name in group["prompt_id"].to_pylist()]
            responses = np.split(spelling.ids, spelling.offsets[1:-1])
            asked = renderer.ids(rows, context)
            for name, prompt, response in zip(group["rollout_id"].to_pylist(), asked, responses, strict=True):
                if len(prompt) + len(response) > context:
                    raise OpdError(
                        f"rollout {name}: prompt and response take {len(prompt) + len(response)} tokens for "
                        f"{speaker.ref.source}, whose context is {context}; lower rollouts.max_new_tokens"
                    )
            scored = score(
                model,
                asked,
                responses,
                speaker.stop,
                config.scores.mass,
                config.scores.k_max,
                config.scores.batch_tokens,
                advance,
            )
            writer.write(_table(group["rollout_id"], spelling, scored))


def _table(names: pa.ChunkedArray, spelling: Spelling, scored: Scores) -> pa.Table:
    """Rows of schema `scores`: each response's tokens, then its end row. Ends past the exact spelling become -1."""
    counts = np.diff(spelling.offsets)
    ends = np.where(spelling.ends <= np.repeat(spelling.exact, counts), spelling.ends, -1)
    rows = len(ends) + len(counts)
    row_first = spelling.offsets[:-1] + np.arange(len(counts))
    is_end = np.zeros(rows, bool)
    is_end[row_first + counts] = True
    owner = np.repeat(np.arange(len(counts)), counts + 1)
    token_id, byte_end = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    token_id[~is_end], byte_end[~is_end] = spelling.ids, ends
    byte_start = np.zeros(rows, np.int32)
    inner = np.flatnonzero(np.arange(rows) != row_first[owner])
    byte_start[inner] = byte_end[inner - 1]
    byte_end[is_end] = byte_start[is_end]
    byte_start[byte_end < 0] = -1
    lists = pa.array(np.concatenate([[0], np.cumsum(scored.cand_count)]), pa.int32())
    schema = arrow_schema("scores")
    columns = {
        "rollout_id": names.combine_chunks().take(pa.array(owner)),
        "pos": pa.array(np.arange(rows) - row_first[owner], pa.int32()),
        "byte_start": byte_start,
        "byte_end": byte_end,
        "token_id": token_id,
        **{name: getattr(scored, name) for name in ("logp", "entropy", "stop_logp", "tail_logp")},
        "cand_id": pa.ListArray.from_arrays(lists, pa.array(scored.cand_id), type=schema.field("cand_id").type),
        "cand_logp": pa.ListArray.from_arrays(lists, pa.array(scored.cand_logp), type=schema.field("cand_logp").type),
    }
    return pa.table(columns, schema=schema)


def prompts_digest(rollouts: Shard, prompts: PromptTable, renderer: Renderer, limit: int) -> str:
    """sha256 of the teacher's prompt ids, row by row."""
    running = hashlib.sha256()
    for group in rollouts.row_groups():
        for ids in renderer.ids((prompts.rows[name] for name in group["prompt_id"].to_pylist()), limit):
            running.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return running.hexdigest()


def publish_link(target: Path, name: Path) -> None:
    """Point `name` at `target`, replacing what was there at once."""
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(name)
    except OSError as error:
        raise OpdError(f"{name}: cannot write: {error.strerror}") from error


if __name__ == "__main__":
    console.run(main)
