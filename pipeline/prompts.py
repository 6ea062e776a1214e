"""Prompts: de-duplicate and split what a source gives, without overlap, holding no more of it than is taken."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.conversations import Asked, asked, reference
from pipeline.sources import is_shuffled, kind_of
from schemas.config import HeldOut, Prompts, PromptSource, Splits
from schemas.errors import OpdError, listed, shown
from schemas.tables import arrow_schema

RESERVED = ("prompt", "answer", "examples")
CONVERSATION_FIELDS = ("messages", "conversations")
"""Where data sets keep conversations; looked for where there is no field `prompt`."""
LATER = "later"
"""Split of what users say after the first answer in imported conversations: not asked, but told from what is held out."""
ROW_GROUP = 4096
"""Prompts that are Python objects at once, and those of a row group on disk."""
KEY_BYTES = 16
"""Of a digest of what a row asks: two among a billion would be the same with a probability of 1e-21."""

Row = Mapping[str, Any]


def collect(config: Prompts, seed: int) -> pa.Table:
    """Read, de-duplicate, shuffle and split prompts; conversations are the same where all of them and their tools are.

    Where a source can be read again, it is read twice, and only what is taken is held in memory beside a digest of each row.

    Returns:
        A table of schema `prompts`: all of `examples`, then `test`, `dev`, `train`. A larger `train` never changes the
        other splits.
    Raises:
        OpdError: the source is missing, broken, or has too few distinct prompts.
    """
    splits = {name: getattr(config.splits, name) for name in ("examples", "test", "dev", "train")}
    need = sum(splits.values())
    kind, shuffled = kind_of(config.source), is_shuffled(config.source, config.options)
    rereads = kind.again and not shuffled

    def rows() -> Iterator[tuple[int, Row]]:
        return enumerate(kind.rows(config.source, config.options, seed, need))

    distinct = islice(_distinct(rows(), config), need if shuffled else None)
    if rereads:
        numbers = np.fromiter((number for number, _ in distinct), np.int64)
        count = len(numbers)
    else:
        table = _table(distinct, config)
        count = len(table)
    if not count:
        raise OpdError(f"prompts: {config.source} holds no prompts")
    if count < need:
        asked_for = " + ".join(f"{name} {splits[name]}" for name in ("examples", "train", "dev", "test"))
        raise OpdError(
            f"prompts: {config.source} holds {count} different prompts, but prompts.splits asks for {need} ({asked_for})"
        )
    # Taking what is in random order already as it comes keeps the splits when `train` grows.
    order = np.arange(need) if shuffled else np.random.default_rng(seed).permutation(count)[:need]
    if rereads:
        table = _table(_taken(rows(), numbers[order]), config)
        order = np.argsort(np.argsort(order))  # the table has them in the source's order
    columns = {
        "prompt_id": pa.array([f"p{number:03}" for number in range(need)]),
        "split": pa.array(np.repeat(list(splits), list(splits.values())), pa.string()),
        **dict(zip(table.column_names, table.take(order).columns, strict=True)),
    }
    return pa.table(columns).select(arrow_schema("prompts").names).cast(arrow_schema("prompts"))


def count(source: PromptSource) -> int:
    """How many different prompts a source without options holds, which ends by itself. Raises OpdError as `collect` does."""
    rows = kind_of(source.source).rows(source.source, source.options, 0, 0)
    return sum(1 for _ in _distinct(enumerate(rows), source))


def collect_also(sets: Mapping[str, HeldOut], seed: int) -> pa.Table:
    """Draw the prompts of `evaluate.also`, each set as `collect` draws a `train` split.

    Returns:
        A table of schema `prompts`, with the sets' names as splits.
    Raises:
        OpdError: as `collect` does, naming the set.
    """
    tables = [arrow_schema("prompts").empty_table()]
    for name, wanted in sets.items():
        source = {key: getattr(wanted, key) for key in PromptSource.model_fields}
        splits = Splits(examples=0, train=wanted.count, dev=0, test=0)
        try:
            table = collect(Prompts(**source, splits=splits), seed)
        except OpdError as error:
            raise OpdError(f"evaluate.also.{name}, with its count of {wanted.count} as `train`: {error}") from error
        ids, of = [f"{name}-{i:03}" for i in range(len(table))], [name] * len(table)
        tables.append(table.set_column(0, "prompt_id", pa.array(ids)).set_column(1, "split", pa.array(of)))
    return pa.concat_tables(table.cast(arrow_schema("prompts")) for table in tables)


def _distinct(rows: Iterable[tuple[int, Row]], config: PromptSource) -> Iterator[tuple[int, Row]]:
    """Of rows that ask the same, the first."""
    seen: set[bytes] = set()
    for number, row in rows:
        asks = _encoded(_asked(row, number, config).key, f"prompts: {config.source}, row {number}")
        key = hashlib.blake2b(asks, digest_size=KEY_BYTES).digest()
        if key not in seen:
            seen.add(key)
            yield number, row


def _taken(rows: Iterable[tuple[int, Row]], numbers: np.ndarray) -> Iterator[tuple[int, Row]]:
    """The rows with these numbers, in the source's order."""
    taken = np.zeros(numbers.max() + 1, bool)
    taken[numbers] = True
    return ((number, row) for number, row in islice(rows, len(taken)) if taken[number])


