"""Plan: sample, score and train on a few prompts, and say what a run will keep, cost and take."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.table import Table

from pipeline import own_code
from pipeline.infer.engines import open_sampler, open_teacher
from pipeline.infer.shard_scores import ShardScores
from schemas.config import Config, Recipe
from schemas.errors import OpdError
from schemas.tables import arrow_schema, writer_options
from stages import models, prompts, rollouts, scores, train, units, weights
from stages.run import console, processors
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, open_prompts, policy, teacher
from stages.run.results import steps_of
from stages.run.run import open_run, run_of
from stages.run.workflow import own_code_in
from stages.tools.choices import RECORDED, SUGGESTED, Choice, compare
from stages.tools.folders import from_anywhere

WIDTH = 512
"""Candidates looked at; what a rule would keep beyond them is not seen."""
FIXED = (8, 16, 20, 32, 64, 128, 256)
FLOORS = (0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002)
MASSES = (0.9, 0.99)
OPENED_FOR = 1024
"""Longest prompt and response that an engine is opened for, at most, when its opening is timed, which hardly depends on it."""
MEASURED = 32
"""Prompts to measure on, where it isn't said."""
VARIANTS = (1, 2, 5)
"""Runs (other students, objectives, learning rates) that the offline and online costs are compared for."""


