"""Import: rollouts that were made elsewhere, as a folder whose rollouts a run scores and trains on."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
import yaml

from pipeline.infer.engines import open_teacher
from pipeline.infer.logged import Logged, Told, columns_of, in_tokens, read
from pipeline.infer.policy_logps import policy_table
from pipeline.infer.rollout_table import row_groups
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.prompts import KEY_BYTES, LATER, collect
from pipeline.prompts import ROW_GROUP as PROMPT_GROUP
from pipeline.rendering import Renderer
from pipeline.sources import kind_of
from pipeline.store.shards import file_digest, open_shard, open_writer, write_text
from schemas.config import Rollouts
from schemas.config.load import load_config
from schemas.config.root import RUN_NAME
from schemas.errors import OpdError
from schemas.tables import arrow_schema
from stages import models
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, policy
from stages.run.run import Run, run_of, write_config

NEXT = "train.yaml"
"""The config of the run that goes on from there."""


def main(
    files: Annotated[list[str], typer.Argument(help="JSONL, JSON, CSV or Parquet files, as prompts.source has them")],
    into: Annotated[Path, typer.Option("--as", help="the folder to make, runs/<name>")],
    config_file: ConfigOption = DEFAULT_CONFIG,
    spans: Annotated[
        str, typer.Option(help="of a conversation: `all` of the assistant's messages are answers, or the `last` alone")
    ] = "all",
) -> None:
    """Take rollouts from elsewhere: check them, put them in the student's tokens, and find the log-probs that they lack.

    A row has `prompt` (text or messages) and `response` (text or messages), or `messages` alone, whose answers by the assistant
    are the response; or `response_ids` in the student's tokens, with `behavior_logp` or `logprobs` (nats at temperature 1),
    `sampler_logp` and `loss_mask` where there are. `tools`, `answer` and `finish_reason` are read, other fields are kept for
    templates. Rows whose question the config's run holds out are left out.
    """
    if into.parent != Path("runs") or not into.name:
        raise OpdError(f"--as {into}: expected runs/<name>, beside other runs")
    if not re.fullmatch(RUN_NAME, into.name):
        raise OpdError(
            f"--as {into}: a run's name has letters, digits, `_`, `.` and `-`, the first a letter, a digit or `_`"
        )
    if (into / "round-0").exists():
        raise OpdError(f"--as {into}: holds rollouts already; give another name, or delete it")
    if spans not in ("all", "last"):
        raise OpdError(f"--spans {spans}: expected all or last")
    given = load_config(config_file)
    run = run_of(given.model_copy(update={"run": into.name}))
    held_out = _held_out(run)
    for _ in chain.from_iterable(islice(_logged([file], spans), 1) for file in files):
        pass  # a file that isn't there or is something else is told before the student is prepared
    write_config(run)
    models.main("student", run.root / "config.yaml")
    student = policy(run, 0)
    prompts, left_out = _write_prompts(run, files, spans, held_out)
    renderer = student.renderer(prompts)
    rows = partial(_rows, files, spans, held_out, student, renderer)
    longest = max((len(ids) + len(one.ids) + 1 for _, _, ids, one in rows()), default=0)
    if not longest:
        raise OpdError(f"import: {', '.join(files)}: no row is left to import")
    made_in = run.root / "importing"  # takes its own name when it is whole
    shutil.rmtree(made_in, ignore_errors=True)
    identity = {"student": student.ref.tokenizer, "prompt": renderer.identity, "stop_ids": student.stop.tolist()}
    inputs = {
        "prompts": prompts.shard.manifest.sha256,
        **{file: file_digest(Path(file)) for file in files if Path(file).is_file()},
    }
    with open_teacher(student, longest, run.settings.scores.batch_tokens, console.say) as scorer:
        responses = lacking = shards = 0
        for shards, shard in enumerate(_shards(rows(), run.config.rollouts), 1):
            place = made_in / "rollouts" / f"{shards - 1:03}.parquet"
            with open_writer(place, "rollouts", identity, inputs, {"imported": " ".join(files)}) as writer:
                for cut in row_groups([_tokens(row) for row in shard]):
                    table = _table(shard[cut], student)
                    lacks = table["behavior_logp"].null_count
                    writer.write(_complete(table, scorer, student) if lacks else table)
                    responses, lacking = responses + len(table), lacking + lacks
    made_in.rename(run.root / "round-0")
    after = _next(run, config_file, into)
    console.say(
        f"{into}: {responses} responses to {len(prompts.split('train'))} prompts in {shards} shards, {lacking} of them without "
        "log-probs, which the student gave; "
        f"{left_out} left out, whose prompts are held out"
    )
    console.say(f"score them and train: snakemake --cores all --configfile {after}")


def _held_out(run: Run) -> set[str]:
    """Questions that the config's own prompts hold out: the texts of their last user messages."""
    table = collect(run.config.prompts, run.config.seed)
    rows = table.filter(pa.compute.is_in(table["split"], pa.array(["dev", "test"])))
    return set(rows["prompt"].to_pylist())


