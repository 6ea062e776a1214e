"""The report: its numbers from the tables by other queries, and the page in a browser, as people use it."""

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator
from functools import cache, reduce
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist
from typing import Any

import browser
import numpy as np
import polars as pl
import pytest
import small
import torch
import whole_run
import yaml
from transformers import AutoModelForCausalLM

from pipeline.measure.accuracy import accuracy, gain
from stages.report import charts, costs
from stages.report.charts import LABELS
from stages.report.page import answered, sets, whens
from stages.report.verdict import difference, direction, verdict, visible

RUN = Path("runs/a")
SECONDS = {"prompts": 2.0, "round-0-rollouts-000": 4.0, "round-0-scores-000": 5.0, "eval-0-scores-000": 3.0} | {
    "eval-1-answers": 1.5,
    "round-0-train": 7.0,
}
"""As Snakemake would have timed them, by job."""
DRAWN: dict[str, dict[str, Any]] = {}
"""Of each plot of the run's report, by its label, what it was drawn from."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on tiny models, in the working directory, some of whose answers training fixes and some it breaks."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.laid_out()
        # Right by a coin that falls the same for the same answer to the same prompt.
        coin = "import zlib\ndef right(said, answer, _):\n    return zlib.crc32((said + answer).encode()) % 3 == 2\n"
        Path("coin.py").write_text(coin)
        (RUN / "timings").mkdir(parents=True)
        for job, seconds in SECONDS.items():
            (RUN / f"timings/{job}.tsv").write_text(f"s\th:m:s\n{seconds}\t-\n")
        where = small.written(
            prompts={"splits": {"examples": 1, "train": 12, "test": 17}},
            rollouts={"rounds": 1, "prompts": 12, "max_new_tokens": 8, "shard_size": 6},
            train={"learning_rate": 0.004},
            evaluate={"kl_items": 12, "scorer": "coin:right"},
        )
        svg = charts.svg

        def drawn(chart: Any, label: str) -> str:
            DRAWN[label] = chart.to_dict()
            return svg(chart, label)

        patch.setattr(charts, "svg", drawn)
        whole_run.stages_of(where)
        yield folder


class Tables(HTMLParser):
    """Rows of the cells of each table by the heading before it, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.heading, self.text, self._into = "", "", ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("h2", "h3", "summary"):
            self.heading, self._into = "", "heading"
        elif tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
            self._into = "cell"
        elif tag in ("script", "style", "svg"):
            self._into = "none"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3", "summary", "td", "th", "script", "style", "svg"):
            self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "heading":
            self.heading += data
        elif self._into == "cell":
            cells = self.tables[self.heading][-1]
            cells[-1] = " ".join(f"{cells[-1]} {data}".split())
        if self._into != "none":
            self.text += data

    def rows(self, heading: str) -> list[list[str]]:
        """Of the tables under a heading, without their head."""
        return next(rows for name, rows in self.tables.items() if name.startswith(heading))[1:]


@pytest.fixture(scope="module")
def page(made: Path) -> Tables:
    return Tables((made / RUN / "report.html").read_text())


def embedded(name: str) -> Any:
    """JSON that the page holds for its script."""
    text = (RUN / "report.html").read_text()
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def units_of(phase: str) -> pl.DataFrame:
    """Compared units with the bytes that they are of, those of the unit before, and what they lose, by no code of ours."""
    rollouts, units = (pl.read_parquet(RUN / phase / table / "*.parquet") for table in ("rollouts", "units"))
    joined = units.join(rollouts, on="rollout_id", how="left", maintain_order="left")
    size = pl.col("byte_end") - pl.col("byte_start")
    logps = pl.col("behavior_logp").list.slice(pl.col("s_start"), pl.col("s_len")).cast(pl.List(pl.Float64))
    spelled = pl.col("response").cast(pl.Binary).bin.slice("byte_start", size)
    text = pl.when(kind="stop").then(pl.lit(b"<stop>")).otherwise(spelled)
    told = joined.with_columns(text=text, student=logps.list.sum())
    place = pl.int_range(pl.len()).over("rollout_id") * 10 // pl.len().over("rollout_id")
    told = told.with_columns(before=pl.col("text").shift(1).over("rollout_id"), tenth=place)
    return told.filter(pl.col("kind") != "masked").with_columns(lost=pl.col("student") - pl.col("teacher_logp"))


def text_of(data: bytes | None) -> str:
    return "(start)" if data is None else visible(data.decode(errors="backslashreplace"))


@cache
def said(token: int) -> str:
    """The text of one of the student's tokens."""
    if token < 0:
        return "<stop>"
    row = pl.read_parquet(RUN / "models/student-vocabulary.parquet").row(token, named=True)
    return f"<{row['role'] or token}>" if row["bytes"] is None else row["bytes"].decode(errors="backslashreplace")


def by_text(units: pl.DataFrame, *keys: str) -> pl.DataFrame:
    sums = units.group_by(*keys, "kind").agg(
        pl.len(), pl.col("lost").sum(), pl.col("student").mean(), pl.col("teacher_logp").mean()
    )
    return sums.with_columns(share=pl.col("lost") / pl.col("lost").sum()).sort("lost", descending=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "phase", "keys"),
    [
        ("Texts that lost most, before", "eval-0", ["text"]),
        ("Texts that lose most, after", "eval-1", ["text"]),
        ("Contexts that lost most", "eval-0", ["before", "text"]),
    ],
)
def test_texts_that_the_teacher_disagreed_with(page: Tables, heading: str, phase: str, keys: list[str]) -> None:
    units = units_of(phase)
    table = by_text(units, *keys)
    expected = {}
    for row in table.filter(pl.col("lost") > 0).to_dicts():
        figures = [f"{row['len']:,}", *(f"{row[name]:.2f}" for name in ("student", "teacher_logp"))]
        name = text_of(row["text"]) + (f" {row['kind']}" if row["kind"] not in ("1:1", "stop") else "")
        before = [text_of(row["before"])] if "before" in keys else []
        expected[(*before, name)] = [*figures, f"{row['lost']:.1f}", f"{100 * row['share']:.1f} %"]
    rows = page.rows(heading)
    assert len(rows) == min(12, len(expected)) > 3
    for cells in rows:
        assert cells[len(keys) : -1] == expected[tuple(cells[: len(keys)])]
    lost = [float(cells[-3]) for cells in rows]
    assert lost == sorted(lost, reverse=True) and lost[0] == round(table["lost"][0], 1)
    # What the teacher would have said.
    for cells, row in zip(rows, table.to_dicts(), strict=False):
        here = units.filter(pl.all_horizontal(pl.col(name).eq_missing(pl.lit(row[name])) for name in (*keys, "kind")))
        mass = (
            here.select(id="cand_id", p="cand_logp")
            .explode("id", "p")
            .group_by("id")
            .agg(pl.col("p").cast(pl.Float64).exp().sum() / len(here))
            .sort("p", descending=True)
            .head(5)
        )
        shares = [f"{100 * share:.0f} %" for share in mass["p"]]
        assert re.findall(r"\d+ %", cells[-1])[-len(shares) :] == shares
        if mass["p"][0] > mass["p"][1] + 1e-9:
            assert cells[-1].startswith(" ".join(f"{visible(said(mass['id'][0]))} {shares[0]}".split()))


