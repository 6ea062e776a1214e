"""Report: what a run came to and why, as one self-contained HTML file to decide by.

First a verdict in words and pictures, then what the teacher disagreed with, responses unit by unit, answers before and after,
training, coverage, cost, lineage and the reporting checklist.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from rich.table import Table

from pipeline.align.tokens import from_table
from pipeline.measure.accuracy import gain
from pipeline.measure.token_view import STOP_TEXT
from pipeline.store.records import read_record, write_record
from pipeline.store.shards import write_text
from schemas.config import consistency
from schemas.records import RunSummary
from stages.report import charts as plots
from stages.report import checklist, costs
from stages.report.disagreements import Read, compared, disagreements, responses
from stages.report.lineage import lineage
from stages.report.verdict import endings, reason, verdict, visible
from stages.run import console
from stages.run.card import counts, write_cards
from stages.run.context import DEFAULT_CONFIG, ConfigOption, tuning, vocabulary
from stages.run.results import read_diagnostics, read_evaluation, steps_of, timings
from stages.run.run import Run, command, config_text, open_run, run_of
from train.states import drop_states

NOT_MEASURED = "not measured"
ANSWER_BYTES, LONG = 700_000, 1_000
"""Of all answers in the page, about, and characters of one of their texts."""


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Write report.html and summary.json from what the run left, and drop the optimiser's state that nothing needs."""
    run = open_run(config_file, "report")
    config = run.config
    measured = [read_evaluation(run.phase(f"eval-{c}")) for c in run.checkpoints]
    results = [figures.model_dump(mode="json", exclude={"decided"}) for figures, _ in measured]
    answers = [table for _, table in measured]
    summary = summarise(run, results, answers)
    phases = [read_diagnostics(phase) for phase in run.phases]
    rounds = [figures for figures in phases if figures.phase.startswith("round")]
    sides = compared(run)
    student, _ = from_table(vocabulary(run, "student").read(), config.student.model)
    found = disagreements(sides, student) if sides else None
    flipped = flips(answers[0], answers[-1], summary["before"]["split"])
    page = (
        templates()
        .get_template("report.html.jinja")
        .render(
            config=config,
            config_text=config_text(config),
            summary=summary,
            verdict=verdict(summary, flipped),
            reason=found and reason(found, summary),
            disagreement=found,
            tokens=responses(sides, student) if sides else None,
            stop=STOP_TEXT,
            ends=evaluations(summary),
            answers=answered(answers[0], answers[-1]),
            sets=sets(summary),
            charts=charts(run, summary, dict(zip(whens(run.checkpoints), results, strict=True)), flipped, sides),
            warning=consistency(config, tuning(run)),
            rounds=rounds,
            endings=endings(rounds),
            cost=costs.cost(run, phases, summary["seconds"]),
            lineage=lineage(run),
            checklist=checklist.rows(rounds),
        )
    )
    write_text(run.root / "report.html", page)
    write_record(run.root / "summary.json", RunSummary(decided=run.decided, **summary))
    write_cards(run, summary)
    if not config.train.keep_last_state:  # no job that is to come asks for it
        for trained in (f"round-{run.rounds[-1]}", *(["sft"] if config.sft.prompts else [])):
            drop_states(run.phase(trained).states)
    console.say(f"report: {run.root / 'report.html'}")