def main(
    config_file: ConfigOption = DEFAULT_CONFIG,
    responses: Annotated[
        int | None,
        typer.Option(min=2, help=f"prompts to measure on; without it {MEASURED}, or all where there are fewer"),
    ] = None,
    rollout_rate: Annotated[
        float | None, typer.Option(min=0.1, max=1e12, help="student tokens sampled per second there")
    ] = None,
    score_rate: Annotated[
        float | None, typer.Option(min=0.1, max=1e12, help="teacher tokens per second there, prompts too")
    ] = None,
    train_rate: Annotated[
        float | None, typer.Option(min=0.1, max=1e12, help="student tokens trained per second there")
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            help="compare the loss's gradient with exact reverse KL's; holds the student, and the teacher in `transformers`, "
            "in memory at once"
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Measure k and mass against covered mass, KL and bytes; how near the loss's gradient is to that of exact reverse KL; hours
    and disk of the run; where offline beats online.

    Rates are measured on this machine, unless they are given, for another one.
    """
    config = open_run(config_file).config
    for reference in own_code_in(config.model_dump(mode="json")):
        own_code.load(reference, reference)  # one's own is found from here, not from the folder below
    processors.take(threads)
    with tempfile.TemporaryDirectory(prefix="opd-plan-") as folder:
        small = _small(config, responses or min(MEASURED, config.prompts.splits.train))
        where = Path(folder) / "config.yaml"
        where.write_text(yaml.safe_dump(small.model_dump(mode="json"), allow_unicode=True))
        with contextlib.chdir(folder):
            horizons = [config.rollouts.horizon(number) for number in range(config.rollouts.rounds)]
            measured = _measure(small, where, horizons)
            own = Choice("this config", _section(config, "scores"), _section(small, "objective"), config.rollouts.top_k)
            choices = [own, *SUGGESTED] if gradients else []
            measured["choices"] = compare(small.model_dump(mode="json"), choices, parameters=False) if choices else []
    rates = {"rollouts": rollout_rate, "scores": score_rate, "train": train_rate}
    measured["rates"] |= {name: rate for name, rate in rates.items() if rate}
    result = measured | {"costs": costs_of(config, measured)}
    if as_json:
        console.out.print(json.dumps(result), markup=False, soft_wrap=True)
        return
    _print(config, result)


def _section(config: Config, name: str) -> dict[str, Any]:
    found: dict[str, Any] = getattr(config, name).model_dump(mode="json")
    return found


def _small(config: Config, responses: int) -> Config:
    """The config of a run of one round over a few prompts that keeps as many candidates as may be asked about.

    Its responses are as long as any round's; those of a shorter horizon begin like them.
    """
    values = from_anywhere(config)
    splits = values["prompts"]["splits"]
    if responses > splits["train"]:
        raise OpdError(f"--responses {responses}: prompts.splits.train is {splits['train']}")
    values["run"], values["reuse"] = "plan", []
    values["rollouts"] |= {"rounds": 1, "prompts": responses, "samples": 1, "shard_size": responses}
    values["rollouts"]["shard_tokens"] = responses * config.rollouts.longest
    if values["weights"]["credit"] == "group":  # which takes several responses to a prompt, as a reward does
        values["weights"]["credit"] = "immediate"
    values["weights"] |= {"reward": "none", "gate": {}}  # nothing is judged
    values["objective"] |= {"reward": 0.0, "reward_clip": Recipe.model_fields["reward_clip"].default}
    values["rollouts"]["max_new_tokens"] = config.rollouts.longest
    values["rollouts"]["top_k"] = max(RECORDED, config.rollouts.top_k)
    values["scores"] |= {"support": "teacher", "min_p": 0.0, "mass": 1.0, "k_max": WIDTH}
    values["audit"] |= {"responses": 0}
    values["evaluate"] |= {"kl_items": 0}
    values["sft"]["prompts"] = 0  # of the student as given
    return Config.model_validate(values)


def _measure(config: Config, where: Path, horizons: list[int]) -> dict[str, Any]:
    """Run the stages once; rates are of the work itself, without what it takes to open an engine and its model.

    `horizons` are the rounds', whose shares of the response tokens that were sampled are measured.
    """
    phase, run = "round-0", run_of(config)
    place = run.phase(phase)[0]
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)
    student, judge = policy(run, 0), teacher(run)
    # Opened for others than the two above, which would keep the models in memory.
    opened_for = min(OPENED_FOR, config.rollouts.longest)
    load = {
        "rollouts": _opening(open_sampler(policy(run, 0), opened_for, config.rollouts.batch_size)),
        "scores": _opening(open_teacher(teacher(run), opened_for, config.scores.batch_tokens)),
    }
    spent = {
        "rollouts": _seconds(lambda: rollouts.main(phase, 0, where, None)) - load["rollouts"],
        "scores": _seconds(lambda: scores.main(phase, 0, where, None)) - load["scores"],
    }
    units.main(phase, 0, where)
    weights.main(phase, where)
    train.main(0, where, None)
    sampled, table = place.rollouts.read(), place.scores.read()
    wanted = ShardScores(
        config,
        place.rollouts,
        open_prompts(run),
        judge,
        student,
    )
    teacher_prompts = sum(len(ids) for group in wanted.teacher_prompts for ids in group)
    rows = len(sampled)
    counts = sampled["response_ids"].combine_chunks().value_lengths().to_numpy()
    lengths = {
        "student_prompt": _mean_length(sampled["prompt_ids"]),
        "student_response": _mean_length(sampled["response_ids"]),
        "teacher_prompt": teacher_prompts / rows,
        "teacher_response": len(table) / rows - 1,
    }
    steps = steps_of(place.phase)
    # The first step warms the allocator up.
    rate = steps.tail(max(1, len(steps) - 1)).select(pl.col("tokens").sum() / pl.col("seconds").sum()).item()
    return {
        "responses": rows,
        "lengths": lengths,
        "kept": [float(np.minimum(counts, horizon).sum() / counts.sum()) for horizon in horizons],
        "rates": {
            "rollouts": rows * lengths["student_response"] / max(spent["rollouts"], 1e-3),
            "scores": rows * (lengths["teacher_prompt"] + lengths["teacher_response"]) / max(spent["scores"], 1e-3),
            "train": float(rate),
        },
        "rules": what_rules_keep(table, len(judge.vocabulary)),
        "teacher_bytes": _weights_bytes(judge.ref.path),
        "student_bytes": _weights_bytes(student.ref.path),
    }


def _opening(engine: AbstractContextManager[Any]) -> float:
    """Seconds until an engine is ready."""
    began = time.perf_counter()
    with engine:
        return time.perf_counter() - began


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _mean_length(column: pa.ChunkedArray) -> float:
    return float(np.mean(column.combine_chunks().value_lengths().to_numpy()))


def _weights_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def what_rules_keep(table: pa.Table, vocabulary: int) -> list[dict[str, Any]]:
    """What each rule keeps: candidates, mass, KL(full || kept and a uniform rest), bytes per teacher token."""
    counts = table["cand_id"].combine_chunks().value_lengths().to_numpy()
    flat = {name: table[name].combine_chunks().flatten().to_numpy() for name in ("cand_id", "cand_logp")}
    p = np.exp(flat["cand_logp"].astype(np.float64))
    row = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    stop = np.exp(table["stop_logp"].to_numpy().astype(np.float64))
    before = np.cumsum(p) - p
    before -= np.repeat(before[np.cumsum(counts) - counts], counts) - stop[row]  # every row has candidates
    keeps = {
        **{f"k_max {k}": rank < k for k in FIXED},
        **{f"min_p {floor:g}": (p >= floor) | (rank == 0) for floor in FLOORS},
        **{f"mass {mass:g}": before < mass for mass in MASSES},
    }
    found = []
    for name, keep in keeps.items():
        kept = np.bincount(row[keep], minlength=len(counts))
        held = np.bincount(row[keep], p[keep], len(counts)) + stop
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = np.clip(1 - held, 1e-9, None)
            inside = np.bincount(row[keep], (p * flat["cand_logp"])[keep], len(counts)) + np.where(
                stop > 0, stop * np.log(stop), 0
            )
            kl = -table["entropy"].to_numpy() - inside - tail * np.log(tail / np.maximum(vocabulary - kept - 1, 1))
        found.append(
            {
                "rule": name,
                "kept": float(kept.mean()),
                "mass": float(np.minimum(held, 1).mean()),
                # Below the rounding of the stored numbers it is nothing.
                "kl": max(0.0, float(kl.mean())),
                "bytes_per_token": _bytes(table, kept, {n: v[keep] for n, v in flat.items()}) / len(table),
            }
        )
    return found


def _bytes(table: pa.Table, kept: np.ndarray, flat: dict[str, np.ndarray]) -> int:
    """Compressed bytes of all columns, as a shard would hold these candidates."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(kept)]), pa.int32())
    columns = {
        name: pa.ListArray.from_arrays(offsets, pa.array(flat[name])) if name in flat else table[name]
        for name in table.column_names
    }
    buffer = io.BytesIO()
    cut = pa.table(columns).cast(arrow_schema("scores"))
    pq.write_table(cut, buffer, compression="zstd", compression_level=3, **writer_options("scores"))
    about = pq.read_metadata(buffer)
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    return sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))


