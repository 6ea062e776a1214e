"""Figures of several answers a prompt, against references written from their formulas."""

import itertools
import math
from fractions import Fraction

import numpy as np
import polars as pl
import pytest

from pipeline.measure.accuracy import accuracy, doubling, gain, mean_interval, pass_at_k, sign_flips
from pipeline.measure.answers import bootstrap_ratio, wilson


def table(right: list[list[bool | None]]) -> pl.DataFrame:
    """Answers of which these are right, a list a prompt."""
    rows = [
        {"prompt_id": f"p{i}", "sample": k, "right": value, "stopped": True}
        for i, of_prompt in enumerate(right)
        for k, value in enumerate(of_prompt)
    ]
    return pl.DataFrame(rows, schema_overrides={"right": pl.Boolean})


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int) -> None:
    for k, count in itertools.product(range(1, samples + 1), range(samples + 1)):
        answers = [True] * count + [False] * (samples - count)
        subsets = list(itertools.combinations(answers, k))
        share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
        assert pass_at_k(np.array([count]), samples, k)[0] == pytest.approx(float(share), abs=1e-15)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not() -> None:
    """Its mean over all that n draws can give is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is not."""
    n, k, p = 8, 4, 0.3
    counts = np.arange(n + 1)
    chances = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in counts])
    truth = 1 - (1 - p) ** k
    assert chances @ pass_at_k(counts, n, k) == pytest.approx(truth, abs=1e-12)
    assert abs(chances @ (1 - (1 - counts / n) ** k) - truth) > 0.02


def test_hundreds_of_samples_stay_exact() -> None:
    found = pass_at_k(np.array([0, 1, 1024]), 1024, 512)
    assert found == pytest.approx([0, 0.5, 1], abs=1e-15)
    assert doubling(1) == [1] and doubling(8) == [1, 2, 4, 8] and doubling(6) == [1, 2, 4, 6]


@pytest.mark.parametrize("right", [0, 1, 7, 20])
def test_with_one_answer_a_prompt_the_interval_is_wilsons(right: int) -> None:
    values = np.array([1.0] * right + [0.0] * (20 - right))
    assert mean_interval(values, 1) == pytest.approx(wilson(right, 20), abs=1e-12)
    # Eight answers that are all alike tell no more than one.
    assert mean_interval(values, 8) == pytest.approx(wilson(right, 20), abs=1e-12)


def test_answers_that_agree_with_each_other_no_more_than_chance_count_in_full() -> None:
    assert mean_interval(np.full(20, 0.25), 8) == pytest.approx(wilson(40, 160), abs=1e-12)
    low, high = mean_interval(np.zeros(20), 8)
    assert low == 0 and high == pytest.approx(wilson(0, 20)[1])


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.15, 1.5)])
def test_the_interval_covers(a: float, b: float) -> None:
    """Prompts of different difficulty, 60 with 8 answers each: about 95 of 100 intervals hold the true mean. One that takes all
    answers for independent holds it far less often, and so does a bootstrap over prompts where few are ever right."""
    rng = np.random.default_rng(0)
    truth, repeats = a / (a + b), 600
    covered = {"clustered": 0, "independent": 0, "bootstrap": 0}
    for _ in range(repeats):
        counts = rng.binomial(8, rng.beta(a, b, 60))
        intervals = {
            "clustered": mean_interval(counts / 8, 8),
            "independent": wilson(int(counts.sum()), 480),
            "bootstrap": bootstrap_ratio(counts / 8, np.ones(60), 1, draws=200),
        }
        for name, (low, high) in intervals.items():
            covered[name] += low <= truth <= high
    share = {name: count / repeats for name, count in covered.items()}
    assert 0.925 <= share["clustered"] <= 0.975, share
    assert share["independent"] < 0.75 and share["bootstrap"] < share["clustered"] + 0.01, share


@pytest.mark.parametrize("differences", [[1, -2, 3, 0, 3], [1, 1, 1], [0, 0], [4, -4], [2, -1, -1, 2, 5, 0, -3, 1]])
def test_sign_flips_counts_every_choice_of_signs(differences: list[int]) -> None:
    found = abs(sum(differences))
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [sum(sign * d for sign, d in zip(flip, differences, strict=True)) for flip in flips]
    expected = sum(abs(value) >= found for value in sums) / len(flips)
    assert sign_flips(np.array(differences)) == pytest.approx(expected, abs=1e-12)


def test_sign_flips_of_greedy_answers_is_the_sign_test_and_takes_thousands() -> None:
    fixed, broken = 109, 31
    tail = sum(Fraction(math.comb(140, k), 2**140) for k in range(fixed, 141))
    differences = np.array([1] * fixed + [-1] * broken + [0] * 160)
    assert sign_flips(differences) == pytest.approx(float(2 * tail), rel=1e-3)
    rng = np.random.default_rng(0)
    many = rng.integers(-64, 65, 3000)
    expected = math.erfc(abs(many.sum()) / math.sqrt(2 * (many**2).sum()))  # what it tends to
    assert sign_flips(many) == pytest.approx(expected, abs=0.01)
    assert 0 < sign_flips(np.full(500, 3)) < 1e-13


def test_prompts_whose_answers_cant_all_be_judged_are_left_out() -> None:
    answers = table([[True, False], [None, True], [True, True], [None, None]])
    found = accuracy(answers)
    assert (found["items"], found["judged"], found["right"], found["accuracy"]) == (4, 2, 3, 0.75)
    assert found["pass_at_k"]["2"]["share"] == 1 and found["pass_at_k"]["1"]["share"] == 0.75
    nothing = accuracy(table([[None], [None]]))
    assert nothing["judged"] == 0 and nothing["accuracy"] is nothing["pass_at_k"] is None
    assert gain(answers, table([[None, None]] * 4), 1) is None


def test_gain_is_by_prompt() -> None:
    before = table([[False, False], [True, False], [True, True], [None, True]])
    after = table([[True, False], [True, True], [True, True], [True, True]])
    found = gain(before, after, 1)
    assert found and found["accuracy"] == pytest.approx(1 / 3) and found["p"] == pytest.approx(0.5)
    low, high = found["accuracy_95"]
    assert low <= 1 / 3 <= high <= 0.5
    assert found == gain(before, after, 1) and gain(after, before, 1)["accuracy"] == -found["accuracy"]  # type: ignore[index]