@pytest.mark.slow
def test_what_changed_by_text_and_the_sentence_that_says_why(page: Tables) -> None:
    sides = []
    for phase in ("eval-0", "eval-1"):
        units = units_of(phase)
        per = len(pl.read_parquet(RUN / phase / "rollouts/*.parquet"))
        sums = units.group_by("text", "kind").agg(times=100 * pl.len() / per, lost=pl.col("lost").sum() / per)
        sides.append(sums)
        mean = units["lost"].sum() / per
        assert f"{mean:.2f}" in page.text
    both = sides[0].join(sides[1], on=["text", "kind"], how="full", coalesce=True, suffix="_after").fill_null(0.0)
    both = both.with_columns(change=pl.col("lost_after") - pl.col("lost"))
    both = both.with_columns(share=pl.col("change") / pl.col("change").sum()).sort(
        pl.col("change").abs(), descending=True
    )
    rows = page.rows("What changed, by text")
    assert len(rows) == 12
    for cells, row in zip(rows, both.head(12).to_dicts(), strict=True):
        figures = [f"{row[name]:.0f}" for name in ("times", "times_after")]
        figures += [f"{row[name]:.3f}" for name in ("lost", "lost_after")] + [f"{row['change']:+.3f}"]
        assert cells[1:] == [*figures, f"{100 * row['share']:.1f} %"] and cells[0].startswith(text_of(row["text"]))
    first = next(row for row in both.to_dicts() if row["share"] > 0)
    times = f"said {first['times']:.0f} times in 100 responses before, {first['times_after']:.0f} after"
    assert f"“{text_of(first['text'])}” ({times}" in page.text
    # The sampled KL that the verdict's table tells is the same sum, per token.
    for phase, column in (("eval-0", 1), ("eval-1", 2)):
        units = units_of(phase)
        cell = next(cells for cells in page.rows("Answers") if cells[0].startswith("the same by what was sampled"))[
            column
        ]
        assert float(cell.split()[0]) == pytest.approx(units["lost"].sum() / units["s_len"].sum(), abs=2e-3)


@pytest.mark.slow
def test_answers_and_their_counts(page: Tables) -> None:
    before, after = (pl.read_parquet(RUN / f"eval-{n}/answers.parquet") for n in (0, 1))
    both = before.join(after, on=["prompt_id", "sample"], suffix="_after")
    broken, fixed = (
        both.filter(pl.col("right") & ~pl.col("right_after")),
        both.filter(~pl.col("right") & pl.col("right_after")),
    )
    assert len(broken) and len(fixed)
    assert f"Of 17 answers {len(fixed)} were fixed and {len(broken)} broken." in page.text
    accuracy = page.rows("Answers")[0]
    for cell, answers in zip(accuracy[1:], (before, after), strict=False):
        assert cell.startswith(f"{100 * answers['right'].mean():.1f} %")
    stopped = next(cells for cells in page.rows("Answers") if cells[0].startswith("answers that stop"))
    assert stopped[1:3] == [f"{100 * answers['stopped'].mean():.0f} %" for answers in (before, after)]
    rows = embedded("answers-data")["rows"]
    columns = ["set", "prompt", "reference", "response", "response_after", "right", "right_after"]
    assert sorted(map(str, rows)) == sorted(str(list(row)) for row in both.select(columns).rows())
    kinds = [(row[5], row[6]) for row in rows]
    assert kinds[: len(broken)] == [(True, False)] * len(broken)
    assert kinds[len(broken) :][: len(fixed)] == [(False, True)] * len(fixed)


@pytest.mark.slow
def test_figures_of_phases_cost_and_lineage(page: Tables) -> None:
    rows = {cells[0]: cells[1:] for cells in page.rows("Where the credit lies")}
    student_tokens, teacher_tokens = {}, {}
    for phase in ("eval-0", "round-0", "eval-1"):
        rollouts, units, weights, scores = (
            pl.read_parquet(RUN / phase / table / "*.parquet") for table in ("rollouts", "units", "weights", "scores")
        )
        student_tokens[phase] = rollouts["response_ids"].list.len().sum()
        teacher_tokens[phase] = len(scores) - len(rollouts)
        compared = weights.filter(units["kind"] != "masked")
        weight = compared["weight"].cast(pl.Float64)
        ends = scores.join(rollouts, on="rollout_id").filter(
            (pl.col("token_id") >= 0) | (pl.col("finish_reason") == "stop")
        )
        assert rows[phase] == [
            str(len(rollouts)),
            str(student_tokens[phase]),
            f"{100 * (rollouts['finish_reason'] == 'length').mean():.0f} %",
            f"{100 * units.filter(pl.col('kind') != 'masked')['dropped_logp'].exp().mean():.3f} %",
            f"{compared['advantage'].mean():.3f}",
            f"{100 * weight.sum() ** 2 / len(compared) / (weight**2).sum():.1f} %",
            f"{-rollouts['behavior_logp'].explode().mean():.3f}",
            f"{ends['entropy'].mean():.3f}",
        ]
    cost = {cells[0]: cells[1] for cells in page.rows("Wall seconds by stage")} | {
        cells[0]: cells[1] for cells in page.tables["Wall seconds by stage"][:1]
    }
    assert cost["all jobs together"] == f"{sum(SECONDS.values()):.1f} s"
    assert cost["student's tokens sampled, a second"] == f"{sum(student_tokens.values()) / 4:.0f}"
    assert cost["teacher's tokens scored, a second"] == f"{sum(teacher_tokens.values()) / 8:.0f}"
    assert cost["teacher tokens, scored"] == str(sum(teacher_tokens.values()))
    assert cost["student tokens, sampled"] == str(sum(student_tokens.values()))
    assert "student tokens, found in the cache" not in cost
    linked = sum(path.stat().st_size for path in RUN.rglob("*") if path.is_symlink())
    assert cost["on disk, in the cache"] == f"{linked / 1e3:.3g} kB"
    steps = [json.loads(line) for line in (RUN / "round-0/train/metrics.jsonl").read_text().splitlines()]
    assert page.rows("Training, drift")[0][:2] == ["round-0", f"{len(steps)} of {len(steps)}"]
    responses = 4 * len(steps)
    anew = [responses * tokens["round-0"] / 12 for tokens in (student_tokens, teacher_tokens)]
    assert f"would have taken {responses} responses, {anew[0]:.0f} tokens of the student and {anew[1]:.0f}" in page.text
    seconds = anew[0] * 4 / sum(student_tokens.values()) + anew[1] * 8 / sum(teacher_tokens.values())
    assert f"{seconds:.1f} s of sampling and scoring at this run's rates" in page.text and "took 9.0 s" in page.text
    lineage = {cells[0]: cells[1:] for cells in page.rows("Lineage")}
    assert lineage["teacher"][1] == json.loads((RUN / "models/teacher.json").read_text())["weights"][:12]
    for phase in ("eval-0", "round-0", "eval-1"):
        manifests = [json.loads((RUN / phase / f"units/00{n}.json").read_text())["sha256"] for n in (0, 1)]
        files = [hashlib.sha256((RUN / phase / f"units/00{n}.parquet").read_bytes()).hexdigest() for n in (0, 1)]
        told = hashlib.sha256(json.dumps(files, separators=(",", ":")).encode()).hexdigest()
        assert manifests == files and lineage[phase][2] == f"{told[:12]} (2 shards)"
    masked = pl.read_parquet(RUN / "eval-0/units/*.parquet").filter(kind="masked")
    told_masked = page.rows("Masked, and why")
    assert sum(int(cells[1]) for cells in told_masked) == len(masked)
    assert sum(int(cells[2]) for cells in told_masked) == masked["s_len"].sum()