def templates() -> jinja2.Environment:
    """The page's templates and their filters."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    of_numbers = {"percent": checklist.percent, "number": checklist.number}
    environment.filters |= of_numbers | {"gigabytes": costs.gigabytes, "duration": costs.duration, "visible": visible}
    return environment


def whens(checkpoints: Sequence[int | str]) -> list[str]:
    """What each evaluated checkpoint came before or after."""
    first, *between, _ = checkpoints
    tuned = first == "base"
    names = ["after sft" if number == 0 and tuned else f"after round {int(number) - 1}" for number in between]
    return ["before", *names, "after"]


def summarise(run: Run, results: Sequence[dict[str, Any]], answers: Sequence[pl.DataFrame]) -> dict[str, Any]:
    """The run's figures: results of each evaluated checkpoint, diagnostics of each phase, seconds of each job.

    Args:
        results, answers: of each evaluated checkpoint.
    """
    phases = [read_diagnostics(phase) for phase in run.phases]
    named = run_of(run.config)  # by the run's own name, wherever its copy lies
    before, *_, after = answers
    split = results[0]["split"]
    sft_jobs = ["sft-"] if run.config.sft.prompts else []
    # A phase that is only answered is none of `phases`.
    own_jobs = [f"{name}-" for name in (*(phase.phase for phase in phases), *(f"eval-{c}" for c in run.checkpoints))]
    of_set = {name: (before.filter(set=name), after.filter(set=name)) for name in (split, *results[0]["also"])}
    pairs = of_set[split][0].join(of_set[split][1], on=["prompt_id", "sample"], suffix="_after")
    greedy = results[0]["samples"] == 1 and bool(results[0]["judged"])
    return {
        "run": run.config.run,
        "before": results[0],
        "after": results[-1],
        "measured": list(results),
        "sft": sft(run, results[1]) if run.config.sft.prompts else None,
        "fixed": int((~pairs["right"] & pairs["right_after"]).sum()) if greedy else None,
        "broken": int((pairs["right"] & ~pairs["right_after"]).sum()) if greedy else None,
        "gain": {name: gain(first, last, run.config.seed) for name, (first, last) in of_set.items()},
        "reverse_kl_ratio": results[-1]["reverse_kl"] / results[0]["reverse_kl"] if results[0]["reverse_kl"] else None,
        "phases": [phase.model_dump(mode="json") for phase in phases],
        "teacher_tokens": dict(sum((Counter(phase.teacher.tokens) for phase in phases), Counter())),
        # Files that a longer run left behind don't count.
        "seconds": timings(run, "prompts", "also", "models-", "fit", *sft_jobs, *own_jobs),
        "checkpoint": str(named.checkpoint(run.rounds[-1])),
        "report": str(named.root / "report.html"),
    }


def sets(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of accuracy for people, a held-out set after the other, the run's own first: its label, what each of the
    `evaluations` found, and the gain."""
    before, samples = summary["before"], summary["before"]["samples"]
    how = f"avg@{samples}" if samples > 1 else "greedy"
    found = []
    for name in (before["split"], *before["also"]):
        of = [result["also"].get(name, result) for result in evaluations(summary).values()]
        label = f"held-out accuracy ({of[0]['judged']} items of {name}, {how})"
        found.append({"label": label, "ends": list(map(shown, of)), "gain": changed(summary["gain"][name])})
        for k in list(of[0]["pass_at_k"] or {})[1:]:  # pass@1 is avg@n
            passed = [one["pass_at_k"][k] if one["pass_at_k"] else None for one in of]
            cells = [spread(one["share"], one["share_95"]) if one else NOT_MEASURED for one in passed]
            found.append({"label": f"pass@{k} of {name}", "ends": cells, "gain": ""})
    return found


def shown(figures: dict[str, Any]) -> str:
    """Accuracy and its interval."""
    return NOT_MEASURED if figures["accuracy"] is None else spread(figures["accuracy"], figures["accuracy_95"])


def spread(share: float, interval: tuple[float, float]) -> str:
    """A share and its interval."""
    return f"{100 * share:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def changed(found: dict[str, Any] | None) -> str:
    """What `accuracy.gain` found, in points."""
    if found is None:
        return ""
    low, high = found["accuracy_95"]
    return f"{100 * found['accuracy']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), p {found['p']:.2g}"


