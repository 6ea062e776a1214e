"""How near is a loss from shards to exact reverse KL? `python benchmarks/gradient.py [--swapped] [--rollouts N]`.

The student of the default run samples; its trainer's gradient, with what a shard of scores keeps under each choice of
candidates, is compared with the gradient of the exact reverse KL over the whole shared vocabulary, stopping and one class for
the rest, at the start of every compared unit. Both models live in float32; weights are uniform. Bytes are those of the shard of
scores on disk, per row (a teacher token or an end).
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from corpus import markdown

from pipeline.align.vocabularies import pair_ids
from pipeline.infer.forward import head
from pipeline.infer.score import hidden_rows
from pipeline.infer.shard_scores import ShardScores
from schemas.config import parse_config
from stages import models, prompts, rollouts, scores, units, weights
from stages.run.context import open_prompts, policy, teacher
from stages.run.rounds import open_shards
from stages.run.run import run_of
from train.batch import Batch
from train.gradient import Gradient, exact_reverse_kl, gradient
from train.policy import unit_logps
from train.recipes import losses, one_to_one
from train.stream import Triple, batches, count_steps

ROOT = Path(__file__).parents[1]
PROMPTS: str | None = None
MICRO_BATCH = 16


@dataclass(frozen=True)
class Choice:
    """What is kept of the teacher, and the loss that reads it."""

    name: str
    scores: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)


def teacher_top(k: int) -> dict[str, Any]:
    return {"k_max": k}


def student_top(k: int) -> dict[str, Any]:
    return {"support": "student", "top_k": k, "min_p": 0}


def union(k: int, of_student: int) -> dict[str, Any]:
    return {"support": "union", "k_max": k, "top_k": of_student}


RENORMALISED, REST, SAMPLED = ({"tail": tail} for tail in ("renormalise", "bucket", "sampled"))
CHOICES = (
    Choice("teacher 20, renormalised", teacher_top(20), RENORMALISED),
    Choice("teacher 128 at p ≥ 0.0005, renormalised", teacher_top(128), RENORMALISED),
    Choice("teacher 20, a class for the rest", teacher_top(20), REST),
    Choice("teacher 20, the rest sampled", teacher_top(20), SAMPLED),
    Choice("teacher 128 at p ≥ 0.0005, the rest sampled", teacher_top(128), SAMPLED),
    Choice("student 20, renormalised", student_top(20), RENORMALISED),
    Choice("student 20, a class for the rest", student_top(20), REST),
    Choice("student 12, a class for the rest", student_top(12), REST),
    Choice("student 12, the rest sampled", student_top(12), SAMPLED),
    Choice("student 8, the rest sampled", student_top(8), SAMPLED),
    Choice("union 20 + 20, a class for the rest", union(20, 20), REST),
    Choice("union 10 + 10, a class for the rest", union(10, 10), REST),
    Choice("union 8 + 8, a class for the rest", union(8, 8), REST),
    Choice("union 8 + 8, the rest sampled", union(8, 8), SAMPLED),
    Choice("union 5 + 8, a class for the rest", union(5, 8), REST),
    Choice("union 5 + 8, the rest sampled", union(5, 8), SAMPLED),
    Choice("teacher 20, forward, a class for the rest", teacher_top(20), REST | {"direction": "forward"}),
    Choice("teacher 20, JSD, a class for the rest", teacher_top(20), REST | {"direction": "jsd"}),
    Choice("teacher 20, a class for the rest, n:m at its start", teacher_top(20), {"recipe": "variants:at_start"}),
    Choice("teacher 20, the rest sampled, n:m at its start", teacher_top(20), {"recipe": "variants:at_start_sampled"}),
    Choice("union 8 + 8, a class for the rest, n:m at its start", union(8, 8), {"recipe": "variants:at_start"}),
    Choice("teacher 20, a class for the rest, n:m per token", teacher_top(20), {"recipe": "variants:longer_per_token"}),
    Choice("teacher 20, a class for the rest, no n:m", teacher_top(20), {"recipe": "kbucket"}),
    Choice("SimCT, teacher 20", teacher_top(20), {"recipe": "simct"}),
    Choice("sampled path, clip 5", teacher_top(20), {"recipe": "sampled"}),
)


def config_of(swapped: bool, responses: int, choice: Choice | None = None) -> dict[str, Any]:
    """The default run's config, cut to one round; with `choice` what that keeps and reads."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    if swapped:
        student, judge = values["student"], values["teacher"]
        values["student"] = {
            "model": judge["model"],
            "prompt": "Question: {{ prompt }}\nAnswer:",
            "stop": ["\n"],
        }
        values["teacher"] = {"model": student["model"], "chat": False, "prompt": judge["prompt"], "stop": ["\n"]}
    for role in ("student", "teacher"):
        values[role]["dtype"] = "float32"
    values["prompts"]["splits"] |= {"train": responses, "dev": 0, "test": 2}
    values["rollouts"] |= {"rounds": 1, "prompts": responses, "top_k": 20}
    if PROMPTS:
        values["prompts"] = {"source": PROMPTS, "splits": values["prompts"]["splits"]}
    values["evaluate"] = {"kl_items": 0}
    values["audit"] = {"responses": 0}
    values["weights"] = {"scheme": "uniform"}
    values["train"] = {"batch_size": MICRO_BATCH, "micro_batch_tokens": 1 << 20}
    if choice:
        kept = dict(choice.scores)
        values["run"] = "choice"
        values["rollouts"]["top_k"] = kept.pop("top_k", 20)
        values["scores"] = kept
        values["objective"] = choice.objective
    return values


