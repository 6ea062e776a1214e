"""Schema: what every column on disk means."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from schemas.diagnostics import fields
from schemas.errors import OpdError
from schemas.tables import TABLES
from stages.run import console


def main(table: Annotated[str | None, typer.Argument(help="one table; all when left out")] = None) -> None:
    """Print every column on disk, and every field of `diagnostics.json`: its type, unit, shape and meaning."""
    known = [*TABLES, "diagnostics"]
    if table is not None and table not in known:
        raise OpdError(f"no table {table!r}; there are {', '.join(known)}")
    for kind in [table] if table else known:
        grid = Table(title=kind, title_justify="left", show_lines=False)
        for heading in ("column", "type", "meaning"):
            grid.add_column(heading, no_wrap=heading == "column")
        if kind == "diagnostics":
            for row in fields():
                grid.add_row(*map(escape, row))
        for column in TABLES.get(kind, ()):
            of = str(column.type).replace("element: ", "").replace(" not null", "")
            grid.add_row(column.name, escape(of) + (" or null" if column.nullable else ""), escape(column.doc))
        console.out.print(grid)
