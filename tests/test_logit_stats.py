"""One pass over rows of logits against float64 sums."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.infer.logit_stats import BLOCK, GROUP, row_statistics


def reference(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = logits.double().numpy()
    log_z = np.logaddexp.reduce(x, axis=1)
    logp = x - log_z[:, None]
    p = np.exp(logp)
    entropy = -np.where(p > 0, p * np.where(p > 0, logp, 0), 0).sum(1)
    groups = x.shape[1] // GROUP
    return log_z, entropy, x[:, : groups * GROUP].reshape(len(x), groups, GROUP).max(2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, GROUP - 1, GROUP, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + GROUP + 5]),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
def test_statistics_are_the_sums(seed: int, vocab: int, scale: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    x = scale * rng.normal(size=(3, vocab)) + rng.normal() * scale
    x[1] = np.sort(x[1])  # every block beats the one before it
    hidden = rng.random(x.shape) < 0.2
    hidden[:, int(rng.integers(vocab))] = False
    x[hidden] = -np.inf
    logits = torch.from_numpy(x).to(dtype)
    log_z, entropy, maxima = (value.numpy() for value in row_statistics(logits))
    expected = reference(logits)
    np.testing.assert_allclose(log_z, expected[0], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(entropy, expected[1], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(maxima, expected[2].astype(np.float32))


@pytest.mark.parametrize("value", [-3e38, -1000.0, 0.0, 1000.0, 3e38])
def test_extreme_logits(value: float) -> None:
    logits = torch.full((2, 2 * GROUP), value, dtype=torch.float32)
    log_z, entropy, maxima = row_statistics(logits)
    assert log_z[0].item() == pytest.approx(value + np.log(2 * GROUP), rel=1e-6, abs=1e-4)
    assert entropy[0].item() == pytest.approx(np.log(2 * GROUP), rel=1e-5)
    assert (maxima == torch.tensor(value)).all()


def test_rows_of_a_view_and_of_several_threads() -> None:
    logits = torch.randn(7, 2 * BLOCK + 3, generator=torch.Generator().manual_seed(0))[:, 1:]
    whole = row_statistics(logits)
    for row in range(7):
        for together, alone in zip(whole, row_statistics(logits[row : row + 1]), strict=True):
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=0)
