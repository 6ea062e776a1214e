"""Also: draw the prompts of other held-out sets, see that their scorers can read the references, write also.parquet."""

import pyarrow.compute as pc

from pipeline import sources
from pipeline.measure.scorers import references_problem
from pipeline.prompts import ROW_GROUP, collect_also
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption
from stages.run.run import open_run


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Draw the prompts of `evaluate.also`, sets that nothing is trained on."""
    run = open_run(config_file, "also")
    config = run.settings
    sets = config.evaluate.also
    identity = run.decided | {"sources": {name: sources.identity(one.source) for name, one in sets.items()}}
    table = collect_also(sets, config.seed)
    for name, one in sets.items():
        rows, section = table.filter(pc.equal(table["split"], name)).to_pylist(), f"evaluate.also.{name}"
        if problem := references_problem(one, one.source, rows, name, section):
            console.warn(f"also: {problem}")
    with open_writer(run.also, "prompts", identity, {}, decided=run.decided) as writer:
        for start in range(0, len(table), ROW_GROUP):
            writer.write(table.slice(start, ROW_GROUP))
    console.say("also: " + ", ".join(f"{one.count} {name} from {one.source}" for name, one in sets.items()))


if __name__ == "__main__":
    console.run(main)
