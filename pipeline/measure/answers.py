"""The answer that a response gives, and intervals for what is measured."""

import re
from typing import Literal

import numpy as np

NUMBER = re.compile(r"(?<!\d)-?(?:\d+(?:\.\d+)?|\.\d+)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract(response: str, how: Literal["last_number", "whole"]) -> str:
    """The answer that a response gives: its last number, or all of it without outer space; empty when there is none.

    A minus between digits subtracts (`10-4` ends in 4); commas are dropped where they part thousands.
    """
    if how == "whole":
        return response.strip()
    found = NUMBER.findall(THOUSANDS.sub("", response))
    return found[-1] if found else ""


def wilson(right: float, total: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    p, zz = right / total, z * z
    middle = (p + zz / (2 * total)) / (1 + zz / total)
    half = z * ((p * (1 - p) + zz / (4 * total)) / total) ** 0.5 / (1 + zz / total)
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # p is in it, whatever the rounding


def bootstrap_ratio(sums: np.ndarray, counts: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of sum(sums) / sum(counts) when the pairs (responses) are drawn anew."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(sums), (draws, len(sums)))
    ratios = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
