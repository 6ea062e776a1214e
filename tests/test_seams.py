"""Each seam takes one more by a declaration and a line of a registry, or `module:function`; CONTRIBUTING names the files."""

import re
from pathlib import Path
from typing import Literal

import polars as pl
import pytest
import tiny
import torch

from pipeline import sources
from pipeline.measure import scorers
from pipeline.prompts import collect
from pipeline.store.shards import open_writer
from pipeline.weights import credit, importance
from pipeline.weights.cross_fitting import sums_by
from pipeline.weights.estimator import Estimator
from pipeline.weights.phase import Part, compute
from schemas.config import Config, Evaluate, Prompts, Recipe, Splits, Weights, parse_config
from schemas.config import evaluate as evaluate_config
from schemas.config import weights as weights_config
from schemas.config.options import Option
from schemas.errors import OpdError
from train import recipes
from train.batch import Batch
from train.policy import UnitLogps, unit_logps
from train.stream import batches

ROOT = Path(__file__).parents[1]
SPLITS = {"examples": 1, "train": 3, "test": 2}


def parsed(**sections: object) -> Config:
    """A config file with these sections."""
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    return parse_config({"prompts": {"source": "p.jsonl"}, **models, **sections}, "my.yaml")


@pytest.mark.parametrize(
    ("declared", "registered"),
    [
        (weights_config.CREDITS, credit.CREDITS),
        (weights_config.SCHEMES, importance.SCHEMES),
        (evaluate_config.SCORERS, scorers.SCORERS),
    ],
)
def test_what_is_declared_is_what_there_is(declared: dict, registered: dict) -> None:
    assert declared.keys() == registered.keys()


def test_a_credit_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that compares responses by sums of a new kind, and reads a column that no other does."""
    monkeypatch.setitem(weights_config.CREDITS, "centred", Option("less the mean of its kind", reads=("discount",)))
    toy = Estimator(
        lambda options: options.discount * (pl.col("advantage") - pl.col("usual")) * pl.col("t_len"),
        sums=lambda table: {"kind": sums_by(table, ["kind"], ["advantage"])},
        estimate=lambda table, sums: table.join(sums["kind"], on="kind", how="left", maintain_order="left").select(
            usual=pl.col("advantage_sum") / pl.col("count")
        )["usual"],
        units=("t_len",),
    )
    monkeypatch.setitem(credit.CREDITS, "centred", toy)
    parts, tables = [], []
    for rollouts, units, weights in tiny.shards(tmp_path, count=2):
        with open_writer(units.path, "units", {}, {"rollouts": rollouts.manifest.sha256}) as writer:
            for group in list(units.row_groups()):
                writer.write(group)
        parts.append(Part(rollouts.path, units.path, None, weights.path))
    compute(parts, parsed(weights={"credit": "centred", "discount": 0.5}).weights)
    for part in parts:
        columns = pl.read_parquet(part.weights), pl.read_parquet(part.units).select("kind", "t_len")
        tables.append(pl.concat(columns, how="horizontal"))
    table = pl.concat(tables)
    usual = {kind: part["advantage"].mean() for (kind,), part in table.group_by("kind")}
    assert len(usual) > 1 and len({part["advantage"].mean() for part in tables}) == 2
    for row in table.iter_rows(named=True):
        expected = 0.5 * (row["advantage"] - usual[row["kind"]]) * row["t_len"]
        assert row["credit"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"credit": "magic"},
            "`weights.credit`: takes immediate, return_to_go, discounted, baseline, group, gae, residual, found",
        ),
        ({"discount": 0.5}, "`discount: 0.5` means nothing to `credit: immediate`; it is of credit: discounted, gae"),
        ({"credit": "discounted", "gae_lambda": 0.5}, "`gae_lambda: 0.5` means nothing to `credit: discounted`"),
        (
            {"scheme": "uniform", "gamma": 0.1},
            "`gamma: 0.1` means nothing to `scheme: uniform`; it is of scheme: iw_opd, si",
        ),
        ({"alpha": 0.1}, "`alpha: 0.1` means nothing to `scheme: uniform`; it is of scheme: ideal"),
        ({"scheme": "ideal", "prefix_share": 0.1}, "`prefix_share: 0.1` means nothing to `scheme: ideal`"),
    ],
)
def test_keys_that_an_estimator_does_not_read_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(OpdError) as caught:
        parsed(weights=weights)
    assert message in str(caught.value) and str(caught.value).startswith("my.yaml: ")


def test_keys_that_an_estimator_reads_are_flat_and_its_identity_is_all_of_them() -> None:
    chosen = {"scheme": "signed", "gamma": 0.1, "credit": "gae", "discount": 0.9, "gae_lambda": 0.5}
    gates = ("truncated", "repetitive", "right", "wrong", "agreeing", "conflicting")
    rest = {"alpha": 0.05, "prefix_share": 0.3, "truncate": None, "gate": dict.fromkeys(gates, 1.0), "reward": "none"}
    assert parsed(weights=chosen).weights.identity() == chosen | rest
    assert Weights(**parsed(weights=chosen).weights.model_dump()) == parsed(weights=chosen).weights


def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section with a key of its own, and its parts; longer units carry no loss."""

    class Squared(Recipe):
        recipe: Literal["squared"] = "squared"
        scale: float = 2.0

    @recipes.divergence
    def part(student: UnitLogps, batch: Batch, options: Squared, _: torch.Tensor) -> torch.Tensor:
        return options.scale * (student.unit - batch.teacher_logp) ** 2

    monkeypatch.setitem(recipes.RECIPES, Squared, recipes.Parts(part, None))
    (step,) = batches(tiny.shards(tmp_path), 20, 10_000, 0, range(1))
    batch = next(iter(step.parts))
    student = unit_logps(tiny.model(), batch, torch.from_numpy(tiny.STOP.astype("int64")))
    scored = recipes.losses(student, batch, Squared(scale=3.0))
    one = (batch.s_len == 1) & (batch.t_len == 1)
    assert torch.equal(scored.used, one) and one.any() and not one.all()
    assert torch.equal(scored.diverges, one)
    torch.testing.assert_close(scored.loss[one], 3 * (student.unit - batch.teacher_logp)[one] ** 2)
    assert not scored.loss[~one].any()


