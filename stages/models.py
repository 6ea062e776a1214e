"""Models: make student and teacher available as local folders, once."""

from typing import Annotated

import typer

from pipeline.models import prepare
from pipeline.shards import write_text
from stages import console, layout
from stages.context import DEFAULT_CONFIG, ConfigOption, Speaker, read_config


def main(
    role: Annotated[str, typer.Option(help="student or teacher")], config_file: ConfigOption = DEFAULT_CONFIG
) -> None:
    """Fetch and convert one model, check that its tokenizer can be aligned, write its reference."""
    config = read_config(config_file)
    wanted = config.student if role == "student" else config.teacher
    ref = prepare(wanted.model, layout.cache_folder(config), wanted.revision, console.say)
    speaker = Speaker(ref, wanted)
    known = int(speaker.vocabulary.has_bytes.sum())
    write_text(layout.model_file(config, role), ref.model_dump_json(indent=1) + "\n")
    console.say(f"{role}: {ref.source} ({known:,} tokens with bytes, {len(speaker.stop)} that stop) in {ref.path}")


if __name__ == "__main__":
    console.run(main)
