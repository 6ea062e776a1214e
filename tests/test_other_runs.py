"""Runs of their own: killed and stale, on tiny models; other pairs on the two real ones (adapters: states take megabytes).

Through Snakemake where it is about what Snakemake does, else all stages in this process: most of a tiny run's time is start-up.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import small
import whole_run
from real_run import ADAPTERS, GEMMA3, SMOLLM2, Run

from pipeline.store.shards import open_shard


@pytest.mark.slow
def test_killed_in_scoring_and_in_training_it_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of Snakemake and all its jobs in the middle of a stage; the same command then finishes, bit for bit."""
    rollouts, trained = {"rounds": 1, "prompts": 12, "shard_size": 12}, "runs/default/round-0/checkpoint.json"
    fresh, whole = Run(place / "killed"), Run(place / "whole")
    for run in (fresh, whole):
        monkeypatch.chdir(run.folder)
        small.laid_out()
        where = small.written(run="default", rollouts=rollouts, train={"epochs": 50}, evaluate={"kl_items": 0})
    monkeypatch.setenv("OPD_CACHE", str(whole.cache))
    whole_run.stages_of(where)
    for sign, written in (("rule scores", fresh.cache / "scores"), ("rule train", fresh.run / "round-0/train/states")):
        process = fresh.start(trained, "--printshellcmds")  # in Snakemake's own words, which tell of starts
        assert process.stdout
        assert any(sign in line for line in process.stdout)
        while not any(written.glob("*")):  # what has a temporary name too
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for shard in fresh.run.glob("*/*/*.parquet"):
            if shard.with_suffix(".json").exists():
                open_shard(shard, shard.parent.name)
    assert not (fresh.folder / trained).exists()
    fresh.snakemake(trained)
    tables = {path: shard for path, shard in fresh.shards().items() if path.startswith("round-0/")}
    assert {Path(path).parent.name for path in tables} == {"rollouts", "scores", "units", "weights"}
    for path in map(Path, tables):
        open_shard(fresh.run / path, path.parent.name)
    assert tables.items() <= whole.shards().items()
    assert json.loads((fresh.run / "round-0/train/result.json").read_text())["steps"] == 150
    found, expected = (run.run / "round-0/checkpoint/model.safetensors" for run in (fresh, whole))
    assert found.read_bytes() == expected.read_bytes()
    assert "Nothing to be done" in fresh.snakemake(trained)


@pytest.mark.slow
def test_a_stale_round_ends_early_and_the_next_one_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large learning rate: the round says why it ended, the next one samples afresh with the steps that were left, and
    trains on the earlier rollouts too, weighed by its own policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    small.laid_out()
    where = small.written(
        prompts={"splits": {"examples": 1, "train": 24, "test": 4}},
        rollouts={"rounds": 2, "replay": 1, "prompts": 12, "shard_size": 6},
        weights={"scheme": "uniform", "truncate": 2.0},
        train={"warmup_steps": 0, "learning_rate": 0.3, "epochs": 3, "min_ess": 0.9},
        evaluate={"kl_items": 0},
    )
    whole_run.stages_of(where)
    stale = tmp_path / "runs/a"
    output = " ".join(capsys.readouterr().err.split())
    first, second = (json.loads((stale / f"round-{r}/train/result.json").read_text()) for r in (0, 1))
    assert first["budget"] == 9 and first["steps"] < 9 and first["ended"] == "min_ess" and first["ess"] < 0.9
    assert f"round-0 train: ended after {first['steps']} of 9 steps: the effective sample size" in output
    assert "below train.min_ess = 0.9" in output
    assert second["budget"] == 18 + 9 - first["steps"]
    replayed, fresh = (pl.read_parquet(stale / phase / "weights/*.parquet") for phase in ("round-1@0", "round-1"))
    assert replayed["is_ratio"].n_unique() > 10 and set(fresh["is_ratio"]) == {1.0}
    assert replayed.select("rollout_id", "unit").equals(
        pl.read_parquet(stale / "round-0/weights/*.parquet", columns=["rollout_id", "unit"])
    )
    summary = json.loads((stale / "summary.json").read_text())
    phases = {phase["phase"]: phase for phase in summary["phases"]}
    assert phases["round-0"]["training"]["ended"] == "min_ess" and phases["round-1@0"]["training"] is None
    assert phases["round-1@0"]["staleness"]["rounds_behind"] == 1
    assert phases["round-1@0"]["staleness"]["units"]["ess"] < 1 == phases["round-1"]["staleness"]["units"]["ess"]
    assert phases["round-1@0"]["teacher"]["tokens"] == {}
    # What is replayed is old from the start; how far the round has moved is counted from its own start.
    began = phases["round-1"]["training"]["first"]
    assert began["units"]["ess"] < 0.9 < began["since_start"]["ess"]
    page = (stale / "report.html").read_text()
    assert "round-1@0" in page and "(stale)" in page and "round-0 ended after" in " ".join(page.split())


HINT = "Question: {{ prompt }}\nHint: the correct answer is {{ answer }}.\nAnswer:"


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["swapped", "self-teacher on own prompts"])
def test_another_pair_by_config_alone(
    pair: str, models: Path, smollm2: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "swapped": {
            "student": {"model": GEMMA3, "prompt": "Question: {{ prompt }}\nAnswer:", "stop": ["\n"]},
            "teacher": {"model": SMOLLM2, "prompt": HINT},
        },
        "self-teacher on own prompts": {
            "student": {"model": smollm2.ref.path},
            "teacher": {"model": SMOLLM2, "prompt": HINT},
            "prompts": {"source": "mine.jsonl", "splits": {"examples": 0, "train": 12, "dev": 0, "test": 8}},
        },
    }[pair]
    other = Run(place, models, train=ADAPTERS, **changes)
    rows = [{"prompt": f"What is {i} plus {i + 3}?", "answer": str(2 * i + 3)} for i in range(20)]
    (place / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(place)
    monkeypatch.setenv("OPD_CACHE", str(other.cache))
    whole_run.stages_of(Path("config.yaml"))
    summary = json.loads((other.run / "summary.json").read_text())
    assert summary["after"]["items"] == 8 and summary["after"]["reverse_kl"] != summary["before"]["reverse_kl"]
    units = pl.read_parquet(other.run / "round-0/units/*.parquet")
    if pair != "swapped":
        # It reads the sampled ids, which needn't be what its tokenizer makes of the text.
        assert set(units["kind"]) <= {"1:1", "stop", "masked"}
        identity = open_shard(other.run / "round-0/scores/000.parquet", "scores").manifest.identity
        assert identity["reads"] == "tokens"
        assert (units.filter(pl.col("kind") != "masked")["dropped_logp"] == -float("inf")).all()
    else:
        assert {"1:1", "n:m"} & set(units["kind"])
