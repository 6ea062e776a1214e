"""Models: make student and teacher available as local folders, once."""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import typer
from tokenizers import Tokenizer

from pipeline.align.roles import roles_of
from pipeline.align.texts import Side, misspelt, read_otherwise
from pipeline.align.tokens import TokenBytes, vocabulary_table
from pipeline.align.vocabularies import end_ids, stop_ids
from pipeline.models import (
    ModelRef,
    embedded,
    file_tokenizer,
    generation_config,
    load_tokenizer,
    model_config,
    prepare,
    vocabulary,
)
from pipeline.store.records import read_record, write_record
from pipeline.store.shards import open_shard, open_writer
from schemas.config import consistency, declared
from schemas.errors import OpdError
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, tuning
from stages.run.run import Run, command, open_run


def main(
    role: Annotated[Literal["student", "teacher"], typer.Option(help="which of the two models")],
    config_file: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Fetch and convert one model, check that its tokenizer spells plain text, write its reference."""
    run = open_run(config_file, f"models {role}")
    wanted = run.settings.student if role == "student" else run.settings.teacher
    if role == "teacher" and not run.needs_teacher:
        return take_over(run)
    ref = prepare(wanted.model, run.cache, wanted.revision, console.say)
    tokenizer = load_tokenizer(ref.source, ref.path)
    tokens = vocabulary(ref.source, ref.path, tokenizer)
    check_tokenizer(role, Side(tokenizer, tokens), file_tokenizer(ref.path))
    stop = stop_ids(tokens, end_ids(tokenizer, generation_config(ref.path)), wanted.stop)
    roles = roles_of(tokenizer.backend_tokenizer, ref.source, wanted.roles)
    tokens = replace(tokens, roles=roles.single)
    said = [spelled[0] for spelled in roles.spellings.values()]
    check_embedding(role, tokens, np.concatenate([stop, *said]), embedded(model_config(ref.path)))
    identity = {"tokenizer": ref.tokenizer, "stop": list(wanted.stop), "roles": roles.identity}
    with open_writer(run.vocabulary(role), "vocabulary", identity, {}, decided=run.decided) as writer:
        writer.write(vocabulary_table(tokens, stop))
    known = {"tokenizer_class": type(tokenizer).__name__, "decided": run.decided}
    write_record(run.model_file(role), ref.model_copy(update=known))
    if all(
        run.model_file(other).exists() for other in ("student", "teacher")
    ):  # of two jobs at once the later one sees both
        warn_of_another_teacher(run)
    console.say(
        f"{role}: {ref.source}, {int(tokens.has_bytes.sum()):,} tokens with bytes, {len(stop)} that stop, in {ref.path}"
    )


def warn_of_another_teacher(run: Run) -> None:
    """Where the student is a checkpoint that learned from another teacher; the Snakefile warns of what is declared."""
    found = tuning(run)
    if found != declared(run.config) and (warning := consistency(run.config, found)):
        console.warn(warning)


def check_embedding(role: str, tokens: TokenBytes, said: np.ndarray, rows: int | None) -> None:
    """Raise OpdError when text is read as ids that the model has no embedding of, or such an id is among those `said`: that
    end a response or spell a role.

    Other special tokens may lie past it, such as a placeholder of images, which no text is read as; `stages.fit` looks at
    prompts.
    """
    last = max(np.flatnonzero(tokens.has_bytes).max(initial=-1), said.max())
    if rows is not None and last >= rows:
        raise OpdError(
            f"{role}.model: the tokenizer of {tokens.name!r} has ids up to {last}, but the model's embedding has {rows} rows; "
            "resize it (`resize_token_embeddings`), or take the tokenizer that belongs to the model"
        )


def check_tokenizer(role: str, side: Side, of_file: Tokenizer | None) -> None:
    """Look at plain text in a model's tokenizer before anything is sampled with it.

    Warns of kinds of text that it changes, and where `transformers` reads other ids than `tokenizer.json` does.

    Raises:
        OpdError: it doesn't spell plain ASCII text exactly, so that hardly anything could be compared.
    """
    name, lost = side.tokens.name, misspelt(side)
    if plain := [found for found in lost if found.plain]:
        raise OpdError(
            f"{role}.model: the tokenizer of {name!r} does not spell plain text: {plain[0]}; each response would be masked "
            "from such a place on; choose another model, or repair its tokenizer.json"
        )
    for found in lost:
        console.warn(f"{role}: the tokenizer of {name} changes {found}; responses are masked from such a place on")
    if of_file is not None and (differing := read_otherwise(side, of_file)):
        kind = type(side.tokenizer).__name__
        console.warn(
            f"{role}: transformers builds a {kind} for {name} that reads {', '.join(differing)} otherwise than its "
            f"tokenizer.json; prompts, rollouts and scores, on every engine, are read with the {kind}"
        )


def take_over(run: Run) -> None:
    """What is needed of a teacher whose scores are all reused: its name and the bytes of its tokens, not its weights."""
    models = run.reused[0].run / "models"
    ref = read_record(models / "teacher.json", ModelRef, command("models teacher"))
    if ref.source != run.settings.teacher.model:
        raise OpdError(
            f"teacher.model is {run.settings.teacher.model!r}, but the scores of {models.parent} are {ref.source!r}'s"
        )
    given = open_shard(models / "teacher-vocabulary.parquet", "vocabulary")
    about = given.manifest
    path = run.vocabulary("teacher")
    with open_writer(path, "vocabulary", about.identity, about.inputs, about.origin, run.decided) as writer:
        writer.write(given.read())
    write_record(run.model_file("teacher"), ref.model_copy(update={"decided": run.decided}))
    if run.model_file("student").exists():
        warn_of_another_teacher(run)
    console.say(f"teacher: {ref.source}, whose scores are reused; its weights are not needed")


if __name__ == "__main__":
    console.run(main)
