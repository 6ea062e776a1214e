"""Advantages, IW-OPD weights and their summary against a loop over responses; answers and their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.measure.answers import bootstrap_ratio, extract, wilson
from pipeline.weights.credit import Summary, advantages, summary, weigh
from pipeline.weights.importance import iw_opd
from schemas.config import Weights
from schemas.tables import arrow_schema


@dataclass(frozen=True)
class Unit:
    """One aligned unit: the teacher's sum (None when masked) and the student's log-prob of each of its tokens."""

    teacher: float | None
    student: tuple[float, ...]

    @property
    def advantage(self) -> float:
        return 0.0 if self.teacher is None else self.teacher - math.fsum(self.student)


Response = Sequence[Unit]


def tables(responses: Sequence[Response]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Units and rollouts; names don't sort in row order, and the rollouts come in another order than their units."""
    names = [f"r{(7 * i + 3) % 10}-{i}" for i in range(len(responses))]
    units: list[dict[str, object]] = []
    for name, response in zip(names, responses, strict=True):
        start = 0
        for index, unit in enumerate(response):
            kind = "masked" if unit.teacher is None else "1:1" if len(unit.student) == 1 else "n:m"
            row = {"rollout_id": name, "unit": index, "kind": kind, "s_start": start, "s_len": len(unit.student)}
            units.append(row | {"teacher_logp": unit.teacher})
            start += len(unit.student)
    rollouts = [
        {"rollout_id": name, "behavior_logp": [x for unit in response for x in unit.student]}
        for name, response in zip(names, responses, strict=True)
    ]
    integers = {"unit": pl.Int32, "s_start": pl.Int32, "s_len": pl.Int32}
    return (
        pl.DataFrame(units, {"rollout_id": pl.String, "kind": pl.String, "teacher_logp": pl.Float32} | integers).select(
            "rollout_id", "unit", "kind", "s_start", "s_len", "teacher_logp"
        ),
        pl.DataFrame(rollouts[::-1], {"rollout_id": pl.String, "behavior_logp": pl.List(pl.Float32)}),
    )


def importance(sizes: Sequence[float], gamma: float) -> list[float]:
    """w_t = 1 + gamma (1 - D_t / D) of one response; no advantage at all leaves nothing before any unit."""
    total = math.fsum(sizes)
    return [1 + gamma * (1 - (math.fsum(sizes[:t]) / total if total else 0.0)) for t in range(len(sizes))]


def advantage_frame(values: Sequence[float]) -> pl.DataFrame:
    return pl.DataFrame({"rollout_id": ["a"] * len(values), "advantage": values})


# Multiples of 1/64 up to 32: exact in float32, so that a response's advantage can be exactly zero.
nats = st.integers(-2048, 0).map(lambda n: n / 64)
unit = st.builds(Unit, st.one_of(st.none(), nats), st.lists(nats, min_size=1, max_size=4).map(tuple))
batch_of_responses = st.lists(st.lists(unit, min_size=1, max_size=12), min_size=1, max_size=6)


@settings(deadline=None)
@given(batch_of_responses, st.floats(0, 2))
def test_weights_are_those_of_a_loop_over_responses(responses: list[Response], gamma: float) -> None:
    units, rollouts = tables(responses)
    table = weigh(units, rollouts, Weights(scheme="iw_opd", gamma=gamma))
    assert table.select("rollout_id", "unit").equals(units.select("rollout_id", "unit"))
    assert table.to_arrow().schema.names == arrow_schema("weights").names
    flat = [unit for response in responses for unit in response]
    assert table["student_logp"].to_list() == [None if u.teacher is None else math.fsum(u.student) for u in flat]
    assert table["advantage"].to_list() == table["credit"].to_list() == [u.advantage for u in flat]
    expected = [w for response in responses for w in importance([abs(u.advantage) for u in response], gamma)]
    np.testing.assert_allclose(table["weight"], expected, rtol=1e-6)
    assert table["is_ratio"].to_list() == [1.0] * len(flat)
    assert {table[name].dtype for name in table.columns[2:]} == {pl.Float32}


@settings(deadline=None)
@given(batch_of_responses)
def test_no_gamma_and_no_scheme_weigh_nothing(responses: list[Response]) -> None:
    units, rollouts = tables(responses)
    for table in (weigh(units, rollouts, o) for o in (Weights(scheme="iw_opd", gamma=0.0), Weights(scheme="uniform"))):
        assert table["weight"].to_list() == [1.0] * len(units)


def test_pinned_vector() -> None:
    weights = advantage_frame([0.2, -0.3, 0.5]).select(w=iw_opd(0.5))["w"]
    np.testing.assert_allclose(weights, [1.5, 1.4, 1.25], rtol=1e-12)


def test_response_without_advantage() -> None:
    """D_t / D counts as 0, and the response beside it is none the worse for it."""
    zero, other = [Unit(-1.5, (-1.0, -0.5))] * 3, [Unit(-0.5, (-0.7,)), Unit(-1.0, (-0.7,)), Unit(-0.2, (-0.7,))]
    table = weigh(*tables([zero, other]), Weights(scheme="iw_opd"))
    assert table["advantage"].to_list()[:3] == [0.0] * 3
    np.testing.assert_allclose(table["weight"], [1.5, 1.5, 1.5, 1.5, 1.4, 1.25], rtol=1e-6)


