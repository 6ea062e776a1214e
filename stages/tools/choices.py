"""What a loss optimises: the trainer's gradient under several choices of candidates, beside that of exact reverse KL.

A choice runs the stages from scores on, over rollouts that are there; nothing is simulated.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from torch.utils.checkpoint import checkpoint

from pipeline.align.units import UNCOMPARED
from pipeline.align.vocabularies import pair_ids
from pipeline.infer.forward import head
from pipeline.infer.score import hidden_rows
from pipeline.infer.shard_scores import ShardScores
from pipeline.store.shards import open_shard, open_writer
from schemas.config import parse_config
from schemas.errors import OpdError
from stages import scores, units, weights
from stages.run.context import open_prompts, policy, teacher
from stages.run.rounds import open_shards
from stages.run.run import run_of
from train.batch import Batch
from train.gradient import Gradient, exact_reverse_kl, gradient
from train.policy import unit_logps
from train.recipes import losses, one_to_one
from train.stream import Triple, batches, count_steps

MICRO_BATCH, MICRO_BATCH_TOKENS = 16, 1 << 20
"""Responses, and padded tokens, of a forward pass: the first binds."""
ROWS = 256
"""Rows of whole logits of both models at once."""
RECORDED = 20
"""The student's candidates that rollouts must have for `SUGGESTED`."""


@dataclass(frozen=True)
class Choice:
    """What is kept of the teacher, sections `scores` and `objective` of a config, and of the student (`rollouts.top_k`)."""

    name: str
    scores: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)
    top_k: int = RECORDED


def teacher_top(k: int) -> dict[str, Any]:
    """Section `scores`: the teacher's k likeliest."""
    return {"k_max": k, "min_p": 0.0005}


def student_top() -> dict[str, Any]:
    """Section `scores`: the student's own `rollouts.top_k`."""
    return {"support": "student", "min_p": 0.0}


def union(k: int) -> dict[str, Any]:
    """Section `scores`: the teacher's k likeliest and the student's `rollouts.top_k`."""
    return {"support": "union", "k_max": k}


RENORMALISED, REST, SAMPLED = {"tail": "renormalise"}, {"tail": "bucket"}, {"recipe": "rao_blackwell"}
SUGGESTED = (
    Choice("teacher 20, a class for the rest", teacher_top(20), REST),
    Choice("teacher 20, the rest sampled", teacher_top(20), SAMPLED),
    Choice("union 8 + 8, a class for the rest", union(8), REST, 8),
    Choice("student 20, renormalised", student_top(), RENORMALISED),
)
"""What is worth looking at beside a config's own: docs/losses.md."""


