"""Rounding and order of what a shard keeps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.rounding import CANDIDATE_BITS, STATISTIC_BITS, STEP, candidates, rescaled, rounded

logps = st.lists(st.floats(-40, 0, width=32), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(logps, st.integers(2, 9))
def test_rounding_is_off_by_half_a_digit_at_most_and_stays_put(values: list[float], bits: int) -> None:
    given_ = np.array(values, np.float32)
    found = rounded(given_, bits)
    assert found.dtype == np.float32
    for value, got in zip(given_.astype(np.float64), found.astype(np.float64), strict=True):
        # The digit's size: 2^-bits of the power of two below |value|, STEP at least.
        power = 1.0
        while power > abs(value) and power > 1e-12:
            power /= 2
        while power * 2 <= abs(value):
            power *= 2
        assert abs(got - value) <= max(power * 2.0**-bits, STEP) / 2 + 1e-12
    np.testing.assert_array_equal(rounded(found, bits), found)
    assert (np.diff(rounded(np.sort(given_), bits)) >= 0).all()  # order is kept


def test_no_mass_stays_no_mass_and_few_values_remain() -> None:
    assert rounded(np.array([-np.inf, 0.0], np.float32), 4).tolist() == [-np.inf, 0.0]
    every = rounded(-np.geomspace(1e-6, 25, 100_000, dtype=np.float32), CANDIDATE_BITS)
    assert len(np.unique(every)) < 256  # one-byte dictionary codes


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.floats(-9, 0, width=32)), max_size=9, unique_by=lambda c: c[0]))
)
def test_candidates_fall_then_ascend_within_their_row(rows: list[list[tuple[int, float]]]) -> None:
    flat = [candidate for row in rows for candidate in row]
    counts = np.array([len(row) for row in rows], np.int64)
    ids, logp = candidates(np.array([i for i, _ in flat], np.int32), np.array([x for _, x in flat], np.float32), counts)
    expected = []
    for row in rows:
        digits = [(-float(rounded(np.float32([x]), CANDIDATE_BITS)[0]), i) for i, x in row]
        expected += sorted(digits)
    assert list(zip((-logp).tolist(), ids.tolist(), strict=True)) == expected


@pytest.mark.parametrize(("rows", "k", "more"), [(300, 60, 18), (50, 1, 0), (4, 2000, 300), (40, 0, 20)])
def test_the_order_is_a_sorts_byte_for_byte(rows: int, k: int, more: int) -> None:
    """The likeliest by falling log-prob, others after them, ragged, with ties and without mass."""
    rng = np.random.default_rng(k)
    likeliest = -np.sort(rng.exponential(4, (rows, k)).astype(np.float32), axis=1)
    logp = np.concatenate([likeliest, -rng.exponential(9, (rows, more)).astype(np.float32)], 1)
    logp[rng.random(logp.shape) < 0.02] = -np.inf
    ids = rng.random(logp.shape).argsort(1).astype(np.int32)
    keep = rng.random(logp.shape) < 0.9
    counts = keep.sum(1)
    plain = rounded(logp[keep], CANDIDATE_BITS)
    order = np.lexsort((ids[keep], -plain, np.repeat(np.arange(rows), counts)))
    given_ids = ids[keep]
    found = candidates(given_ids, logp[keep], counts)
    assert found[0].tobytes() == given_ids[order].tobytes() and found[1].tobytes() == plain[order].tobytes()
    assert (given_ids == ids[keep]).all()  # what was given stays as it is


@pytest.mark.parametrize("dropped", [0.0, 0.3, 0.95, 0.99, 0.995])
def test_rescaling_leaves_to_the_tail_exactly_what_it_has(dropped: float) -> None:
    """Of 500 units that keep five candidates, drop three with so much of their mass, and leave a tail; all stored rounded."""
    rng = np.random.default_rng(0)
    tail = rng.uniform(0.001, 0.3, 500)
    own, gone = (rng.dirichlet(np.ones(n), 500) * (1 - tail)[:, None] for n in (5, 3))
    own, gone = own * (1 - dropped), gone * dropped
    exact = np.log(own).astype(np.float32).ravel()
    stored = rounded(exact, CANDIDATE_BITS)
    with np.errstate(divide="ignore"):
        lost = np.log(np.exp(rounded(np.log(gone), CANDIDATE_BITS).astype(np.float64)).sum(1))
    tail_logp = rounded(np.log(tail), STATISTIC_BITS)
    found = rescaled(stored, np.full(500, 5), tail_logp, lost)
    shift = (found - stored).reshape(500, 5)
    np.testing.assert_allclose(shift, shift[:, :1].repeat(5, 1), atol=1e-5)
    held = (np.exp(found.astype(np.float64)).reshape(500, 5).sum(1)) + np.exp(lost + shift[:, 0])
    np.testing.assert_allclose(held + np.exp(tail_logp.astype(np.float64)), 1, atol=1e-6)
    # Each is off by half a step at most, and what all are scaled by is a mean of such errors.
    assert np.abs(found - exact).max() <= 2 * np.abs(exact).max() / 2 ** (CANDIDATE_BITS + 1)
    assert np.abs(found - exact).mean() <= 1.15 * np.abs(stored - exact).mean()


def test_what_a_tail_says_too_coarsely_scales_nothing() -> None:
    """Candidates with a thousandth of the mass: that of the tail, rounded, is all or all but two thousandths."""
    exact = np.log(np.array([4e-4, 2e-4, 1e-4], np.float32))
    tail, none = rounded(np.log1p(-np.array([7e-4])), STATISTIC_BITS), np.array([-np.inf])
    np.testing.assert_array_equal(rescaled(exact, np.array([3]), tail, none), exact)
    masked = np.array([np.nan])
    np.testing.assert_array_equal(rescaled(exact, np.array([3]), masked, masked), exact)
    nothing = np.full(5, -np.inf, np.float32)
    assert (rescaled(nothing, np.array([5]), none, none) == -np.inf).all()
    alone = rescaled(np.log(np.array([0.4, 0.4], np.float32)), np.array([2]), none, none)
    np.testing.assert_allclose(np.exp(alone), 0.5, rtol=1e-6)
