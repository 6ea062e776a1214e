"""Commands that are given the folders of runs, on small runs that differ in recipe and in seed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import whole_run
from typer.testing import CliRunner

from pipeline.measure.accuracy import gain
from schemas.config import load_config
from stages.run.results import read_evaluation
from stages.run.run import run_of, write_config
from stages.tools.cli import app
from stages.tools.compare import judged_otherwise, kl_of
from stages.tools.folders import open_folder

ROUND = {"rounds": 1, "prompts": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with runs a, `recipe` and `seed`, which each differ from a in one key."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.laid_out()
        changes: dict[str, dict[str, Any]] = {
            "a": {},
            "recipe": {"objective": {"recipe": "sampled"}, "weights": {"scheme": "uniform"}},
            "seed": {"seed": 2, "evaluate": {"kl_items": 0}},
        }
        for name, changed in changes.items():
            where = small.written(run=name, rollouts=ROUND, **changed)
            write_config(run_of(load_config(where)))
            whole_run.stages_of(where)
        timings = Path("runs/a/timings")
        timings.mkdir()
        for job, seconds in {"round-0-scores-000": 5, "round-0-scores-001": 7, "eval-0-answers": 2, "fit": 1}.items():
            (timings / f"{job}.tsv").write_text(f"s\th:m:s\n{seconds}\t0\n")
        yield folder


def told(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    return result.output


def test_runs_are_compared(runs: Path) -> None:
    found = json.loads(told("compare", "a", "runs/recipe", "seed", "--json"))
    assert found["config"]["objective.recipe"] == ["hybrid", "sampled", "hybrid"]
    assert found["config"]["seed"] == [1, 1, 2] and "train.learning_rate" not in found["config"]
    a, recipe, seed = found["runs"]
    assert list(a["evaluations"]) == ["0", "1"] and a["seconds"] == {"fit": 1, "scores": 12, "evaluate": 2}
    assert a["teacher_tokens"]["scored"] > 0 and a["disk"]["own"] > a["disk"]["cache"] > 0
    assert recipe["teacher_tokens"]["cache"] > 0 and seed["evaluations"]["1"]["reverse_kl"] is None
    by = {(test["second"], test["of"]): test for test in found["tests"]}
    answers = [read_evaluation(open_folder(Path(name)).phase("eval-1"))[1] for name in ("a", "recipe")]
    expected = gain(*answers, 1)
    same = by["recipe", "accuracy"]
    assert expected and same["paired"] and (same["accuracy"], same["p"]) == (expected["accuracy"], expected["p"])
    assert by["recipe", "sampled_kl"]["paired"] and by["recipe", "sampled_kl"]["items"] == [2, 2]
    # Another seed has other held-out prompts, under the same ids.
    other = by["seed", "accuracy"]
    assert other["items"] == [4, 4] and other["common"] < 2 and not other["paired"]
    assert by["seed", "sampled_kl"]["problem"] == "not measured in both"


def test_a_comparison_in_words(runs: Path) -> None:
    output = " ".join(told("compare", "a", "recipe", "seed").split())
    assert "recipe against a, accuracy on test: " in output and "4 items of both, " in output
    assert "recipe against a, on-policy KL as sampled: " in output and "(2 items of both)" in output
    assert "seed against a, accuracy on test: " in output and "other items, 4 and 4" in output
    assert "on-policy KL as sampled: not compared: not measured in both" in output
    assert "give two or more" in told("compare", "a", status=2)
    assert "no run here (it has no config.yaml)" in told("compare", "a", "nothing", status=2)


def test_the_kl_that_is_compared_is_the_evaluations(runs: Path) -> None:
    for number in (0, 1):
        phase = open_folder(Path("a")).phase(f"eval-{number}")
        found, answers = read_evaluation(phase)
        nats = kl_of(phase, answers)
        assert found.sampled_kl == pytest.approx(nats["nats"].sum() / nats["tokens"].sum(), abs=1e-5)
        assert nats["tokens"].sum() == found.kl_tokens


def test_what_is_judged_otherwise_or_unfinished_is_not_compared(runs: Path) -> None:
    (found, _), (other, _) = (read_evaluation(open_folder(Path(name)).phase("eval-1")) for name in ("a", "recipe"))
    assert judged_otherwise(found, other, "test") is None
    sampled = other.model_copy(update={"samples": 4, "temperature": 1.0})
    assert judged_otherwise(found, sampled, "test") == (
        "judged otherwise: samples: first 1, second 4; temperature: first 0.0, second 1.0"
    )
    exact = other.model_copy(update={"scorer": "exact"})
    assert "scorer: first 'source', second 'exact'" in str(judged_otherwise(found, exact, "test"))
    write_config(run_of(load_config(small.written(run="unfinished"))))
    assert "nothing evaluated yet" in told("compare", "a", "unfinished", status=2)
