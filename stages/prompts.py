"""Prompts: read the source, split it, see that the scorer can read the references, write prompts.parquet."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import sources
from pipeline.measure.scorers import references_problem
from pipeline.prompts import ROW_GROUP, collect
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption
from stages.run.run import Run, open_run


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Read prompts from the configured source and split them into examples, train, dev and test."""
    run = open_run(config_file, "prompts")
    config = run.settings
    table = collect(config.prompts, config.seed)
    split = config.evaluate.split
    held_out = table.filter(pc.equal(table["split"], split)).to_pylist()
    if problem := references_problem(config.evaluate, config.prompts.source, held_out, f"split {split}"):
        console.warn(f"prompts: {problem}")
    write(run, table)
    counts = ", ".join(f"{n['counts']} {n['values']}" for n in table["split"].value_counts().to_pylist())
    console.say(f"prompts: {counts} from {config.prompts.source}")


def write(run: Run, table: pa.Table) -> None:
    """Prompts, schema `prompts`, as the run's."""
    identity = run.decided | sources.identity(run.settings.prompts.source)
    with open_writer(run.prompts, "prompts", identity, {}, decided=run.decided) as writer:
        for start in range(0, len(table), ROW_GROUP):
            writer.write(table.slice(start, ROW_GROUP))


if __name__ == "__main__":
    console.run(main)