def _table(rows: Iterator[tuple[int, Row]], config: Prompts) -> pa.Table:
    """Columns of schema `prompts`, without those that depend on the other rows."""
    whole = arrow_schema("prompts")
    schema = pa.schema([whole.field(name) for name in whole.names if name not in ("prompt_id", "split")])
    tables = [schema.empty_table()]
    while group := list(islice(rows, ROW_GROUP)):
        tables.append(pa.Table.from_pylist([_item(row, number, config) for number, row in group], schema))
    return pa.concat_tables(tables)


def _asked(row: Row, number: int, config: PromptSource) -> Asked:
    field = _prompt_field(row, number, config)
    where = f"prompts: {config.source}, row {number}, field {field!r}"
    return asked(row[field], row.get(config.tools_field) if config.tools_field else None, where)


def _prompt_field(row: Row, number: int, config: PromptSource) -> str:
    """The field that holds the question: the configured one, or where it is `prompt` and not there, that of a conversation."""
    if row.get(config.prompt_field) is None and config.prompt_field == "prompt":
        for name in CONVERSATION_FIELDS:
            if row.get(name) is not None:
                return name
    if config.prompt_field not in row:
        raise _no_field(config.prompt_field, row, number, config)
    return config.prompt_field


def _no_field(field: str, row: Row, number: int, config: PromptSource) -> OpdError:
    return OpdError(
        f"prompts: {config.source}, row {number}: has no field {field!r}; it has {listed(row)} "
        "(set prompts.prompt_field and prompts.answer_field)"
    )


def _item(row: Row, number: int, config: Prompts) -> dict[str, Any]:
    one = _asked(row, number, config)
    answer = None
    if field := config.answer_field:
        answer = reference(row.get(field), f"prompts: {config.source}, row {number}, field {field!r}")
        if answer is None:
            answer = one.answer
        if answer is None and field not in row:
            raise _no_field(field, row, number, config)
    used = (_prompt_field(row, number, config), config.answer_field, config.tools_field)
    columns = {
        "prompt": one.prompt,
        "messages": json_text(one.messages),
        "tools": json_text(one.tools),
        "answer": answer,
        "fields": json_text({name: value for name, value in row.items() if name not in used}),
    }
    for column, text in columns.items():
        _encoded(text or "", f"prompts: {config.source}, row {number}, for column {column!r}")
    return columns


def _encoded(text: str, where: str) -> bytes:
    """As UTF-8, which text from one's own code may not be. Raises OpdError, beginning with `where`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise OpdError(f"{where}: text with a lone surrogate, half a character: {shown(text)}") from error


def json_text(value: Any) -> str | None:
    """A value of a row as a table has it: JSON; None stays None."""
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def asked_of(row: Row) -> Asked:
    """What a `prompts` row asks."""
    messages, tools = (None if row[name] is None else json.loads(row[name]) for name in ("messages", "tools"))
    return Asked(row["prompt"], messages, tools)


def variables(row: Row) -> dict[str, Any]:
    """What templates know of a `prompts` row: its prompt, its answer, its conversation, and the source's other fields.

    `system` is the text of the conversation's own system message, or else the field of that name, or empty.
    """
    fields = {name: value for name, value in json.loads(row["fields"]).items() if name not in RESERVED}
    conversation: dict[str, Any] = {"messages": [{"role": "user", "content": row["prompt"]}], "system": "", "tools": []}
    conversation |= fields
    if row.get("messages"):
        conversation["messages"] = json.loads(row["messages"])
        own = [message["content"] for message in conversation["messages"] if message["role"] == "system"]
        conversation["system"] = own[0] if own else conversation["system"]
    if row.get("tools"):
        conversation["tools"] = json.loads(row["tools"])
    return {**conversation, "prompt": row["prompt"], "answer": row["answer"]}
