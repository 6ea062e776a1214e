"""What scoring needs of whole rows of logits, in one reading of them: normaliser, entropy, maxima of groups of ids.

PyTorch reads and writes the row anew, in float32, at each step: on a CPU that costs more than the matmul that made it.
Here a block of ids is widened, searched and summed while it lies in the core's own cache: 5 times faster than the same
statistics in PyTorch (rows of 262,144 bfloat16 logits, 2 cores).
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

GROUP = 64
"""Neighbouring ids that share one maximum."""
BLOCK = 4096
"""Ids worked on at once, a multiple of GROUP: their temporaries fit the first-level cache."""
LOWEST = np.float32(-87.0)
"""exp of anything below is taken as exp of this, 2e-38: float32 has no smaller normal numbers."""
LOWEST_LOGIT = np.float32(np.finfo(np.float32).min)
FAST = {"reassoc", "contract", "nsz", "arcp", "nnan"}
"""Sums and maxima may be taken in any order, so that they vectorise; infinite logits stay allowed."""


def row_statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of each row, which may hold -inf but not only that.

    Args:
        logits: (rows, vocab), any float dtype and device.
    Returns:
        logsumexp, float32 (rows,); entropy in nats, float32 (rows,); maxima of the complete groups of GROUP ids,
        float32 (rows, vocab // GROUP).
    """
    if logits.device.type == "cpu":
        return _on_cpu(logits)
    logits = logits.float()
    rows, groups = len(logits), logits.shape[1] // GROUP
    peak = logits.amax(1, keepdim=True)
    logits_above = (logits - peak).clamp_(min=float(LOWEST))
    weights = logits_above.exp()
    total = weights.sum(1)
    entropy = total.log() - torch.linalg.vecdot(weights, logits_above) / total
    return peak[:, 0] + total.log(), entropy, logits[:, : groups * GROUP].view(rows, groups, GROUP).amax(2)


def _on_cpu(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # A bfloat16 is the upper half of a float32.
    if logits.dtype == torch.bfloat16:
        bits, shift = logits.contiguous().view(torch.int16).numpy(), np.int32(16)
    else:
        bits, shift = logits.float().contiguous().view(torch.int32).numpy(), np.int32(0)
    rows, vocab = bits.shape
    log_z, entropy = np.empty(rows, np.float32), np.empty(rows, np.float32)
    maxima = np.empty((rows, vocab // GROUP), np.float32)
    threads = torch.get_num_threads()
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = map(slice, bounds, bounds[1:])
        list(pool.map(lambda part: _rows(bits[part], shift, log_z[part], entropy[part], maxima[part]), parts))
    return torch.from_numpy(log_z), torch.from_numpy(entropy), torch.from_numpy(maxima)


@numba.njit(cache=True, nogil=True)
def _rows(bits: np.ndarray, shift: np.int32, log_z: np.ndarray, entropy: np.ndarray, maxima: np.ndarray) -> None:
    """Online softmax: sums are relative to the largest logit so far and rescaled, in float64, when a block beats it."""
    wide = np.empty(BLOCK, np.int32)
    power = np.empty(BLOCK, np.int32)
    fraction = np.empty(BLOCK, np.float32)
    for row in range(bits.shape[0]):
        peak = LOWEST_LOGIT
        total = dot = np.float64(0)
        for start in range(0, bits.shape[1], BLOCK):
            block = bits[row, start : start + BLOCK]
            _widen(block, shift, wide)
            x = wide.view(np.float32)[: len(block)]
            top = _maxima(x, maxima[row, start // GROUP :])
            if top > peak:
                drop = np.float64(peak) - np.float64(top)
                scale = np.exp(drop)
                dot = scale * (dot + drop * total)
                total *= scale
                peak = top
            _exp(x, peak, power, fraction)
            more_total, more_dot = _sums(x, peak, power.view(np.float32), fraction)
            total += more_total
            dot += more_dot
        log_z[row] = peak + np.log(total)
        entropy[row] = np.log(total) - dot / total


# One loop a function, none of which reads what it writes: LLVM vectorises those.


@numba.njit(cache=True, nogil=True, fastmath=FAST)
def _widen(bits: np.ndarray, shift: np.int32, wide: np.ndarray) -> None:
    for i in range(len(bits)):
        wide[i] = np.int32(bits[i]) << shift


@numba.njit(cache=True, nogil=True, fastmath=FAST)
def _maxima(x: np.ndarray, maxima: np.ndarray) -> np.float32:
    """Fill in the complete groups' maxima. Returns the maximum of all, of the incomplete group too."""
    top = x[0]
    for group in range(len(x) // GROUP):
        largest = x[group * GROUP]
        for i in range(group * GROUP, group * GROUP + GROUP):
            largest = max(x[i], largest)
        maxima[group] = largest
        top = max(top, largest)
    for i in range(len(x) // GROUP * GROUP, len(x)):
        top = max(top, x[i])
    return top


@numba.njit(cache=True, nogil=True, fastmath=FAST)
def _exp(x: np.ndarray, peak: np.float32, power: np.ndarray, fraction: np.ndarray) -> None:
    """exp(x - peak) as a power of two (the bits of a float32) times a number near 1; coefficients from Cephes' expf."""
    for i in range(len(x)):
        above = max(x[i] - peak, LOWEST)
        whole = np.floor(above * np.float32(1.44269504) + np.float32(0.5))
        power[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        # ln 2 in two parts, so that the difference keeps its digits.
        f = above - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
        y = np.float32(1.9875691500e-4) * f + np.float32(1.3981999507e-3)
        y = y * f + np.float32(8.3334519073e-3)
        y = y * f + np.float32(4.1665795894e-2)
        y = y * f + np.float32(1.6666665459e-1)
        y = y * f + np.float32(5.0000001201e-1)
        fraction[i] = y * f * f + f + np.float32(1)


@numba.njit(cache=True, nogil=True, fastmath=FAST)
def _sums(x: np.ndarray, peak: np.float32, power: np.ndarray, fraction: np.ndarray) -> tuple[np.float32, np.float32]:
    """Sums of exp(x - peak) and of exp(x - peak) * (x - peak)."""
    total, dot = np.float32(0), np.float32(0)
    for i in range(len(x)):
        weight = power[i] * fraction[i]
        total += weight
        dot += weight * max(x[i] - peak, LOWEST)
    return total, dot
