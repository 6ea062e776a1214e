"""Time and memory that Snakemake takes to plan a run of many shards: `python benchmarks/dag.py [SHARDS ...]`.

A dry run of one round, whose rollouts, scores and units are a job a shard each; nothing is made before, so all are planned.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from stages.tools.run import snakemake

SIZES = (10, 1000, 5000)
"""Shards of the round."""


def planned(shards: int) -> tuple[float, float, float]:
    """Seconds on the clock, seconds of the processor, and the most memory in bytes."""
    config = {
        "prompts": {"source": "prompts.jsonl", "splits": {"examples": 0, "train": shards, "test": 1}},
        "student": {"model": "a/student"},
        "teacher": {"model": "a/teacher"},
        "rollouts": {"rounds": 1, "prompts": shards, "shard_size": 1},
        "evaluate": {"kl_items": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "config.yaml")
        where.write_text(json.dumps(config))
        command, environment = snakemake(where, ["--dry-run", "--quiet=all", "--directory", folder])
        began = time.perf_counter()
        child = os.posix_spawn(command[0], command, environment)
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{shards} shards: snakemake ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


if __name__ == "__main__":
    print("| shards | s | processor s | peak MB |\n|---|---|---|---|")
    for size in map(int, sys.argv[1:] or SIZES):
        clock, processor, memory = planned(size)
        print(f"| {size:,} | {clock:.0f} | {processor:.0f} | {memory / 1e6:.0f} |", flush=True)
