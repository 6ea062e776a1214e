"""How near is a loss from shards to exact reverse KL? `python benchmarks/gradient.py [--swapped] [--rollouts N]`.

The student of the default run samples; its trainer's gradient, with what a shard of scores keeps under each choice of
candidates, is compared with the gradient of the exact reverse KL over the whole shared vocabulary, stopping and one class for
the rest, at the start of every compared unit. Both models live in float32; weights are uniform. Bytes are those of the shard of
scores on disk, per row (a teacher token or an end). `opd plan` does so for a run's own models, in the hidden states alone.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from corpus import markdown

from stages import models, prompts, rollouts
from stages.tools.choices import (
    RECORDED,
    RENORMALISED,
    REST,
    SAMPLED,
    Choice,
    compare,
    student_top,
    teacher_top,
    union,
)

ROOT = Path(__file__).parents[1]

CHOICES = (
    Choice("teacher 20, renormalised", teacher_top(20), RENORMALISED),
    Choice("teacher 128 at p ≥ 0.0005, renormalised", teacher_top(128), RENORMALISED),
    Choice("teacher 20, a class for the rest", teacher_top(20), REST),
    Choice("teacher 20, the rest sampled", teacher_top(20), SAMPLED),
    Choice("teacher 128 at p ≥ 0.0005, the rest sampled", teacher_top(128), SAMPLED),
    Choice("student 20, renormalised", student_top(), RENORMALISED),
    Choice("student 20, a class for the rest", student_top(), REST),
    Choice("student 12, a class for the rest", student_top(), REST, 12),
    Choice("student 12, the rest sampled", student_top(), SAMPLED, 12),
    Choice("student 8, the rest sampled", student_top(), SAMPLED, 8),
    Choice("union 20 + 20, a class for the rest", union(20), REST, 20),
    Choice("union 10 + 10, a class for the rest", union(10), REST, 10),
    Choice("union 8 + 8, a class for the rest", union(8), REST, 8),
    Choice("union 8 + 8, the rest sampled", union(8), SAMPLED, 8),
    Choice("union 5 + 8, a class for the rest", union(5), REST, 8),
    Choice("union 5 + 8, the rest sampled", union(5), SAMPLED, 8),
    Choice("teacher 20, forward, a class for the rest", teacher_top(20), REST | {"direction": "forward"}),
    Choice("teacher 20, JSD, a class for the rest", teacher_top(20), REST | {"direction": "jsd"}),
    Choice("teacher 20, a class for the rest, n:m at its start", teacher_top(20), {"recipe": "variants:at_start"}),
    Choice("teacher 20, the rest sampled, n:m at its start", teacher_top(20), {"recipe": "variants:at_start_sampled"}),
    Choice("union 8 + 8, a class for the rest, n:m at its start", union(8), {"recipe": "variants:at_start"}, 8),
    Choice("teacher 20, a class for the rest, n:m per token", teacher_top(20), {"recipe": "variants:longer_per_token"}),
    Choice("teacher 20, a class for the rest, no n:m", teacher_top(20), {"recipe": "kbucket"}),
    Choice("SimCT, teacher 20", teacher_top(20), {"recipe": "simct"}),
    Choice("sampled path, clip 5", teacher_top(20), {"recipe": "sampled"}),
)


def config_of(swapped: bool, responses: int, source: str | None) -> dict[str, Any]:
    """The default run's config, cut to one round."""
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
    splits = values["prompts"]["splits"] | {"train": responses, "dev": 0, "test": 2}
    values["prompts"] = {"source": source, "splits": splits} if source else values["prompts"] | {"splits": splits}
    values["rollouts"] |= {"rounds": 1, "prompts": responses, "top_k": RECORDED}
    return values | {"evaluate": {"kl_items": 0}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--swapped", action="store_true", help="the default run's teacher as the student")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--choices", nargs="+", type=int, default=range(len(CHOICES)), help="by number, from 0")
    parser.add_argument("--prompts", help="a file of prompts instead of the default run's source")
    parser.add_argument("--out", default=".")
    options = parser.parse_args()
    source = options.prompts and str(Path(options.prompts).absolute())
    values = config_of(options.swapped, options.rollouts, source)
    with tempfile.TemporaryDirectory(prefix="opd-gradient-") as folder, contextlib.chdir(folder):
        where = Path("config.yaml")
        where.write_text(yaml.safe_dump(values, allow_unicode=True))
        prompts.main(where)
        for role in ("student", "teacher"):
            models.main(role, where)
        rollouts.main("round-0", 0, where)
        rows = compare(values, [CHOICES[i] for i in options.choices], parameters=True)
    text = markdown(pl.DataFrame(rows, infer_schema_length=None))
    print(text)
    (Path(options.out) / f"gradient{'-swapped' if options.swapped else ''}.md").write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("OPD_CACHE", str(Path("~/.cache/offline-opd").expanduser()))
    main()