class Rollouts:
    """A student's rollouts, and the teacher's hidden states at them.

    Args:
        values: a run's config, of one round whose rollouts lie in the working directory with at least as many of the student's
            candidates as any choice takes.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.run = run_of(parse_config(values, "these choices"))
        self.student, judge = policy(self.run, 0), teacher(self.run)
        self.pairs = pair_ids(judge.vocabulary, self.student.vocabulary)
        place = self.run.phase("round-0")[0]
        wanted = ShardScores(self.run.config, place.rollouts, open_prompts(self.run), judge, self.student)
        self.hidden: dict[str, torch.Tensor] = {}
        model = judge.take_model()
        for group, prompts in zip(place.rollouts.row_groups(), wanted.teacher_prompts, strict=True):
            spelling, segments = wanted.spelling(group)
            responses = np.split(spelling.ids, spelling.offsets[segments.offsets[1:-1]])
            names = group["rollout_id"].to_pylist()
            for batch, hidden in hidden_rows(model, prompts, responses, self.run.config.scores.batch_tokens):
                self.hidden |= {names[i]: rows for i, rows in zip(batch, hidden, strict=True)}
        del model  # only its head is needed from here on
        self.judge = judge.load(layers=False)
        self.model = self.student.load()
        self.stop, self.teacher_stop = (
            torch.from_numpy(side.stop.astype(np.int64)).to(self.model.device) for side in (self.student, judge)
        )

    def config_of(self, choice: Choice) -> dict[str, Any]:
        """The config of the same run under a choice."""
        return self.values | {
            "run": "choice",
            "scores": choice.scores,
            # With weights left out IW-OPD's is the plain sampled path, and says so.
            "objective": choice.objective
            | ({"recipe": "sampled"} if choice.objective.get("recipe") == "iw_opd" else {}),
            "rollouts": self.values["rollouts"] | {"top_k": choice.top_k},
            # Beside what corrects for the sampler's temperature. Nothing is judged, so a recipe's reward is left out.
            "weights": {"scheme": "uniform", "reward": "none"},
            "audit": {"responses": 0},
        }

    def shards(self, choice: Choice) -> tuple[list[Triple], float]:
        """What a choice has of the rollouts, and the bytes of its scores per row (a teacher token or an end)."""
        values = self.config_of(choice)
        run, where = run_of(parse_config(values, choice.name)), Path("choice.yaml")
        where.write_text(yaml.safe_dump(values, allow_unicode=True))
        shutil.rmtree(run.root, ignore_errors=True)
        shutil.copytree(self.run.root, run.root, symlinks=True, ignore=shutil.ignore_patterns("train", "checkpoint"))
        place = run.phase("round-0")[0]
        if choice.top_k < self.values["rollouts"]["top_k"]:
            _cut(place.path("rollouts"), choice.top_k)
        scores.main("round-0", 0, where)
        units.main("round-0", 0, where)
        weights.main("round-0", where)
        return open_shards(run.phase("round-0")), place.path("scores").resolve().stat().st_size / place.scores.rows

    def batches(self, shards: Sequence[Triple]) -> Iterator[Batch]:
        """All responses, micro-batch by micro-batch."""
        for step in batches(shards, MICRO_BATCH, MICRO_BATCH_TOKENS, 0, range(count_steps(shards, MICRO_BATCH))):
            yield from (part.to(self.model.device) for part in step.parts if len(part.unit_row))

    def exact(self, shards: Sequence[Triple], parameters: bool) -> Gradient:
        """Of exact reverse KL at the start of every compared unit, summed."""
        starts = {
            name: torch.tensor(of_response["t_start"].to_list())
            for (name,), of_response in pl.concat([pl.DataFrame(triple[1].read()) for triple in shards])
            .filter(~pl.col("kind").is_in(UNCOMPARED))
            .group_by("rollout_id")
        }

        def kl(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                judged = head(self.judge, theirs)
            return exact_reverse_kl(head(self.model, own), judged, self.pairs, self.stop, self.teacher_stop).sum()

        def loss(part: Batch) -> torch.Tensor:
            hidden = self.model.base_model(input_ids=part.ids, attention_mask=part.mask).last_hidden_state
            own = hidden.flatten(0, 1)[part.rows[part.unit_row]]
            theirs = torch.cat([self.hidden[name][starts[name]] for name in part.responses if name in starts])
            pieces = zip(own.split(ROWS), theirs.split(ROWS), strict=True)
            return torch.stack([checkpoint(kl, *piece, use_reentrant=False) for piece in pieces]).sum()

        return gradient(self.model, (partial(loss, part) for part in self.batches(shards)), parameters)

    def found(self, shards: Sequence[Triple], choice: Choice, parameters: bool) -> tuple[Gradient, float]:
        """Of the trainer's loss under a choice, summed, and the share of its square in n:m units (in hidden states)."""
        objective = parse_config(self.config_of(choice), choice.name).objective

        def loss(part: Batch, of: Callable[[Batch], torch.Tensor] | None = None) -> torch.Tensor:
            scored = losses(unit_logps(self.model, part, self.stop), part, objective)
            used = scored.used if of is None else scored.used & of(part)
            return (part.weight * scored.loss * used).sum()

        def longer(part: Batch) -> torch.Tensor:
            return ~one_to_one(part)

        whole = gradient(self.model, (partial(loss, part) for part in self.batches(shards)), parameters)
        longer_alone = (partial(loss, part, longer) for part in self.batches(shards))
        of_longer = gradient(self.model, longer_alone, parameters=False)
        return whole, float(of_longer.hidden.double().square().sum() / whole.hidden.double().square().sum())


def compare(values: dict[str, Any], choices: Sequence[Choice], parameters: bool) -> list[dict[str, Any]]:
    """A row for exact reverse KL and for each choice: loss in nats per unit, cosines with the exact gradient, and costs.

    Args:
        values: see `Rollouts`.
        parameters: whether also in the parameters, whose backward passes are most of the work.
    Raises:
        OpdError: nothing can be compared, or as the stages do.
    """
    rollouts = Rollouts(values)
    rows, exact, compared = [], None, 0
    for choice in choices:
        shards, size = rollouts.shards(choice)
        if exact is None:
            compared = sum(len(part.unit_row) for part in rollouts.batches(shards))
            if not compared:
                raise OpdError("no unit of these responses can be compared with the teacher; take more of them")
            exact = rollouts.exact(shards, parameters)
            rows.append({"choice": "exact", "units": compared, "loss": exact.loss / max(1, compared)})
        began = time.perf_counter()
        whole, longer = rollouts.found(shards, choice, parameters)
        hidden, of_parameters = whole.cosines(exact)
        rows.append(
            {
                "choice": choice.name,
                "units": compared,
                "loss": whole.loss / max(1, compared),
                "cos_hidden": hidden,
                "cos_parameters": of_parameters,
                "norm_to_exact": whole.norm / exact.norm,
                "n_to_m_share": longer,
                "bytes_per_row": size,
                "seconds": time.perf_counter() - began,
            }
        )
    return rows


def _cut(path: Path, top_k: int) -> None:
    """Rollouts with fewer of the student's candidates: of those recorded the first are the likeliest."""
    shard = open_shard(path, "rollouts")
    groups, about = list(shard.row_groups()), shard.manifest
    with open_writer(path, "rollouts", about.identity, about.inputs, about.origin) as writer:
        for group in groups:
            recorded = group["top_id"].combine_chunks()
            tokens = pc.list_slice(recorded.flatten(), 0, top_k)
            offsets = pc.subtract(recorded.offsets, recorded.offsets[0])
            at = group.column_names.index("top_id")
            writer.write(group.set_column(at, "top_id", pa.ListArray.from_arrays(offsets, tokens)))
