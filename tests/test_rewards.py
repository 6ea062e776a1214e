"""Outcomes of responses: what they add to the loss, and how far they let the teacher's in, against plain Python."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipes import MINIMAL, every_outcome, moved_units, ppo, sampled_at, told
from typer.testing import CliRunner

from pipeline.store.records import read_record
from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.credit import Summary
from pipeline.weights.gates import columns_read, gated
from pipeline.weights.phase import Part, compute
from pipeline.weights.rewards import grpo, outcome_keys, outcome_sums, rloo
from schemas.config import Gate, Weights, parse_config
from schemas.decides import decided
from schemas.diagnostics import Diagnostics
from schemas.errors import OpdError
from stages import (
    diagnostics,
    fit,
    models,
    outcomes,
    policy,
    prompts,
    reuse,
    rollouts,
    scores,
    train,
    units,
    weights,
)
from stages.report import checklist
from stages.tools.cli import app
from train.recipes import losses

Outcome = bool | None


def of_group(how: str, mine: Outcome, group: Sequence[Outcome]) -> float | None:
    """The reward of one of a group's responses; `group` has it too."""
    if mine is None:
        return None
    known = [float(r) for r in group if r is not None]
    if how == "rloo":
        return float(mine) - (sum(known) - mine) / (len(known) - 1) if len(known) > 1 else 0.0
    return (mine - fmean(known)) / pstdev(known) if pstdev(known) else 0.0