def test_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are taken as they come, and no more of them than are needed; it has a verifier."""
    asked = []

    def count(source: str, options: dict, seed: int, need: int):
        for i in range(seed, 1000):
            asked.append(i)
            yield {"prompt": f"{source}{i}", "answer": i * options["step"]}

    kind = sources.Source(
        re.compile("count:"), count, shuffled=True, verify=lambda source, answer, row: answer in ("7", row["answer"])
    )
    monkeypatch.setattr(sources, "SOURCES", {"count": kind, **sources.SOURCES})
    config = parsed(prompts={"source": "count:", "options": {"step": 2}, "splits": SPLITS}, rollouts={"prompts": 3})
    table = collect(config.prompts, seed=5)
    assert table["prompt"].to_pylist() == [f"count:{i}" for i in range(5, 11)] and asked[-1] == 10
    assert table["answer"].to_pylist() == ["10", "12", "14", "16", "18", "20"]
    (first, *_) = table.to_pylist()
    assert scorers.scorer(config.evaluate, "count:")("so 7", first) == ("7", True)
    assert scorers.scorer(config.evaluate, "count:")("so 8", first) == ("8", False)


def test_a_source_of_your_own(folder: Path) -> None:
    """All its rows are shuffled, so that a larger `train` changes no other split; its digest is part of the identity."""
    text = (
        "def rows(options, seed, need):\n    return ({'prompt': f'p{i}', 'answer': i} for i in range(options['n']))\n"
    )
    (folder / "mine.py").write_text(text + "def word(options, seed, need): return ['p']\ndef no(*_): return 3\n")
    config = Prompts(source="mine:rows", options={"n": 9}, splits=Splits(**SPLITS))
    table = collect(config, seed=1)
    more = collect(config.model_copy(update={"splits": Splits(**SPLITS | {"train": 6})}), seed=1)
    assert more.slice(0, 6).equals(table) and set(more["prompt"].to_pylist()) == {f"p{i}" for i in range(9)}
    before = sources.identity("mine:rows")
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + "\n")
    assert before.keys() == {"source_code"} and before != sources.identity("mine:rows")
    assert sources.identity("p.jsonl") == {}
    for name, message in (("word", "row 0: expected a dict, found str"), ("no", "an iterable of dicts, found int")):
        with pytest.raises(OpdError, match=f"prompts: mine:{name}.*{message}"):
            collect(Prompts(source=f"mine:{name}"), seed=1)


def test_a_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate_config.SCORERS, "longest", Option("the longest word"))
    monkeypatch.setitem(
        scorers.SCORERS,
        "longest",
        lambda config, source: scorers.Judge(
            lambda row: row["answer"] if " " not in row["answer"] else None,
            lambda text, row: max(text.split(), key=len),
            lambda answer, gold, row: (answer, answer == gold),
            "words",
        ),
    )
    config = parsed(evaluate={"scorer": "longest"})
    score = scorers.scorer(config.evaluate, config.prompts.source)
    assert score("a word here it isn't", {"answer": "isn't"}) == ("isn't", True)
    assert score("a word here it isn't", {"answer": "no word"}) == ("isn't", None)
    with pytest.raises(ValueError, match="`extract: whole` means nothing to `scorer: longest`"):
        Evaluate(scorer="longest", extract="whole")


def contributing() -> list[tuple[str, list[str], list[str]]]:
    """Rows of CONTRIBUTING's table of seams: what is added, the files for it, and its test and doc row."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("| what | files | test | doc row |\n|---|---|---|---|\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [
        (what, re.findall("`(.+?)`", files), re.findall("`(.+?)`", beside + doc)) for what, files, beside, doc in cells
    ]


def test_contributing_lists_two_files_at_most_that_are_there() -> None:
    listed = contributing()
    seams = {"recipe", "credit estimator", "weighing scheme", "prompt source", "scorer", "teacher or sampler"}
    assert {what for what, *_ in listed} == seams
    for what, files, beside in listed:
        assert 1 <= len(files) <= 2 and len(beside) == 2, what
        assert all((ROOT / file).is_file() for file in files + beside), (what, files, beside)
