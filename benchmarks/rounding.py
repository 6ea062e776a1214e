"""Rounding and sorting of candidates, `store.rounding.candidates` beside one sort of all: `python benchmarks/rounding.py`."""

import time

import numpy as np

from pipeline.store.rounding import CANDIDATE_BITS, candidates, rounded

ROUNDS = 5


def by_one_sort(ids: np.ndarray, logp: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by `np.lexsort` over all rows."""
    logp = rounded(logp, CANDIDATE_BITS)
    order = np.lexsort((ids, -logp, np.repeat(np.arange(len(counts)), counts)))
    return ids[order], logp[order]


def main() -> None:
    """Print a Markdown table: medians of rounds in which both take turns."""
    rng = np.random.default_rng(0)
    print("| likeliest | requested beside them | rows/s | one sort | ratio |\n|---|---|---|---|---|")
    for rows, k, more in ((8000, 20, 0), (4000, 78, 0), (4000, 60, 18), (200, 2000, 0)):
        likeliest = -np.sort(rng.exponential(3, (rows, k)), 1)
        logp = np.concatenate([likeliest, -rng.exponential(9, (rows, more))], 1).astype(np.float32).ravel()
        ids = rng.random((rows, k + more)).argsort(1).astype(np.int32).ravel()
        counts = np.full(rows, k + more)
        candidates(ids, logp, counts)
        taken = []
        for _ in range(ROUNDS):
            clock = [time.perf_counter()]
            for way in (candidates, by_one_sort):
                found = way(ids, logp, counts)
                clock.append(time.perf_counter())
            taken.append(np.diff(clock))
        assert all(np.array_equal(a, b) for a, b in zip(found, candidates(ids, logp, counts), strict=True))
        ours, theirs = np.median(taken, 0)
        print(
            f"| {k} | {more} | {rows / ours:,.0f} | {rows / theirs:,.0f} | {np.median([b / a for a, b in taken]):.1f} |"
        )


if __name__ == "__main__":
    main()
