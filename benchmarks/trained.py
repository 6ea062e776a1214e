"""Which loss makes the better student? `python benchmarks/trained.py CONFIG [--arms NAME ...] [--seeds 1 101 ...]`.

Trains the run of a config under several losses, all else the same, each at the learning rate that is best for it on the dev
split over the first two seeds, and measures it on the test split for every seed: accuracy of greedy answers, the unbiased
on-policy reverse KL, and a paired test over items against the first arm. The functions are those of the stages; models stay in
memory from one run to the next, and nothing is kept of a run but its figures, a line each in `results.jsonl`, from which the
same command goes on. On a GPU several workers share it (`--workers`).
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from corpus import markdown

from pipeline.infer import score
from pipeline.infer.engines import open_sampler
from pipeline.measure.held_out_answers import held_out_answers
from pipeline.measure.scorers import scorer
from schemas.config import Config, parse_config
from stages import evaluate, models, prompts, rollouts, scores, units, weights
from stages.run import processors
from stages.run.context import open_prompts, policy, teacher
from stages.run.rounds import open_shards, planned_steps
from stages.run.run import Run, run_of
from train.loop import train_step
from train.on_policy_kl import on_policy_kl
from train.optimiser import MasterAdamW, learning_rate
from train.stream import batches

TEACHER, STUDENT = {"k_max": 20, "min_p": 0.0005}, {"support": "student", "min_p": 0}
ARMS: dict[str, dict[str, Any]] = {
    "teacher 20, renormalised": {"scores": TEACHER, "objective": {"tail": "renormalise"}},
    "teacher 20, rest": {"scores": TEACHER, "objective": {"tail": "bucket"}},
    "teacher 20, rest sampled": {"scores": TEACHER, "objective": {"recipe": "rao_blackwell"}},
    "student 20, renormalised": {"scores": STUDENT, "top_k": 20, "objective": {"tail": "renormalise"}},
    "student 12, rest": {"scores": STUDENT, "top_k": 12, "objective": {"tail": "bucket"}},
    "union 20+20, rest": {"scores": {"support": "union", "k_max": 20}, "top_k": 20, "objective": {"tail": "bucket"}},
    "union 8+8, rest": {"scores": {"support": "union", "k_max": 8}, "top_k": 8, "objective": {"tail": "bucket"}},
    "forward, teacher 20, rest": {"scores": TEACHER, "objective": {"tail": "bucket", "direction": "forward"}},
    "JSD, teacher 20, rest": {"scores": TEACHER, "objective": {"tail": "bucket", "direction": "jsd"}},
    "teacher 20, rest, uniform": {
        "scores": TEACHER,
        "objective": {"tail": "bucket"},
        "weights": {"scheme": "uniform"},
    },
    "teacher 20, rest, n:m at start": {"scores": TEACHER, "objective": {"recipe": "variants:at_start"}},
    "teacher 20, rest, no n:m": {"scores": TEACHER, "objective": {"recipe": "kbucket"}},
    "SimCT, teacher 20": {"scores": TEACHER, "objective": {"recipe": "simct"}},
    "sampled path": {"scores": TEACHER, "objective": {"recipe": "sampled"}},
}
RATES = (4e-5, 8e-5, 1.6e-4)
SWEPT = 2
"""Seeds whose dev split chooses an arm's learning rate."""


def config_of(base: dict[str, Any], arm: str, rate: float, seed: int) -> Config:
    """The config of one run."""
    values = json.loads(json.dumps(base))
    chosen = ARMS[arm]
    values |= {"run": "run", "seed": seed, "audit": {"responses": 0}}
    values["scores"] = chosen["scores"]
    values["objective"] = chosen["objective"]
    values["weights"] = {"scheme": "iw_opd"} | base.get("weights", {}) | chosen.get("weights", {})
    values["rollouts"] = values.get("rollouts", {}) | {"top_k": chosen.get("top_k", 0)}
    values["train"] = values.get("train", {}) | {"learning_rate": rate}
    return parse_config(values, arm)


# ---- one run, in a worker ----


