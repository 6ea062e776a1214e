"""Report: before and after, training curves, coverage, credit by position and cost, as one self-contained HTML file."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import polars as pl
from rich.table import Table

from pipeline.align.units import KINDS
from pipeline.measure.accuracy import gain
from pipeline.store.records import read_record, write_record
from pipeline.store.shards import write_text
from schemas.config import consistency
from schemas.errors import masked
from schemas.records import RunSummary
from stages.report import checklist
from stages.run import console
from stages.run.card import counts, write_cards
from stages.run.context import DEFAULT_CONFIG, ConfigOption, tuning
from stages.run.results import read_diagnostics, read_evaluation, steps_of, timings
from stages.run.run import Run, command, config_text, open_run

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NOT_MEASURED = "not measured"


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Write report.html and summary.json from what the run left."""
    run = open_run(config_file, "report")
    config = run.config
    measured = [read_evaluation(run.phase(f"eval-{c}")) for c in run.checkpoints]
    results = [figures.model_dump(mode="json", exclude={"decided"}) for figures, _ in measured]
    answers = [table for _, table in measured]
    summary = summarise(run, results, answers)
    rounds = [read_diagnostics(phase) for number in run.rounds for phase in run.trained_on(number)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": checklist.percent, "number": checklist.number}
    page = environment.from_string(TEMPLATE.read_text()).render(
        config=config,
        config_text=masked(config_text(config)),
        summary=summary,
        ends=evaluations(summary),
        examples=examples(answers[0], answers[-1], config.evaluate.split),
        sets=sets(summary),
        charts=charts(run, summary),
        warning=consistency(config, tuning(run)),
        rounds=rounds,
        checklist=checklist.rows(rounds),
    )
    write_text(run.root / "report.html", page)
    write_record(run.root / "summary.json", RunSummary(decided=run.decided, **summary))
    write_cards(run, summary)
    console.say(f"report: {run.root / 'report.html'}")


def summarise(run: Run, results: Sequence[dict[str, Any]], answers: Sequence[pl.DataFrame]) -> dict[str, Any]:
    """The run's figures: results of each evaluated checkpoint, diagnostics of each phase, seconds of each job.

    Args:
        results, answers: of each evaluated checkpoint.
    """
    phases = [read_diagnostics(phase) for phase in run.phases]
    before, *_, after = answers
    split = results[0]["split"]
    sft_jobs = ["sft-"] if run.config.sft.prompts else []
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
        "seconds": timings(
            run, "prompts", "also", "models-", "fit", *sft_jobs, *(f"{phase.phase}-" for phase in phases)
        ),
        "checkpoint": str(run.checkpoint(run.rounds[-1])),
        "report": str(run.root / "report.html"),
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
        "checkpoint": str(phase.checkpoint),
    }


def examples(before: pl.DataFrame, after: pl.DataFrame, split: str, count: int = 8) -> list[dict[str, Any]]:
    """The first held-out prompts with an answer each before and after, as rows for the page."""
    joined = (
        before.join(after, on=["prompt_id", "sample"], suffix="_after", maintain_order="left")
        .filter(set=split, sample=0)
        .head(count)
    )
    return joined.to_dicts()


