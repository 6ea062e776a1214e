"""Which responses a step takes, which of them a rank gets, which share a forward pass. Pure functions; no files, no state."""

from dataclasses import dataclass

import numpy as np

WINDOW = 4
"""Row groups whose responses are mixed: what lies beside each other on disk (samples of a prompt, neighbouring prompts) is
spread over that many, and memory holds about twice as many decoded."""


@dataclass(frozen=True)
class Order:
    """The order of an epoch: row groups as they are read, each window of WINDOW of them shuffled as one.

    Attributes:
        key: seed and epoch, which alone determine it.
        groups: int64 (G,), the row groups; an index into this array is a *place*.
        starts: int64 (G + 1,), responses before each place.
        bounds: int64 (W + 1,), responses before each window.
    """

    key: tuple[int, int]
    groups: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray

    def windows(self, start: int, stop: int) -> range:
        """The windows that responses start to stop (start < stop) lie in."""
        first, last = np.searchsorted(self.bounds, start, "right") - 1, np.searchsorted(self.bounds, stop, "left")
        return range(int(first), int(last))

    def pick(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Responses start to stop of the epoch: their places and their rows within the row groups, int64 (stop - start,)."""
        mixed = []
        for window in self.windows(start, stop):
            a, b = self.bounds[window : window + 2]
            # Windows count from 1 here: a seed sequence takes (s, e, 0) for (s, e), which shuffled the row groups.
            shuffled = a + np.random.default_rng((*self.key, window + 1)).permutation(b - a)
            mixed.append(shuffled[max(start - a, 0) : stop - a])
        flat = np.concatenate(mixed)
        places = np.searchsorted(self.starts, flat, "right") - 1
        return places, flat - self.starts[places]


def epoch_order(sizes: np.ndarray, seed: int, epoch: int) -> Order:
    """The order of one epoch over row groups of these sizes, int64 (G,)."""
    groups = np.random.default_rng((seed, epoch)).permutation(len(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes[groups])]).astype(np.int64)
    return Order((seed, epoch), groups, starts, np.append(starts[:-1:WINDOW], starts[-1]))


def share(lengths: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The responses of a step that a rank gets, longest first: shares differ by at most one response and are alike in tokens.

    Args:
        lengths: int64 (B,), tokens of each response of the step, prompt included.
    Returns:
        int64 indices into it. They are dealt out by falling length, back and forth, so that no rank always gets the longer
        one; a step of fewer responses than ranks leaves some without any.
    """
    ordered = np.argsort(-lengths, kind="stable")
    turn, seat = np.divmod(np.arange(len(ordered)), ranks)
    return ordered[np.where(turn % 2, ranks - 1 - seat, seat) == rank]


def cut(lengths: np.ndarray, tokens: int) -> list[slice]:
    """Cut responses of falling length so that a piece padded to its longest has at most so many tokens, or one response."""
    pieces, at = [], 0
    while at < len(lengths):
        pieces.append(slice(at, at + max(1, tokens // max(1, int(lengths[at])))))
        at = pieces[-1].stop
    return pieces