groups = st.lists(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(groups, st.integers(1, 3))
def test_a_reward_is_over_the_judged_responses_to_the_prompt(told: list[list[Outcome]], shards: int) -> None:
    rows = [(f"p{p}-{i}", f"p{p}", right) for p, group in enumerate(told) for i, right in enumerate(group)]
    sampled = pl.DataFrame(
        rows, schema={"rollout_id": pl.String, "prompt_id": pl.String, "right": pl.Boolean}, orient="row"
    )
    of_units = pl.DataFrame({"rollout_id": [name for i, (name, _, _) in enumerate(rows) for _ in range(1 + i % 3)]})
    table = outcome_keys(of_units, sampled)
    # Sums of shards add up, wherever responses are cut into them.
    number = {name: i % shards for i, (name, _, _) in enumerate(rows)}
    parts = [table.filter(pl.Series([number[name] == k for name in table["rollout_id"]])) for k in range(shards)]
    added = pl.concat([outcome_sums(part)["outcome"] for part in parts])
    sums = {"outcome": added.group_by("prompt_id").sum()}
    right = {name: (r, told[int(p[1:])]) for name, p, r in rows}
    for how, estimate in (("rloo", rloo), ("grpo", grpo)):
        expected = [of_group(how, *right[name]) for name in of_units["rollout_id"]]
        assert estimate(table, sums).to_list() == pytest.approx(expected, abs=1e-12)


def test_rewards_are_pinned() -> None:
    """Of one right answer among four: by GRPO sqrt 3 and -1 / sqrt 3, by RLOO 1 and -1/3."""
    sampled = pl.DataFrame({"rollout_id": list("abcd"), "prompt_id": ["p"] * 4, "right": [True, False, False, False]})
    table = outcome_keys(sampled, sampled)
    assert grpo(table, outcome_sums(table)).to_list() == pytest.approx([sqrt(3), *[-1 / sqrt(3)] * 3])
    assert rloo(table, outcome_sums(table)).to_list() == pytest.approx([1, *[-1 / 3] * 3])


@pytest.mark.parametrize("recipe", ["hybrid", "strict_1to1", "kdrl", "sampled"])
def test_the_reward_term_and_its_gradient_are_grpos(recipe: str) -> None:
    """-c min(r A, clip(r) A) of every token, also where the recipe itself has no loss; and nothing else changes."""
    found, h, clip = moved_units(seed=51), 1e-6, (0.2, 0.3)
    rng = np.random.default_rng(52)
    found = [replace(u, reward=float(rng.normal())) for u in found]
    numbers, student, batch = told(found)
    config = tiny.objective(recipe=recipe, reward=0.6, reward_clip=clip)
    plain = losses(student, batch, config.model_copy(update={"reward": 0.0}))
    scored = losses(student, batch, config)
    assert plain.beside is None and torch.equal(plain.loss, scored.loss) and scored.beside is not None
    (slopes,) = torch.autograd.grad(scored.beside.sum(), student.token)

    def term(tokens: Sequence[float], behavior: Sequence[float], reward: float) -> float:
        return 0.6 * sum(ppo(reward, t, b, clip) for t, b in zip(tokens, behavior, strict=True))

    expected, slope = [], []
    for u, n in zip(found, numbers, strict=True):
        behavior = sampled_at(u, n.tokens)
        expected.append(term(n.tokens, behavior, u.reward))
        for j in range(len(n.tokens)):
            up, down = ([t + by * (i == j) for i, t in enumerate(n.tokens)] for by in (h, -h))
            slope.append((term(up, behavior, u.reward) - term(down, behavior, u.reward)) / (2 * h))
    np.testing.assert_allclose(scored.beside.detach(), expected, rtol=1e-9)
    np.testing.assert_allclose(slopes, slope, rtol=1e-5, atol=1e-8)
    assert 0 < np.count_nonzero(np.abs(slope) < 1e-12) < len(slope)  # the clip binds at some


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**20), st.floats(-1, 1))
def test_the_expected_gradient_is_that_of_the_expected_reward(seed: int, baseline: float) -> None:
    """Whatever is taken off that doesn't depend on the token, and wherever it was sampled from within the ratio's bounds."""
    logits, _, student, batch = every_outcome(seed=53)
    rng = np.random.default_rng(seed)
    right = torch.from_numpy(rng.integers(0, 2, len(logits)).astype(float))
    student = replace(student, token=student.unit)
    s = logits.log_softmax(-1)
    behavior = (s.detach() + torch.from_numpy(rng.normal(0, 0.2, len(logits)))).log_softmax(-1)
    batch = replace(batch, reward=right - baseline, token_behavior_logp=behavior)
    found = losses(student, batch, tiny.objective(recipe="sampled", reward=0.3, reward_clip=(1.0, 1e6)))
    assert found.beside is not None
    (ours,) = torch.autograd.grad((behavior.exp() * found.beside).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(-0.3 * (s.exp() * right).sum(), logits)
    np.testing.assert_allclose(ours, exact, atol=1e-12)


factor = st.sampled_from([0.0, 0.25, 1.0, 1.8])
unit = st.tuples(st.integers(0, 3), st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([True, False, None]), min_size=4, max_size=4), st.lists(unit), st.tuples(*[factor] * 4))
def test_a_units_weight_has_the_factors_of_its_responses_outcome(
    right: list[Outcome], told: list[tuple[int, float]], factors: tuple[float, ...]
) -> None:
    gate = Gate(**dict(zip(("right", "wrong", "agreeing", "conflicting"), factors, strict=True)))
    sampled = pl.DataFrame({"rollout_id": list("0123"), "right": pl.Series(right, dtype=pl.Boolean)})
    given_units = {
        "rollout_id": pl.Series([str(i) for i, _ in told], dtype=pl.String),
        "advantage": pl.Series([a for _, a in told], dtype=pl.Float64),
    }
    table = pl.DataFrame(given_units).with_columns(weight=1.5)
    found = gated(table, sampled.select("rollout_id", *columns_read(gate)), gate)
    expected = []
    for i, advantage in told:
        by = 1.0
        if right[i] is not None:
            by = gate.right if right[i] else gate.wrong
            if advantage:
                by *= gate.agreeing if (advantage > 0) == right[i] else gate.conflicting
        expected.append(1.5 * by)
    assert found["weight"].to_list() == expected and found.drop("weight").equals(table.drop("weight"))
    assert (columns_read(gate) == ()) == (set(factors) == {1.0})


def test_the_teacher_never_speaks_against_the_outcome() -> None:
    """With factors 1 and 0 the sampled path is OPDVR's: -R log p, R = max(0, A) where right, -max(0, -A) where wrong."""
    advantages = [2.0, -1.0, 0.5, -3.0, 1.0]
    sampled = pl.DataFrame({"rollout_id": ["r", "w", "n"], "right": [True, False, None]})
    rows = pl.DataFrame({"rollout_id": [name for name in "rwn" for _ in advantages], "advantage": advantages * 3})
    found = gated(rows.with_columns(weight=1.0), sampled, Gate(conflicting=0.0))
    of = {"r": lambda a: max(0.0, a), "w": lambda a: -max(0.0, -a), "n": lambda a: a}
    expected = [of[name](a) for name, a in rows.rows()]
    assert (found["weight"] * found["advantage"]).to_list() == expected


