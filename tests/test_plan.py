"""What `opd plan` says against sums over a whole vocabulary, and one real run of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.prompts import collect
from schemas.config import Config, parse_config
from schemas.errors import OpdError
from schemas.tables import arrow_schema
from stages.tools import plan
from stages.tools.cli import app
from stages.tools.plan import WIDTH, costs_of, what_rules_keep


def test_rules_are_sums_over_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    vocab, rows, full = 800, [], []
    for pos in range(40):
        p = rng.dirichlet(np.full(vocab, 0.05)) + 1e-12
        p = np.sort(p / p.sum())[::-1]
        stop, p = p[7], np.delete(p, 7)  # the stop set is no candidate
        full.append((stop, p))
        rows.append(
            {"rollout_id": "r", "pos": pos, "byte_start": 0, "byte_end": 1, "token_id": 5, "logp": -1.0}
            | {"entropy": float(-(p * np.log(p)).sum() - stop * np.log(stop)), "stop_logp": float(np.log(stop))}
            | {"tail_logp": float(np.log(p[WIDTH:].sum()))}
            | {"cand_id": list(range(WIDTH)), "cand_logp": np.log(p[:WIDTH]).tolist()}
        )
    table = pa.Table.from_pylist(rows, schema=arrow_schema("scores"))
    found = {rule["rule"]: rule for rule in what_rules_keep(table, vocab)}

    def reference(count: Any) -> tuple[float, float, float]:
        kept, mass, kl = [], [], []
        for stop, p in full:
            k = count(stop, p)
            tail = p[k:].sum()
            kept.append(k)
            mass.append(p[:k].sum() + stop)
            kl.append((p[k:] * np.log(p[k:] / (tail / (vocab - k - 1)))).sum() if tail > 0 else 0.0)
        return tuple(map(float, map(np.mean, (kept, mass, kl))))  # type: ignore[return-value]

    for k in (8, 32, 256):
        expected = reference(lambda stop, p, k=k: k)
        assert [found[f"k_max {k}"][n] for n in ("kept", "mass", "kl")] == pytest.approx(expected, rel=1e-4, abs=2e-5)
    for floor in (0.01, 0.0005):
        expected = reference(lambda stop, p, floor=floor: max(1, int((p[:WIDTH] >= floor).sum())))
        assert [found[f"min_p {floor:g}"][n] for n in ("kept", "mass", "kl")] == pytest.approx(
            expected, rel=1e-3, abs=2e-5
        )
    expected = reference(lambda stop, p: int(((p.cumsum() - p + stop) < 0.9)[:WIDTH].sum()))
    assert [found["mass 0.9"][n] for n in ("kept", "mass", "kl")] == pytest.approx(expected, rel=1e-3, abs=2e-5)
    sizes = [found[f"k_max {k}"]["bytes_per_token"] for k in (8, 32, 128)]
    assert sizes == sorted(sizes) and sizes[0] > 8


def test_costs_count_what_each_rounds_horizon_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums over single responses, for lengths on the two sides that are proportional."""
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    values |= {"prompts": {"source": "p", "splits": {"train": 20, "test": 10}}}
    values |= {"rollouts": {"rounds": 3, "prompts": 4, "max_new_tokens": [2, 8]}, "train": {"epochs": 2}}
    values |= {"evaluate": {"kl_items": 5, "samples": 3, "also": {"other": {"source": "q", "count": 7}}}}
    sampled = [1, 2, 5, 8]  # tokens of the student's; the teacher has half as many again
    cut = [sum(min(length, horizon) for length in sampled) for horizon in (2, 8, 8)]
    measured = {
        "lengths": {"student_prompt": 10, "student_response": 4, "teacher_prompt": 30, "teacher_response": 6},
        "kept": [tokens / sum(sampled) for tokens in cut],
        "rates": {"rollouts": 1, "scores": 2, "train": 4},
    }
    found = costs_of(parse_config(values, "here"), measured)
    answers, kl = 2 * (10 + 7) * 3, 2 * 5  # of two checkpoints
    held_out = {"rollouts": (answers + kl) * 4, "scores": kl * (30 + 6)}
    expected = {"rollouts": sum(cut), "scores": 3 * 4 * 30 + 1.5 * sum(cut), "train": 2 * (3 * 4 * 10 + sum(cut))}
    assert found["tokens"] == pytest.approx(expected | {"evaluate": sum(held_out.values())})
    assert found["responses"] == 12
    assert found["scored_tokens"] == pytest.approx(1.5 * sum(cut) + 12 + kl * 7)  # and an end row each
    assert found["hours"]["scores"] == pytest.approx(expected["scores"] / 2 / 3600)
    assert found["hours"]["evaluate"] == pytest.approx((held_out["rollouts"] + held_out["scores"] / 2) / 3600)
    # The first round is another run's, and is replayed in both others, as the second is in the last; sft comes before.
    for table in ("rollouts", "scores"):
        there = Path(f"runs/other/round-0/{table}")
        there.mkdir(parents=True)
        (there / "000.parquet").touch()
    monkeypatch.setattr("stages.run.run.read_manifest", lambda path: SimpleNamespace(rows=4))
    values["rollouts"]["replay"] = 2
    values |= {"reuse": ["runs/other"], "sft": {"prompts": 6, "samples": 2, "temperature": 1.0, "epochs": 3}}
    again = costs_of(parse_config(values, "here"), measured)
    lengths = 10 * 4 * (3 + 2 + 1) + cut[0] * 3 + cut[1] * 2 + cut[2]
    assert again["tokens"] == pytest.approx(
        {
            "rollouts": cut[1] + cut[2],
            "scores": 2 * 4 * 30 + 1.5 * (cut[1] + cut[2]),
            "train": 2 * lengths,
            "sft": 3 * 12 * (10 + 4),
            "evaluate": 1.5 * sum(held_out.values()),  # before sft too
        }
    )
    alone, *_ = again["variants"]  # without what is reused
    assert alone["online_hours"] == alone["offline_hours"] > sum(again["hours"].values())


