"""What of the teacher's numbers is worth its bytes. The figures behind the choices: `benchmarks/fidelity.py`, docs/cache.md."""

import numba
import numpy as np

STEP = 2.0**-10
"""nats; no digit of a log-prob is finer. With the digits below it leaves few enough values for one-byte dictionary codes."""
CANDIDATE_BITS = 4
"""Binary digits kept after the leading one of a candidate's log-prob: half a unit of them is KL 3e-4 to 6e-4, under bf16's
own noise between runs (7e-4)."""
STATISTIC_BITS = 7
"""The same for entropy, stop and tail. The realised token's log-prob is kept exactly."""
GAPS = np.array([1750, 701, 301, 132, 57, 23, 10, 4, 1])
"""Ciura's, of Shell's sort."""
LONG = 256
"""Candidates from which on a row is sorted with all of them."""


def rounded(logp: np.ndarray, bits: int) -> np.ndarray:
    """Round to so many binary digits after the leading one, none below STEP: still float32 nats; -inf stays -inf."""
    _, exponent = np.frexp(logp)
    step = np.maximum(np.ldexp(1.0, exponent - 1 - bits), STEP)
    return (np.round(logp / step) * step).astype(np.float32)


def candidates(ids: np.ndarray, logp: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates as a shard holds them: rounded, in each row by falling rounded log-prob, then by ascending id.

    The order does not depend on how a device breaks ties, and the first k of a row are its k likeliest.

    Args:
        ids, logp: int32 and float32 (kept,), flat.
        counts: int64 (rows,), kept in each row.
    """
    ids, logp = np.array(ids), rounded(logp, CANDIDATE_BITS)
    _order(ids, logp, np.concatenate([[0], np.cumsum(counts)]))
    return ids, logp


@numba.njit(cache=True, nogil=True)
def _order(ids: np.ndarray, logp: np.ndarray, bounds: np.ndarray) -> None:
    """Sort each row in place. Rows come sorted but for ties and what was asked for beside the likeliest, so insertion takes
    few steps; long rows take larger ones first (Shell)."""
    for row in range(len(bounds) - 1):
        start, end = bounds[row], bounds[row + 1]
        for gap in GAPS if end - start > LONG else GAPS[-1:]:
            for at in range(start + gap, end):
                token, value, to = ids[at], logp[at], at
                while to >= start + gap and (
                    logp[to - gap] < value or (logp[to - gap] == value and ids[to - gap] > token)
                ):
                    ids[to], logp[to] = ids[to - gap], logp[to - gap]
                    to -= gap
                ids[to], logp[to] = token, value


def rescaled(logp: np.ndarray, counts: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Rounded candidates scaled so that they and the rest hold all mass again: what is known best is how much is left over.

    Args:
        logp: float32 (kept,), flat.
        counts: int64 (rows,), kept in each row.
        rest: (rows,) mass outside of them; rows where it is not a number stay as they are.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    held = np.bincount(row, np.exp(logp.astype(np.float64)), len(counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log(np.clip(1 - rest, 0, None) / held)
    return (logp + np.where(np.isfinite(shift), shift, 0.0)[row]).astype(np.float32)