@pytest.mark.slow
def test_the_token_view_holds_the_tables_rows(page: Tables) -> None:
    data = embedded("tokens-data")
    units = {phase: units_of(phase) for phase in ("eval-0", "eval-1")}
    before = [one for one in data["shown"] if one["when"] == "before"]
    lost = units["eval-0"].group_by("rollout_id").agg(pl.col("lost").sum()).sort("lost", descending=True)
    assert [one["id"] for one in before[:6]] == lost["rollout_id"].head(6).to_list()
    assert {one["prompt"] for one in before} == {one["prompt"] for one in data["shown"] if one["when"] == "after"}
    for one in data["shown"]:
        phase = {"before": "eval-0", "after": "eval-1"}[one["when"]]
        rows = pl.read_parquet(RUN / phase / "units/*.parquet").filter(rollout_id=one["id"]).sort("unit")
        weights = pl.read_parquet(RUN / phase / "weights/*.parquet").filter(rollout_id=one["id"]).sort("unit")
        assert [unit[1] for unit in one["units"]] == rows["kind"].to_list() and one["more"] == 0
        compared = units[phase].filter(rollout_id=one["id"])
        assert one["lost"] == pytest.approx(compared["lost"].sum(), abs=0.02)
        told = [unit for unit in one["units"] if unit[1] != "masked"]
        assert [unit[2] for unit in told] == pytest.approx(compared["teacher_logp"].to_list(), abs=1e-3)
        assert [unit[3] for unit in told] == pytest.approx(compared["student"].to_list(), abs=1e-3)
        assert [unit[5] for unit in one["units"]] == pytest.approx(weights["advantage"].to_list(), abs=1e-3)
        assert [data["texts"][unit[0]] for unit in told] == [
            t.decode(errors="backslashreplace") for t in compared["text"]
        ]
        assert all(unit[10] for unit in one["units"] if unit[1] == "masked")
        assert [unit[6] for unit in one["units"]] == pytest.approx(weights["weight"].to_list(), abs=1e-3)
        for unit, row in zip(told, compared.to_dicts(), strict=True):
            assert unit[4] == pytest.approx(row["teacher_logp"] - row["student"], abs=1e-3)
            assert unit[9] == pytest.approx(math.exp(row["tail_logp"]) + math.exp(row["dropped_logp"]), abs=1e-3)
            assert [data["texts"][text] for text in unit[8]] == list(map(said, row["top_id"][row["s_start"]]))
            logps = dict(zip(map(said, row["cand_id"]), row["cand_logp"], strict=True))
            assert unit[7][1::2] == pytest.approx([logps[data["texts"][text]] for text in unit[7][::2]], abs=6e-3)
            assert unit[7][1::2] == pytest.approx(sorted(row["cand_logp"], reverse=True)[:6], abs=6e-3)
            assert len(unit[8]) == len(row["top_id"][row["s_start"]]) == 4


PHASES = ("eval-0", "round-0", "eval-1")
MASKED = "masked"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.?\d*(?:e-\d+)?", text)]


def table(phase: str, name: str) -> pl.DataFrame:
    return pl.read_parquet(RUN / phase / name / "*.parquet")


def manifest(phase: str, name: str) -> dict[str, Any]:
    return json.loads((RUN / phase / name / "000.json").read_text())


def steps() -> pl.DataFrame:
    return pl.read_ndjson(RUN / "round-0/train/metrics.jsonl")


def result(phase: str) -> dict[str, Any]:
    return json.loads((RUN / phase / "result.json").read_text())


def sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def wilsons(right: float, total: float) -> list[float]:
    """The two shares that `right` of `total` lies 1.96 of their own standard deviations from."""
    zz, share = NormalDist().inv_cdf(0.975) ** 2 / total, right / total
    return sorted(np.roots([1 + zz, -2 * share - zz, share**2]).real.tolist())


def sign_test(fixed: int, broken: int) -> float:
    among = fixed + broken
    return min(1.0, 2 * sum(math.comb(among, k) for k in range(max(fixed, broken), among + 1)) / 2**among)


@pytest.mark.slow
def test_intervals_of_the_score_and_of_its_change(page: Tables) -> None:
    before, after = (pl.read_parquet(RUN / f"eval-{n}/answers.parquet").sort("prompt_id") for n in (0, 1))
    label, *ends, change = page.rows("Answers")[0]
    assert label == "held-out accuracy (17 items of test, greedy)"
    for cell, answers in zip(ends, (before, after), strict=True):
        right = answers["right"].sum()
        assert numbers(cell) == pytest.approx([100 * x for x in (right / 17, *wilsons(right, 17))], abs=0.051)
    difference = after["right"].cast(int) - before["right"].cast(int)
    told = numbers(change)
    assert told[0] == pytest.approx(100 * difference.mean(), abs=0.051) and told[0] != 0
    # Sums of 17 draws from these differences, exactly: what 2000 of them are an estimate of.
    one = [(difference == value).mean() for value in (-1, 0, 1)]
    below = np.cumsum(reduce(np.convolve, [one] * 17))
    for end, level in zip(told[1:3], (0.025, 0.975), strict=True):
        at = round(end * 17 / 100) + 17
        assert below[at - 1] - 0.005 < level < below[at] + 0.005
    fixed, broken = (difference == 1).sum(), (difference == -1).sum()
    assert change.endswith(f"p {sign_test(fixed, broken):.2g}") and fixed and broken
    points = f"{told[0]:+.1f} points (95 %: {told[1]:+.1f} to {told[2]:+.1f}, p {told[3]:.2g})"
    went = " to ".join(f"{100 * answers['right'].mean():.1f} %" for answers in (before, after))
    assert f"Held-out accuracy went from {went} on 17 items: {points}." in page.text
    assert f"{fixed} answers fixed, {broken} broken." in page.text and told[1] < 0 < told[2]


