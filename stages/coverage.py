"""Coverage: the gate before training. Stops the run with a table when too little can be compared."""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
from rich.table import Table

from pipeline.align.units import KINDS
from pipeline.measure.coverage import CLASSES, measure, shares, shortfalls, sizes
from pipeline.store.records import write_record
from schemas.errors import OpdError
from schemas.records import Gate
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, policy
from stages.run.run import open_run


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Measure what of a phase can be compared, and refuse to go on below the configured thresholds."""
    run = open_run(config_file, "coverage", phase)
    part = run.phase(phase)
    student = policy(run, part.number, weights=False)

    def tables() -> Iterator[tuple[pa.Table, pa.Table]]:
        for place in part:
            yield from zip(place.units.row_groups(), place.rollouts.row_groups(), strict=True)

    measured = measure(tables(), student.vocabulary)
    found = shares(measured)
    missing = shortfalls(found, run.settings.coverage)
    console.console.print(coverage_table(measured, phase))
    if missing:
        raise OpdError(
            f"{phase}: too little of the rollouts can be compared with the teacher: {'; '.join(missing)} "
            "(look at the table above and at `opd support`, or lower the threshold)"
        )
    console.say(
        f"{phase} coverage: {100 * found['compared']:.1f} % of the student's tokens carry loss, "
        f"{100 * found['one_to_one']:.1f} % in 1:1 units and stops; the teacher's kept mass is shared to "
        f"{100 * found['shared_mass']:.1f} %"
    )
    by_class, n_to_m = measured.to_dicts(), sizes(tables()).to_dicts()
    write_record(part.coverage, Gate(decided=run.decided, phase=phase, **found, by_class=by_class, n_to_m=n_to_m))


def coverage_table(measured: pl.DataFrame, phase: str) -> Table:
    """Student tokens by class of text (rows) and kind of unit (columns), in per cent of the class."""
    table = Table(title=f"{phase}: student tokens by text and unit", title_justify="left")
    for heading in ("text", "tokens", *KINDS):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name in (*CLASSES, "all"):
        rows = measured if name == "all" else measured.filter(pl.col("class") == name)
        total = int(rows["tokens"].sum())
        if total:
            by_kind = {kind: int(rows.filter(pl.col("kind") == kind)["tokens"].sum()) for kind in KINDS}
            table.add_row(name, f"{total:,}", *(f"{100 * n / total:.1f} %" for n in by_kind.values()))
    return table


if __name__ == "__main__":
    console.run(main)