def _asks(logged: Logged, held_out: set[str]) -> bool:
    """Whether a row's prompt, or a user's turn after it, is a question that is held out."""
    return not held_out.isdisjoint([logged.asked.prompt, *_later(logged)])


def _later(logged: Logged) -> list[str]:
    """What the user says after the first answer."""
    return [turn["content"] for turn in logged.turns or () if turn["role"] == "user"]


def _key(logged: Logged) -> bytes:
    """A digest, the same for rows that are samples of one prompt: all that templates and scorers may read of them is alike."""
    return hashlib.blake2b(json.dumps(list(logged.prompt.values())).encode(), digest_size=KEY_BYTES).digest()


def _logged(files: Iterable[str], spans: Any) -> Iterator[Logged]:
    for file in files:
        for number, row in enumerate(kind_of(file).rows(file, {}, 0, 0)):
            yield read(row, f"{file}, row {number}", spans)


def _write_prompts(run: Run, files: list[str], spans: str, held_out: set[str]) -> tuple[PromptTable, int]:
    """The prompts of all rows, each once, and how many rows are left out.

    Texts of users' later turns follow them, as a split of their own, by which a run that holds one out tells it.
    """
    left_out, seen, later, group = 0, set[bytes](), set[str](), []
    identity = {"imported": files}
    with open_writer(run.prompts, "prompts", identity, {}) as writer:
        for logged in _logged(files, spans):
            asks = _asks(logged, held_out)
            left_out += asks
            if asks:
                continue
            later.update(_later(logged))
            if (key := _key(logged)) in seen:
                continue
            group.append({"prompt_id": f"p{len(seen):03}", "split": "train", **logged.prompt})
            seen.add(key)
            if len(group) == PROMPT_GROUP:
                writer.write(pa.Table.from_pylist(group, arrow_schema("prompts")))
                group = []
        for number, text in enumerate(sorted(later)):
            nothing_else = {"messages": None, "tools": None, "answer": None, "fields": "{}"}
            group.append({"prompt_id": f"{LATER}-{number:03}", "split": LATER, "prompt": text, **nothing_else})
        for start in range(0, len(group) or 1, PROMPT_GROUP):
            writer.write(pa.Table.from_pylist(group[start : start + PROMPT_GROUP], arrow_schema("prompts")))
    return PromptTable(open_shard(run.prompts, "prompts")), left_out


Row = tuple[dict[str, Any], Logged, np.ndarray, Told]


