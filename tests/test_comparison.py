"""What two runs differ in, against references written from the formulas."""

import itertools
import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.measure.accuracy import gain
from pipeline.measure.comparison import compared_answers, compared_kl, difference, differing, items, sampled_kl


def answers(right: list[list[bool | None]], first: int = 0, asked: str = "What is {}?") -> pl.DataFrame:
    """Answers of which these are right, a list an item; items are numbered from `first`, their ids from 0."""
    rows = [
        {"prompt_id": f"p{i}", "sample": k, "prompt": asked.format(first + i), "reference": str(i % 2), "right": value}
        for i, of_item in enumerate(right)
        for k, value in enumerate(of_item)
    ]
    return pl.DataFrame(rows, schema_overrides={"right": pl.Boolean}).with_columns(stopped=True)


def test_items_are_named_by_what_they_ask() -> None:
    """Not by their id, which another seed gives to others; alike ones of a run are told apart."""
    a, b = answers([[True]] * 3), answers([[True]] * 3, first=1)
    named = [items(table)["prompt_id"].to_list() for table in (a, b)]
    assert len(set(named[0])) == len(set(named[1])) == 3
    # Item 1 of `a` is the first of `b` but for its reference, which is another one.
    assert not set(named[0]) & set(named[1])
    shifted = b.with_columns(reference=pl.Series(["1", "0", "1"]))
    assert set(named[0]) & set(items(shifted)["prompt_id"]) == set(named[0][1:])
    alike = items(answers([[True, False], [False, True]], asked="?").with_columns(reference=pl.lit(None, pl.String)))
    assert alike["prompt_id"].n_unique() == 2 and alike["sample"].to_list() == [0, 1, 0, 1]


def test_the_same_items_are_paired_by_mcnemar() -> None:
    rng = np.random.default_rng(0)
    before, after = ([[bool(x)] for x in rng.random(60) < share] for share in (0.4, 0.7))
    found = compared_answers(items(answers(before)), items(answers(after)), 1)
    gained = sum(b[0] > a[0] for a, b in zip(before, after, strict=True))
    lost = sum(b[0] < a[0] for a, b in zip(before, after, strict=True))
    n, most = gained + lost, max(gained, lost)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n)
    assert (found["paired"], found["gained"], found["lost"], found["common"]) == (True, gained, lost, 60)
    assert found["p"] == pytest.approx(p) and found["accuracy"] == pytest.approx((gained - lost) / 60)


def test_several_answers_are_clustered_by_item_and_other_items_are_not_paired() -> None:
    rng = np.random.default_rng(1)
    a, b = ((rng.random((40, 3)) < share).tolist() for share in (0.3, 0.5))
    found = compared_answers(items(answers(a)), items(answers(b)), 1)
    assert found["paired"] and found["gained"] is None
    expected = gain(answers(a), answers(b), 1)
    assert expected and {name: found[name] for name in expected} == expected
    # Of 40 items 30 are the same: those alone are paired. Of 40 items 10: none is.
    a, b = ([[value] for value in (rng.random(40) < share).tolist()] for share in (0.2, 0.6))
    most = compared_answers(items(answers(a)), items(answers(b, first=10)), 1)
    assert (
        most["paired"]
        and most["common"] == 30
        and most["gained"] == sum(y > x for x, y in zip(a[10:], b, strict=False))
    )
    few = compared_answers(items(answers(a)), items(answers(b, first=30)), 1)
    assert not few["paired"] and few["common"] == 10 and few["gained"] is None
    assert few["accuracy"] == pytest.approx(np.mean(b) - np.mean(a)) and 0.01 < few["p"] < 0.1
    # With other numbers of answers, the shares of the same items.
    more = compared_answers(items(answers(a)), items(answers([[*one, True] for one in a])), 1)
    assert more["paired"] and more["gained"] is None
    assert more["accuracy"] == pytest.approx(np.mean([(one[0] + 1) / 2 - one[0] for one in a]))
    nothing = compared_answers(items(answers([[None]])), items(answers([[True]])), 1)
    assert nothing["accuracy"] is nothing["p"] is None


