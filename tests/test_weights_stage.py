"""The weights stage over a real shard: estimators see the whole of it, and its row groups are those of the units."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import tiny

from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.credit import weigh
from pipeline.weights.estimator import Loss
from schemas.config import Weights
from stages import weights
from train.stream import batches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "ideal", "credit": "baseline", "truncate": 2.0},
        {"scheme": "signed", "credit": "gae", "discount": 0.9},
        {"scheme": "prefix", "credit": "discounted"},
        {"scheme": "uniform", "credit": "return_to_go"},
    ],
)
def test_the_whole_shard_is_weighed_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    phase = tmp_path / "runs" / "default" / "round-0"
    rollouts, units, _ = tiny.shards(phase, count=1)[0]
    made_from = {"rollouts": rollouts.manifest.sha256}
    groups = list(units.row_groups())
    with open_writer(units.path, "units", {}, made_from) as writer:  # as the units stage does
        for group in groups:
            writer.write(group)
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    config = models | {"prompts": {"source": "p.jsonl"}, "weights": options, "objective": {"clip": 1.5}}
    Path("c.yaml").write_text(json.dumps(config))
    weights.main("round-0", Path("c.yaml"))

    made = open_shard(phase / "weights" / "000.parquet", "weights", Weights(**options).identity())  # type: ignore[arg-type]
    table, frames = pl.read_parquet(made.path), [pl.read_parquet(shard.path) for shard in (units, rollouts)]
    loss = Loss(clip=1.5, corrected=("n:m",))
    assert made.manifest.identity["loss"] == {"clip": 1.5, "corrected": ["n:m"]}
    assert table.equals(weigh(*frames, Weights(**options), loss=loss))  # type: ignore[arg-type]
    with pq.ParquetFile(made.path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [len(group) for group in groups]

    # The trainer reads credit and weight of the units that are compared.
    units = open_shard(units.path, "units", inputs=made_from)
    steps = batches([(rollouts, units, made)], 8, 40, 0, range(3))
    seen = [part for step in steps for part in step.parts]
    compared = table.filter(frames[0]["kind"] != "masked")
    shift = compared["credit"] - compared["advantage"].clip(-1.5, 1.5)
    assert (compared["advantage"].abs() > 1.5).any()
    behavior = compared["student_logp"] - compared["is_ratio"].log()
    for name, expected in (("credit_shift", shift), ("weight", compared["weight"]), ("behavior_logp", behavior)):
        got = np.concatenate([getattr(part, name).numpy() for part in seen])
        np.testing.assert_array_equal(np.sort(got), np.sort(expected.to_numpy()))
    assert bool((shift == 0).all()) == (options.get("credit", "immediate") == "immediate")


@pytest.mark.parametrize("kept", [True, False])
def test_one_is_told_how_responses_were_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    """At temperature .6 weights are to the sampler; where its log-probs are gone a warning names the phase."""
    monkeypatch.chdir(tmp_path)
    phase = tmp_path / "runs" / "default" / "round-0"
    rollouts, units, _ = tiny.shards(phase, count=1)[0]
    groups = [rollouts.row_groups(), units.row_groups()]
    sampled, aligned = (list(each) for each in groups)
    with open_writer(rollouts.path, "rollouts", {"sampling": {"temperature": 0.6, "top_p": 0.95}}, {}) as writer:
        for group in sampled:
            sampler = group["behavior_logp"] if kept else group["sampler_logp"]
            writer.write(group.set_column(group.schema.get_field_index("sampler_logp"), "sampler_logp", sampler))
    made_from = {"rollouts": open_shard(rollouts.path, "rollouts").manifest.sha256}
    with open_writer(units.path, "units", {}, made_from) as writer:
        for group in aligned:
            writer.write(group)
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    Path("c.yaml").write_text(json.dumps(models | {"prompts": {"source": "p.jsonl"}}))
    weights.main("round-0", Path("c.yaml"))
    told = " ".join(capsys.readouterr().err.split())
    how = "20 responses were sampled at temperature 0.6, top-p 0.95; ratios are to that sampler's log-probs, weights of the"
    lost = "warning: round-0: 20 of 20 responses were sampled at temperature 0.6, top-p 0.95, but their log-probs under that"
    assert (how in told) == kept and (lost in told) == (not kept)