def written(values: dict[str, Any]) -> Path:
    path = Path(f"{values['run']}.yaml")
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    return path


def parts(shards: list[Triple], device: Any) -> Iterator[Batch]:
    """All responses, micro-batch by micro-batch."""
    for step in batches(shards, MICRO_BATCH, 1 << 20, 0, range(count_steps(shards, MICRO_BATCH))):
        for part in step.parts:
            yield part.to(device)


class Pair:
    """The student, its rollouts, and the teacher's hidden states at them."""

    def __init__(self, swapped: bool, responses: int) -> None:
        self.swapped, self.responses = swapped, responses
        where = written(config_of(swapped, responses))
        self.run = run_of(parse_config(yaml.safe_load(where.read_text()), str(where)))
        prompts.main(where)
        models.main("student", where)
        models.main("teacher", where)
        rollouts.main("round-0", 0, where)
        self.student, self.teacher = policy(self.run, 0), teacher(self.run)
        self.pairs = pair_ids(self.teacher.vocabulary, self.student.vocabulary)
        place = self.run.phase("round-0")[0]
        wanted = ShardScores(self.run.config, place.rollouts, open_prompts(self.run), self.teacher, self.student)
        self.names: dict[str, int] = {}
        self.hidden: list[torch.Tensor] = []
        for group, at in zip(place.rollouts.row_groups(), wanted.teacher_prompts, strict=True):
            spelling = wanted.spelling(group)
            rows = np.split(spelling.ids, spelling.offsets[1:-1])
            found: dict[int, torch.Tensor] = {}
            for batch, hidden in hidden_rows(self.teacher.model, at, rows, 4096):
                found |= dict(zip(batch.tolist(), hidden, strict=True))
            self.names |= {name: len(self.hidden) + i for i, name in enumerate(group["rollout_id"].to_pylist())}
            self.hidden += [found[i] for i in range(len(rows))]
        self.model = self.student.load()
        self.stop, self.teacher_stop = (
            torch.from_numpy(side.stop.astype("int64")).to(self.model.device) for side in (self.student, self.teacher)
        )

    def shards(self, choice: Choice) -> tuple[list[Triple], float]:
        """What a choice has of the same rollouts, and bytes per row of its scores."""
        values = config_of(self.swapped, self.responses, choice)
        where = written(values)
        folder = Path("runs/choice")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.run.root, folder, symlinks=True)
        run = run_of(parse_config(values, str(where)))
        if values["rollouts"]["top_k"] != self.run.config.rollouts.top_k:
            rollouts.main("round-0", 0, where)  # fewer of the student's candidates, the same responses
        scores.main("round-0", 0, where)
        units.main("round-0", 0, where)
        weights.main("round-0", where)
        shard = run.phase("round-0")[0].scores
        return open_shards(run.phase("round-0")), shard.path.resolve().stat().st_size / shard.rows

    def exact(self, shards: list[Triple]) -> Gradient:
        """Of exact reverse KL at every unit's start, summed."""
        starts = {
            name: units["t_start"].to_list()
            for (name,), units in pl.concat([pl.DataFrame(triple[1].read()) for triple in shards])
            .filter(pl.col("kind") != "masked")
            .group_by("rollout_id")
        }

        def of(part: Batch) -> torch.Tensor:
            hidden = self.model.base_model(input_ids=part.ids, attention_mask=part.mask).last_hidden_state
            student = head(self.model, hidden.flatten(0, 1)[part.rows[part.unit_row]])
            rows = torch.cat(
                [self.hidden[self.names[name]][torch.tensor(starts[name])] for name in part.responses if name in starts]
            )
            with torch.no_grad():
                judge = head(self.teacher.model, rows)
            return exact_reverse_kl(student, judge, self.pairs, self.stop, self.teacher_stop).sum()

        return gradient(self.model, [lambda part=part: of(part) for part in parts(shards, self.model.device)])

    def found(self, shards: list[Triple], choice: Choice) -> tuple[Gradient, float]:
        """Of the loss that the trainer has under a choice, summed, and its share of squared gradient in n:m units."""
        config = parse_config(config_of(self.swapped, self.responses, choice), choice.name)

        def of(part: Batch, only: Callable[[Batch], torch.Tensor] | None = None) -> torch.Tensor:
            scored = losses(unit_logps(self.model, part, self.stop), part, config.objective)
            kept = scored.used if only is None else scored.used & only(part)
            return (scored.loss * kept).sum()

        every = [lambda part=part: of(part) for part in parts(shards, self.model.device)]
        longer = [lambda part=part: of(part, lambda p: ~one_to_one(p)) for part in parts(shards, self.model.device)]
        whole = gradient(self.model, every)
        of_longer = gradient(self.model, longer, parameters=False)
        return whole, float(of_longer.hidden.double().square().sum() / whole.hidden.double().square().sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--swapped", action="store_true")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument(
        "--choices", nargs="+", type=int, default=range(len(CHOICES)), help="by number, from 0; default: all"
    )
    parser.add_argument("--prompts", help="a file of prompts instead of the default run's source")
    parser.add_argument("--out", default=".")
    options = parser.parse_args()
    out = Path(options.out).absolute()
    global PROMPTS  # noqa: PLW0603
    PROMPTS = options.prompts and str(Path(options.prompts).absolute())
    os.environ.setdefault("OPD_CACHE", str(Path("~/.cache/offline-opd").expanduser()))
    table = []
    with tempfile.TemporaryDirectory(prefix="opd-gradient-") as folder:
        os.chdir(folder)
        pair = Pair(options.swapped, options.rollouts)
        shards, _ = pair.shards(CHOICES[0])
        compared = sum(len(part.unit_row) for part in parts(shards, "cpu"))
        began = time.perf_counter()
        exact = pair.exact(shards)
        table.append(
            {
                "candidates, rest": "exact",
                "loss": exact.loss / compared,
                "cos hidden": 1.0,
                "cos parameters": 1.0,
                "norm / exact": 1.0,
                "n:m share": None,
                "bytes a token": None,
                "seconds": time.perf_counter() - began,
            }
        )
        for choice in [CHOICES[i] for i in options.choices]:
            shards, size = pair.shards(choice)
            began = time.perf_counter()
            whole, longer = pair.found(shards, choice)
            seconds = time.perf_counter() - began
            hidden, parameters = whole.cosines(exact)
            table.append(
                {
                    "candidates, rest": choice.name,
                    "loss": whole.loss / compared,
                    "cos hidden": hidden,
                    "cos parameters": parameters,
                    "norm / exact": whole.norm / exact.norm,
                    "n:m share": longer,
                    "bytes a token": size,
                    "seconds": seconds,
                }
            )
            print(table[-1], flush=True)
    text = f"{compared} units of {options.rollouts} rollouts\n\n" + markdown(pl.DataFrame(table))
    print(text)
    (out / f"gradient{'-swapped' if options.swapped else ''}.md").write_text(text)


if __name__ == "__main__":
    main()
