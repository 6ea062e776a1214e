"""The report: its numbers from the tables by other queries, and the page in a browser, as people use it."""

import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import polars as pl
import pytest
import small
import whole_run

from stages.report import costs
from stages.report.charts import LABELS
from stages.report.page import answered, whens
from stages.report.verdict import difference, direction, verdict, visible

RUN = Path("runs/a")
SECONDS = {"prompts": 2.0, "round-0-rollouts-000": 4.0, "round-0-scores-000": 5.0, "eval-0-scores-000": 3.0} | {
    "eval-1-answers": 1.5,
    "round-0-train": 7.0,
}
"""As Snakemake would have timed them, by job."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on tiny models, in the working directory, some of whose answers training fixes and some it breaks."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.laid_out()
        # Right by a coin that falls the same for the same answer to the same prompt.
        coin = "import zlib\ndef right(said, answer, _):\n    return zlib.crc32((said + answer).encode()) % 2 == 0\n"
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
    told = told.with_columns(before=pl.col("text").shift(1).over("rollout_id"))
    return told.filter(pl.col("kind") != "masked").with_columns(lost=pl.col("student") - pl.col("teacher_logp"))


def text_of(data: bytes | None) -> str:
    return "(start)" if data is None else visible(data.decode(errors="backslashreplace"))


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
    # What the teacher would have said, of the first row.
    here = units.filter(pl.all_horizontal(pl.col(name).eq_missing(table[name][0]) for name in (*keys, "kind")))
    mass = (
        here.select(id="cand_id", p="cand_logp")
        .explode("id", "p")
        .group_by("id")
        .agg(pl.col("p").exp().sum() / len(here))
    )
    shares = [f"{100 * share:.0f} %" for share in mass["p"].sort(descending=True).head(5)]
    assert re.findall(r"\d+ %", rows[0][-1])[-len(shares) :] == shares


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
        for unit, row in zip(told, compared.to_dicts(), strict=True):
            assert unit[7][1::2] == pytest.approx(sorted(row["cand_logp"], reverse=True)[:6], abs=6e-3)
            assert len(unit[8]) == len(row["top_id"][row["s_start"]]) == 4


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