def costs_of(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """Tokens, hours and bytes of the configured run, and hours of several variants offline and online.

    Of rounds that it reuses the run samples and scores nothing; held-out answers are counted as long as those that were
    measured. Not counted: the teacher's answers of `sft`, log-probs under other policies (`reuse`, `replay`, a reference), the
    on-policy KL's forward pass, audits, and opening models.
    """
    run, rates = run_of(config), measured["rates"]
    each = _TokensEach(**measured["lengths"])
    phases = [run.phase(f"round-{number}") for number in run.rounds]
    rounds = [(phase.responses, phase.responses * kept) for phase, kept in zip(phases, measured["kept"], strict=True)]
    scored = [of for phase, of in zip(phases, rounds, strict=True) if not (phase.source and phase.source.is_scored)]
    sampled = [of for phase, of in zip(phases, rounds, strict=True) if not phase.source]
    trained = [rounds[part.sampled_in.number] for number in run.rounds for part in run.trained_on(number)]
    kl = (run.kl_items * len(run.checkpoints),) * 2
    asked = config.held_out + sum(one.count for one in config.evaluate.also.values())
    answers = (asked * config.evaluate.samples * len(run.checkpoints),) * 2
    tuned = (config.sft.prompts * config.sft.samples,) * 2
    evaluated = {"rollouts": each.sampled([kl, answers]), "scores": each.scored([kl])}
    tokens = {
        "rollouts": each.sampled(sampled),
        "scores": each.scored(scored),
        "train": config.train.epochs * each.trained(trained),
        **({"sft": config.sft.epochs * each.trained([tuned])} if config.sft.prompts else {}),
        "evaluate": sum(evaluated.values()),
    }
    rates = rates | {"sft": rates["train"]}
    hours = {name: tokens[name] / rates[name] / 3600 for name in tokens if name != "evaluate"}
    hours["evaluate"] = sum(evaluated[name] / rates[name] / 3600 for name in evaluated)
    # Variants offline: other objectives, weights or students on the same rollouts and scores; online each makes its own.
    own = sum(of for name, of in hours.items() if name not in ("rollouts", "scores"))
    shared = (each.sampled(rounds) / rates["rollouts"] + each.scored(rounds) / rates["scores"]) / 3600
    return {
        "responses": sum(count for count, _ in rounds),
        "tokens": tokens,
        "hours": hours,
        "scored_tokens": sum(whole * each.teacher_response + count for count, whole in [*scored, kl]),
        "variants": [
            {"runs": n, "offline_hours": shared + n * own, "online_hours": n * (shared + own)} for n in VARIANTS
        ],
    }


@dataclass(frozen=True)
class _TokensEach:
    """Mean tokens of a prompt and of a response, and of groups of them: each group is how many responses, and how many whole
    ones their tokens would make, cut ones counted by what is left of them."""

    student_prompt: float
    student_response: float
    teacher_prompt: float
    teacher_response: float

    def sampled(self, groups: Sequence[tuple[float, float]]) -> float:
        """Tokens that the student samples."""
        return sum(whole * self.student_response for _, whole in groups)

    def scored(self, groups: Sequence[tuple[float, float]]) -> float:
        """Tokens that the teacher reads."""
        return sum(count * self.teacher_prompt + whole * self.teacher_response for count, whole in groups)

    def trained(self, groups: Sequence[tuple[float, float]]) -> float:
        """Tokens that the student reads once in training."""
        return sum(count * self.student_prompt + whole * self.student_response for count, whole in groups)


def _print_choices(exact: dict[str, Any], *choices: dict[str, Any]) -> None:
    table = Table(title="what the loss optimises, beside exact reverse KL", title_justify="left")
    for heading in ("candidates and the rest", "cosine of gradients", "size of gradient", "bytes a token"):
        table.add_column(heading, justify="left" if heading.startswith("candidates") else "right")
    for row in choices:
        figures = (f"{row['cos_hidden']:.2f}", f"{row['norm_to_exact']:.2f}", f"{row['bytes_per_row']:.0f}")
        table.add_row(row["choice"], *figures)
    console.out.print(table)
    console.out.print(
        f"in the last hidden states, {exact['units']:,} units, weights left out; a truer gradient is not yet a better student: "
        "docs/losses.md\n"
    )


def _print(config: Config, result: dict[str, Any]) -> None:
    costs, lengths = result["costs"], result["lengths"]
    console.out.print(
        f"{config.run}, measured on {result['responses']} responses: {lengths['teacher_response']:.1f} teacher and "
        f"{lengths['student_response']:.1f} student tokens each"
    )
    table = Table(title="what to keep of the teacher", title_justify="left")
    for heading in ("rule", "candidates", "mass held", "KL error, nats", "bytes a token", "disk"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for rule in result["rules"]:
        disk = rule["bytes_per_token"] * costs["scored_tokens"] / 1e6
        figures = (f"{rule['kept']:.1f}", f"{100 * rule['mass']:.2f} %", f"{rule['kl']:.3f}")
        table.add_row(rule["rule"], *figures, f"{rule['bytes_per_token']:.0f}", f"{disk:,.2f} MB")
    console.out.print(table)
    chosen = config.scores
    console.out.print(f"the config keeps min_p {chosen.min_p:g}, mass {chosen.mass:g}, k_max {chosen.k_max}\n")
    if result["choices"]:
        _print_choices(*result["choices"])
    table = Table(title=f"what the run takes, {costs['responses']:,} responses", title_justify="left")
    for heading in ("stage", "tokens", "tokens/s", "hours"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, tokens in costs["tokens"].items():
        rate = result["rates"].get({"sft": "train"}.get(name, name))
        table.add_row(name, f"{tokens:,.0f}", f"{rate:,.0f}" if rate else "", f"{costs['hours'][name]:,.3f}")
    table.add_row("all", "", "", f"{sum(costs['hours'].values()):,.3f}")
    console.out.print(table)
    console.out.print(
        "evaluate: held-out answers and the on-policy KL's rollouts and scores. Reused rounds are neither sampled nor scored. "
        "Not counted: sft's answers of the teacher, log-probs under other policies, audits, opening models\n"
    )
    table = Table(title="offline against online, hours", title_justify="left")
    for heading in ("runs on the same prompts", "offline", "online", "ratio"):
        table.add_column(heading, justify="right")
    for row in costs["variants"]:
        ratio = row["online_hours"] / row["offline_hours"]
        table.add_row(str(row["runs"]), f"{row['offline_hours']:,.3f}", f"{row['online_hours']:,.3f}", f"{ratio:.2f}x")
    console.out.print(table)
    console.out.print(
        f"A run of its own costs the same either way; from the second on, offline saves sampling and scoring. Online also "
        f"keeps the teacher's {result['teacher_bytes'] / 1e9:.2f} GB beside the student's "
        f"{result['student_bytes'] / 1e9:.2f} GB while training; offline keeps none of it."
    )


if __name__ == "__main__":
    console.run(main)