def sft(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """What the fine-tuning left: counts of the answers, cross-entropy by epoch, and the evaluation after it."""
    phase = run.phase("sft")
    steps = steps_of(phase)
    per_epoch = len(steps) // run.config.sft.epochs
    epochs = steps.group_by(epoch=pl.col("step") // per_epoch).agg(
        (pl.col("loss") * pl.col("units")).sum() / pl.col("units").sum()
    )
    return {
        "after": result,
        **counts([place.rollouts.manifest for place in phase]),
        "steps": len(steps),
        "cross_entropy": epochs.sort("epoch")["loss"].to_list(),
        "checkpoint": str(run_of(run.config).phase("sft").checkpoint),
    }


def answered(before: pl.DataFrame, after: pl.DataFrame, budget: int = ANSWER_BYTES) -> dict[str, Any]:
    """Held-out answers before and after for the page, the broken ones first, then the fixed ones, then the wrong ones.

    Args:
        budget: bytes of all texts together, about.
    Returns:
        `rows`, each (set, prompt, reference, before, after, right before, right after); `cut`, characters that a text has at
        most, 0 where none was longer; `left_out`, rows that there was no room for; `several` sets; `unjudged` ones.
    """
    keys = ["set", "prompt_id", "sample"]
    both = before.join(after.select(*keys, "response", "right"), on=keys, suffix="_after", maintain_order="left")
    broken, fixed = pl.col("right") & ~pl.col("right_after"), ~pl.col("right") & pl.col("right_after")
    rank = pl.when(broken).then(0).when(fixed).then(1).when(~pl.col("right")).then(2).otherwise(3)
    said = ("prompt", "reference", "response", "response_after")
    rows = both.sort(rank, maintain_order=True).select("set", *said, "right", "right_after")
    too_long = rows.select(pl.any_horizontal((pl.col(said).str.len_chars() > LONG).any())).item()
    ending = pl.when(pl.col(said).str.len_chars() > LONG).then(pl.lit("…")).otherwise(pl.lit(""))
    size = pl.sum_horizontal(pl.col(said).str.len_bytes().fill_null(0)) + 40
    kept = rows.with_columns(pl.col(said).str.head(LONG) + ending).filter(size.cum_sum() <= budget)
    return {
        "rows": [list(row) for row in kept.rows()],
        "cut": LONG if too_long else 0,
        "left_out": len(rows) - len(kept),
        "several": rows["set"].n_unique() > 1,
        "unjudged": bool(rows["right"].null_count() or rows["right_after"].null_count()),
    }


def charts(
    run: Run,
    summary: dict[str, Any],
    results: Mapping[str, dict[str, Any]],
    flipped: Mapping[str, int],
    sides: Mapping[str, Read],
) -> dict[str, str]:
    """Inline SVG of each plot, by name; none of what was not measured.

    Args:
        results: of each evaluated checkpoint, by what it came before or after.
        flipped: what `flips` gives.
        sides: the phases whose disagreement is shown, likewise.
    """
    config = run.config
    rounds = [steps_of(run.phase(f"round-{r}")) for r in run.rounds]
    # A round none of whose units had a part of the loss has no column of it.
    steps = pl.concat(rounds, how="diagonal_relaxed").with_row_index("at")
    over = {"what sampled": "ess"}
    warped = (config.rollouts.temperature, config.rollouts.top_p) != (1, 1)
    if config.rollouts.replay or config.reuse or warped:  # else the same
        over["round's start"] = "drift_ess"
    own = [figures for figures in summary["phases"] if "@" not in figures["phase"]]
    trained = [figures for figures in own if figures["phase"].startswith("round")]
    drawn = {
        "accuracy": plots.measured(results, "accuracy", "held-out accuracy", share=True),
        "reverse_kl": plots.measured(results, "reverse_kl", "nats per token", share=False),
        "flips": plots.flips(flipped) if any(flipped.values()) else None,
        "losses": plots.losses(steps),
        "surrogate": plots.surrogate(steps),
        "sizes": plots.sizes(steps, over, config.train.min_ess),
        "moved": plots.moved(steps),
        "coverage": plots.covered(own),
        "credit": plots.credit(trained),
    }
    if sides:
        drawn["tenths"] = plots.by_tenth({when: read.found["tenths"] for when, read in sides.items()})
        drawn["kinds"] = plots.by_kind(next(iter(sides.values())).found["kinds"])
    if summary["sft"]:
        drawn["sft"] = plots.cross_entropy(steps_of(run.phase("sft")), summary["sft"]["steps"] // config.sft.epochs)
    if summary["seconds"]:
        drawn["cost"] = plots.seconds(costs.by_stage(summary["seconds"]))
    return {name: plots.svg(chart, plots.LABELS[name]) for name, chart in drawn.items() if chart is not None}


def flips(before: pl.DataFrame, after: pl.DataFrame, split: str) -> dict[str, int]:
    """Of the run's own held-out set, how many judged answers were fixed, broken, and stayed right or wrong; none of no such."""
    keys = ["prompt_id", "sample"]
    both = (
        before.filter(set=split)
        .join(after.filter(set=split), on=keys, suffix="_after")
        .drop_nulls(["right", "right_after"])
    )
    first, last = pl.col("right"), pl.col("right_after")
    cells = {
        "fixed": ~first & last,
        "broken": first & ~last,
        "stayed right": first & last,
        "stayed wrong": ~first & ~last,
    }
    return {
        name: int(count) for name, count in both.select(**{k: c.sum() for k, c in cells.items()}).to_dicts()[0].items()
    }


def evaluations(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The evaluations by what they came before or after, in order."""
    tuned = {"after sft": summary["sft"]["after"]} if summary["sft"] else {}
    return {"before": summary["before"], **tuned, "after": summary["after"]}


def by_round(run: Run, summary: dict[str, Any]) -> None:
    """Accuracy and KL of every checkpoint, where more were evaluated than the ends."""
    if not run.config.evaluate.every_round:
        return
    for name, label, digits in (("accuracy", "accuracy", "{:.1%}"), ("reverse_kl", "reverse KL, nats", "{:.3f}")):
        told = [
            f"{checkpoint}: {digits.format(result[name])}"
            for checkpoint, result in zip(run.checkpoints, summary["measured"], strict=True)
            if result[name] is not None
        ]
        if told:
            console.say(f"{label}, by checkpoint: {', '.join(told)}")


def print_summary(run: Run) -> None:
    """Before and after, and where the results are, on the terminal."""
    path = run.root / "summary.json"
    found = read_record(path, RunSummary, command("report"))
    run.check(path, found, "report")
    summary = found.model_dump(mode="json")
    table = Table(title=f"{summary['run']}: before and after", title_justify="left")
    ends = evaluations(summary)
    for heading in ("", *ends, "change, points"):
        table.add_column(heading, justify="left" if not heading else "right")

    def nats(result: dict[str, Any]) -> str:
        if result["reverse_kl"] is None:
            return NOT_MEASURED
        low, high = result["reverse_kl_95"]
        return f"{result['reverse_kl']:.3f} ({low:.3f} to {high:.3f})"

    for row in sets(summary):
        table.add_row(row["label"], *row["ends"], row["gain"])
    table.add_row("on-policy reverse KL, nats per token", *map(nats, ends.values()))
    table.add_row("answers that stop", *(f"{100 * result['stopped']:.0f} %" for result in ends.values()))
    console.console.print(table)
    by_round(run, summary)
    if summary["fixed"] is not None:
        console.say(f"{summary['fixed']} answers fixed, {summary['broken']} broken")
    by_origin = ", ".join(f"{count:,} {origin}" for origin, count in summary["teacher_tokens"].items())
    console.say(f"teacher tokens: {by_origin}")
    spent = summary["seconds"]
    console.say(f"{sum(spent.values()):.0f} s in {len(spent)} jobs" if spent else "times: not measured")
    console.say(f"model:  {summary['checkpoint']}  (AutoModelForCausalLM.from_pretrained)")
    console.say(f"report: {summary['report']}")
