"""The report's plots, as inline SVG that takes its colours from the page, light or dark, and shrinks with it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from pipeline.align.units import CONTEXT, KINDS

WIDTH, HEIGHT = 262, 170
"""Of a plot, without axes: with them it is as wide as a phone's page."""
COLOURS = {"#010101": "currentColor", "#020202": "var(--muted)", "#030303": "var(--line)"} | {
    f"#0{n}0{n}f{n}": f"var(--c{n})" for n in range(1, 9)
}
"""What a chart is drawn with, and what of the page's style stands for it."""
INK, MUTED, LINE, *SERIES = COLOURS
STEP = alt.X("at:Q", title="optimiser step", axis=alt.Axis(tickMinStep=1, format="d", tickCount=5))
LABELS = {
    "accuracy": "held-out accuracy of each evaluated checkpoint with its interval",
    "reverse_kl": "reverse KL to the teacher of each evaluated checkpoint with its interval",
    "flips": "number of answers that were fixed, broken, and stayed right or wrong",
    "tenths": "lost nats per unit by tenth of the response",
    "kinds": "share of tokens and of lost nats by kind of unit",
    "losses": "reverse KL of each training step",
    "surrogate": "surrogate of the sampled path of each training step",
    "sizes": "effective sample size of each training step",
    "moved": "log-ratio of responses of each training step",
    "coverage": "share of student tokens by kind of unit and phase",
    "credit": "share of the absolute advantage by tenth of the response",
    "sft": "cross-entropy of each step of the fine-tuning",
    "cost": "wall seconds by stage",
}
"""Each plot in words, by its name."""
FONT = "system-ui, sans-serif"


def svg(chart: alt.TopLevelMixin, label: str) -> str:
    """A chart as SVG text, which needs no script and no network; `label` is what it shows, in words."""
    out = io.StringIO()
    styled(chart).save(out, format="svg")
    text = out.getvalue()
    for drawn, of_page in COLOURS.items():
        text = text.replace(f'"{drawn}"', f'"{of_page}"')
    # The words for who can't see it; a chart's own name each of its marks.
    text = re.sub(r' aria-(label|roledescription)="[^"]*"| role="[^"]*"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def styled(chart: alt.TopLevelMixin) -> Any:
    """In the page's colours and letters, legends below so that it stays narrow."""
    return (
        chart.configure(background="transparent", font=FONT, padding={"left": 12, "right": 12, "top": 5, "bottom": 5})
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=MUTED,
            titleColor=MUTED,
            titleFontWeight="normal",
            gridColor=LINE,
            domainColor=LINE,
            tickColor=LINE,
        )
        .configure_legend(orient="bottom", labelColor=MUTED, titleColor=MUTED, titleFontWeight="normal", columns=3)
        .configure_text(color=INK)
        .configure_range(category=SERIES)
    )


def sized(chart: Any, height: int = HEIGHT) -> Any:
    """As all plots are."""
    return chart.properties(width=WIDTH, height=height)


def measured(results: Mapping[str, dict[str, Any]], key: str, title: str, share: bool) -> Any:
    """A figure of each evaluated checkpoint with its interval; None where it was not measured.

    Args:
        results: by what the checkpoint came before or after.
        key: `accuracy` or `reverse_kl`, whose interval is `<key>_95`.
        share: whether it is one, rather than nats.
    """
    rows = [
        {"when": when, "value": found[key], "low": found[f"{key}_95"][0], "high": found[f"{key}_95"][1]}
        for when, found in results.items()
        if found[key] is not None
    ]
    if not rows:
        return None
    chart = alt.Chart(pl.DataFrame(rows)).encode(
        x=alt.X("when:N", sort=list(results), title=None, axis=alt.Axis(labelAngle=0), scale=alt.Scale(padding=0.5))
    )
    axis = alt.Axis(format="%") if share else alt.Axis()
    line = chart.mark_line(color=SERIES[0], point={"color": SERIES[0], "size": 60, "filled": True})
    words = alt.Text("value:Q", format=".1%" if share else ".3f")
    dx = -7 if rows[-1]["value"] > rows[0]["value"] else 7  # where the line is not
    label = chart.mark_text(dx=dx, dy=-8, align="right" if dx < 0 else "left", fontWeight="bold")
    return sized(
        line.encode(y=alt.Y("value:Q", title=title, axis=axis, scale=alt.Scale(zero=True, nice=True)))
        + chart.mark_rule(color=SERIES[0], strokeWidth=2).encode(y="low:Q", y2="high:Q")
        + label.encode(y="value:Q", text=words)
    )


