"""A reference policy: the pull towards it against plain Python and exact KL, and its log-probs through a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from test_recipes import MINIMAL, every_outcome, first, moved_units, started, told

from pipeline.models import ModelRef
from pipeline.store.records import read_record, write_record
from pipeline.weights.credit import weigh
from schemas.config import Weights, parse_config
from schemas.diagnostics import Diagnostics
from schemas.errors import OpdError
from stages import diagnostics, fit, models, prompts, reference, rollouts, scores, train, units, weights
from train.recipes import losses


@pytest.mark.parametrize("which", ["round", "initial"])
@pytest.mark.parametrize("recipe", ["hybrid", "strict_1to1", "sampled", "exopd"])
def test_the_pull_and_its_gradient_are_the_formula(recipe: str, which: str) -> None:
    """c (log p_S - log p_ref)^2 / 2 at every unit, also where the recipe has no loss; with c 0 nothing."""
    found = moved_units(seed=61)
    numbers, student, batch = told(found)
    config = tiny.objective(recipe=recipe, reference_kl=0.4, reference=which)
    plain = losses(student, batch, config.model_copy(update={"reference_kl": 0.0}))
    scored = losses(student, batch, config)
    assert plain.beside is None and torch.equal(plain.loss, scored.loss) and scored.beside is not None
    (slopes,) = torch.autograd.grad(scored.beside.sum(), student.unit)
    of, h = {"round": started, "initial": first}[which], 1e-6

    def term(logp: float, to: float) -> float:
        return 0.4 * (logp - to) ** 2 / 2

    pairs = [(n.unit, of(u)) for u, n in zip(found, numbers, strict=True)]
    np.testing.assert_allclose(scored.beside.detach(), [term(*pair) for pair in pairs], rtol=1e-12)
    slope = [(term(logp + h, to) - term(logp - h, to)) / (2 * h) for logp, to in pairs]
    np.testing.assert_allclose(slopes, slope, rtol=1e-6, atol=1e-9)
    assert not batch.reward.any()
    both = losses(student, batch, config.model_copy(update={"reward": 0.5}))
    assert both.beside is not None and torch.equal(both.beside, scored.beside)  # no outcome, no reward


def test_the_expected_pull_is_that_of_kl() -> None:
    """Over every token as often as the policy samples it; 0 once the policy is the reference."""
    logits, _, student, batch = every_outcome(seed=62)
    to = torch.from_numpy(np.random.default_rng(63).normal(size=len(logits))).log_softmax(-1)
    s = logits.log_softmax(-1)
    found = losses(student, replace(batch, policy_logp=to), tiny.objective(reference_kl=0.7))
    assert found.beside is not None
    (ours,) = torch.autograd.grad((s.detach().exp() * found.beside).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(0.7 * (s.exp() * (s - to)).sum(), logits, retain_graph=True)
    np.testing.assert_allclose(ours, exact, atol=1e-12)
    there = losses(student, replace(batch, policy_logp=s.detach()), tiny.objective(reference_kl=0.7))
    assert there.beside is not None and not there.beside.any()


def test_a_units_reference_is_the_sum_over_its_tokens() -> None:
    aligned = pl.DataFrame(
        {
            "rollout_id": ["a", "a", "a", "b"],
            "unit": [0, 1, 2, 0],
            "kind": ["1:1", "n:m", "masked", "1:1"],
            "s_start": [0, 1, 3, 0],
            "s_len": [1, 2, 1, 1],
            "t_len": [1, 1, 1, 1],
            "teacher_logp": [-1.0, -2.0, None, -0.5],
        }
    )
    sampled = pl.DataFrame({"rollout_id": ["a", "b"], "behavior_logp": [[-0.5] * 4, [-0.25]]})
    found = weigh(
        aligned, sampled.with_columns(reference_logp=pl.Series([[-1.0, -2.0, -4.0, -8.0], [-16.0]])), Weights()
    )
    assert found["reference_logp"].to_list() == [-1.0, -6.0, None, -16.0]
    plain = weigh(aligned, sampled, Weights())
    assert plain["reference_logp"].null_count() == 4 and found.drop("reference_logp").equals(
        plain.drop("reference_logp")
    )
    with pytest.raises(
        OpdError, match=r"`reference_logp` is missing, NaN or infinite in 1 units.*shard of reference again"
    ):
        weigh(aligned, sampled.with_columns(reference_logp=pl.Series([[-1.0] * 4, [float("nan")]])), Weights())


def test_the_first_policy_is_the_reference_of_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 0 needs no table of it, whose own policy it is; of round 1 it reads what another policy sampled, and of round 0 it
    says what it said when it sampled that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    tiny.saved_pair(Path())
    rows = [{"prompt": f"{a} ab 12?", "answer": str(a)} for a in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": "a",
        "prompts": {"source": "rows.jsonl", "splits": {"examples": 0, "train": 10, "test": 2}},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"recipe": "exopd", "reference_kl": 0.1, "clip": 0.1},
        "rollouts": {"rounds": 2, "prompts": 5, "max_new_tokens": 6},
        "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
        "train": {"batch_size": 5, "warmup_steps": 0, "learning_rate": 1e-2},
        "evaluate": {"kl_items": 0},
    }
    where = Path("a.yaml")
    where.write_text(json.dumps(config))
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)
    fit.main(where)
    for number in (0, 1):
        phase = f"round-{number}"
        for stage in (rollouts, scores):
            stage.main(phase, 0, where, None)
        units.main(phase, 0, where)
        if number:
            with pytest.raises(OpdError, match=r"reference/000.parquet: this shard does not exist"):
                weights.main(phase, where)
            reference.main(phase, 0, where, None)
        weights.main(phase, where)
        train.main(number, where, None)
    reference.main("round-0", 0, where, None)

    def read(table: str, number: int) -> pl.DataFrame:
        return pl.read_parquet(f"runs/a/round-{number}/{table}/000.parquet")

    def flat(table: pl.DataFrame, column: str) -> np.ndarray:
        return table[column].explode().to_numpy()

    said = flat(read("rollouts", 0), "behavior_logp")
    np.testing.assert_allclose(flat(read("reference", 0), "reference_logp"), said, atol=1e-4)
    assert read("weights", 0)["reference_logp"].null_count() == len(read("weights", 0))
    moved = flat(read("reference", 1), "reference_logp") - flat(read("rollouts", 1), "behavior_logp")
    assert np.abs(moved).max() > 0.05  # round 1 is another policy
    made = (
        read("weights", 1)
        .join(read("units", 1), on=["rollout_id", "unit"])
        .filter(pl.col("student_logp").is_not_null())
    )
    logp = dict(read("reference", 1).select("rollout_id", "reference_logp").rows())
    expected = [
        sum(logp[name][start : start + size])
        for name, start, size in made.select("rollout_id", "s_start", "s_len").rows()
    ]
    np.testing.assert_allclose(made["reference_logp"], expected, rtol=1e-5, atol=1e-5)
    # What exopd clips is the advantage over that policy.
    diagnostics.main("round-1", where)
    about = read_record(Path("runs/a/round-1/diagnostics.json"), Diagnostics, "")
    own = read("weights", 1).filter(pl.col("reference_logp").is_not_null())
    sizes = [
        1.25 * (a + s - r) - (s - r) for a, s, r in own.select("advantage", "student_logp", "reference_logp").rows()
    ]
    count = sum(abs(size) > 0.1 for size in sizes)
    assert about.credit.clipped == count / len(sizes)
    expression = diagnostics.clipped_advantage(tiny.objective(recipe="exopd"))
    assert own.select(expression).to_series().to_list() == pytest.approx(sizes, abs=1e-6)
    assert sizes != pytest.approx((1.25 * own["advantage"]).to_list(), abs=1e-3)
    assert about.loss.reference == "initial" and about.loss.reference_kl == 0.1
    # Of another first policy it is not the reference.
    first_file = Path("runs/a/models/student.json")
    other = read_record(first_file, ModelRef, "").model_copy(update={"weights": "0" * 64})
    write_record(first_file, other)
    with pytest.raises(
        OpdError, match=r"round-1/reference/000.parquet: made with another policy than that of .*student"
    ):
        weights.main("round-1", where)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"reference": "initial"}, "`reference: initial` means nothing with `reference_kl: 0`"),
        ({"reference_kl": -1}, "reference_kl"),
        ({"recipe": "exopd", "reference": "last"}, "reference"),
    ],
)
def test_references_without_meaning_are_refused(objective: dict[str, object], message: str) -> None:
    with pytest.raises(OpdError, match=message):
        parse_config({**MINIMAL, "objective": objective}, "my.yaml")