def charts(run: Run, summary: dict[str, Any]) -> dict[str, str]:
    """Inline SVG of each plot, by name; none of what was not measured."""
    config = run.config
    rounds = [steps_of(run.phase(f"round-{r}")) for r in run.rounds]
    # A round none of whose units had a part of the loss has no column of it.
    steps = pl.concat(rounds, how="diagonal_relaxed").with_row_index("at")
    told = {"sampled, all units": "sampled_kl", "over candidates": "divergence"}
    curve = _lines(steps, {name: key for name, key in told.items() if key in steps.columns}, "nats per unit")
    curves = [curve.properties(width=330, height=200)]
    if "surrogate" in steps.columns:  # on a scale of its own, which means nothing
        path = _lines(steps, {"sampled path": "surrogate"}, "surrogate")
        curves.append(path.properties(width=330, height=70))
    over = {"what sampled": "ess"}
    warped = (config.rollouts.temperature, config.rollouts.top_p) != (1, 1)
    if config.rollouts.replay or config.reuse or warped:  # else the same
        over["round's start"] = "drift_ess"
    drift = _lines(steps, over, "effective sample size", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    if config.train.min_ess is not None:
        bound = alt.Chart(pl.DataFrame({"value": [config.train.min_ess]}))
        drift = drift + bound.mark_rule(color="#b42318").encode(y="value:Q")
    mean, spread = pl.col("response_log_ratio"), pl.col("response_log_ratio_sd")
    responses = steps.select("at", "round", mean=mean, low=mean - spread, high=mean + spread)
    moved = _lines(responses, {"responses": "mean"}, "log-ratio, nats per unit") + alt.Chart(responses).mark_rule(
        opacity=0.4
    ).encode(x=STEP, y="low:Q", y2="high:Q", color=ROUND)
    ends = pl.DataFrame(
        [
            dict(
                zip(
                    ("when", "accuracy", "low", "high", "kl", "kl_low", "kl_high"),
                    (
                        when,
                        r["accuracy"],
                        *(r["accuracy_95"] or (None, None)),
                        r["reverse_kl"],
                        *(r["reverse_kl_95"] or (None, None)),
                    ),
                    strict=True,
                )
            )
            for when, r in evaluations(summary).items()
        ]
    )
    order = alt.X("when:N", sort=list(evaluations(summary)), title=None, axis=alt.Axis(labelAngle=0))
    accuracy = alt.Chart(ends).mark_bar(size=40).encode(
        x=order, y=alt.Y("accuracy:Q", title="held-out accuracy", axis=alt.Axis(format="%"))
    ) + alt.Chart(ends).mark_rule().encode(x=order, y="low:Q", y2="high:Q")
    kl = alt.Chart(ends).mark_bar(size=40, color="#e45756").encode(
        x=order, y=alt.Y("kl:Q", title="on-policy reverse KL, nats per token")
    ) + alt.Chart(ends).mark_rule().encode(x=order, y="kl_low:Q", y2="kl_high:Q")
    own = [figures for figures in summary["phases"] if "@" not in figures["phase"]]
    coverage = pl.DataFrame(
        [
            {"phase": figures["phase"], "kind": kind, "share": share, "order": KINDS.index(kind)}
            for figures in own
            for kind, share in figures["coverage"]["kinds"].items()
        ]
    )
    covered = (
        alt.Chart(coverage)
        .mark_bar()
        .encode(
            y=alt.Y("phase:N", title=None, sort=None),
            x=alt.X(
                "share:Q", title="share of student tokens", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
            ),
            color=alt.Color("kind:N", sort=list(KINDS), title="unit"),
            order="order:Q",
        )
    )
    deciles = pl.DataFrame(
        [
            {"phase": figures["phase"], "decile": int(decile), "share": share}
            for figures in own
            if figures["phase"].startswith("round")
            for decile, share in figures["credit"]["advantage_share"].items()
        ]
    )
    by_tenth = (
        alt.Chart(deciles)
        .mark_line(point=True)
        .encode(
            x=alt.X("decile:O", title="tenth of the response", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of |advantage|", axis=alt.Axis(format="%")),
            color=alt.Color("phase:N", title=None),
        )
    )
    measured = [
        chart.properties(width=170, height=200)
        for name, chart in (("accuracy", accuracy), ("reverse_kl", kl))
        if summary["before"][name] is not None
    ]
    drawn = {
        "ends": alt.hconcat(*measured) if measured else None,
        "curve": alt.vconcat(*curves).resolve_scale(x="shared"),
        "drift": alt.vconcat(drift.properties(width=330, height=130), moved.properties(width=330, height=130)),
        "coverage": covered.properties(width=330),
        "credit": by_tenth.properties(width=330, height=180),
    }
    if summary["sft"]:
        losses = steps_of(run.phase("sft"))
        per_epoch = summary["sft"]["steps"] // config.sft.epochs
        by_epoch = losses.select(at=pl.col("step"), round=pl.col("step") // per_epoch, loss="loss")
        drawn["sft"] = _lines(by_epoch, {"answers": "loss"}, "cross-entropy, nats per token", of="epoch").properties(
            width=330, height=160
        )
    if summary["seconds"]:
        cost = pl.DataFrame({"job": list(summary["seconds"]), "seconds": list(summary["seconds"].values())})
        drawn["cost"] = (
            alt.Chart(cost)
            .mark_bar()
            .encode(y=alt.Y("job:N", sort="-x", title=None), x=alt.X("seconds:Q", title="wall seconds"))
            .properties(width=400)
        )
    return {name: svg(chart) for name, chart in drawn.items() if chart is not None}


STEP = alt.X("at:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, format="d"))
ROUND = alt.Color("round:N", title="round")


def _lines(steps: pl.DataFrame, told: dict[str, str], title: str, of: str = "round", **options: Any) -> alt.LayerChart:
    """Figures of every step, one line each; `told` names their columns for people, `of` what the column `round` counts."""
    table = steps.select("at", "round", **told).unpivot(index=["at", "round"], variable_name="of")
    colour = alt.Color("round:N", title=of)
    chart = alt.Chart(table.drop_nulls()).encode(x=STEP, y=alt.Y("value:Q", title=title, **options), color=colour)
    lines = chart.mark_line()
    if len(told) > 1:
        legend = alt.Legend(symbolType="stroke", symbolStrokeColor="#444", symbolSize=300)
        lines = lines.encode(strokeDash=alt.StrokeDash("of:N", title=None, sort=list(told), legend=legend))
    # A line's own points would fill the legend's strokes, which have nothing to fill.
    return lines + chart.mark_circle(opacity=1)


def svg(chart: alt.TopLevelMixin) -> str:
    """A chart as SVG text; no script, no network."""
    out = io.StringIO()
    chart.save(out, format="svg")
    return out.getvalue()


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
