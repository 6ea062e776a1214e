"""Drift of the policy from the one that sampled: figures from the formula, rounds that end early, budgets that carry over."""

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from test_train import STOP, config, metrics, run, same, stop_after

from pipeline.store.shards import open_writer
from schemas.config import Config
from schemas.errors import OpdError, Stopped
from schemas.outcome import Outcome
from schemas.tables import STOP_ID, arrow_schema
from stages.run.rounds import progress_of
from stages.run.run import run_of
from stages.train import ended
from train.loop import Progress, train_round
from train.staleness import is_stale, ratio_figures, ratio_sums
from train.stream import Triple


def on_policy(folder: Path, model: Any) -> list[Triple]:
    """Tiny shards as `model` would have sampled them: its own log-probs, ratios of 1."""
    for rollouts, units, weights in tiny.shards(folder, responses=40):
        responses = {row["rollout_id"]: row for row in rollouts.read().to_pylist()}
        logps: dict[str, list[float]] = {}
        for name, row in responses.items():
            ids = torch.tensor([*row["prompt_ids"], *row["response_ids"]])
            with torch.no_grad():
                logp = model(ids[None]).logits[0].double().log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
            stopped = row["finish_reason"] == "stop"
            targets = [*row["response_ids"][:-1], STOP_ID] if stopped else row["response_ids"]
            logps[name] = [
                float(at[STOP].logsumexp(0) if target == STOP_ID else at[target])
                for at, target in zip(logp, targets, strict=True)
            ]
        rows = weights.read().to_pylist()
        for row, unit in zip(rows, units.read().to_pylist(), strict=True):
            of = slice(unit["s_start"], unit["s_start"] + unit["s_len"])
            masked = unit["kind"] == "masked"
            row |= {"student_logp": None if masked else sum(logps[row["rollout_id"]][of]), "is_ratio": 1.0}
        table, at = pa.Table.from_pylist(rows, schema=arrow_schema("weights")), 0
        groups = [len(group) for group in weights.row_groups()]
        with open_writer(weights.path, "weights", {}, {}) as writer:
            for size in groups:
                writer.write(table.slice(at, size))
                at += size
    return tiny.open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Triple]:
    return on_policy(tmp_path_factory.mktemp("shards"), tiny.model())


def trained(folder: Path, shards: list[Triple], settings: Config, **changes: Any) -> Outcome:
    steps = -(-80 // settings.train.batch_size) * settings.train.epochs
    arguments: dict[str, Any] = {"progress": Progress(0, steps, steps), "start_from": None, "identity": {"run": 1}}
    return train_round(tiny.model(), STOP, shards, settings, 0, folder=folder, **{**arguments, **changes})


def test_figures_from_the_formula_whatever_the_micro_batches() -> None:
    rng = np.random.default_rng(0)
    response = np.sort(rng.integers(0, 7, 60))
    ours, theirs, start = torch.from_numpy(rng.normal(-3, 1, (3, 60)))
    ratio, since = np.exp((ours - theirs).numpy()), np.exp((ours - start).numpy())
    per_unit = [np.log(ratio[response == r]).mean() for r in np.unique(response)]
    cuts = [0, int((response < 3).sum()), 60]
    sums: defaultdict[str, float] = defaultdict(float)
    for a, b in pairwise(cuts):
        for name, value in ratio_sums(ours[a:b], theirs[a:b], start[a:b], torch.from_numpy(response[a:b] + 5)).items():
            sums[name] += value
    expected = {"response_log_ratio": np.mean(per_unit), "response_log_ratio_sd": np.std(per_unit)}
    for prefix, r in (("", ratio), ("drift_", since)):
        expected[f"{prefix}ess"] = r.sum() ** 2 / (len(r) * (r**2).sum())
        expected[f"{prefix}chi2"] = len(r) * (r**2).sum() / r.sum() ** 2 - 1
    assert ratio_figures(sums) == pytest.approx(expected, rel=1e-10)


def test_nothing_and_ratios_beyond_float_are_numbers() -> None:
    empty = torch.zeros(0)
    nothing = ratio_figures(ratio_sums(empty, empty, empty, empty.long()))
    assert nothing == {f"{of}{name}": at for of in ("", "drift_") for name, at in (("ess", 1.0), ("chi2", 0.0))} | {
        "response_log_ratio": 0.0,
        "response_log_ratio_sd": 0.0,
    }
    near = torch.tensor([-1.0, -1.0])
    far = ratio_figures(ratio_sums(torch.tensor([-1.0, 800.0]), near, near, torch.tensor([0, 1])))
    assert all(math.isfinite(value) for value in far.values()) and far["ess"] == pytest.approx(0.5)
    assert not is_stale([0.1] * 3, 0.5) and not is_stale([0.1] * 4, None) and is_stale([0.9, 0.1, 0.1, 0.1, 0.1], 0.5)


def test_responses_tell_apart_what_their_products_no_longer_do() -> None:
    """16 responses of 200 units: one product outweighs the rest, while the log-ratio per unit follows how far the policy is."""
    rng = np.random.default_rng(1)
    noise, response = torch.from_numpy(rng.normal(0, 1, 3200)), torch.arange(16).repeat_interleave(200)
    zero = torch.zeros(3200)
    products = (0.6 * noise.reshape(16, 200).sum(1)).exp()
    assert products.sum() ** 2 / (16 * (products**2).sum()) < 1.1 / 16
    for scale, shift in ((0.3, -0.05), (0.6, -0.2)):
        found = ratio_figures(ratio_sums(scale * noise + shift, zero, zero, response))
        assert found["response_log_ratio"] == pytest.approx(scale * float(noise.mean()) + shift, rel=1e-9)
        assert found["response_log_ratio_sd"] == pytest.approx(scale / 200**0.5, rel=0.4)


def test_a_large_learning_rate_ends_the_round_earlier_than_a_small_one(tmp_path: Path, shards: list[Triple]) -> None:
    taken = {}
    for rate in (1e-5, 3e-3, 1e-2):
        settings = config(learning_rate=rate, epochs=3, min_ess=0.9, schedule="constant")
        taken[rate] = trained(tmp_path / str(rate), shards, settings)
        lines = metrics(tmp_path / str(rate))
        # What sampled is what is trained: before the first update all ratios are 1.
        assert lines[0]["ess"] == pytest.approx(1, abs=1e-9)
        assert (lines[0]["response_log_ratio"], lines[0]["response_log_ratio_sd"]) == pytest.approx((0, 0), abs=1e-5)
        assert all(line["drift_ess"] == pytest.approx(line["ess"], rel=1e-6) for line in lines)
        assert len(lines) == taken[rate].steps and {line["steps"] for line in lines} == {42}
        assert taken[rate].ess == pytest.approx(np.mean([line["ess"] for line in lines[-4:]]))
        bound = [np.mean([line["ess"] for line in lines[i - 4 : i]]) < 0.9 for i in range(4, len(lines) + 1)]
        assert bound == [False] * (len(bound) - 1) + [taken[rate].ended == "min_ess"]
    assert taken[1e-5].ended == "budget" and taken[1e-5].unspent == 0
    assert 4 <= taken[1e-2].steps < taken[3e-3].steps < 42
    text = ended(config(min_ess=0.9), 0, taken[1e-2])
    assert text and "fell to 0." in text and "below train.min_ess = 0.9" in text
    assert f"round-1 samples afresh and has {42 - taken[1e-2].steps} steps more" in text
    assert ended(config(min_ess=0.9), 0, taken[1e-5]) is None


def test_a_round_that_ended_early_resumes_to_the_same_bits_and_stays_ended(
    tmp_path: Path, shards: list[Triple]
) -> None:
    settings = config(learning_rate=1e-2, epochs=3, min_ess=0.9, save_every=2, schedule="constant")
    outcome = trained(tmp_path / "straight", shards, settings)
    straight = run(tmp_path / "straight", shards, settings, progress=Progress(0, 42, 42))
    assert len(metrics(tmp_path / "straight")) == outcome.steps < 42  # what is finished takes no step more
    for step in (1, 3, outcome.steps - 1, outcome.steps):
        folder = tmp_path / str(step)
        with pytest.raises(Stopped):
            trained(folder, shards, settings, stop_asked=stop_after(folder, step))
        assert trained(folder, shards, settings) == outcome
        assert same(run(folder, shards, settings, progress=Progress(0, 42, 42)), straight)
        assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in metrics(tmp_path / "straight")]


