"""Weights: `python benchmarks/weights.py`. Units per second of every credit and scheme, and memory at ten times the shards.

Fabricated shards on disk, read, checked and written as the stage does: random lengths, log-probs and candidates, which cost
what real ones do. Rates are of one process, the better of two runs each; memory is of a process of its own per size.
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import memory
import numpy as np
import pyarrow as pa

from pipeline.store.rounding import CANDIDATE_BITS, rounded
from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.phase import Part, compute
from schemas.config import Weights
from schemas.config.weights import CREDITS, SCHEMES
from schemas.tables import STOP_ID

SHARDS, RESPONSES, LENGTH, CANDIDATES, VOCABULARY = 8, 250, 500, 20, 50_000
GROUP = 50  # responses of a row group
SMALL = 50  # responses of a shard where memory is measured
TIMES = 10  # more shards there


def fabricate(folder: Path, index: int, responses: int) -> Part:
    """A shard of rollouts and units: responses of about LENGTH units, a tenth of them masked and a tenth longer than 1:1."""
    rng = np.random.default_rng(index)
    rollouts, units, weights = (folder / table / f"{index:03}.parquet" for table in ("rollouts", "units", "weights"))
    part = Part(rollouts, units, None, weights)
    with open_writer(part.rollouts, "rollouts", {}, {}) as writer:
        groups = [rng.integers(LENGTH // 2, 3 * LENGTH // 2, GROUP) for _ in range(responses // GROUP)]
        tables = [rows(rng, [f"{index}-{g}-{i}" for i in range(GROUP)], n) for g, n in enumerate(groups)]
        for rollouts, _ in tables:
            writer.write(rollouts)
    made_from = {"rollouts": open_shard(part.rollouts, "rollouts").manifest.sha256}
    with open_writer(part.units, "units", {}, made_from) as writer:
        for _, units in tables:
            writer.write(units)
    return part


def rows(rng: np.random.Generator, names: list[str], lengths: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """A row group of both tables; `lengths` are units of each response."""
    n = int(lengths.sum())
    kind = rng.choice(["1:1", "n:m", "masked"], n, p=[0.8, 0.1, 0.1])
    masked = kind == "masked"
    size = np.where(kind == "n:m", 2, 1).astype(np.int32)
    response = np.repeat(np.arange(len(names)), lengths)
    first = np.cumsum(lengths) - lengths
    tokens = np.bincount(response, size, len(names)).astype(np.int64)
    at = np.cumsum(size) - size
    start = (at - at[first][response]).astype(np.int32)
    offsets = pa.array(np.append(0, np.cumsum(tokens)), pa.int32())
    token_ids = rng.zipf(1.3, tokens.sum()) % VOCABULARY
    count = np.where(masked, 0, CANDIDATES)
    listed = pa.array(np.append(0, np.cumsum(count)), pa.int32())
    shares = rng.dirichlet(np.full(CANDIDATES + 2, 0.3), int((~masked).sum())).astype(np.float32).clip(1e-12)
    logp = rounded(np.log(shares), CANDIDATE_BITS)

    def of_units(values: np.ndarray) -> pa.Array:
        filled = np.zeros(n, np.float32)
        filled[~masked] = values
        return pa.array(filled, mask=masked)

    units = {
        "rollout_id": pa.array(names).take(pa.array(response)),
        "unit": np.arange(n) - first[response],
        "kind": pa.array(kind),
        "s_start": start,
        "s_len": size,
        **dict.fromkeys(("t_start", "byte_start", "byte_end"), start),
        "t_len": size,
        "teacher_entropy": pa.nulls(n, pa.float32()),
        "t_log_z": pa.nulls(n, pa.float32()),
        "teacher_logp": of_units(-rng.exponential(1.0, int((~masked).sum()))),
        "cand_id": pa.ListArray.from_arrays(
            listed, pa.array(np.append(rng.integers(0, VOCABULARY, max(0, int(count.sum()) - 1), np.int32), STOP_ID))
        ),
        "cand_logp": pa.ListArray.from_arrays(listed, pa.array(logp[:, :CANDIDATES].ravel())),
        "tail_logp": of_units(logp[:, -1]),
        "dropped_logp": of_units(logp[:, -2]),
    }
    rollouts = {
        "rollout_id": names,
        "prompt_id": names,
        **dict.fromkeys(("sample", "round"), np.zeros(len(names), np.int32)),
        "prompt_ids": [[0]] * len(names),
        "response_ids": pa.ListArray.from_arrays(offsets, pa.array(token_ids.astype(np.int32))),
        "response": [""] * len(names),
        "behavior_logp": pa.ListArray.from_arrays(
            offsets, pa.array(-rng.exponential(1.0, tokens.sum()).astype(np.float32))
        ),
        **dict.fromkeys(("sampler_logp", "top_id", "answer"), pa.nulls(len(names))),
        "finish_reason": ["length"] * len(names),
    }
    return pa.table(rollouts), pa.table(units)


def peak(parts: list[Part], options: Weights) -> float:
    """Resident MB at most of a fresh process that weighs `parts`."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (parts, options))


def _peak(parts: list[Part], options: Weights) -> float:
    compute(parts, options)
    return memory.peak() / 1e6


def speed(folder: Path) -> None:
    """Print units per second of every credit and of every scheme."""
    parts = [fabricate(folder, i, RESPONSES) for i in range(SHARDS)]
    print("| | units/s | seconds |\n|---|---|---|")
    for key, options_of in (("credit", CREDITS), ("scheme", SCHEMES)):
        for value in options_of:
            options = Weights(**{"scheme": "uniform", key: value})  # type: ignore[arg-type]
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                units = compute(parts, options).units
                seconds.append(time.perf_counter() - began)
            print(f"| `{key}: {value}` | {units / min(seconds) / 1e6:.2f} M | {min(seconds):.1f} |", flush=True)
    print(f"\n{units:,} units in {SHARDS} shards, {CANDIDATES} candidates each")


def growth(folder: Path) -> None:
    """Print the peak resident memory over some shards and over ten times as many."""
    parts = [fabricate(folder, i, SMALL) for i in range(SHARDS * TIMES)]
    print(f"\n| | {SHARDS} shards, MB | {len(parts)} shards, MB | ratio |\n|---|---|---|---|")
    for changes in ({}, {"credit": "baseline", "scheme": "ideal"}, {"credit": "gae"}, {"credit": "residual"}):
        options = Weights(**{"scheme": "iw_opd"} | changes)  # type: ignore[arg-type]
        few, many = peak(parts[:SHARDS], options), peak(parts, options)
        name = ", ".join(f"`{key}: {value}`" for key, value in changes.items()) or "`scheme: iw_opd`"
        print(f"| {name} | {few:.0f} | {many:.0f} | {many / few:.2f} |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if "memory" not in sys.argv:
            speed(Path(scratch) / "speed")
        if "speed" not in sys.argv:
            growth(Path(scratch) / "memory")