def flips(counts: Mapping[str, int]) -> Any:
    """How many answers were fixed, broken, and stayed as they were."""
    table = pl.DataFrame({"answers": list(counts), "count": list(counts.values())})
    chart = alt.Chart(table).encode(
        y=alt.Y("answers:N", sort=list(counts), title=None),
        x=alt.X("count:Q", title="answers", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5)),
    )
    colour = alt.Color(
        "answers:N", scale=alt.Scale(domain=list(counts), range=[SERIES[n] for n in (2, 1, 0, 7)]), legend=None
    )
    return sized(
        chart.mark_bar().encode(color=colour) + chart.mark_text(dx=4, align="left").encode(text="count:Q"), 110
    )


def by_tenth(tables: dict[str, pl.DataFrame]) -> Any:
    """Lost nats per unit by tenth of the response, a line a phase."""
    rows = [table.select("tenth", lost=pl.col("lost") / pl.col("count"), of=pl.lit(of)) for of, table in tables.items()]
    return sized(
        alt.Chart(pl.concat(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("tenth:O", title="tenth of the response", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("lost:Q", title="lost nats per unit"),
            color=alt.Color("of:N", title=None, sort=list(tables)),
        )
    )


def by_kind(table: pl.DataFrame) -> Any:
    """Share of the student's tokens and of the lost nats by kind of unit."""
    shares = table.select("kind", **{"tokens": pl.col("tokens") / pl.col("tokens").sum()}).join(
        table.select("kind", **{"lost nats": pl.col("lost") / pl.col("lost").sum()}), on="kind"
    )
    chart = alt.Chart(shares.unpivot(index="kind", variable_name="of", value_name="share").drop_nulls())
    return sized(
        chart.mark_bar().encode(
            y=alt.Y("kind:N", title=None, sort=list(KINDS)),
            yOffset=alt.YOffset("of:N", sort=["tokens", "lost nats"]),
            x=alt.X("share:Q", title="share", axis=alt.Axis(format="%")),
            color=alt.Color("of:N", title=None, sort=["tokens", "lost nats"]),
        ),
        max(80, 34 * len(shares)),
    )


def losses(steps: pl.DataFrame) -> Any:
    """The trainer's estimates of reverse KL, step by step."""
    told = {"sampled, all units": "sampled_kl", "over candidates": "divergence"}
    return sized(lines(steps, {name: key for name, key in told.items() if key in steps.columns}, "nats per unit"))


def surrogate(steps: pl.DataFrame) -> Any:
    """The sampled path's, on a scale of its own, which means nothing; None where the recipe has none."""
    return sized(lines(steps, {"sampled path": "surrogate"}, "surrogate"), 90) if "surrogate" in steps.columns else None


def sizes(steps: pl.DataFrame, over: dict[str, str], least: float | None) -> Any:
    """Effective sample sizes of each step's batch; `least` is where a round ends."""
    drift = lines(steps, over, "effective sample size", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    if least is not None:
        drift = drift + alt.Chart(pl.DataFrame({"value": [least]})).mark_rule(color=INK, strokeDash=[4, 3]).encode(
            y="value:Q"
        )
    return sized(drift)


def moved(steps: pl.DataFrame) -> Any:
    """How far the responses' probabilities have moved from those that they were sampled with."""
    mean, spread = pl.col("response_log_ratio"), pl.col("response_log_ratio_sd")
    table = steps.select("at", "round", mean=mean, low=mean - spread, high=mean + spread)
    spans = alt.Chart(table).mark_rule(opacity=0.4).encode(x=STEP, y="low:Q", y2="high:Q", color=_of("round"))
    return sized(lines(table, {"responses": "mean"}, "log-ratio, nats per unit") + spans, 120)


def covered(phases: Sequence[dict[str, Any]]) -> Any:
    """Share of the student's tokens in each kind of unit, a bar a phase."""
    rows = [
        {"phase": figures["phase"], "kind": kind, "share": share, "order": KINDS.index(kind)}
        for figures in phases
        for kind, share in figures["coverage"]["kinds"].items()
    ]
    share = alt.X("share:Q", title="share of student tokens", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    kinds = [kind for kind in KINDS if kind != KINDS[CONTEXT]]
    return sized(
        alt.Chart(pl.DataFrame(rows))
        .mark_bar()
        .encode(
            y=alt.Y("phase:N", title=None, sort=None),
            x=share,
            color=alt.Color("kind:N", sort=kinds, scale=alt.Scale(domain=kinds), title="unit"),
            order="order:Q",
        ),
        max(70, 24 * len(phases)),
    )


def credit(phases: Sequence[dict[str, Any]]) -> Any:
    """Share of |advantage| by tenth of the response, a line a phase."""
    rows = [
        {"phase": figures["phase"], "tenth": int(tenth), "share": share}
        for figures in phases
        for tenth, share in figures["credit"]["advantage_share"].items()
    ]
    return sized(
        alt.Chart(pl.DataFrame(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("tenth:O", title="tenth of the response", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of |advantage|", axis=alt.Axis(format="%")),
            color=alt.Color("phase:N", title=None),
        )
    )


def cross_entropy(steps: pl.DataFrame, per_epoch: int) -> Any:
    """Of the fine-tuning on the teacher's answers, step by step."""
    by_epoch = steps.select(at=pl.col("step"), epoch=pl.col("step") // per_epoch, loss="loss")
    return sized(lines(by_epoch, {"answers": "loss"}, "cross-entropy, nats per token", of="epoch"))


def seconds(spent: dict[str, float]) -> Any:
    """Wall seconds by stage, over all of its jobs."""
    cost = pl.DataFrame({"stage": list(spent), "seconds": list(spent.values())})
    chart = alt.Chart(cost).encode(
        y=alt.Y("stage:N", sort="-x", title=None), x=alt.X("seconds:Q", title="wall seconds")
    )
    words = chart.mark_text(dx=4, align="left").encode(text=alt.Text("seconds:Q", format=",.0f"))
    return sized(chart.mark_bar(color=SERIES[0]) + words, 22 * len(spent))


def _of(name: str) -> alt.Color:
    return alt.Color(f"{name}:N", title=name)


def lines(table: pl.DataFrame, told: dict[str, str], title: str, of: str = "round", **options: Any) -> alt.LayerChart:
    """Figures by `at`, the step, one line each; `told` names their columns for people, `of` is the column they differ in colour
    by."""
    long = table.select("at", of, **told).unpivot(index=["at", of], variable_name="figure")
    chart = alt.Chart(long.drop_nulls()).encode(x=STEP, y=alt.Y("value:Q", title=title, **options), color=_of(of))
    drawn = chart.mark_line()
    if len(told) > 1:
        legend = alt.Legend(symbolType="stroke", symbolStrokeColor=MUTED, symbolSize=300)
        drawn = drawn.encode(strokeDash=alt.StrokeDash("figure:N", title=None, sort=list(told), legend=legend))
    # A line's own points would fill the legend's strokes, which have nothing to fill.
    return drawn + chart.mark_circle(opacity=1)