@cache
def kl_of_responses(phase: str, checkpoint: str) -> pl.DataFrame:
    """Sums over each response's comparable units by the formulas, from a forward pass of its own; one response at a time."""
    stop = manifest(phase, "rollouts")["identity"]["stop_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    units = table(phase, "units").filter(pl.col("kind") != MASKED).partition_by("rollout_id", as_dict=True)
    found = []
    for row in table(phase, "rollouts").to_dicts():
        prompt, response = row["prompt_ids"], row["response_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        logp = torch.cat([logp, logp[:, stop].logsumexp(-1, keepdim=True)], 1)  # what STOP_ID, -1, points at
        sums = {"full": 0.0, "sampled": 0.0, "bound": 0.0, "tokens": 0}
        for unit in units[row["rollout_id"],].to_dicts() if (row["rollout_id"],) in units else []:
            first, length = unit["s_start"], unit["s_len"]
            said = [-1] if unit["kind"] == "stop" else response[first : first + length]
            here = logp[len(prompt) - 1 + first]
            own = sum(float(logp[len(prompt) - 1 + first + k, token]) for k, token in enumerate(said))
            log_ratio = own - unit["teacher_logp"]
            cand = np.array(unit["cand_logp"], np.float64)
            held = np.exp(cand).sum() + math.exp(unit["dropped_logp"])
            rescaled = cand + math.log((1 - math.exp(unit["tail_logp"])) / held)
            teacher = dict(zip(unit["cand_id"], rescaled, strict=True))
            f = {token: float(here[token]) - value for token, value in teacher.items()}
            full = log_ratio - f.get(said[0], 0.0) + sum(math.exp(float(here[token])) * f[token] for token in f)
            bound = log_ratio
            if length == 1 and unit["t_len"] <= 1:
                classes = {said[0]: unit["teacher_logp"]} | teacher
                p, q = (np.exp([float(of[token]) for token in classes]) for of in (here, classes))
                p, q = (np.append(x, 1 - x.sum()) for x in (p, q))
                bound = float((p * np.log(p / q)).sum())
            for name, value in zip(sums, (full, log_ratio, bound, length), strict=True):
                sums[name] += value
        found.append(sums)
    return pl.DataFrame(found)


@pytest.mark.slow
def test_the_unbiased_kl_its_bound_and_their_intervals_by_another_forward_pass(page: Tables) -> None:
    checkpoints = {"eval-0": json.loads((RUN / "models/student.json").read_text())["path"]}
    checkpoints["eval-1"] = str(RUN / "round-0/checkpoint")
    rows = {cells[0].split(",")[0].split(":")[0]: cells[1:3] for cells in page.rows("Answers")}
    labels = {
        "full": ("on-policy reverse KL", "reverse_kl"),
        "sampled": ("the same by what was sampled alone", "sampled_kl"),
        "bound": ("a lower bound", "reverse_kl_bound"),
    }
    rng = np.random.default_rng(7)
    for column, (phase, checkpoint) in enumerate(checkpoints.items()):
        found = kl_of_responses(phase, checkpoint)
        figures = result(phase)
        for name, (label, key) in labels.items():
            value, (low, high) = figures[key], figures[f"{key}_95"]
            assert rows[label][column] == f"{value:.3f} ({low:.3f} to {high:.3f})"
            assert value == pytest.approx(found[name].sum() / found["tokens"].sum(), abs=3e-5), (phase, name)
            picks = rng.integers(0, len(found), (20_000, len(found)))
            drawn = found[name].to_numpy()[picks].sum(1) / found["tokens"].to_numpy()[picks].sum(1)
            ends = np.quantile(drawn, [0.025, 0.975])
            assert [low, high] == pytest.approx(ends, abs=0.16 * drawn.std()), (phase, name)
        assert abs(found["full"].sum() - found["sampled"].sum()) > 5e-4 * found["tokens"].sum()
    assert f"reverse KL, nats per token ({len(found)} responses)" in page.text
    # The change: distances to the interval's ends add as squares (Zou and Donner's MOVER).
    (a, a_low, a_high), (b, b_low, b_high) = ([r["reverse_kl"], *r["reverse_kl_95"]] for r in map(result, checkpoints))
    low = a - b + math.hypot(a_high - a, b - b_low)
    ends = f"{b - a - math.hypot(b - b_low, a_high - a):+.3f} to {b - a + math.hypot(b_high - b, a - a_low):+.3f}"
    assert f"from {a:.3f} to {b:.3f} nats per token (change {b - a:+.3f}, 95 %: {ends})." in page.text
    assert -low < 0 < b - a + math.hypot(b_high - b, a - a_low)
    same = "The score did not measurably change, and the student is not measurably nearer to its teacher."
    assert same in page.text and "What moved:" in page.text


@pytest.mark.slow
def test_the_sentences_that_say_why(page: Tables) -> None:
    sides = [units_of(phase) for phase in ("eval-0", "eval-1")]
    responses = len(table("eval-0", "rollouts"))
    sums = [units["lost"].sum() / responses for units in sides]
    way = "fell" if sums[1] < sums[0] else "rose"
    assert f"{way} from {sums[0]:.2f} to {sums[1]:.2f} nats." in page.text
    assert f"The largest parts of these {sums[1] - sums[0]:+.2f} nats: " in page.text
    of_text = [
        units.group_by("text", "kind").agg(times=100 * pl.len() / responses, lost=pl.col("lost").sum() / responses)
        for units in sides
    ]
    both = of_text[0].join(of_text[1], on=["text", "kind"], how="full", coalesce=True, suffix="_after").fill_null(0.0)
    both = both.with_columns(part=(pl.col("lost_after") - pl.col("lost")) / (sums[1] - sums[0]))
    largest = both.sort(pl.col("part").abs(), descending=True).head(12).filter(pl.col("part") > 0).head(3).to_dicts()
    told = [
        f"“{text_of(row['text'])}” (said {row['times']:.0f} times in 100 responses before, {row['times_after']:.0f} "
        f"after; {100 * row['part']:.0f} %)"
        for row in largest
    ]
    assert len(told) == 3 and f"nats: {', '.join(told)}." in page.text
    first = sides[0].filter(text=largest[0]["text"], kind=largest[0]["kind"])
    means = f"{first['teacher_logp'].mean():.1f} nats, the student {first['student'].mean():.1f};"
    said = re.search(
        r"Where the student said “.*?” before, the teacher gave it (.*?) the teacher would have said (.*?)\.\s",
        page.text,
    )
    assert said and said[1] == means
    mass = first.explode("cand_id", "cand_logp").group_by("cand_id").agg(pl.col("cand_logp").exp().sum() / len(first))
    shares = mass["cand_logp"].sort(descending=True).head(3)
    assert re.findall(r"(\d+) %", said[2]) == [f"{100 * share:.0f}" for share in shares]
    tenths = [dict(u.group_by("tenth").agg(pl.col("lost").mean()).iter_rows()) for u in sides]
    worst = max(tenths[0], key=lambda tenth: tenths[0][tenth])
    ordinal = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "last"][worst]
    told_worst = f"{tenths[0][worst]:.2f} nats per unit before, {tenths[1].get(worst, 0):.2f} after."
    assert f"most was lost in the {ordinal} tenth of a response: {told_worst}" in page.text
    stopped = [pl.read_parquet(RUN / f"eval-{n}/answers.parquet")["stopped"].mean() for n in (0, 1)]
    before, after = (f"{100 * share:.0f} %" for share in stopped)
    assert f"{before} of the held-out answers stopped by themselves before, {after} after." in page.text
    about = f"{responses} before (eval-0), {responses} after (eval-1)"
    sentence = f"the sum over a response is {sums[0]:.2f} nats before and {sums[1]:.2f} after"
    assert about in page.text and sentence in page.text
    masked = table("eval-0", "units").filter(kind=MASKED)["s_len"].sum()
    shares_masked = [float(cells[3].split()[0]) for cells in page.rows("Masked, and why")]
    tokens = table("eval-0", "rollouts")["response_ids"].list.len().sum()
    assert sum(shares_masked) == pytest.approx(100 * masked / tokens, abs=0.05 * len(shares_masked))


def rows_drawn(name: str) -> list[list[dict[str, Any]]]:
    """What a plot is drawn from, a list of rows for each of its tables."""
    return list(DRAWN[LABELS[name]]["datasets"].values())


def fields_drawn(name: str) -> set[str]:
    """Columns that are drawn."""
    return set(re.findall(r'"field": "(\w[\w ]*)"', json.dumps(DRAWN[LABELS[name]])))


@pytest.mark.slow
def test_plots_are_drawn_from_the_tables(page: Tables) -> None:
    html = (RUN / "report.html").read_text()
    for name, key in (("accuracy", "accuracy"), ("reverse_kl", "reverse_kl")):
        (rows,) = rows_drawn(name)
        assert [row["when"] for row in rows] == ["before", "after"] and {"value", "low", "high"} < fields_drawn(name)
        for row, figures in zip(rows, map(result, ("eval-0", "eval-1")), strict=True):
            assert [row["value"], row["low"], row["high"]] == [figures[key], *figures[f"{key}_95"]]
            said = f"{100 * row['value']:.1f}%" if key == "accuracy" else f"{row['value']:.3f}"
            assert f">{said}</text>" in html
    before, after = (pl.read_parquet(RUN / f"eval-{n}/answers.parquet").sort("prompt_id")["right"] for n in (0, 1))
    (flips,) = rows_drawn("flips")
    assert {row["answers"]: row["count"] for row in flips} == {
        "fixed": (~before & after).sum(),
        "broken": (before & ~after).sum(),
        "stayed right": (before & after).sum(),
        "stayed wrong": (~before & ~after).sum(),
    }
    (tenths,) = rows_drawn("tenths")
    expected = {}
    for when, phase in (("before", "eval-0"), ("after", "eval-1")):
        for tenth, lost in units_of(phase).group_by("tenth").agg(pl.col("lost").mean()).iter_rows():
            expected[when, tenth] = lost
    assert {(row["of"], row["tenth"]): row["lost"] for row in tenths} == pytest.approx(expected, abs=1e-6)
    (kinds,) = rows_drawn("kinds")
    tokens = table("eval-0", "units").group_by("kind").agg(pl.col("s_len").sum())
    lost = units_of("eval-0").group_by("kind").agg(pl.col("lost").sum())
    shares = {("tokens", kind): n / tokens["s_len"].sum() for kind, n in tokens.iter_rows()}
    shares |= {("lost nats", MASKED): 0.0} | {("lost nats", k): n / lost["lost"].sum() for k, n in lost.iter_rows()}
    assert {(row["of"], row["kind"]): row["share"] for row in kinds} == pytest.approx(shares, abs=1e-6)
    coverage = {(row["phase"], row["kind"]): row["share"] for row in rows_drawn("coverage")[0]}
    credit = {(row["phase"], row["tenth"]): row["share"] for row in rows_drawn("credit")[0]}
    for phase in PHASES:
        units, weights = table(phase, "units"), table(phase, "weights")
        for kind in ("1:1", "n:m", "stop", "role", MASKED):
            own = units.filter(kind=kind)["s_len"].sum() / units["s_len"].sum()
            assert coverage.pop((phase, kind)) == pytest.approx(own)
        size = weights.select(
            tenth=pl.col("unit") * 10 // pl.len().over("rollout_id"), size=pl.col("advantage").cast(pl.Float64).abs()
        )
        for tenth in range(10):
            share = size.filter(tenth=tenth)["size"].sum() / size["size"].sum()
            if phase == "round-0":
                assert credit.pop((phase, tenth)) == pytest.approx(share, abs=1e-6)
    assert not coverage and not credit
    taken = steps()
    named = {"losses": {"sampled, all units": "sampled_kl", "over candidates": "divergence"}}
    named |= {"sizes": {"what sampled": "ess"}, "moved": {"responses": "response_log_ratio"}}
    for name, figures in named.items():
        long = {
            (row["figure"], row["at"]): row["value"] for rows in rows_drawn(name) for row in rows if "figure" in row
        }
        wanted = {(figure, at): value for figure, key in figures.items() for at, value in enumerate(taken[key])}
        assert long == pytest.approx(wanted) and {"at", "value"} < fields_drawn(name)
    spans = next(rows for rows in rows_drawn("moved") if "low" in rows[0])
    mean, spread = taken["response_log_ratio"], taken["response_log_ratio_sd"]
    for row, low, high in zip(spans, mean - spread, mean + spread, strict=True):
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    (seconds,) = rows_drawn("cost")
    stages = {"prompts": 2.0, "rollouts": 4.0, "scores": 8.0, "evaluate": 1.5, "train": 7.0}
    assert {row["stage"]: row["seconds"] for row in seconds} == stages


@pytest.mark.slow
def test_the_checklist_and_how_training_went(page: Tables) -> None:
    rows = {cells[0]: cells[1] for cells in page.rows("Round by round") if len(cells) > 1}
    phase = "round-0"
    rollouts, units, weights, scores = (table(phase, name) for name in ("rollouts", "units", "weights", "scores"))
    kinds, identity = units["kind"], manifest(phase, "rollouts")["identity"]
    teacher = manifest(phase, "scores")["identity"]
    compared = weights.filter(kinds != MASKED).with_columns(pl.col("is_ratio", "weight", "advantage").cast(pl.Float64))
    tokens = rollouts["response_ids"].list.len().sum()
    size = rollouts["response"].cast(pl.Binary).bin.size().sum()

    def share(of: pl.Series) -> str:
        return f"{100 * units.filter(of)['s_len'].sum() / tokens:.1f} %"

    def digests(model: dict[str, str], prompt: Any) -> str:
        return f"weights {model['weights'][:12]}, tokenizer {model['tokenizer'][:12]}, template {sha256(prompt)[:12]}"

    def effective(of: pl.Series) -> float:
        return of.sum() ** 2 / len(of) / (of**2).sum()

    by_response = compared.group_by("rollout_id").agg(pl.col("is_ratio").log().mean())["is_ratio"]
    kept, dropped = units["cand_logp"].explode().exp().sum(), units["dropped_logp"].exp().sum()
    repeated = []
    for ids in rollouts["response_ids"].to_list():
        grams = [tuple(ids[at : at + 4]) for at in range(len(ids) - 3)]
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    ends = (
        scores.join(rollouts, on="rollout_id")
        .filter((pl.col("token_id") >= 0) | (pl.col("finish_reason") == "stop"))["entropy"]
        .cast(pl.Float64)
    )
    surprise = -rollouts["behavior_logp"].explode().cast(pl.Float64).sum()
    advantage = weights["advantage"].cast(pl.Float64).abs()
    tenth = weights.select(pl.col("unit") * 10 // pl.len().over("rollout_id"))["unit"]
    taken = steps()
    first, last = taken.row(0, named=True), taken.row(-1, named=True)
    sampling = identity["sampling"] | {name: identity[name] for name in ("seed", "engine", "dtype")}
    order = ("temperature", "top_p", "max_new_tokens", "seed", "engine", "dtype")
    scored = teacher["scores"]
    percent = f"{100 * scored['mass']:.1f} % of the mass, at most {scored['k_max']}"
    expected = {
        "support": f"{scored['support']}'s likeliest tokens, p ≥ {scored['min_p']:g} up to {percent}",
        "teacher": f"teacher, reads text, {teacher['engine']}, {teacher['dtype']}",
        "teacher's digests": digests(teacher["teacher"], teacher["prompt"]),
        "responses sampled by": "checkpoint 0",
        "digests of that student": digests(identity["policy"], identity["prompt"]),
        "sampler": ", ".join(f"{name} {sampling[name]}" for name in order),
        "sampler's log-probs, which ratios are to": f"{100 * rollouts['sampler_logp'].is_not_null().mean():.1f} %",
        "rounds behind": "0",
        "effective sample size, units": f"{100 * effective(compared['is_ratio']):.1f} %",
        "χ², units": f"{1 / effective(compared['is_ratio']) - 1:.3f}",
        "log-ratio of responses, nats per unit": f"{by_response.mean():.3f} (± {by_response.std(ddof=0):.3f})",
        "in training, first and last step: effective sample size, units": ", ".join(
            f"{100 * step['ess']:.1f} %" for step in (first, last)
        ),
        "likewise: log-ratio of responses": ", ".join(
            f"{step['response_log_ratio']:.3f} (± {step['response_log_ratio_sd']:.3f})" for step in (first, last)
        ),
        "steps taken, budget": f"{len(taken)}, {-(-len(rollouts) // 4)}",
        "responses, student tokens": f"{len(rollouts)}, {tokens}",
        "tokens in units that carry loss": share(kinds != MASKED),
        "tokens in 1:1 units and stops": share(kinds.is_in(["1:1", "stop"])),
        "teacher's kept mass with a student id": f"{100 * kept / (kept + dropped):.3f} %",
        "cut at max_new_tokens": f"{100 * (rollouts['finish_reason'] == 'length').mean():.1f} %",
        "mean seq-rep-4, responses above 50 %": ", ".join(
            f"{100 * np.mean(of):.1f} %" for of in (repeated, np.array(repeated) > 0.5)
        ),
        "teacher's entropy, nats a token": f"{ends.mean():.3f} ({ends.sum() / size:.3f} a byte)",
        "student's entropy, nats a token": f"{surprise / tokens:.3f} ({surprise / size:.3f} a byte)",
        "mean advantage, nats per unit": f"{compared['advantage'].mean():.3f}",
        "|advantage| in the first and last tenth": ", ".join(
            f"{100 * advantage.filter(tenth == n).sum() / advantage.sum():.1f} %" for n in (0, 9)
        ),
        "clipped on the sampled path": "-" if not (kinds == "n:m").any() else "?",
        "effective sample size of the weights": f"{100 * effective(compared['weight']):.1f} %",
        "student tokens": f"{tokens} sampled",
        "teacher tokens": f"{len(scores) - len(rollouts)} scored",
        "seconds": "rollouts 4, scores 5, train 7",
        **dict.fromkeys(("gate", "outcomes", "reward beside it", "reference policy"), "-"),
    }
    assert {label: rows[label] for label in expected} == expected
    words = {"KL direction, estimator", "mass outside the candidates", "credit", "weights", "normaliser"}
    assert rows.keys() - expected.keys() == words | {"student fine-tuned on samples of"}
    ended = page.rows("Training, drift")
    assert ended == [["round-0", "3 of 3", "took all steps of its budget", f"{100 * last['drift_ess']:.1f} %"]]
    # Of the sums that the trainer adds up, those that the tables tell too: before its first step the policy is what sampled.
    lengths = rollouts["prompt_ids"].list.len() + rollouts["response_ids"].list.len() - 1
    assert taken["tokens"].sum() == lengths.sum() and taken["units"].sum() == len(compared)
    assert first["ess"] == pytest.approx(1) and first["response_log_ratio"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_what_is_left_of_cost_lineage_and_configuration(page: Tables) -> None:
    assert "1 round of 12 prompts." in page.text and "All 17 held-out answers" in page.text
    cost = dict(cells for cells in page.tables["Wall seconds by stage"] if len(cells) == 2)
    taken = steps()
    rate = taken["tokens"].sum() / taken["seconds"].sum()
    assert cost["tokens trained on, prompts included, a second"] == f"{rate:,.0f}"
    files = [path for path in RUN.rglob("*") if path.is_file() and not path.is_symlink()]
    made_after = {
        "report.html",
        "summary.json",
        "README.md",
    }  # or made again: the report tells of what was there before
    groups = {
        "checkpoints": [path for path in files if "checkpoint" in path.parts],
        "training states": [path for path in files if path.suffix == ".safetensors" and "checkpoint" not in path.parts],
        "tables": [path for path in files if path.suffix == ".parquet"],
    }
    groups["all else"] = [path for path in files if not any(path in group for group in groups.values())]
    for name, group in groups.items():
        size = sum(path.stat().st_size for path in group if path.name not in made_after)
        told = float(cost[f"on disk, {name}"].split()[0]) * 1e3
        assert cost[f"on disk, {name}"].endswith(" kB") and told == pytest.approx(
            size, rel=6e-3, abs=5e3 * (name == "checkpoints")
        )
    lineage = {cells[0]: cells[1:] for cells in page.rows("Lineage")}
    for name, record in (
        ("teacher", "models/teacher"),
        ("student", "models/student"),
        ("checkpoint 1", "round-0/checkpoint"),
    ):
        about = json.loads((RUN / f"{record}.json").read_text())
        assert lineage[name][1:] == [about["weights"][:12], about["tokenizer"][:12]]
    for phase in PHASES:
        for column, name in enumerate(("rollouts", "scores", "units", "weights")):
            digests = [hashlib.sha256((RUN / phase / name / f"00{n}.parquet").read_bytes()).hexdigest() for n in (0, 1)]
            assert lineage[phase][column] == f"{sha256(digests)[:12]} (2 shards)"
    text = re.search(
        r"All keys, defaults included</summary><pre[^>]*>(.*?)</pre>", (RUN / "report.html").read_text(), re.DOTALL
    )
    assert text
    config = yaml.safe_load(text[1].replace("&#39;", "'").replace("&#34;", '"').replace("&amp;", "&"))
    prompts = hashlib.sha256((RUN / "prompts.parquet").read_bytes()).hexdigest()
    assert config["rollouts"]["prompts"] == 12 and config["train"]["learning_rate"] == 0.004
    assert f"Config {sha256(config)[:12]}, prompts {prompts[:12]};" in page.text
    for package in ("numpy", "pyarrow", "tokenizers", "torch", "transformers"):
        assert f"{package} {importlib.metadata.version(package)}" in page.text


@pytest.mark.parametrize("samples", [1, 4])
def test_rows_of_accuracy_of_several_sets_and_pass_at_k(samples: int) -> None:
    """By their formulas: pass@k as a product of chances to miss, its interval and that of avg@n at the effective number."""
    rng, names, seed = np.random.default_rng(3), ("test", "other"), 5
    right = {name: [rng.random((9, samples)) < share for share in (0.4, 0.6)] for name in names}

    def figures(end: int) -> dict[str, Any]:
        return {name: accuracy(answers(right[name][end])) for name in names}

    def answers(of: np.ndarray) -> pl.DataFrame:
        prompts, number = np.indices(of.shape)
        columns = {"prompt_id": prompts.ravel().astype(str), "sample": number.ravel(), "right": of.ravel()}
        return pl.DataFrame(columns).with_columns(stopped=True)

    before, after = (
        {"split": "test", "samples": samples, "also": {"other": f["other"]}} | f["test"] for f in map(figures, (0, 1))
    )
    gains = {name: gain(*map(answers, ends), seed) for name, ends in right.items()}
    rows = sets({"before": before, "after": after, "sft": None, "gain": gains})
    how = "greedy" if samples == 1 else "avg@4"
    heads = [f"held-out accuracy (9 items of {name}, {how})" for name in names]
    passed = [f"pass@{k}" for k in (2, 4)] if samples == 4 else []
    labels = [
        label for head, name in zip(heads, names, strict=True) for label in (head, *(f"{p} of {name}" for p in passed))
    ]
    assert [row["label"] for row in rows] == labels
    for row in rows:
        name = re.search(r"of (test|other)", row["label"])[1]  # type: ignore[index]
        for cell, of in zip(row["ends"], right[name], strict=True):
            count = of.sum(1)
            if k := re.match(r"pass@(\d)", row["label"]):
                missed = [np.prod([(samples - c - i) / (samples - i) for i in range(int(k[1]))]) for c in count]
                values = 1 - np.array(missed)
            else:
                values = count / samples
            mean = values.mean()
            effective = min(9 * mean * (1 - mean) / values.var(), 9 * samples)
            expected = [100 * x for x in (mean, *wilsons(mean * effective, effective))]
            assert numbers(cell) == pytest.approx(expected, abs=0.051)
        told = numbers(row["gain"])
        if "pass@" in row["label"]:
            assert told == []
            continue
        differences = (right[name][1].sum(1) - right[name][0].sum(1)).tolist()
        signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1)
        chance = (np.abs(np.array(differences) @ signs) >= abs(sum(differences))).mean()
        assert told[0] == pytest.approx(100 * sum(differences) / 9 / samples, abs=0.051)
        assert told[3] == pytest.approx(chance, rel=0.06)
        picks = np.array(differences)[np.random.default_rng(11).integers(0, 9, (20_000, 9))].mean(1) / samples
        assert told[1:3] == pytest.approx(100 * np.quantile(picks, [0.025, 0.975]), abs=100 * (1 / 9 / samples) + 0.06)


NO_BROWSER = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here")
CUT_OFF = """[...document.querySelectorAll("body *")].filter((at) => {
  const box = at.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !at.closest(".scroll *, pre, nav, .units, option");
}).map((at) => `${at.tagName} ${at.className} ${at.textContent.slice(0, 40)}`)"""
"""What lies beyond the screen, but for what can be scrolled to within its own box."""


@pytest.fixture(scope="module")
def chromium(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@NO_BROWSER
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_on_a_phone_and_a_desk_light_and_dark(chromium: browser.Page, width: int, dark: bool) -> None:
    chromium.open(RUN / "report.html", width, dark)
    assert chromium.errors == []
    assert chromium("document.documentElement.scrollWidth") == width and chromium(CUT_OFF) == []
    ground, ink = chromium("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ground, ink)]
    assert (brightness[0] < 0.2 and brightness[1] > 0.8) if dark else (brightness[0] > 0.9 and brightness[1] < 0.2)
    plots = chromium("""[...document.querySelectorAll("figure svg")].map((at) => {
      const marks = [...at.querySelectorAll(".mark-symbol path, .mark-rect path, .mark-rule line, .mark-line path")];
      const colours = marks.map((mark) => [getComputedStyle(mark).fill, getComputedStyle(mark).stroke].join());
      return [at.getAttribute("aria-label"), at.getBoundingClientRect().width, marks.length, new Set(colours).size];
    })""")
    # No unit here is longer than a token, so there is no sampled path.
    wanted = {words for name, words in LABELS.items() if name not in ("sft", "surrogate")}
    assert {label for label, *_ in plots} == wanted and len(plots) == len(wanted)
    for label, wide, marks, colours in plots:
        assert 200 < wide <= width and marks > 2 and colours > 1, label


@NO_BROWSER
@pytest.mark.slow
def test_a_unit_is_clicked_and_told_of_and_the_keyboard_goes_on(chromium: browser.Page) -> None:
    chromium.open(RUN / "report.html", 1280)
    detail, unit = "document.getElementById('detail').innerText", "document.querySelectorAll('.unit:not(.masked)')"
    data = embedded("tokens-data")
    shown = next(one for one in data["shown"] if any(unit[1] != "masked" for unit in one["units"]))
    assert shown["when"] == "before"
    first = next(each for each in shown["units"] if each[1] != "masked")
    chromium.click(f"{unit}[0]")
    said = chromium(detail)
    assert "teacher's candidates" in said and "student's candidates" in said
    assert f"{first[2]:.2f}" in said and f"{first[3]:.2f}" in said
    for logp in first[7][1::2]:
        assert f"{logp:.2f}" in said
    place = "[...document.querySelectorAll('.unit')].indexOf(document.activeElement)"
    at = chromium(place)
    chromium.press("ArrowRight")
    assert chromium(place) == at + 1 and chromium("document.activeElement.getAttribute('aria-selected')") == "true"
    chromium.press("ArrowLeft")
    assert chromium(place) == at and chromium(detail) == said
    colours = "[...document.querySelectorAll('.unit')].map((at) => at.style.backgroundColor).filter(Boolean).length"
    assert chromium(colours) > 0
    chromium.click("document.getElementById('tokens-choose')")  # opens nothing that a script can see
    chromium("const choose = document.getElementById('tokens-choose'); choose.selectedIndex = 1; choose.onchange; "
             "choose.dispatchEvent(new Event('change'))")  # fmt: skip
    second = list(dict.fromkeys(one["prompt"] for one in data["shown"]))[1]
    assert data["prompts"][second].strip() == chromium("document.getElementById('tokens-prompt').innerText").strip()
    assert chromium.errors == []


@NO_BROWSER
@pytest.mark.slow
def test_a_broken_answer_is_found_by_search(chromium: browser.Page) -> None:
    chromium.open(RUN / "report.html", 390)
    rows = embedded("answers-data")["rows"]
    broken = [row for row in rows if row[5] and not row[6]]
    shown = "[...document.querySelectorAll('.answer')].map((at) => at.innerText)"
    assert len(chromium(shown)) == len(rows) and chromium(shown)[0].startswith("broken")
    words = broken[-1][1].split()[0]
    chromium.click("document.getElementById('answers-search')")
    chromium.type(f"{words} AB")
    found = chromium(shown)
    assert 0 < len(found) < len(rows) and all(words in text for text in found)
    assert any(text.startswith("broken") and broken[-1][1] in text for text in found)
    chromium("const filter = document.getElementById('answers-filter'); filter.value = 'fixed'; "
             "filter.dispatchEvent(new Event('change'))")  # fmt: skip
    assert all(text.startswith("fixed") for text in chromium(shown))
    chromium.type("nothing that anyone has said")
    assert chromium(shown) == [] and chromium("document.getElementById('answers-count').innerText") == "0 of 0 shown"
    assert chromium.errors == []


def test_answers_are_ordered_cut_and_counted() -> None:
    def table(rows: dict[str, tuple[str, bool | None]]) -> pl.DataFrame:
        columns = {"set": "test", "sample": 0, "prompt": "p", "reference": None}
        told = [columns | {"prompt_id": name, "response": text, "right": right} for name, (text, right) in rows.items()]
        return pl.DataFrame(told, schema_overrides={"right": pl.Boolean, "reference": pl.String})

    before = table({"a": ("r", True), "b": ("w", False), "c": ("r", True), "d": ("w", False), "e": ("?", None)})
    after = table({"a": ("r", True), "b": ("r", True), "c": ("w" * 2000, False), "d": ("w", False), "e": ("?", None)})
    found = answered(before, after)
    kinds = [(True, False), (False, True), (False, False), (True, True), (None, None)]
    assert [(row[5], row[6]) for row in found["rows"]] == kinds
    assert found["rows"][0][4] == "w" * 1000 + "…" and found["rows"][0][2] is None
    assert found["cut"] == 1000 and found["left_out"] == 0 and found["unjudged"] and not found["several"]
    short = answered(before, after, budget=1200)
    assert (
        len(short["rows"]) + short["left_out"] == 5 and short["rows"][0] == found["rows"][0] and short["left_out"] > 0
    )


FAR, NEAR, SAME = (1.0, 0.9, 1.1), (0.5, 0.4, 0.6), "The score did not measurably change"


@pytest.mark.parametrize(
    ("gain", "before", "after", "headline", "news"),
    [
        (
            ((0.1, 0.3), 0.2),
            FAR,
            NEAR,
            "More held-out answers are right, and the student is closer to its teacher",
            "good",
        ),
        (
            ((-0.3, -0.1), -0.2),
            FAR,
            NEAR,
            "Fewer held-out answers are right, but the student is closer to its teacher",
            "bad",
        ),
        (((-0.1, 0.1), 0.0), FAR, FAR, f"{SAME}, and the student is not measurably nearer to its teacher", None),
        (((0.0, 0.0), 0.0), None, None, SAME, None),
        (None, NEAR, FAR, "The student is further from its teacher", "bad"),
        (None, None, None, "Neither score nor KL was measured", None),
    ],
)
def test_verdicts(gain: Any, before: Any, after: Any, headline: str, news: str | None) -> None:
    def figures(kl: Any, accuracy: float) -> dict[str, Any]:
        known = {"reverse_kl": kl and kl[0], "reverse_kl_95": kl and kl[1:]}
        return known | {"accuracy": accuracy, "judged": 10, "split": "test"}

    told = gain and {"accuracy": gain[1], "accuracy_95": gain[0], "p": 0.01}
    summary = {"before": figures(before, 0.5), "after": figures(after, 0.7), "gain": {"test": told}}
    found = verdict(summary, {"fixed": 3, "broken": 1, "stayed right": 4, "stayed wrong": 2})
    assert found["headline"] == headline + "."
    assert (found["good"], found["bad"]) == (news == "good", news == "bad")
    assert any("Of 10 answers 3 were fixed and 1 broken" in text for text in found["said"]) == (gain is not None)


def test_the_interval_of_a_difference_has_the_limits_that_it_must() -> None:
    """Symmetric intervals: half-widths add as squares; nothing is lost where one of both is certain."""
    assert difference((1.0, 0.7, 1.3), (2.0, 1.6, 2.4)) == pytest.approx((1 - 0.5, 1 + 0.5))
    assert difference((1.0, 1.0, 1.0), (2.0, 1.9, 2.5)) == pytest.approx((0.9, 1.5))
    assert difference((1.0, 0.9, 1.5), (2.0, 2.0, 2.0)) == pytest.approx((0.5, 1.1))
    assert [direction(given) for given in (None, (0.1, 1), (-1, -0.1), (-1, 1), (0, 1))] == [
        None,
        "up",
        "down",
        "same",
        "same",
    ]


def test_what_a_checkpoint_came_after_and_how_texts_sizes_and_times_look() -> None:
    assert whens((0, 3)) == ["before", "after"]
    assert whens((0, 1, 2, 3)) == ["before", "after round 0", "after round 1", "after"]
    assert whens(("base", 0, 1, 2)) == ["before", "after sft", "after round 0", "after"]
    assert [visible(text) for text in (" a b ", "  ", "a\n", "\ta", "")] == ["␣a b␣", "␣␣", "a⏎", "⇥a", ""]
    assert [costs.gigabytes(size) for size in (12, 1234, 5.6e6, 7.89e9)] == ["12 B", "1.23 kB", "5.6 MB", "7.89 GB"]
    assert [costs.duration(seconds) for seconds in (9.94, 90, 5400)] == ["9.9 s", "1.5 min", "1.5 h"]
    jobs = {"round-0-scores-000": 1.0, "eval-base-scores-001": 2.0, "models-teacher": 3.0, "eval-1-answers": 4.0}
    jobs |= {"sft-answers-000": 5.0, "round-1@0-policy-000": 6.0, "fit": 7.0}
    stages = {"scores": 3.0, "models": 3.0, "evaluate": 4.0, "answers": 5.0, "policy": 6.0, "fit": 7.0}
    assert costs.by_stage(jobs) == stages