@pytest.mark.parametrize("paired", [True, False])
def test_relabelling_is_as_every_relabelling(paired: bool) -> None:
    rng = np.random.default_rng(2)
    n, m = 6, 6 if paired else 5
    a, b = rng.normal(1, 0.5, n), rng.normal(1.3, 0.5, m)
    na, nb = rng.integers(2, 9, n), rng.integers(2, 9, m)
    pooled, counts = np.concatenate([a, b]), np.concatenate([na, nb])

    def of(left: list[int], right: list[int]) -> float:
        return float(pooled[right].sum() / counts[right].sum() - pooled[left].sum() / counts[left].sum())

    sides = (
        [[i + n * swap for i, swap in enumerate(flip)] for flip in itertools.product((0, 1), repeat=n)]
        if paired
        else [list(chosen) for chosen in itertools.combinations(range(n + m), n)]
    )
    whole = set(range(n + m))
    every = [abs(of(left, sorted(whole - set(left)))) for left in sides]
    found = difference(a, na, b, nb, 3, paired)
    assert found["difference"] == pytest.approx(b.sum() / nb.sum() - a.sum() / na.sum())
    exact = np.mean([value >= abs(found["difference"]) * (1 - 1e-9) for value in every])
    assert found["p"] == pytest.approx(float(exact), abs=4 * math.sqrt(exact * (1 - exact) / 2000))


def test_intervals_cover_and_pairing_takes_the_items_difficulty_away() -> None:
    rng = np.random.default_rng(4)
    held = dict.fromkeys((True, False), 0)
    width = {True: 0.0, False: 0.0}
    for seed in range(40):
        hard, tokens = rng.gamma(2, 1, 40), rng.integers(5, 9, 40)
        a, b = hard + rng.normal(0, 0.2, 40), hard + 0.1 + rng.normal(0, 0.2, 40)
        for paired in held:
            low, high = difference(a * tokens, tokens, b * tokens, tokens, seed, paired)["difference_95"]
            held[paired] += low <= 0.1 <= high
            width[paired] += high - low
    assert held[True] >= 34 and width[True] < 0.3 * width[False]


def test_sampled_kl_is_a_sum_over_compared_units() -> None:
    rollouts = pl.DataFrame({"rollout_id": ["a", "b", "c"], "prompt_id": ["p", "q", "q"]})
    units = pl.DataFrame({"kind": ["1:1", "n:m", "masked", "stop", "context"], "s_len": [1, 2, 4, 1, 9]})
    weights = pl.DataFrame(
        {"rollout_id": list("aabbb"), "advantage": [-1.0, 0.5, 7.0, -2.0, 3.0], "is_ratio": [1.0, 2.0, 1.0, 0.5, 1.0]}
    )
    found = sampled_kl(rollouts, units, weights)
    assert found.rows() == [("p", 1.0 - 1.0, 3), ("q", 1.0, 1)]
    moved = found.with_columns(nats=pl.col("nats") + 1)
    assert compared_kl(found, moved, 1)["difference"] == pytest.approx(3 / 4 - 1 / 4)
    assert (
        compared_kl(found, moved, 1)["paired"]
        and not compared_kl(found, moved.with_columns(prompt_id=pl.lit("x")), 1)["paired"]
    )


def test_keys_that_differ() -> None:
    runs: list[dict[str, Any]] = [
        {"seed": 1, "train": {"lr": 1.0, "same": [1]}, "objective": {"recipe": "a", "clip": 5}},
        {"seed": 1, "train": {"lr": 2.0, "same": [1]}, "objective": {"recipe": "b", "options": {}}},
    ]
    assert differing(runs) == {
        "train.lr": [1.0, 2.0],
        "objective.recipe": ["a", "b"],
        "objective.clip": [5, None],
        "objective.options": [None, {}],
    }
    assert differing(runs[:1] * 2) == {}