class Worker:
    """Models that stay in memory, and a folder in memory for what a run writes."""

    def __init__(self, base: dict[str, Any], prepared: Path) -> None:
        self.base, self.prepared = base, prepared
        self.folder = Path(tempfile.mkdtemp(prefix="opd-worker-", dir=prepared))
        os.chdir(self.folder)
        score.CHUNK_BYTES = 64 << 20  # several workers share a GPU
        self.student: Any = None
        self.teacher: Any = None
        for module in (rollouts, scores, units, evaluate):
            module.policy = lambda run, number: self.student  # type: ignore[attr-defined]
        for module in (scores, units):
            module.teacher = lambda run: self.teacher  # type: ignore[attr-defined]

    def open(self, config: Config) -> tuple[Run, Path]:
        """A fresh run."""
        shutil.rmtree("runs", ignore_errors=True)
        run = run_of(config)
        run.root.mkdir(parents=True)
        for name in ("prompts.parquet", "prompts.json"):
            (run.root / name).symlink_to(self.prepared / f"seed-{config.seed}" / "runs/run" / name)
        (run.root / "models").symlink_to(self.prepared / "seed-models" / "runs/run/models")
        where = Path("config.yaml")
        where.write_text(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True))
        if self.student is None:
            self.student, self.teacher = policy(run, 0), teacher(run)
            self.initial = {name: value.clone() for name, value in self.student.model.state_dict().items()}
        self.student.model.load_state_dict(self.initial)
        return run, where

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """Train and measure; figures of the run."""
        began = time.perf_counter()
        config = config_of(self.base, arm, rate, seed)
        run, where = self.open(config)
        torch.manual_seed(config.seed)
        optimiser = MasterAdamW(self.student.model, config.train)
        stop = torch.from_numpy(self.student.stop.astype("int64")).to(self.student.model.device)
        total, step, norms = sum(planned_steps(run, r) for r in run.rounds), 0, []
        for number in run.rounds:
            tables(run, where, f"round-{number}")
            shards = open_shards(run.phase(f"round-{number}"))
            steps = batches(
                shards,
                config.train.batch_size,
                config.train.micro_batch_tokens,
                seed + number,
                range(planned_steps(run, number)),
            )
            for batch in steps:
                rate_now = learning_rate(config.train, step, total)
                norms.append(train_step(self.student.model, stop, batch, optimiser, rate_now, config)["grad_norm"])
                step += 1
        del optimiser
        return {
            "arm": arm,
            "rate": rate,
            "seed": seed,
            **self.measured(run, where),
            "clipped": statistics.mean(norm > config.train.grad_clip for norm in norms),
            "bytes": run.phase("round-0")[0].scores.path.resolve().stat().st_size / run.phase("round-0")[0].scores.rows,
            "seconds": time.perf_counter() - began,
        }

    def measured(self, run: Run, where: Path) -> dict[str, Any]:
        """Accuracy on dev and test, and the KL on test."""
        found = {}
        table = open_prompts(run)
        for split in ("dev", "test"):
            rows = table.split(split)
            ids = self.student.renderer(table).ids(rows, self.student.context - run.config.rollouts.longest)
            longest = max(map(len, ids)) + run.config.rollouts.longest
            with open_sampler(self.student, longest, run.config.rollouts.batch_size) as sampler:
                judge = scorer(run.config.evaluate, run.config.prompts.source)
                right = held_out_answers(sampler, self.student, rows, ids, judge, run.config)["right"]
            found[split] = [bool(one) for one in right]
        phase = f"eval-{run.config.rollouts.rounds}"
        tables(run, where, phase)
        kl = on_policy_kl(self.student.model, self.student.stop, open_shards(run.phase(phase)), run.config)
        return found | {"kl": kl}


def tables(run: Run, where: Path, phase: str) -> None:
    """Sample, score, align and weigh a phase."""
    for shard in range(len(run.phase(phase))):
        rollouts.main(phase, shard, where, None)
        scores.main(phase, shard, where, None)
        units.main(phase, shard, where)
    weights.main(phase, where)


WORKER: Worker | None = None


def start(base: dict[str, Any], prepared: Path, threads: int) -> None:
    """A worker process begins."""
    global WORKER  # noqa: PLW0603 - what a pool's processes keep between their tasks
    processors.take(threads)
    WORKER = Worker(base, prepared)


