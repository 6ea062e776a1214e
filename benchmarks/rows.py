"""Memory of units, weights and the stream at long responses: `python benchmarks/rows.py`.

A shard of rollouts and scores is made of random tokens with 78 candidates each, in the row groups that the pipeline cuts, or
with `--by-responses` in those of 256 responses whatever their length, as it once did. Then each stage runs over it in a
process of its own, and the stream once more as the first of `--ranks`. Seconds are the processor's; MB are what the peak of
resident memory lies over its value before the first row group is read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import memory
import numpy as np
import pyarrow as pa

from pipeline.align.segments import list_offsets, sampled_tokens
from pipeline.align.student_view import student_view
from pipeline.align.tokens import TokenBytes
from pipeline.infer.rollout_table import ROW_GROUP, row_groups
from pipeline.infer.score import Scores
from pipeline.infer.score_table import score_table
from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.phase import Part, compute
from schemas.config import Train, Weights
from schemas.tables import arrow_schema
from train.stream import batches, count_steps

CANDIDATES, PROMPT = 78, 50
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
WORDS = np.stack(np.meshgrid(LETTERS, LETTERS), -1).reshape(-1, 2)
"""The vocabulary: all pairs of letters."""
STOP = np.array([len(WORDS)], np.int32)
SIZE: int = Train.model_fields["batch_size"].default
SHAPES = {"4,096 tokens": (4096, (64, 256)), "32,768 tokens": (32768, (16, 64))}
"""Tokens of a response, and how many responses."""


def vocabulary() -> TokenBytes:
    """Of both models."""
    tokens = [*(word.tobytes() for word in WORDS), None]
    return TokenBytes("pairs", pa.array(tokens, pa.large_binary()), np.arange(len(tokens)) == STOP, np.ones(677, bool))


def fabricate(folder: Path, responses: int, length: int, by_responses: bool) -> None:
    """A shard of rollouts and one of scores."""
    rng, tokens = np.random.default_rng(0), vocabulary()
    cuts = [slice(i, min(i + ROW_GROUP, responses)) for i in range(0, responses, ROW_GROUP)]
    with ExitStack() as stack:
        rollouts, scores = (
            stack.enter_context(open_writer(folder / f"{kind}.parquet", kind, {}, {}))
            for kind in ("rollouts", "scores")
        )
        for cut in cuts if by_responses else row_groups([length] * responses):
            table = sampled(rng, [f"r0-p{number}-0" for number in range(cut.start, cut.stop)], length)
            rollouts.write(table)
            spelling, segments, _ = sampled_tokens(table, tokens, STOP)
            names = table["rollout_id"]
            scores.write(score_table(names, spelling, segments, scored(rng, len(table) * (length + 1)), log_z=False))


def sampled(rng: np.random.Generator, names: list[str], length: int) -> pa.Table:
    """A row group of rollouts, none of them stopped."""
    ids = rng.integers(0, len(WORDS), (len(names), length), np.int32)
    schema = arrow_schema("rollouts")
    lists = list_offsets(np.full(len(names), length))
    columns = {
        "rollout_id": names,
        "prompt_id": names,
        **dict.fromkeys(("sample", "round"), np.zeros(len(names), np.int32)),
        "prompt_ids": [[0] * PROMPT] * len(names),
        "response_ids": pa.ListArray.from_arrays(lists, pa.array(ids.ravel())),
        "response": [WORDS[row].tobytes().decode() for row in ids],
        "behavior_logp": pa.ListArray.from_arrays(lists, pa.array(-rng.random(ids.size, np.float32))),
        "finish_reason": ["length"] * len(names),
    }
    absent = {field.name: pa.nulls(len(names), field.type) for field in schema if field.name not in columns}
    return pa.table([(columns | absent)[field.name] for field in schema], names=schema.names).cast(schema)


def scored(rng: np.random.Generator, rows: int) -> Scores:
    """What a teacher could have said of so many rows."""
    logp = np.log(rng.dirichlet(np.full(CANDIDATES + 2, 0.3), 256).astype(np.float32).clip(1e-12))
    logp = logp[rng.integers(0, len(logp), rows)]
    first = rng.integers(0, len(WORDS), rows)
    cand_id = ((first[:, None] + np.arange(CANDIDATES)) % len(WORDS)).astype(np.int32)
    every = np.zeros(rows, np.float32)
    cand_logp = -np.sort(-logp[:, :CANDIDATES], 1)
    counts = np.full(rows, CANDIDATES)
    return Scores(logp[:, 0], -every, logp[:, -1], logp[:, -2], every, cand_id.ravel(), cand_logp.ravel(), counts)


def units(folder: Path) -> None:
    """As the stage makes them."""
    rollouts, scores = (open_shard(folder / f"{kind}.parquet", kind) for kind in ("rollouts", "scores"))
    tokens, pairs = vocabulary(), np.append(np.arange(len(WORDS), dtype=np.int32), -1)
    with open_writer(folder / "units.parquet", "units", {}, {"rollouts": rollouts.manifest.sha256}) as writer:
        for sampled, scored in zip(rollouts.row_groups(), scores.row_groups(), strict=True):
            writer.write(student_view(sampled, scored, tokens, STOP, STOP, pairs))


def weights(folder: Path) -> None:
    """As the stage makes them by default."""
    paths = [folder / f"{kind}.parquet" for kind in ("rollouts", "units", "weights")]
    compute([Part(paths[0], paths[1], None, paths[2])], Weights())


def stream(folder: Path, ranks: int = 1) -> None:
    """An epoch of a trainer that does nothing, the first of so many, which reads ahead."""
    opened = tuple(open_shard(folder / f"{kind}.parquet", kind) for kind in ("rollouts", "units", "weights"))
    tokens: int = Train.model_fields["micro_batch_tokens"].default
    steps = range(count_steps([opened], SIZE))  # type: ignore[list-item]
    for step in batches([opened], SIZE, tokens, 1, steps, ranks=ranks, workers=1):  # type: ignore[list-item]
        for _ in step.parts:
            pass


STAGES: dict[str, Callable[[Path], None]] = {"units": units, "weights": weights, "stream": stream}


def measured(stage: Callable[[Path], None], folder: Path) -> dict[str, float]:
    """A stage in this process."""
    before, began = memory.peak(), time.process_time()
    stage(folder)
    return {"seconds": time.process_time() - began, "memory": (memory.peak() - before) / 1e6}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all by default")
    parser.add_argument("--responses", type=int, action="append", help="how many, in place of the shape's")
    parser.add_argument("--by-responses", action="store_true", help="row groups of 256 responses")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    stages = STAGES | {f"stream of {options.ranks} ranks": partial(stream, ranks=options.ranks)}
    if options.stage:
        print(json.dumps(measured(stages[options.stage], options.folder)))
        return
    print(f"| responses | row groups | {' | '.join(f'{name}, s | MB' for name in stages)} |")
    print(f"|---|---|{'---|---|' * len(stages)}")
    for shape in options.shape or SHAPES:
        length, counts = SHAPES[shape]
        for responses in options.responses or counts:
            with tempfile.TemporaryDirectory(prefix="opd-rows-") as folder:
                fabricate(Path(folder), responses, length, options.by_responses)
                groups = open_shard(Path(folder) / "rollouts.parquet", "rollouts").manifest.row_groups
                cells = []
                for stage in stages:
                    command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
                    command += ["--ranks", str(options.ranks)]
                    got = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                    cells += [f"{got['seconds']:.1f}", f"{got['memory']:,.0f}"]
                print(f"| {responses} of {shape} | {groups} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
