"""What the columns of a table hold, in a row a column: for a first look at a shard."""

from collections.abc import Sequence
from typing import Any

import polars as pl

from schemas.tables import Column


def summaries(table: pl.LazyFrame, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """A row a column, of whole columns.

    Args:
        table: of a schema; columns that it lacks are left out.
        columns: of that schema.
    Returns:
        name, doc; nulls: share; of numbers low, mean, high, of lists those of their elements, of which `each` is how many a row
        has on average; of texts distinct, and the first one; of truth values mean, the share that is true. None for what a
        column hasn't.
    """
    schema = table.collect_schema()
    here = [column for column in columns if column.name in schema]
    figures = {
        f"{column.name}\0{name}": figure for column in here for name, figure in _figures(column.name, schema).items()
    }
    found = table.select(**figures).collect(engine="streaming").row(0, named=True)
    names = ("nulls", "low", "mean", "high", "each", "distinct", "first")
    return [
        {"name": column.name, "doc": column.doc, **{name: found.get(f"{column.name}\0{name}") for name in names}}
        for column in here
    ]


def _figures(name: str, schema: pl.Schema) -> dict[str, pl.Expr]:
    column, dtype = pl.col(name), schema[name]
    found = {"nulls": column.is_null().mean()}
    values = column
    if isinstance(dtype, pl.List):
        found["each"] = column.list.len().mean()
    while isinstance(dtype, pl.List):
        values, dtype = values.explode(), dtype.inner  # type: ignore[assignment]
    if dtype.is_numeric():
        # -inf is what has no mass.
        finite = values.filter(values.is_finite()) if dtype.is_float() else values
        return found | {"low": finite.min(), "mean": finite.mean(), "high": finite.max()}
    if dtype == pl.Boolean:
        return found | {"mean": values.mean()}
    if dtype == pl.String:
        return found | {"distinct": values.n_unique(), "first": values.drop_nulls().first()}
    return found