def _rows(
    files: list[str], spans: str, held_out: set[str], student: PreparedModel, renderer: Renderer
) -> Iterator[Row]:
    """Of each response its names, its row, the ids of its prompt, and itself in tokens."""
    numbers: dict[bytes, int] = {}
    samples: list[int] = []
    for logged in _logged(files, spans):
        if _asks(logged, held_out):
            continue
        number = numbers.setdefault(_key(logged), len(numbers))
        if number == len(samples):
            samples.append(0)
        name, sample = f"p{number:03}", samples[number]
        samples[number] += 1
        prompt = {"prompt_id": name, **logged.prompt}  # as `_write_prompts` has it
        try:
            told = in_tokens(logged, prompt, student, renderer)
            (ids,) = renderer.ids([prompt], student.context - len(told.ids) - 1)
        except OpdError as error:
            raise OpdError(f"{logged.where}: {error}") from error
        if not len(told.ids) and not told.stopped:
            raise OpdError(
                f"{logged.where}: its response is empty and was cut: there is nothing to score; leave out the row"
            )
        names = {"rollout_id": f"r0-{name}-{sample}", "prompt_id": name, "sample": sample, "round": 0}
        yield names | {"answer": prompt["answer"]}, logged, ids, told


def _tokens(row: Row) -> int:
    """Of its response."""
    return len(row[-1].ids) + row[-1].stopped


def _shards(rows: Iterable[Row], options: Rollouts) -> Iterator[list[Row]]:
    """As many rows in each as both limits let in, one at least."""
    shard: list[Row] = []
    tokens = 0
    for row in rows:
        if shard and (len(shard) == options.shard_size or tokens + _tokens(row) > options.shard_tokens):
            yield shard
            shard, tokens = [], 0
        shard.append(row)
        tokens += _tokens(row)
    if shard:
        yield shard


def _table(rows: list[Row], student: PreparedModel) -> pa.Table:
    """Rows of schema `rollouts`, where `behavior_logp` may be null."""
    out = []
    says = columns_of([told for *_, told in rows], student)
    for (names, logged, prompt, told), say in zip(rows, says, strict=True):
        ids, count = told.ids, len(told.ids) + told.stopped
        if told.stopped:
            sampled = logged.ids is not None and len(logged.ids) == count
            ids = np.append(ids, logged.ids[-1:] if sampled else student.stop[:1]).astype(np.int32)  # type: ignore[index]
        logps, sampler_logps = (
            None if given is None else given[:count] for given in (logged.logps, logged.sampler_logps)
        )
        out.append(
            names
            | say
            | {"prompt_ids": prompt, "response_ids": ids, "behavior_logp": logps}
            | {"sampler_logp": sampler_logps, "finish_reason": "stop" if told.stopped else "length"}
        )
    schema = arrow_schema("rollouts")
    at = schema.get_field_index("behavior_logp")
    return pa.Table.from_pylist(out, schema.set(at, schema.field(at).with_nullable(True)))


def _complete(table: pa.Table, scorer: Any, student: PreparedModel) -> pa.Table:
    """With the student's own log-probs for the responses that have none."""
    lacks = table["behavior_logp"].combine_chunks().is_null().to_numpy(zero_copy_only=False)
    own = policy_table(scorer, student, table.filter(pa.array(lacks)))["policy_logp"].to_pylist()
    given = table["behavior_logp"].to_pylist()
    filled = iter(own)
    values = [next(filled) if missing else logps for missing, logps in zip(lacks, given, strict=True)]
    schema = arrow_schema("rollouts")
    return table.set_column(
        schema.get_field_index("behavior_logp"),
        schema.field("behavior_logp"),
        pa.array(values, schema.field("behavior_logp").type),
    )


def _next(run: Run, config_file: Path, into: Path) -> Path:
    """The given config, but for the rollouts of its first round, which are those of the folder."""
    values = yaml.safe_load(config_file.read_text())
    name = values.get("run", "default")
    values |= {"run": name if name != into.name else f"{name}-trained", "reuse": [str(into)]}
    write_text(into / NEXT, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return into / NEXT


if __name__ == "__main__":
    console.run(main)