def test_what_a_round_leaves_is_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = config(batch_size=10, epochs=2).model_dump()
    values["rollouts"] |= {"rounds": 3, "prompts": 30, "samples": 2, "replay": 1}
    settings = Config.model_validate(values)
    # 60 responses a round, and 60 more that are replayed from the second on.
    assert progress_of(run_of(settings), 0) == Progress(before=0, budget=12, total=12 + 24 + 24)
    with pytest.raises(OpdError, match=r"round-0/train/result.json: missing; run `python -m stages.train --round 0`"):
        progress_of(run_of(settings), 1)
    for number, outcome in enumerate(
        (Outcome(budget=12, steps=5, ended="min_ess", ess=0.4), Outcome(budget=31, steps=31, ended="budget", ess=0.9))
    ):
        path = run_of(settings).phase(f"round-{number}").outcome
        path.parent.mkdir(parents=True)
        path.write_text(outcome.dump())
    assert progress_of(run_of(settings), 1) == Progress(before=5, budget=24 + 7, total=60)
    assert progress_of(run_of(settings), 2) == Progress(before=36, budget=24, total=60)
    run_of(settings).phase(f"round-{1}").outcome.write_text(json.dumps({"budget": 1}))
    with pytest.raises(OpdError, match=r"round-1/train/result.json: damaged"):
        progress_of(run_of(settings), 2)


def test_a_replayed_round_has_its_own_weights_only(tmp_path: Path) -> None:
    values = config().model_dump()
    values["rollouts"] |= {"rounds": 3, "replay": 2, "shard_size": 100}
    run = run_of(Config.model_validate(values))
    assert [phase.name for phase in run.trained_on(0)] == ["round-0"]
    assert [phase.name for phase in run.trained_on(2)] == ["round-2", "round-2@0", "round-2@1"]
    replayed = run.phase("round-2@1")
    for table in ("rollouts", "scores", "units"):
        assert replayed[0].path(table) == run.phase("round-1")[0].path(table)
    for table in ("policy", "weights"):
        assert replayed[0].path(table).parent.parent.name == "round-2@1"
    assert replayed.is_foreign and not run.phase("round-2").is_foreign
    assert run.policy_file(replayed.number).parent.name == "round-1"  # checkpoint 2
    assert len(replayed) == 2
    assert {"round-1@0", "round-2@0", "round-2@1"} <= {phase.name for phase in run.phases}
    for wrong in ("round", "round-1@", "eval-1@0", "round-x"):
        with pytest.raises(OpdError, match="expected round-<number>"):
            run.phase(wrong)
    with pytest.raises(OpdError, match="--shard 2: phase round-2 has 2 shards"):
        run.phase("round-2")[2]
