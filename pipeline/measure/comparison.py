"""Two runs beside each other: which held-out items they share, and what differs between them, with an interval and a p."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import polars as pl

from pipeline.align.units import UNCOMPARED
from pipeline.measure.accuracy import gain, samples_of, solved

DRAWS = 2000
"""Resamples of an interval, and relabellings of a p."""
AT_ONCE = 1 << 20
"""Items that are drawn at once: a bound on memory."""
ENOUGH = 0.5
"""Share of the smaller set of items that two runs must have in common for a paired test on those."""


def items(answers: pl.DataFrame) -> pl.DataFrame:
    """Answers with their prompts named by what they ask and by their reference, so that two runs name the same item alike.

    A run with another seed has other items under the same `prompt_id`, or the same under another. Items that are alike in one
    run are told apart by their order.

    Args:
        answers: schema `answers`, of one held-out set.
    """
    first = answers.unique("prompt_id", keep="first", maintain_order=True)
    asked = pl.concat_str(pl.col("prompt"), pl.lit("\0"), pl.col("reference").fill_null("\1"))
    named = first.select("prompt_id", item=asked).with_columns(
        item=pl.concat_str("item", pl.lit("\0"), pl.int_range(pl.len()).over("item").cast(pl.String))
    )
    return answers.join(named, on="prompt_id", maintain_order="left").drop("prompt_id").rename({"item": "prompt_id"})


def compared_answers(first: pl.DataFrame, second: pl.DataFrame, seed: int) -> dict[str, Any]:
    """What differs from one run's answers to a held-out set to another's.

    Paired by item where enough are the same (ENOUGH): the figures and the p of `accuracy.gain`, McNemar's exact test for one
    answer an item, signs flipped by item for several; `difference` where one has more answers an item than the other. Else the
    means of other items are compared, by `difference` too.

    Args:
        first, second: as `items` gives them, with a number of answers to each item.
    Returns:
        items: judged ones of each; common: of both; paired; accuracy, accuracy_95, p: of the second less the first; gained,
        lost: items right in the second alone or the first alone, of one answer an item where paired. None where none can be
        judged.
    """
    of = [solved(answers) for answers in (first, second)]
    both = of[0].join(of[1], on="prompt_id", suffix="_second", maintain_order="left")
    found: dict[str, Any] = {"items": [len(one) for one in of], "common": len(both), "paired": False}
    found |= dict.fromkeys(("accuracy", "accuracy_95", "p", "gained", "lost"))
    if not all(found["items"]):
        return found
    samples = samples_of(first), samples_of(second)
    paired = len(both) >= ENOUGH * min(found["items"])
    if paired and samples[0] == samples[1]:
        change = both["right_second"] - both["right"]
        counts = {"gained": int((change > 0).sum()), "lost": int((change < 0).sum())} if samples[0] == 1 else {}
        return found | {"paired": True, **(gain(first, second, seed) or {}), **counts}
    right = (both["right"], both["right_second"]) if paired else (one["right"] for one in of)
    shares = [counts.to_numpy() / each for counts, each in zip(right, samples, strict=True)]
    other = difference(shares[0], np.ones(len(shares[0])), shares[1], np.ones(len(shares[1])), seed, paired)
    figures = {"accuracy": other["difference"], "accuracy_95": other["difference_95"], "p": other["p"]}
    return found | {"paired": paired} | figures


def sampled_kl(rollouts: pl.DataFrame, units: pl.DataFrame, weights: pl.DataFrame) -> pl.DataFrame:
    """The sampled log-ratio of student to teacher of each prompt's responses, which `sampled_kl` of an evaluation adds up.

    Args:
        rollouts, units, weights: of the schemas of those names, of the same responses.
    Returns:
        prompt_id, nats: float64, sum over compared units of r (log p_S - log p_T), r the ratio of the policy to what sampled;
        tokens: the student's in these units. In the order of the rollouts.
    """
    compared = pl.concat([units.select("kind", "s_len"), weights], how="horizontal").filter(
        ~pl.col("kind").is_in(UNCOMPARED)
    )
    nats = -(pl.col("advantage").cast(pl.Float64) * pl.col("is_ratio").cast(pl.Float64)).sum()
    by_response = compared.group_by("rollout_id").agg(nats=nats, tokens=pl.col("s_len").cast(pl.Int64).sum())
    joined = rollouts.select("rollout_id", "prompt_id").join(
        by_response, on="rollout_id", how="left", maintain_order="left"
    )
    return joined.group_by("prompt_id", maintain_order=True).agg(pl.col("nats", "tokens").sum())


def compared_kl(first: pl.DataFrame, second: pl.DataFrame, seed: int) -> dict[str, Any]:
    """What differs from one run's `sampled_kl` to another's: nats per token, paired by prompt where enough are the same.

    Args:
        first, second: as `sampled_kl` gives them, prompts named as by `items`.
    Returns:
        items, common, paired: as `compared_answers`; difference, difference_95, p: as `difference` has them.
    """
    both = first.join(second, on="prompt_id", suffix="_second", maintain_order="left")
    found: dict[str, Any] = {"items": [len(first), len(second)], "common": len(both)}
    paired = len(both) >= ENOUGH * min(len(first), len(second))
    of = (both, both) if paired else (first, second)
    names = ("nats", "tokens"), (("nats_second", "tokens_second") if paired else ("nats", "tokens"))
    sums = [one[name].to_numpy() for one, pair in zip(of, names, strict=True) for name in pair]
    return found | {"paired": paired, **difference(sums[0], sums[1], sums[2], sums[3], seed, paired)}


def difference(
    first: np.ndarray, first_counts: np.ndarray, second: np.ndarray, second_counts: np.ndarray, seed: int, paired: bool
) -> dict[str, Any]:
    """The difference of two ratios of sums, with items as the unit.

    The interval is the bootstrap's percentile one over items, drawn together where paired. The p is two-sided by relabelling:
    how often the difference is as large when each pair is swapped by chance, or, unpaired, when items change sides; the found
    labelling counts as one of those drawn, so that it is never 0 (Phipson and Smyth 2010).

    Args:
        first, second: (n,) and (m,), n = m where paired, sums of each item; `_counts` what they are sums over.
    Returns:
        difference: of the second's ratio less the first's; difference_95; p.
    """
    rng = np.random.default_rng(seed)
    n, m = len(first), len(second)
    sums, counts = np.concatenate([first, second]), np.concatenate([first_counts, second_counts])

    def drawn(draws: int) -> tuple[np.ndarray, np.ndarray]:
        left = rng.integers(0, n, (draws, n))
        return left, n + (left if paired else rng.integers(0, m, (draws, m)))

    def relabelled(draws: int) -> tuple[np.ndarray, np.ndarray]:
        if paired:
            left = np.arange(n) + n * rng.integers(0, 2, (draws, n))
            return left, (left + n) % (2 * n)
        mixed = rng.permuted(np.tile(np.arange(n + m), (draws, 1)), axis=1)
        return mixed[:, :n], mixed[:, n:]

    def less(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        ratios = [sums[side].sum(-1) / np.maximum(1, counts[side].sum(-1)) for side in (left, right)]
        return np.asarray(ratios[1] - ratios[0])

    def repeated(draw: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        at_once = max(1, AT_ONCE // (n + m))
        return np.concatenate([less(*draw(min(at_once, DRAWS - done))) for done in range(0, DRAWS, at_once)])

    found = float(less(np.arange(n), n + np.arange(m)))
    low, high = np.quantile(repeated(drawn), [0.025, 0.975])
    as_large = int((np.abs(repeated(relabelled)) >= abs(found) * (1 - 1e-12)).sum())
    return {"difference": found, "difference_95": (float(low), float(high)), "p": (1 + as_large) / (1 + DRAWS)}


def differing(values: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys in which nested mappings differ, by dotted name, with each one's value; None: it has no such key.

    In the order of the first that has the key.
    """
    flat = [dict(_leaves(one)) for one in values]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key) for one in flat] for key in keys}
    return {key: each for key, each in found.items() if any(value != each[0] for value in each[1:])}


def _leaves(values: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