@pytest.mark.parametrize("rate", ["-3", "0", "nan", "inf", "fast"])
def test_a_rate_is_a_number_of_a_size(rate: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--train-rate", rate])
    assert result.exit_code == 2 and "--train-rate" in result.output


def test_a_plan_takes_ones_own_prompts_and_no_more_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are decided before anything is measured, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    code = "def rows(options, seed, need):\n    return ({'prompt': f'{i}?'} for i in range(need))\n"
    Path("planned_source.py").write_text(code)
    values = {
        "prompts": {
            "source": "planned_source:rows",
            "answer_field": None,
            "splits": {"examples": 0, "train": 16, "test": 4},
        }
    }
    values |= {"student": {"model": "a"}, "teacher": {"model": "b"}, "rollouts": {"prompts": 16}}
    Path("c.yaml").write_text(json.dumps(values))
    seen: list[Any] = []

    def measured(small: Config, *_: Any) -> None:
        seen.append((small.rollouts.prompts, len(collect(small.prompts, small.seed))))
        raise OpdError("that will do")

    monkeypatch.setattr(plan, "_measure", measured)
    result = CliRunner().invoke(app, ["plan", "--config", "c.yaml"])
    assert "that will do" in result.output and seen == [(16, 20)], result.output


@pytest.mark.slow
def test_a_plan_of_a_real_run(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "config/config.yaml").read_text())
    config["prompts"]["splits"] = {"examples": 0, "train": 160, "dev": 0, "test": 1}
    config["student"] = {"model": smollm2.ref.path}
    config["teacher"] = {"model": smollm2.ref.path, "prompt": "{{ prompt }} (The answer is {{ answer }}.)"}
    config["train"] = {"batch_size": 4}
    config["rollouts"]["max_new_tokens"] = [2, 16]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    arguments = ["plan", "--config", "config.yaml", "--responses", "8", "--json", "--score-rate", "1000000"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    planned = json.loads(next(line for line in outcome.output.splitlines() if line.startswith("{")))
    assert planned["responses"] == 8 and all(rate > 1 for rate in planned["rates"].values())
    kl = [rule["kl"] for rule in planned["rules"] if rule["rule"].startswith("k_max")]
    assert kl == sorted(kl, reverse=True) and kl[0] > 0
    assert planned["costs"]["responses"] == 480
    first, *later = planned["kept"]
    assert later == [1, 1] and first == pytest.approx(2 / planned["lengths"]["student_response"], rel=0.1)
    exact, own, *others = planned["choices"]
    assert own["choice"] == "this config" and len(others) == 4 and exact["units"] == own["units"] > 20
    cosine = {row["choice"]: row["cos_hidden"] for row in [own, *others]}
    # The default config keeps 20 of the teacher's, with a class for the rest.
    assert cosine["this config"] == pytest.approx(cosine["teacher 20, a class for the rest"], abs=1e-6)
    # A teacher that is the student itself, told the answer: both supports hold nearly all of either's mass.
    assert 0.9 < cosine["this config"] <= 1 and 0.9 < cosine["student 20, renormalised"] <= 1
    assert not list(tmp_path.glob("runs*"))  # it leaves nothing but a prepared model and scores in the cache
    assert planned["costs"]["hours"]["scores"] == pytest.approx(planned["costs"]["tokens"]["scores"] / 1e6 / 3600)
    outcome = CliRunner().invoke(app, [*arguments[:3], "--responses", "999"])
    assert outcome.exit_code == 2
