"""Scores: have the teacher score a rollout shard, unless the cache holds the answer already."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.align.student_candidates import asked_ids
from pipeline.align.student_view import sampled_tokens
from pipeline.align.tokens import Spelling, spell
from pipeline.align.vocabularies import pair_ids, same_ids
from pipeline.infer.audit import choose, deltas, figures
from pipeline.infer.score import Scores, score
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.prompts import Renderer
from pipeline.store.cache import fetch_or_make, lists_digest, responses_digest
from pipeline.store.rounding import STATISTIC_BITS, candidates, rounded
from pipeline.store.shards import Shard, open_shard, open_writer, read_manifest
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
    job = Job(config, rollouts, open_prompts(config), teacher(config), policy(config, 0))
    link = layout.shard_path(config, phase, "scores", shard)

    def make(path: Path) -> None:
        job.write(path, f"{phase} scores")

    found = fetch_or_make(layout.cache_folder(config), job.identity, job.inputs, make, link, config.cache_remote)
    if found:
        console.say(f"{phase} scores: found in the cache, no teacher token scored ({link.resolve().name})")
    write_provenance(link, read_manifest(link), rollouts.rows, "cache" if found else "scored")


@dataclass(frozen=True)
class Job:
    """A shard of rollouts to be scored, and what the scores depend on."""

    config: Config
    rollouts: Shard
    prompts: PromptTable
    teacher: PreparedModel
    student: PreparedModel

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the teacher reads the sampled ids instead of the text."""
        return same_ids(self.teacher.vocabulary, self.student.vocabulary)

    @cached_property
    def renderer(self) -> Renderer:
        """The teacher's prompts."""
        return self.teacher.renderer(self.prompts)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the scores beside the inputs; how they are batched changes no more than the last bits."""
        scores = self.config.scores
        return {
            "teacher": self.teacher.ref.identity(),
            "reads": "tokens" if self.reads_tokens else "text",
            "engine": self.config.teacher.engine,
            "dtype": self.teacher.dtype,
            "prompt": self.renderer.identity,
            "stop_ids": self.teacher.stop.tolist(),
            "scores": scores.model_dump(include={"support", "mass", "k_max", "min_p", "log_z"}),
        }

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of what the teacher reads."""
        running = hashlib.sha256()
        for group in self.teacher_prompts:
            for ids in group:
                running.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        inputs = {"responses": responses_digest(self.rollouts), "teacher_prompts": running.hexdigest()}
        if self.reads_tokens:
            inputs["tokens"] = lists_digest(self.rollouts, "response_ids")
        if self.config.scores.support != "teacher":
            inputs["asked"] = lists_digest(self.rollouts, "top_id")
        return inputs

    @cached_property
    def teacher_prompts(self) -> list[list[np.ndarray]]:
        """Prompt ids of each response, by row group."""
        limit = self.teacher.context - self.config.rollouts.max_new_tokens
        groups = (group["prompt_id"].to_pylist() for group in self.rollouts.row_groups())
        return [self.renderer.ids((self.prompts.rows[name] for name in names), limit) for names in groups]

    def read(self, group: pa.Table) -> Spelling:
        """The responses as the teacher reads them."""
        if self.reads_tokens:
            return sampled_tokens(group, self.student.vocabulary, self.student.stop)[0]
        return spell(self.teacher.text_tokenizer, self.teacher.vocabulary, group["response"].to_pylist())

    def asked(self, group: pa.Table, spelling: Spelling) -> list[np.ndarray] | None:
        """The student's own candidates, when they are wanted. Raises OpdError when the rollouts don't have them."""
        if self.config.scores.support == "teacher":
            return None
        if group["top_id"].null_count:
            raise OpdError(
                f"{self.rollouts.path}: scores.support is {self.config.scores.support}, but these rollouts were "
                "sampled without `rollouts.top_k`"
            )
        sampled, _ = sampled_tokens(group, self.student.vocabulary, self.student.stop)
        pairs = pair_ids(self.student.vocabulary, self.teacher.vocabulary)
        return asked_ids(group["top_id"].combine_chunks(), sampled, spelling, pairs)

    def write(self, path: Path, label: str) -> None:
        """Score the shard row group by row group."""
        scores = self.config.scores
        spelled = [self.read(group) for group in self.rollouts.row_groups()]
        longest = self.longest(spelled)
        total = sum(len(spelling.ids) for spelling in spelled)
        samples = choose(self.rollouts.rows, self.config.audit.responses, self.inputs["responses"])
        kept: list[tuple[np.ndarray, np.ndarray, pa.Table]] = []
        first = 0
        revision = self.config.teacher.revision
        name = self.teacher.ref.source + (f"@{revision}" if revision else "")
        origin = {"teacher": name, **self.rollouts.manifest.origin}
        with open_writer(path, "scores", self.identity, self.inputs, origin) as writer:
            with (
                engines.scorer(self.teacher, self.config, longest) as (hidden_rows, logits, model),
                console.progress(label, total, "teacher tokens") as advance,
            ):
                for group, spelling, asked in zip(
                    self.rollouts.row_groups(), spelled, self.teacher_prompts, strict=True
                ):
                    responses = np.split(spelling.ids, spelling.offsets[1:-1])
                    scored = score(
                        hidden_rows(asked, responses),
                        logits,
                        responses,
                        self.teacher.stop,
                        scores.mass,
                        0 if scores.support == "student" else scores.k_max,
                        scores.min_p,
                        self.asked(group, spelling),
                        advance,
                    )
                    table = _table(group["rollout_id"], spelling, scored, scores.log_z)
                    writer.write(table)
                    for at in samples[(samples >= first) & (samples < first + len(group))] - first:
                        row = int(spelling.offsets[at] + at)
                        kept.append((asked[at], responses[at], table.slice(row, len(responses[at]) + 1)))
                    first += len(group)
            if kept:
                # Another engine's scores are looked at again by `transformers`, once that engine is closed.
                writer.figures |= self.audit(model or self.teacher.load(), kept)

    def audit(self, model: Any, kept: list[tuple[np.ndarray, np.ndarray, pa.Table]]) -> dict[str, Any]:
        """Score (prompt, response, rows of the shard) again and compare; `model` is converted in place.

        Raises OpdError when they differ by more than the config allows.
        """
        limits = self.config.audit
        model = model.to(getattr(torch, limits.dtype))
        found = figures((deltas(model, *sample[:2], self.teacher.stop, sample[2]) for sample in kept), limits.dtype)
        largest, mean = found["audit_max_delta"], found["audit_mean_delta"]
        console.say(
            f"audit: {found['audit_logps']:,} log-probs of {len(kept)} responses in {limits.dtype}: "
            f"mean difference {mean:.3f}, max {largest:.3f} nats"
        )
        if largest > limits.max_delta or mean > limits.max_mean_delta:
            raise OpdError(
                f"scores of {self.rollouts.path}: a second look differs by {mean:.3f} nats on average and {largest:.3f} at "
                f"most; audit.max_mean_delta is {limits.max_mean_delta}, audit.max_delta {limits.max_delta}"
            )
        return found

    def longest(self, spelled: list[Spelling]) -> int:
        """Tokens of the longest prompt and response together. Raises OpdError when the teacher can't read that many."""
        longest = 0
        for group, spelling, prompts in zip(self.rollouts.row_groups(), spelled, self.teacher_prompts, strict=True):
            lengths = np.diff(spelling.offsets) + [len(prompt) for prompt in prompts]
            at = int(lengths.argmax())
            if lengths[at] > self.teacher.context:
                raise OpdError(
                    f"rollout {group['rollout_id'][at].as_py()}: prompt and response take {lengths[at]} tokens for "
                    f"{self.teacher.ref.source}, whose context is {self.teacher.context}; lower rollouts.max_new_tokens"
                )
            longest = max(longest, int(lengths[at]))
        return longest


def _table(names: pa.ChunkedArray, spelling: Spelling, scored: Scores, log_z: bool) -> pa.Table:
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
    cand_id, cand_logp = candidates(scored.cand_id, scored.cand_logp, scored.cand_count)
    schema = arrow_schema("scores")
    columns = {
        "rollout_id": names.combine_chunks().take(pa.array(owner)),
        "pos": pa.array(np.arange(rows) - row_first[owner], pa.int32()),
        "byte_start": byte_start,
        "byte_end": byte_end,
        "token_id": token_id,
        "logp": scored.logp,
        **{name: rounded(getattr(scored, name), STATISTIC_BITS) for name in ("entropy", "stop_logp", "tail_logp")},
        "log_z": pa.array(scored.log_z) if log_z else pa.nulls(rows, pa.float32()),
        "cand_id": pa.ListArray.from_arrays(lists, pa.array(cand_id), type=schema.field("cand_id").type),
        "cand_logp": pa.ListArray.from_arrays(lists, pa.array(cand_logp), type=schema.field("cand_logp").type),
    }
    return pa.table(columns, schema=schema)


if __name__ == "__main__":
    console.run(main)
