"""How much of the student's tokens the teacher can speak about, by kind of unit and by what the text is."""

from collections.abc import Iterable

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.align.tokens import TokenBytes
from pipeline.align.units import CONTEXT, KINDS
from schemas.config import Coverage

CLASSES = ("digits", "whitespace", "non-ASCII", "template", "other")
"""digits: nothing else but a leading space or sign | whitespace | non-ASCII: at least one such byte | template: stops and
special tokens | other."""


def unit_classes(units: pa.Table, rollouts: pa.Table, student: TokenBytes) -> pl.Series:
    """The class of text of each unit, by name (see `CLASSES`).

    Args:
        units, rollouts: schemas of those names, the same responses in the same order.
        student: bytes of the student's tokens.
    """
    ids = rollouts["response_ids"].combine_chunks().flatten().to_numpy()
    data, ends = student.concatenate(ids)
    # Units hold every token once, in order, so their borders in the bytes of all responses follow from token counts.
    last = np.cumsum(units["s_len"].to_numpy().astype(np.int64))
    running = np.concatenate([[0], ends])
    stop, start = running[last], running[np.concatenate([[0], last[:-1]])]

    def count(where: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(where)])
        return total[stop] - total[start]

    length = stop - start
    digit = (data >= ord("0")) & (data <= ord("9"))
    space = np.isin(data, np.frombuffer(b" \t\r\n\f\v", np.uint8))
    head = data[np.minimum(start, max(0, len(data) - 1))] if len(data) else np.zeros(len(start), np.uint8)
    lead = np.isin(head, np.frombuffer(b" +-", np.uint8)) & (length > 1)
    tests = [
        length == 0,
        count(data >= 0x80) > 0,
        count(space) == length,
        count(digit) == length - lead,
    ]
    names = ["template", "non-ASCII", "whitespace", "digits"]
    return pl.Series("class", np.select(tests, names, "other"))


def measure(tables: Iterable[tuple[pa.Table, pa.Table]], student: TokenBytes) -> pl.DataFrame:
    """Coverage of a phase.

    Args:
        tables: (units, rollouts) of each row group.
    Returns:
        One row per class of text and kind of unit: class, kind, tokens (student's), units, kept (sum over units of the
        teacher's kept mass, stop included), dropped (what of it has no student id).
    """
    parts = []
    for units, rollouts in tables:
        frame = pl.DataFrame(pl.from_arrow(units.select(["kind", "s_len", "cand_logp", "dropped_logp"])))
        mass = pl.col("cand_logp").list.eval(pl.element().exp()).list.sum()
        dropped = pl.col("dropped_logp").exp().fill_null(0.0)
        parts.append(
            frame.with_columns(unit_classes(units, rollouts, student))
            .filter(pl.col("kind") != KINDS[CONTEXT])  # not the student's to be compared
            .group_by("class", "kind")
            .agg(
                tokens=pl.col("s_len").sum(),
                units=pl.len(),
                dropped=dropped.sum(),
                kept=(mass + dropped).sum(),
            )
        )
    return (
        pl.concat(parts)
        .group_by("class", "kind")
        .agg(pl.col("tokens", "units", "dropped", "kept").sum())
        .sort("class", "kind")
    )


def sizes(tables: Iterable[tuple[pa.Table, pa.Table]]) -> pl.DataFrame:
    """n:m units by size: s_len, t_len, units, largest groups first. `tables` as for `measure`."""
    parts = [
        pl.DataFrame(pl.from_arrow(units.select(["kind", "s_len", "t_len"]))).filter(pl.col("kind") == "n:m")
        for units, _ in tables
    ]
    return (
        pl.concat(parts).group_by("s_len", "t_len").agg(units=pl.len()).sort("units", "s_len", "t_len", descending=True)
    )


def shares(measured: pl.DataFrame) -> dict[str, float]:
    """The figures that the gate compares, from `measure`: shares of student tokens, and of the teacher's kept mass."""
    tokens = max(1, int(measured["tokens"].sum()))

    def of(*kinds: str) -> float:
        return float(measured.filter(pl.col("kind").is_in(kinds))["tokens"].sum()) / tokens

    kept = float(measured["kept"].sum())
    return {
        "compared": of("1:1", "n:m", "stop", "role"),
        "one_to_one": of("1:1", "stop", "role"),
        "shared_mass": 1 - float(measured["dropped"].sum()) / kept if kept else 0.0,
    }


def shortfalls(found: dict[str, float], wanted: Coverage) -> list[str]:
    """What falls short of the config, one sentence each; empty when the gate is open."""
    limits = wanted.model_dump()
    return [
        f"{name} is {100 * share:.1f} %, coverage.min_{name} is {100 * limits[f'min_{name}']:.1f} %"
        for name, share in found.items()
        if share < limits[f"min_{name}"]
    ]