def test_outcomes_reach_the_weights_of_a_phase(tmp_path: Path) -> None:
    """Over two shards: rewards by prompt, gates, counts; without outcomes nothing is gated or rewarded, the rest the same."""
    tiny.shards(tmp_path, count=2)
    parts, right, rng = [], {}, np.random.default_rng(5)
    for number in ("000", "001"):
        sampled, aligned, judged = (tmp_path / name / f"{number}.parquet" for name in ("rollouts", "units", "outcomes"))
        groups_of = {path: list(open_shard(path, path.parent.name).row_groups()) for path in (sampled, aligned)}
        with open_writer(sampled, "rollouts", {}, {}) as writer:
            for group in groups_of[sampled]:
                named = pa.array([f"p{n % 4}" for n in map(len_of, group["rollout_id"].to_pylist())])
                writer.write(group.set_column(group.schema.names.index("prompt_id"), "prompt_id", named))
        made_from = {"rollouts": open_shard(sampled, "rollouts").manifest.sha256}
        with open_writer(aligned, "units", {}, made_from) as writer:
            for group in groups_of[aligned]:
                writer.write(group)
        with open_writer(judged, "outcomes", {}, made_from) as writer:
            for group in groups_of[sampled]:
                names = group["rollout_id"].to_pylist()
                found = {name: [True, False, None][rng.integers(3)] for name in names}
                right |= found
                columns = {"rollout_id": names, "judged": names, "right": pa.array([*found.values()], pa.bool_())}
                writer.write(pa.table(columns))
        parts.append(Part(sampled, aligned, None, tmp_path / "weights" / f"{number}.parquet", judged))

    def made(options: Weights, outcomes: bool = True) -> tuple[pl.DataFrame, Summary]:
        figures = compute(parts if outcomes else [replace(part, outcomes=None) for part in parts], options)
        return pl.concat(pl.from_arrow(open_shard(part.weights, "weights").read()) for part in parts), figures

    gate = Gate(right=0.5, wrong=0.25, conflicting=0.0)
    plain, before = made(Weights(scheme="iw_opd"), outcomes=False)
    table, figures = made(Weights(scheme="iw_opd", gate=gate, reward="grpo"))
    unjudged, none = made(Weights(scheme="iw_opd", gate=gate, reward="grpo"), outcomes=False)
    assert unjudged.equals(plain) and plain["reward"].null_count() == len(plain)
    assert table.drop("weight", "reward").equals(plain.drop("weight", "reward"))
    own = table.with_columns(outcome=pl.col("rollout_id").replace_strict(right, return_dtype=pl.Boolean))
    of_prompt: dict[int, list[Outcome]] = {}
    for name, outcome in right.items():
        of_prompt.setdefault(len_of(name) % 4, []).append(outcome)
    rewards = {name: of_group("grpo", outcome, of_prompt[len_of(name) % 4]) for name, outcome in right.items()}
    expected = [rewards[name] for name in own["rollout_id"]]
    assert own["reward"].is_null().to_list() == [r is None for r in expected]
    assert own["reward"].fill_null(0).to_list() == pytest.approx([r or 0.0 for r in expected], rel=1e-6)
    for weight, was, advantage, outcome in zip(
        own["weight"], plain["weight"], own["advantage"], own["outcome"], strict=True
    ):
        by = 1.0 if outcome is None else 0.5 if outcome else 0.25
        by *= outcome is None or advantage * (1 if outcome else -1) >= 0
        assert weight == pytest.approx(was * by, rel=1e-6)
    counted = [*right.values()]
    assert (figures.right, figures.wrong) == (counted.count(True), counted.count(False))
    assert figures.rewarded == sum(bool(r) for r in rewards.values()) > 0
    assert (before.right, before.wrong, none.right, none.rewarded) == (0, 0, 0, 0)


def len_of(name: str) -> int:
    """The number of a response that `tiny.shards` named, in any shard."""
    return int(name.rpartition("r")[2])


