"""Prompts: read the source, split it, write prompts.parquet."""

from pipeline import sources
from pipeline.prompts import collect
from pipeline.store.shards import open_writer
from stages.run import console, layout
from stages.run.context import DEFAULT_CONFIG, ConfigOption, read_config


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Read prompts from the configured source and split them into examples, train, dev and test."""
    config = read_config(config_file)
    table = collect(config.prompts, config.seed)
    identity = {"prompts": config.prompts.model_dump(mode="json"), "seed": config.seed}
    identity |= sources.identity(config.prompts.source)
    with open_writer(layout.run_folder(config) / "prompts.parquet", "prompts", identity, {}) as writer:
        writer.write(table)
    counts = ", ".join(f"{n['counts']} {n['values']}" for n in table["split"].value_counts().to_pylist())
    console.say(f"prompts: {counts} from {config.prompts.source}")


if __name__ == "__main__":
    console.run(main)
