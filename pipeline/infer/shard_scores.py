"""A shard of scores: what it depends on, how it is made, and how it is audited."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.align.segments import Segments, read_by, sampled_tokens
from pipeline.align.student_candidates import requested_ids
from pipeline.align.tokens import Spelling
from pipeline.align.vocabularies import pair_ids, same_ids
from pipeline.infer.audit import UNAUDITED, Deltas, choose, deltas, figures, in_precision, out_of_memory
from pipeline.infer.engines import open_teacher
from pipeline.infer.score import Candidates
from pipeline.infer.score_table import score_table
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.rendering import Renderer
from pipeline.store.cache import lists_digest, responses_digest
from pipeline.store.shards import Shard, open_writer
from schemas.config import Config
from schemas.errors import OpdError, one_line

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
"""Opened with how much there is to do, and of what; yields a function to call with the amount just done."""


@dataclass(frozen=True)
class ShardScores:
    """The scores of a shard of rollouts, made already or not."""

    config: Config
    rollouts: Shard
    prompts: PromptTable
    teacher: PreparedModel
    student: PreparedModel
    asked: PromptTable | None = None
    """The prompts that the rollouts name, where another run sampled them; the run's own are for its examples then."""

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the teacher reads the sampled ids instead of the text."""
        return same_ids(self.teacher.vocabulary, self.student.vocabulary)

    @cached_property
    def has_roles(self) -> bool:
        """Whether some response has more than text."""
        return any(group["segments"].null_count < len(group) for group in self.rollouts.row_groups(["segments"]))

    @cached_property
    def renderer(self) -> Renderer:
        """The teacher's prompts."""
        return self.teacher.renderer(self.prompts)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the scores beside the inputs; how they are batched changes no more than the last bits.

        Names and values of this and of `inputs` make an entry's name in the cache: with others, none is found again.
        """
        scores = self.config.scores
        # Without roles in the responses it doesn't matter how the teacher says them.
        roles = {"roles": self.teacher.roles.identity} if self.has_roles and not self.reads_tokens else {}
        return roles | {
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
            # The student's candidates. Elsewhere the word for them is `requested`; entries made before say `asked`.
            inputs["asked"] = lists_digest(self.rollouts, "top_id")
        return inputs

    @cached_property
    def teacher_prompts(self) -> list[list[np.ndarray]]:
        """Prompt ids of each response, by row group. Raises OpdError when one is longer than the teacher's context; `longest`
        takes the response too."""
        limit = self.teacher.context
        groups = (group["prompt_id"].to_pylist() for group in self.rollouts.row_groups())
        return [self.renderer.ids((self.asked or self.prompts).take(names), limit) for names in groups]

    def spelling(self, group: pa.Table) -> tuple[Spelling, Segments]:
        """The responses of a row group as the teacher reads them, by segment."""
        sampled, segments, _ = sampled_tokens(group, self.student.vocabulary, self.student.stop)
        if self.reads_tokens:
            return sampled, segments
        teacher = self.teacher
        return read_by(teacher.text_tokenizer, teacher.vocabulary, teacher.roles, group, segments), segments

    @property
    def candidates(self) -> Candidates:
        """Which of the teacher's own candidates are kept."""
        scores = self.config.scores
        return Candidates(scores.mass, 0 if scores.support == "student" else scores.k_max, scores.min_p)

    def requested(self, group: pa.Table, spelling: Spelling, segments: Segments) -> list[np.ndarray] | None:
        """The student's candidates, where they are kept: for each response int64 (teacher tokens + 1, k) teacher ids or -1.

        Raises OpdError when the rollouts don't have them.
        """
        if self.config.scores.support == "teacher":
            return None
        if group["top_id"].null_count:
            raise OpdError(
                f"{self.rollouts.path}: scores.support is {self.config.scores.support}, but these rollouts were "
                "sampled without `rollouts.top_k`"
            )
        sampled, _, _ = sampled_tokens(group, self.student.vocabulary, self.student.stop)
        pairs = pair_ids(self.student.vocabulary, self.teacher.vocabulary)
        return requested_ids(group["top_id"].combine_chunks(), sampled, spelling, segments, pairs)

    def write(self, path: Path, progress: Progress, say: Callable[[str], None]) -> None:
        """Score the shard row group by row group, and audit it.

        Args:
            progress: opened once the engine is; of teacher tokens.
            say: called with a line for the person watching.
        Raises:
            OpdError: the teacher can't be opened or can't read this much, memory or disk is too small, or the audit finds
                differences above the config's thresholds.
        """
        spelled = [self.spelling(group) for group in self.rollouts.row_groups()]
        longest = self.longest(spelled)
        total = sum(len(spelling.ids) for spelling, _ in spelled)
        chosen = choose(self.rollouts.rows, self.config.audit.responses, self.inputs["responses"])
        kept: list[tuple[np.ndarray, np.ndarray, pa.Table]] = []
        first = 0
        revision = self.config.teacher.revision
        name = self.teacher.ref.source + (f"@{revision}" if revision else "")
        origin = {"teacher": name, **self.rollouts.manifest.origin}
        with open_writer(path, "scores", self.identity, self.inputs, origin) as writer:
            with (
                open_teacher(self.teacher, longest, self.config.scores.batch_tokens, say) as teacher,
                progress(total, "teacher tokens") as advance,
            ):
                for group, (spelling, segments), prompts in zip(
                    self.rollouts.row_groups(), spelled, self.teacher_prompts, strict=True
                ):
                    responses_at = spelling.offsets[segments.offsets]
                    responses = np.split(spelling.ids, responses_at[1:-1])
                    candidates = replace(self.candidates, requested=self.requested(group, spelling, segments))
                    scored = teacher.score(prompts, responses, candidates, advance)
                    table = score_table(group["rollout_id"], spelling, segments, scored, self.config.scores.log_z)
                    writer.write(table)
                    for at in chosen[(chosen >= first) & (chosen < first + len(group))] - first:
                        row = int(responses_at[at] + at)
                        kept.append((prompts[at], responses[at], table.slice(row, len(responses[at]) + 1)))
                    first += len(group)
            if kept:
                # By `transformers` whatever the engine was, and once that is closed.
                writer.figures |= self._audit(kept, say)

    def _audit(self, kept: list[tuple[np.ndarray, np.ndarray, pa.Table]], say: Callable[[str], None]) -> dict[str, Any]:
        """Score (prompt, response, rows of the shard) again and compare: figures for the manifest.

        Where `audit.dtype` doesn't fit into memory, or the teacher is quantised, it is done in the teacher's own, and where
        that doesn't fit either the shard is kept, UNAUDITED. Raises OpdError when they differ by more than the config allows.
        """
        limits, found = self.config.audit, None
        for dtype in dict.fromkeys((limits.dtype, self.teacher.dtype)):
            try:
                found = self._compared(kept, dtype)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError, OpdError) as error:
                if not out_of_memory(error):
                    raise
                say(f"audit: {self.teacher.ref.source} doesn't fit into memory in {dtype}: {one_line(error, 100)}")
        if found is None:
            say("audit: none; the scores are kept, and trained on only with `audit.required: false`")
            return {UNAUDITED: "out of memory"}
        largest, mean = found["audit_max_delta"], found["audit_mean_delta"]
        say(
            f"audit: {found['audit_logps']:,} log-probs of {len(kept)} responses in {found['audit_dtype']}: "
            f"mean difference {mean:.3f}, max {largest:.3f} nats"
        )
        if not (largest <= limits.max_delta and mean <= limits.max_mean_delta):  # not numbers neither
            raise OpdError(
                f"scores of {self.rollouts.path}: the audit differs by {mean:.3f} nats on average and {largest:.3f} at "
                f"most; audit.max_mean_delta is {limits.max_mean_delta}, audit.max_delta {limits.max_delta}"
            )
        return found

    def _compared(self, kept: list[tuple[np.ndarray, np.ndarray, pa.Table]], dtype: str) -> dict[str, Any]:
        model, dtype = in_precision(self.teacher.take_model(), dtype, self.teacher.dtype)
        return figures((deltas(model, *sample[:2], self.teacher.stop, sample[2]) for sample in kept), dtype)

    def stored_deltas(self, model: Any, scores: Shard, count: int, seed: str) -> list[Deltas]:
        """Score `count` responses again that a finished shard holds.

        Args:
            model: the whole teacher, in the precision to compare with.
            scores: the shard.
            seed: hex digits; draws the responses.
        """
        table = scores.read()
        ends = np.flatnonzero(table["token_id"].to_numpy() < 0)
        prompts = [ids for group in self.teacher_prompts for ids in group]
        found = []
        for at in choose(self.rollouts.rows, count, seed):
            start = 0 if at == 0 else int(ends[at - 1]) + 1
            rows = table.slice(start, int(ends[at]) + 1 - start)
            response = rows["token_id"].to_numpy()[:-1]
            found.append(deltas(model, prompts[at], response, self.teacher.stop, rows))
        return found

    def longest(self, spelled: list[tuple[Spelling, Segments]]) -> int:
        """Tokens of the longest prompt and response together. Raises OpdError when the teacher can't read that many."""
        longest = 0
        for group, (spelling, segments), prompts in zip(
            self.rollouts.row_groups(), spelled, self.teacher_prompts, strict=True
        ):
            lengths = np.diff(spelling.offsets[segments.offsets]) + [len(prompt) for prompt in prompts]
            at = int(lengths.argmax())
            if lengths[at] > self.teacher.context:
                raise OpdError(
                    f"rollout {group['rollout_id'][at].as_py()}: prompt and response take {lengths[at]} tokens for "
                    f"{self.teacher.ref.source}, whose context is {self.teacher.context}; lower rollouts.max_new_tokens"
                )
            longest = max(longest, int(lengths[at]))
        return longest