def test_a_run_judges_what_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """KDRL from prompts to a checkpoint: a scorer of one's own judges each response once, and its reward is trained on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "even", raising=False)
    Path("even.py").write_text(
        "def right(response, reference, row):\n    return None if reference == '3' else len(response) % 2 == 0\n"
    )
    tiny.saved_pair(Path())
    rows = [{"prompt": f"{a} ab 12?", "answer": str(a)} for a in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "run": "a",
        "prompts": {"source": "rows.jsonl", "splits": {"examples": 0, "train": 6, "test": 2}},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "objective": {"recipe": "kdrl"},
        "rollouts": {"rounds": 1, "prompts": 6, "samples": 4, "max_new_tokens": 6, "shard_size": 12},
        "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
        "train": {"batch_size": 12, "warmup_steps": 0},
        "evaluate": {"scorer": "even:right", "kl_items": 0},
    }
    where = Path("a.yaml")
    where.write_text(json.dumps(config))
    prompts.main(where)
    for role in ("student", "teacher"):
        models.main(role, where)
    fit.main(where)
    for shard in (0, 1):
        for stage in (rollouts, scores):
            stage.main("round-0", shard, where, None)
        units.main("round-0", shard, where)
        outcomes.main("round-0", shard, where)
    weights.main("round-0", where)
    train.main(0, where, None)
    said = pl.read_parquet("runs/a/round-0/rollouts/*.parquet")
    judged = pl.read_parquet("runs/a/round-0/outcomes/*.parquet")
    expected = [None if a == "3" else len(text) % 2 == 0 for text, a in said.select("response", "answer").rows()]
    assert judged["right"].to_list() == expected and judged["rollout_id"].equals(said["rollout_id"])
    assert {None, True, False} <= set(expected)
    told_of = " ".join(capsys.readouterr().err.split())
    counts = [expected.count(value) for value in (True, False, None)]
    assert "of 24 responses {} are right and {} wrong, {} can't be judged".format(*counts) in told_of
    steps = [json.loads(line) for line in Path("runs/a/round-0/train/metrics.jsonl").read_text().splitlines()]
    # The loss is 0.002 times the sampled path, but for the reward: far more than that.
    assert len(steps) == 2 and all(abs(step["beside"]) > 1e-4 for step in steps)
    assert all(step["loss"] == pytest.approx(step["surrogate"] + step["beside"], rel=1e-4) for step in steps)
    diagnostics.main("round-0", where)
    about = read_record(Path("runs/a/round-0/diagnostics.json"), Diagnostics, "")
    assert about.outcomes and [about.outcomes.right, about.outcomes.wrong, about.outcomes.unknown] == counts
    assert about.outcomes.rewarded > 0
    assert (about.loss.reward, about.loss.reward_coefficient, about.loss.reference) == ("grpo", 1.0, None)
    shown = checklist.rows([about])["Objective"]
    assert (shown["gate"], shown["reward beside it"]) == (["-"], ["1 times grpo's"])
    assert shown["outcomes"][0].startswith("{} right, {} wrong, {} unknown, ".format(*counts))
    # Of another tokenizer's student it has no ratios of tokens.
    other = config | {"run": "b", "reuse": ["runs/a"], "student": {"model": "teacher", "dtype": "float32"}}
    Path("b.yaml").write_text(json.dumps(other))
    prompts.main(Path("b.yaml"))
    models.main("student", Path("b.yaml"))
    with pytest.raises(
        OpdError, match=r"`weights.reward: grpo` takes ratios of tokens.*sampled in another tokenizer's"
    ):
        reuse.main("round-0", 0, Path("b.yaml"))
    # What is planned of it has no reward, for nothing is judged.
    planned = CliRunner().invoke(app, ["plan", "--config", "a.yaml", "--responses", "4", "--json"])
    assert planned.exit_code == 0, planned.output
    # Judged for another scorer, weights aren't made of it.
    where.write_text(json.dumps(config | {"evaluate": {"scorer": "equality", "kl_items": 0}}))
    with pytest.raises(OpdError, match=r"outcomes/000.parquet: made for another config.*evaluate\.scorer"):
        weights.main("round-0", where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"reward": 1.0}}, "`objective.reward: 1` and `weights.reward: none` don't go together"),
        (
            {"weights": {"reward": "rloo"}, "rollouts": {"samples": 2}},
            "`objective.reward: 0` and `weights.reward: rloo`",
        ),
        ({"objective": {"reward_clip": [0.1, 0.1]}}, "`reward_clip: .0.1, 0.1.` means nothing with `reward: 0`"),
        (
            {"objective": {"recipe": "kdrl"}, "rollouts": {"samples": 1}},
            "`rollouts.samples: 1` gives each a single one",
        ),
        (
            {"objective": {"recipe": "kdrl"}, "prompts": {"source": "p", "answer_field": None}},
            "`weights.reward` takes which",
        ),
        (
            {"weights": {"gate": {"wrong": 0}}, "prompts": {"source": "p", "answer_field": None}},
            "`weights.gate` takes which",
        ),
        ({"weights": {"gate": {"agreeing": -1}}}, "agreeing"),
        ({"weights": {"reward": "mean"}}, "takes none, rloo, grpo"),
    ],
)
def test_outcomes_that_nothing_could_tell_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OpdError, match=message):
        parse_config({**MINIMAL, **change}, "my.yaml")


def test_where_no_response_has_a_reward_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rollouts that are reused, of which there is one a prompt, and which their own run's prompts judge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    tiny.saved_pair(Path())
    for name in ("theirs", "mine"):
        rows = [{"prompt": f"{a} {name} 12?", "answer": str(a) if name == "theirs" else None} for a in range(4)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "run": "a",
        "prompts": {"source": "theirs.jsonl", "splits": {"examples": 0, "train": 3, "test": 1}},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "rollouts": {"rounds": 1, "prompts": 3, "max_new_tokens": 4},
        "evaluate": {"kl_items": 0},
    }
    taken = {"run": "b", "reuse": ["runs/a"], "prompts": config["prompts"] | {"source": "mine.jsonl"}}
    taken |= {"objective": {"recipe": "kdrl"}, "rollouts": {"rounds": 1, "samples": 1, "max_new_tokens": 4}}
    for name, values in (("a", config), ("b", config | taken)):
        where = Path(f"{name}.yaml")
        where.write_text(json.dumps(values))
        prompts.main(where)
        for role in ("student", "teacher"):
            models.main(role, where)
        fit.main(where)
        if name == "b":
            reuse.main("round-0", 0, where)
            policy.main("round-0", 0, where, None)
            outcomes.main("round-0", 0, where)
        else:
            for stage in (rollouts, scores):
                stage.main("round-0", 0, where, None)
        units.main("round-0", 0, where)
        weights.main("round-0", where)
    told = " ".join(capsys.readouterr().err.split())
    assert "round-0 outcomes: 0 right, 3 wrong, 0 that can't be judged" in told
    assert "no response has a reward, so `objective.reward` adds nothing" in told


def test_gates_by_outcome_decide_nothing_of_what_is_only_measured() -> None:
    gated = [parse_config({**MINIMAL, "weights": {"gate": {"wrong": w, "truncated": 0.5}}}, "x") for w in (0.0, 1.0)]
    of_eval, of_round = ([decided(c, "weights", phase) for c in gated] for phase in ("eval-0", "round-0"))
    assert of_eval[0] == of_eval[1] and of_eval[0]["weights"]["gate"]["truncated"] == 0.5
    assert of_round[0] != of_round[1]


def test_a_loss_of_ones_own_reads_rewards_and_the_first_policy() -> None:
    own = {"objective": {"recipe": "a:b", "reference": "initial"}, "weights": {"reward": "rloo"}}
    config = parse_config({**MINIMAL, **own, "rollouts": {"samples": 2}}, "x")
    assert config.objective.refers and config.weights.judges and not config.objective.adds


def test_a_scorer_of_ones_own_may_need_no_reference() -> None:
    source = {"source": "p", "answer_field": None}
    config = parse_config(
        {**MINIMAL, "prompts": source, "objective": {"recipe": "kdrl"}, "evaluate": {"scorer": "a:b"}}, "x"
    )
    assert config.weights.judges and (config.objective.reward, config.weights.reward) == (1.0, "grpo")
    assert not parse_config(MINIMAL, "my.yaml").weights.judges


def test_prompts_without_references_are_refused_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.saved_pair(Path())
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a} ab 12?", "answer": None}) + "\n" for a in range(8))
    )
    config = {
        "prompts": {"source": "rows.jsonl", "splits": {"examples": 0, "train": 6, "test": 2}},
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "rollouts": {"prompts": 6},
        "weights": {"gate": {"right": 0}},
    }
    Path("a.yaml").write_text(json.dumps(config))
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    prompts.main(Path("a.yaml"))
    for role in ("student", "teacher"):
        models.main(role, Path("a.yaml"))
    with pytest.raises(OpdError, match="none of the prompts of split train has a reference answer"):
        fit.main(Path("a.yaml"))