def work(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """A task of a worker process."""
    assert WORKER
    with contextlib.redirect_stderr(Path(os.devnull).open("w")):
        return WORKER.run(arm, rate, seed)


# ---- all of them ----


def prepare(base: dict[str, Any], seeds: list[int], folder: Path) -> None:
    """Prompts of every seed, and the models once."""
    for seed in seeds:
        values = base | {"run": "run", "seed": seed}
        (folder / f"seed-{seed}").mkdir(parents=True)
        with contextlib.chdir(folder / f"seed-{seed}"):
            Path("config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
            prompts.main(Path("config.yaml"))
    (folder / "seed-models").mkdir()
    with contextlib.chdir(folder / "seed-models"):
        Path("config.yaml").write_text(yaml.safe_dump(base | {"run": "run"}, allow_unicode=True))
        models.main("student", Path("config.yaml"))
        models.main("teacher", Path("config.yaml"))


def best_rate(results: list[dict[str, Any]], arm: str, seeds: list[int]) -> float | None:
    """By dev accuracy over the seeds that choose; None where one of the runs is missing."""
    found: dict[float, list[float]] = {}
    for one in results:
        if one["arm"] == arm and one["seed"] in seeds[:SWEPT]:
            found.setdefault(one["rate"], []).append(statistics.mean(one["dev"]))
    if len(found) < len(RATES) or any(len(of_seeds) < len(seeds[:SWEPT]) for of_seeds in found.values()):
        return None
    return max(found, key=lambda rate: statistics.mean(found[rate]))


def wanted(results: list[dict[str, Any]], arms: list[str], seeds: list[int]) -> Iterator[tuple[str, float, int]]:
    """Runs that can be started and are not done: the sweep first, then every arm at its best rate."""
    done = {(one["arm"], one["rate"], one["seed"]) for one in results}
    for seed in seeds[:SWEPT]:
        for rate in sorted(RATES, key=lambda rate: abs(math.log(rate / RATES[1]))):
            yield from ((arm, rate, seed) for arm in arms if (arm, rate, seed) not in done)
    for seed in seeds[SWEPT:]:
        for arm in arms:
            rate = best_rate(results, arm, seeds)
            if rate is not None and (arm, rate, seed) not in done:
                yield arm, rate, seed


def table(results: list[dict[str, Any]], arms: list[str], seeds: list[int]) -> str:
    """Test figures of every arm at its best rate, as Markdown."""
    rows = []
    base: dict[int, dict[str, Any]] = {}
    for arm in arms:
        rate = best_rate(results, arm, seeds)
        runs = {one["seed"]: one for one in results if one["arm"] == arm and one["rate"] == rate}
        if not runs:
            continue
        base = base or runs
        accuracy = [100 * statistics.mean(one["test"]) for one in runs.values()]
        kl = [one["kl"]["sampled_kl"] for one in runs.values()]
        fixed = broken = 0
        for seed in runs.keys() & base.keys():
            pairs = list(zip(runs[seed]["test"], base[seed]["test"], strict=True))
            fixed += sum(a and not b for a, b in pairs)
            broken += sum(b and not a for a, b in pairs)
        rows.append(
            {
                "arm": arm,
                "rate": f"{rate:.1e}",
                "seeds": len(runs),
                "right %": spread(accuracy),
                "reverse KL": spread(kl, 3),
                "right where the first is wrong / the other way": f"{fixed} / {broken} (p {sign_test(fixed, broken):.2g})",
                "bytes a row": round(statistics.mean(one["bytes"] for one in runs.values()), 1),
                "steps clipped %": round(100 * statistics.mean(one["clipped"] for one in runs.values())),
            }
        )
    return markdown(pl.DataFrame(rows))


def spread(values: list[float], digits: int = 1) -> str:
    """Mean over seeds and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def sign_test(a: int, b: int) -> float:
    """Two-sided exact p of a against b under even odds: McNemar's."""
    n, k = a + b, min(a, b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 101, 202, 303, 404])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--out", default="results.jsonl")
    options = parser.parse_args()
    out = Path(options.out).absolute()
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    base = yaml.safe_load(Path(options.config).read_text())
    source = Path(base["prompts"]["source"])
    if source.exists():
        base["prompts"]["source"] = str(source.absolute())
    os.environ["OPD_CACHE"] = str(Path(os.environ.get("OPD_CACHE", "~/.cache/offline-opd")).expanduser())
    with tempfile.TemporaryDirectory(prefix="opd-trained-") as folder:
        prepare(base, options.seeds, Path(folder))
        deadline = time.monotonic() + 60 * options.minutes
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"), start, (base, Path(folder), options.threads))
        running: dict[Future[dict[str, Any]], tuple[str, float, int]] = {}
        with pool:
            while True:
                if time.monotonic() < deadline:
                    for task in wanted(results, options.arms, options.seeds):
                        if len(running) >= options.workers:
                            break
                        if task not in running.values():
                            running[pool.submit(work, *task)] = task
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    del running[future]
                    results.append(future.result())
                    with out.open("a") as lines:
                        lines.write(json.dumps(results[-1]) + "\n")
                    one = results[-1]
                    print(
                        f"{len(results)}: {one['arm']}, {one['rate']:.1e}, seed {one['seed']}: "
                        f"{100 * statistics.mean(one['test']):.1f} % right, KL {one['kl']['sampled_kl']:.3f}, "
                        f"{one['seconds']:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    print(table(results, options.arms, options.seeds))


if __name__ == "__main__":
    main()