def test_masked_unit_carries_nothing() -> None:
    response = [Unit(-1.0, (-0.5, -0.25)), Unit(None, (-9.0, -9.0)), Unit(-2.0, (-0.5,))]
    table = advantages(*tables([response]))
    assert table["student_logp"].to_list() == [-0.75, None, -0.5]
    assert table["advantage"].to_list() == [-0.25, 0.0, -1.5]
    masked = weigh(*tables([response]), Weights(scheme="iw_opd"))["weight"].to_list()
    left_out = weigh(*tables([[response[0], response[2]]]), Weights(scheme="iw_opd"))["weight"].to_list()
    assert [masked[0], masked[2]] == left_out


def test_summaries_of_shards_add_up() -> None:
    rng = np.random.default_rng(4)

    def response(n: int) -> list[Unit]:
        return [Unit(float(-rng.integers(1, 64)) / 16, (float(-rng.integers(1, 64)) / 16,)) for _ in range(n)]

    shards = [[response(10), response(23)], [response(1), []], [[Unit(None, (-1.0,))] * 3]]
    figures = sum((summary(weigh(*tables(shard), Weights(scheme="iw_opd")), len(shard)) for shard in shards), Summary())
    told = [row for shard in shards for row in shard]
    weights = [w for row in told for w in importance([abs(u.advantage) for u in row], 0.5)]
    assert (figures.responses, figures.incomparable, figures.units) == (5, 2, 37)
    assert figures.advantage_mean == pytest.approx(np.mean([u.advantage for r in told for u in r]), abs=1e-6)
    assert figures.ess == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / len(weights), rel=1e-6)


def test_summary_of_nothing_to_learn_and_of_nothing() -> None:
    table = weigh(*tables([[Unit(-1.0, (-1.0,))] * 2]), Weights(scheme="uniform"))
    assert summary(table, 1) == Summary(1, 0, 2, 0.0, 2.0, 2.0) and summary(table, 1).ess == 1
    assert summary(table.clear(), 3) == Summary(3, 3) and Summary().ess == 0


@pytest.mark.parametrize(
    ("response", "how", "answer"),
    [
        ("12 + 30 = 42", "last_number", "42"),
        ("The answer is -7.", "last_number", "-7"),
        ("3.50 dollars", "last_number", "3.50"),
        ("1,234,567 in all", "last_number", "1234567"),
        ("It costs 5.", "last_number", "5"),
        ("none", "last_number", ""),
        ("10-4", "last_number", "4"),
        ("1,2", "last_number", "2"),
        ("", "last_number", ""),
        ("  a word\n", "whole", "a word"),
        ("1,234", "whole", "1,234"),
    ],
)
def test_extract(response: str, how: str, answer: str) -> None:
    assert extract(response, how) == answer


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (15, 300, 0.0305, 0.0808),
    ],
)
def test_wilson_published(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_quadratic(pair: tuple[int, int]) -> None:
    """Its ends are the shares p at which (right/total - p)^2 = z^2 p (1 - p) / total."""
    right, total = pair
    p, n = right / total, total
    z = 1.9599639845400545
    roots = np.sort(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real)
    assert wilson(right, total) == pytest.approx(tuple(roots), abs=1e-7)


def test_wilson_of_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_the_ratio_of_totals_and_repeats_by_seed() -> None:
    rng = np.random.default_rng(8)
    counts = rng.integers(1, 20, 150)
    sums = counts * 0.4 + rng.normal(size=150) * np.sqrt(counts)
    low, high = bootstrap_ratio(sums, counts, seed=3)
    ratio = sums.sum() / counts.sum()
    assert low < ratio < high
    assert bootstrap_ratio(sums, counts, seed=3) == (low, high)
    assert bootstrap_ratio(sums, counts, seed=4) != (low, high)
    # The delta method's standard error of a ratio of totals.
    error = np.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_bootstrap_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(9)
    covered = 0
    for trial in range(300):
        counts = rng.integers(1, 10, 60)
        low, high = bootstrap_ratio(rng.poisson(0.7 * counts).astype(float), counts, seed=trial, draws=400)
        covered += low <= 0.7 <= high
    assert 0.90 < covered / 300 < 0.98


def test_a_foreign_policys_rollouts_carry_its_ratio() -> None:
    units = pl.DataFrame(
        {
            "rollout_id": ["a", "a", "b"],
            "unit": [0, 1, 0],
            "kind": ["n:m", "masked", "1:1"],
            "s_start": [0, 2, 0],
            "s_len": [2, 1, 1],
            "teacher_logp": [-1.0, None, -2.0],
        }
    )
    rollouts = pl.DataFrame(
        {
            "rollout_id": ["a", "b"],
            "behavior_logp": [[-1.0, -0.5, -9.0], [-50.0]],
            "policy_logp": [[-0.25, -0.5, -1.0], [-0.5]],
        }
    )
    table = weigh(units, rollouts, Weights(scheme="uniform"))
    assert table["student_logp"].to_list() == [-0.75, None, -0.5]
    assert table["advantage"].to_list() == [-0.25, 0.0, -1.5]
    assert table["is_ratio"].to_list() == pytest.approx([math.exp(0.75), 1.0, math.exp(20.0)])
    own = weigh(units, rollouts.drop("policy_logp"), Weights(scheme="uniform"))
    assert own["is_ratio"].to_list() == [1.0, 1.0, 1.0] and own["student_logp"][0] == -1.5
