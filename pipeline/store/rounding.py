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
    step = _step(logp, bits)
    return (np.round(logp / step) * step).astype(np.float32)


def _step(logp: np.ndarray, bits: int) -> np.ndarray:
    """What neighbours of a rounded log-prob differ from it by, nats: it may be off by half of that."""
    step: np.ndarray = np.maximum(np.ldexp(1.0, np.frexp(logp)[1] - 1 - bits), STEP)
    return step


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


def rescaled(logp: np.ndarray, counts: np.ndarray, tail_logp: np.ndarray, dropped_logp: np.ndarray) -> np.ndarray:
    """Rounded candidates scaled so that they, those dropped and the tail hold all mass again: what is known best is how much
    the tail has. Where it has nearly all, it says less of what is left over than the candidates do, and they stay as they are.

    Args:
        logp: float32 (kept,), flat.
        counts: int64 (rows,), kept in each row.
        tail_logp: (rows,) log of the mass outside of all candidates; rows where it is not a number stay as they are.
        dropped_logp: (rows,) log of what candidates held that are no longer there, rounded as these were.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    held = np.bincount(row, np.exp(logp.astype(np.float64)), len(counts)) + np.exp(dropped_logp.astype(np.float64))
    tail = np.exp(tail_logp.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log((1 - tail) / held)
        known = tail / (1 - tail) * _step(tail_logp, STATISTIC_BITS) <= _step(np.log(held), CANDIDATE_BITS)
    return (logp + np.where(np.isfinite(shift) & known, shift, 0.0)[row]).astype(np.float32)
