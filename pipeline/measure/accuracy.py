"""Figures of judged answers, with prompts as the unit: mean accuracy, pass@k, and what changed between two checkpoints."""

import math
from typing import Any

import numpy as np
import polars as pl

from pipeline.measure.answers import bootstrap_ratio, wilson


def accuracy(answers: pl.DataFrame) -> dict[str, Any]:
    """How many prompts there are and can be judged, the mean share of right answers (avg@n), and pass@k.

    Args:
        answers: as `held_out_answers` gives them, n to each prompt.
    Returns:
        items, judged: prompts, and those all of whose answers can be judged, which the other figures are of;
        right: their right answers; accuracy, accuracy_95: mean over prompts and its interval (`mean_interval`);
        pass_at_k: of n above 1, for k = 1, 2, 4, ... n, share and share_95 likewise; stopped: share of all answers that end by
        themselves. None where no prompt can be judged: not measured is not 0.
    """
    found, samples = solved(answers), samples_of(answers)
    right = found["right"].to_numpy()
    figures: dict[str, Any] = {
        "items": answers["prompt_id"].n_unique(),
        "judged": len(found),
        "right": None,
        "accuracy": None,
        "accuracy_95": None,
        "pass_at_k": None,
        "stopped": float(answers["stopped"].mean()),  # type: ignore[arg-type]
    }
    if not len(found):
        return figures
    shares = {k: pass_at_k(right, samples, k) for k in doubling(samples)} if samples > 1 else {}
    return figures | {
        "right": int(right.sum()),
        "accuracy": float(right.mean() / samples),
        "accuracy_95": mean_interval(right / samples, samples),
        "pass_at_k": {
            str(k): {"share": float(values.mean()), "share_95": mean_interval(values, samples)}
            for k, values in shares.items()
        },
    }


def gain(before: pl.DataFrame, after: pl.DataFrame, seed: int) -> dict[str, Any] | None:
    """What changed from one checkpoint's answers to another's, prompt by prompt.

    Args:
        before, after: as `held_out_answers` gives them, as many to each prompt.
    Returns:
        accuracy: mean over prompts of the difference of their shares of right answers; accuracy_95: its bootstrap interval
        over prompts; p: see `sign_flips`. None where no prompt can be judged in both.
    """
    both = solved(before).join(solved(after), on="prompt_id", suffix="_after", maintain_order="left")
    if both.is_empty():
        return None
    differences = (both["right_after"] - both["right"]).to_numpy()
    shares = differences / samples_of(before)
    return {
        "accuracy": float(shares.mean()),
        "accuracy_95": bootstrap_ratio(shares, np.ones(len(shares)), seed),
        "p": sign_flips(differences),
    }


def solved(answers: pl.DataFrame) -> pl.DataFrame:
    """prompt_id and how many of its answers are `right`, of each prompt all of whose answers can be judged, in order."""
    by_prompt = answers.group_by("prompt_id", maintain_order=True)
    counts = by_prompt.agg(pl.col("right").cast(pl.Int64).sum(), judged=pl.col("right").is_not_null().all())
    return counts.filter("judged").drop("judged")


def samples_of(answers: pl.DataFrame) -> int:
    """Answers to each prompt."""
    return len(answers) // max(1, answers["prompt_id"].n_unique())


def doubling(samples: int) -> list[int]:
    """1, 2, 4, ... and `samples`."""
    return [*(2**i for i in range((samples - 1).bit_length())), samples]


def pass_at_k(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased estimates of the probability that one of k answers to a prompt is right.

    1 - C(n - c, k) / C(n, k) of n answers with c right ones: Chen et al. 2021, arXiv 2107.03374, eq. 1.

    Args:
        right: int (prompts,), c of each prompt.
        samples: n, at least k.
    Returns:
        float64 (prompts,).
    """
    of_count = [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.array(of_count)[right]


def mean_interval(values: np.ndarray, samples: int) -> tuple[float, float]:
    """95 % interval of the mean of shares, one a prompt: Wilson's, at the effective number of answers.

    That is p (1 - p) over the variance of the mean, clustered by prompt (Korn and Graubard 1998): the number of prompts where
    all answers to one are alike, up to that of answers where they are as good as independent. With one answer to a prompt this
    is Wilson's interval itself, and unlike a bootstrap's it has a width where all are wrong.

    Args:
        values: (prompts,) in [0, 1].
        samples: answers to each.
    """
    prompts, mean, variance = len(values), float(np.mean(values)), float(np.var(values))
    if mean in (0.0, 1.0):
        effective = float(prompts)
    elif variance == 0:
        effective = float(prompts * samples)
    else:
        effective = min(prompts * mean * (1 - mean) / variance, prompts * samples)
    return wilson(mean * effective, effective)


def sign_flips(differences: np.ndarray) -> float:
    """Two-sided p of paired differences: how often their sum is as large when each one's sign is drawn anew, exactly.

    With one answer to a prompt it is the sign test on the answers that were fixed and broken (McNemar's, exact).

    Args:
        differences: int (prompts,).
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    most, found = int(sizes @ counts), abs(int(differences.sum()))
    if not found:
        return 1.0
    # The sum's characteristic function, a product of cosines, on as many angles as it has values.
    angles = 2 * np.pi * np.arange(2 * most + 1) / (2 * most + 1)
    transform = np.ones(len(angles))
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        transform *= np.cos(size * angles) ** count
    chances = np.fft.fft(transform).real / len(angles)  # of sums 0, 1, ... most, -most, ... -1
    return float(np.clip(2 * chances[found : most + 1].sum(), 2.0 ** (1 - counts.sum()), 1.0))
