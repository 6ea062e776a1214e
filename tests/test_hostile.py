"""Hostile inputs, a table of them: each is refused in one line that says what was given, in which file and field."""

import csv
import gzip
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from typer.testing import CliRunner

from pipeline.sources import kind_of
from schemas.config.strict_yaml import read_yaml
from schemas.errors import OpdError
from stages.tools.cli import app
from stages.tools.import_rollouts import _logged

SECONDS = 10
"""That an input may take, at most."""
LONGEST = 1500
"""Characters that a person reads of an error, at most."""
GOOD: dict[str, Any] = {
    "run": "r",
    "cache": "cache",
    "prompts": {"source": "p.jsonl", "splits": {"examples": 0, "train": 2, "dev": 0, "test": 2}},
    "student": {"model": "./student"},
    "teacher": {"model": "./teacher"},
    "rollouts": {"prompts": 2, "max_new_tokens": 4},
    "evaluate": {"kl_items": 2},
}
ROWS = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(6)]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def config(**sections: Any) -> str:
    """GOOD with keys set, `section__key` inside a section."""
    whole = json.loads(json.dumps(GOOD))
    for place, value in sections.items():
        *above, key = place.split("__")
        inner = whole
        for name in above:
            inner = inner.setdefault(name, {})
        inner[key] = value
    return yaml.safe_dump(whole)


PLAIN = jsonl(*ROWS)
ZST = zstandard.ZstdCompressor().compress(PLAIN)
STREAMED = zstandard.ZstdCompressor(write_content_size=False).compressobj()
FLUSHED = STREAMED.compress(PLAIN[:-1]) + STREAMED.compress(b"\n") + STREAMED.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
"""A frame whose blocks hold whole lines, and that never ends."""
STREAMED_END = STREAMED.flush()
GZ = gzip.compress(PLAIN)
PARQUET = parquet(pa.Table.from_pylist(ROWS))
FEW = 3
"""Good rows before a bad one: with it as many as are asked for, so that all are taken."""


def line(text: str) -> bytes:
    """A file of good rows and then this line."""
    return jsonl(*ROWS[:FEW]) + text.encode() + b"\n"


def deep(depth: int) -> str:
    return '{"prompt": "x", "answer": ' + "[" * depth + "]" * depth + "}"


DATA: dict[str, tuple[str, bytes, str]] = {
    "empty": ("p.jsonl", b"", "p.jsonl holds no prompts"),
    "blank lines": ("p.jsonl", b"\n \n\t\n", "p.jsonl holds no prompts"),
    "a byte order mark alone": ("p.jsonl", b"\xef\xbb\xbf", "p.jsonl holds no prompts"),
    "lone surrogate": ("p.jsonl", line(r'{"prompt": "x \ud800 y", "answer": "1"}'), "p.jsonl, line 4"),
    "lone low surrogate": ("p.jsonl", line(r'{"prompt": "x \udfff", "answer": "1"}'), "p.jsonl, line 4"),
    "lone surrogate in the answer": ("p.jsonl", line(r'{"prompt": "x", "answer": "\ud800"}'), "p.jsonl, line 4"),
    "lone surrogate in a key": ("p.jsonl", line(r'{"prompt": "x", "answer": "1", "\ud800": 1}'), "p.jsonl, line 4"),
    "lone surrogate deep in another field": (
        "p.jsonl", line(r'{"prompt": "x", "answer": "1", "m": [{"a": "\uDC00"}]}'), "p.jsonl, line 4"),
    "lone surrogate in tools": (
        "p.jsonl", line(r'{"prompt": "x", "answer": "1", "tools": "[{\"name\": \"\\ud800\"}]"}'), "surrogate"),
    "5,000 digits": ("p.jsonl", line('{"prompt": "x", "answer": ' + "9" * 5000 + "}"), "p.jsonl, line 4"),
    "5,000 digits in tools": (
        "p.jsonl", line(json.dumps({"prompt": "x", "answer": "1", "tools": "[" + "9" * 5000 + "]"})), "tools"),
    "NaN": ("p.jsonl", line('{"prompt": "x", "answer": NaN}'), "p.jsonl, line 4"),
    "Infinity": ("p.jsonl", line('{"prompt": "x", "answer": "1", "w": -Infinity}'), "p.jsonl, line 4"),
    "1e999": ("p.jsonl", line('{"prompt": "x", "answer": "1", "w": 1e999}'), "p.jsonl, line 4"),
    "a key twice": ("p.jsonl", line('{"prompt": "x", "answer": "1", "prompt": "y"}'), "p.jsonl, line 4"),
    "nested 100,000 deep": ("p.jsonl", line(deep(100_000)), "p.jsonl, line 4"),
    "nested 3,000 deep": ("p.jsonl", line(deep(3_000)), "p.jsonl, line 4"),
    "nested 600 deep": ("p.jsonl", line(deep(600)), "p.jsonl, line 4"),
    "objects nested 600 deep": (
        "p.jsonl", line('{"prompt": "x", "answer": "1", "f": ' + '{"a": ' * 600 + "1" + "}" * 601), "p.jsonl, line 4"),
    "tools nested deep": (
        "p.jsonl", line(json.dumps({"prompt": "x", "answer": "1", "tools": "[" * 50_000})), "tools"),
    "a line cut": ("p.jsonl", PLAIN[:-10], "p.jsonl, line 6: not JSON"),
    "trailing comma": ("p.jsonl", line('{"prompt": "x", "answer": "1",}'), "p.jsonl, line 4: not JSON"),
    "single quotes": ("p.jsonl", line("{'prompt': 'x'}"), "p.jsonl, line 4: not JSON"),
    "two objects in a line": ("p.jsonl", line(json.dumps(ROWS[0]) * 2), "p.jsonl, line 4: not JSON"),
    "a list in a line": ("p.jsonl", line('["x"]'), "line 4: expected an object, found list"),
    "a text in a line": ("p.jsonl", line('"x"'), "line 4: expected an object, found str"),
    "null in a line": ("p.jsonl", line("null"), "line 4: expected an object, found NoneType"),
    "a control character": ("p.jsonl", line('{"prompt": "a\tb", "answer": "1"}'), "line 4: not JSON"),
    "NUL bytes": ("p.jsonl", line("\0\0\0"), "line 4: not JSON"),
    "Latin-1": ("p.jsonl", line("{\"prompt\": \"\u00e9\"}").decode().encode("latin-1"), "p.jsonl: not UTF-8"),
    "UTF-16": ("p.jsonl", PLAIN.decode().encode("utf-16"), "p.jsonl: not UTF-8"),
    "UTF-16 without a mark": ("p.jsonl", PLAIN.decode().encode("utf-16-le"), "p.jsonl, line 1: not JSON"),
    "UTF-32": ("p.jsonl", PLAIN.decode().encode("utf-32"), "p.jsonl: not UTF-8"),
    "CESU surrogates in bytes": ("p.jsonl", line("") + b'{"prompt": "\xed\xa0\x80"}\n', "p.jsonl: not UTF-8"),
    "gzip by another name": ("p.jsonl", GZ, "p.jsonl: not UTF-8"),
    "Parquet by another name": ("p.jsonl", PARQUET, "p.jsonl"),
    "a pointer of Git LFS": ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "line 1: not JSON"),
    "HTML": ("p.jsonl", b"<html>404</html>", "line 1: not JSON"),
    "no field prompt": ("p.jsonl", line('{"question": "x"}'), "row 3: has no field 'prompt'; it has 'question'"),
    "an empty object": ("p.jsonl", line("{}"), "row 3: has no field 'prompt'"),
    "10,000 fields, no prompt": ("p.jsonl", line(json.dumps({f"k{n}": n for n in range(10_000)})), "has no field 'prompt'"),
    "prompt: null": ("p.jsonl", line('{"prompt": null, "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: number": ("p.jsonl", line('{"prompt": 3, "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: true": ("p.jsonl", line('{"prompt": true, "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: empty": ("p.jsonl", line('{"prompt": "", "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: blank": ("p.jsonl", line('{"prompt": " \\n", "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: object": ("p.jsonl", line('{"prompt": {"a": 1}, "answer": "1"}'), "row 3, field 'prompt'"),
    "prompt: a huge object": (
        "p.jsonl", line(json.dumps({"prompt": {"a": "x" * 1_000_000}, "answer": "1"})), "row 3, field 'prompt'"),
    "prompt: []": ("p.jsonl", line('{"prompt": [], "answer": "1"}'), "row 3, field 'prompt'"),
    "messages of numbers": ("p.jsonl", line('{"messages": [1, 2]}'), "row 3, field 'messages', message 0"),
    "a message without role": ("p.jsonl", line('{"messages": [{"content": "x"}]}'), "message 0: no `role`"),
    "a message of an unknown role": (
        "p.jsonl", line('{"messages": [{"role": "wizard", "content": "x"}]}'), "unknown role 'wizard'"),
    "a role that is a list": ("p.jsonl", line('{"messages": [{"role": [], "content": "x"}]}'), "unknown role []"),
    "content: number": ("p.jsonl", line('{"messages": [{"role": "user", "content": 3}]}'), "message 0: content must be text"),
    "content: object": (
        "p.jsonl", line('{"messages": [{"role": "user", "content": {"a": 1}}]}'), "message 0: content must be text"),
    "content: an image": (
        "p.jsonl", line('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'), "'image_url'"),
    "content: nothing": ("p.jsonl", line('{"messages": [{"role": "user"}]}'), "message 0: no text"),
    "nobody asks": ("p.jsonl", line('{"messages": [{"role": "assistant", "content": "x"}]}'), "row 3, field 'messages'"),
    "only a system message": ("p.jsonl", line('{"messages": [{"role": "system", "content": "x"}]}'), "no user's message"),
    "tool calls: number": (
        "p.jsonl", line('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": 3}]}'),
        "message 1: a tool call needs a `name`"),
    "tool calls: arguments not JSON": (
        "p.jsonl",
        line(json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
            {"name": "f", "arguments": "{"}]}]})),
        "the arguments of 'f' is not JSON"),
    "tool calls: arguments nested deep": (
        "p.jsonl",
        line(json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
            {"name": "f", "arguments": '{"a":' * 50_000}]}]})),
        "the arguments of 'f'"),
    "tool calls of the answer: numbers": (
        "p.jsonl", line('{"prompt": "x", "answer": {"role": "assistant", "tool_calls": [3]}}'), "row 3, field 'answer'"),
    "answer: content of numbers": (
        "p.jsonl", line('{"prompt": "x", "answer": {"role": "assistant", "content": 3}}'), "row 3, field 'answer'"),
    "tools: number": ("p.jsonl", line('{"prompt": "x", "answer": "1", "tools": 3}'), "`tools` must be a list"),
    "tools: object": ("p.jsonl", line('{"prompt": "x", "answer": "1", "tools": {"a": 1}}'), "`tools` must be a list"),
    "tools: not JSON": ("p.jsonl", line('{"prompt": "x", "answer": "1", "tools": "["}'), "`tools` is not JSON"),
    "tools: without name": ("p.jsonl", line('{"prompt": "x", "answer": "1", "tools": [{}]}'), "with a `name`"),
    "tools: numbers": ("p.jsonl", line('{"prompt": "x", "answer": "1", "tools": [3]}'), "with a `name`"),
    "too few": ("p.jsonl", jsonl(*ROWS[:3]), "holds 3 different prompts, but prompts.splits asks for 4"),
    "all the same": ("p.jsonl", jsonl(ROWS[0]) * 100, "holds 1 different prompts, but prompts.splits asks for 4"),
    "a row without end": ("p.jsonl.zst", zstandard.compress(b'{"prompt": "' + b"x" * (2 << 20)), "p.jsonl.zst, line 1"),
    "json: a row without end": ("p.json.zst", zstandard.compress(b'[{"prompt": "' + b"x" * (5 << 20)), "p.json.zst, row 0"),
    "json: empty": ("p.json", b"", "p.json holds no prompts"),
    "json: an object": ("p.json", b'{"data": []}', "has no field 'prompt'"),
    "json: an object over lines": ("p.json", b'{\n"data": []}', "line 1: not JSON"),
    "json: cut": ("p.json", json.dumps(ROWS).encode()[:-20], "p.json, row 5: not JSON"),
    "json: cut between rows": ("p.json", json.dumps(ROWS).encode()[:-1], "p.json, row 6: not JSON"),
    "json: more after the list": ("p.json", json.dumps(ROWS).encode() + b'[{"prompt": "z"}]', "p.json"),
    "json: no commas": ("p.json", b"[" + PLAIN[:-1].replace(b"\n", b"") + b"]", "p.json"),
    "json: nested deep": ("p.json", b'[{"prompt": ' + b"[" * 100_000, "p.json, row 0"),
    "json: 5,000 digits": ("p.json", b'[{"prompt": "x", "answer": ' + b"9" * 5000 + b"}]", "p.json, row 0"),
    "json: lone surrogate": ("p.json", rb'[{"prompt": "\ud800", "answer": "1"}]', "p.json, row 0"),
    "json: NaN": ("p.json", b'[{"prompt": "x", "answer": NaN}]', "p.json, row 0"),
    "json: numbers": ("p.json", b"[1, 2]", "row 0: expected an object, found int"),
    "json: a list of lists": ("p.json", b"[[1]]", "row 0: expected an object, found list"),
    "csv: empty": ("p.csv", b"", "p.csv holds no prompts"),
    "csv: a header alone": ("p.csv", b"prompt,answer\n", "p.csv holds no prompts"),
    "csv: a column twice": ("p.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
    "csv: too few cells": ("p.csv", b"prompt,answer\na\n", "line 2: 1 cells, but the header has 2"),
    "csv: too many cells": ("p.csv", b"prompt,answer\na,b,c\n", "line 2: 3 cells, but the header has 2"),
    "csv: an open quote": ("p.csv", b'prompt,answer\n"a,b\n', "p.csv, line 2: not CSV"),
    "csv: text after a quote": ("p.csv", b'prompt,answer\n"a"b,c\n', "p.csv, line 2: not CSV"),
    "csv: semicolons": ("p.csv", b"prompt;answer\na;b\n", "has no field 'prompt'; it has 'prompt;answer'"),
    "csv: tabs": ("p.csv", b"prompt\tanswer\na\tb\n", "has no field 'prompt'"),
    "csv: an empty prompt": ("p.csv", b"prompt,answer\n,b\n", "row 0, field 'prompt'"),
    "csv: Latin-1": ("p.csv", b"prompt,answer\n\xe9,b\n", "p.csv: not UTF-8"),
    "csv: NUL": ("p.csv", b"prompt,answer\na\0,b\n", "p.csv"),
    "csv: a cell without end": ("p.csv.zst", zstandard.compress(b'prompt,answer\n"' + b"x" * (2 << 20)), "p.csv.zst, line"),
    "zst: empty": ("p.jsonl.zst", b"", "p.jsonl.zst"),
    "zst: plain text": ("p.jsonl.zst", PLAIN, "p.jsonl.zst: not zstandard data"),
    "zst: cut in its header": ("p.jsonl.zst", ZST[:3], "p.jsonl.zst"),
    "zst: cut in its middle": ("p.jsonl.zst", ZST[: len(ZST) // 2], "p.jsonl.zst"),
    "zst: its last byte cut": ("p.jsonl.zst", ZST[:-1], "p.jsonl.zst"),
    "zst: cut at a line's end": ("p.jsonl.zst", FLUSHED, "p.jsonl.zst"),
    "zst: its second frame cut": ("p.jsonl.zst", ZST + ZST[:-2], "p.jsonl.zst"),
    "zst: more after its frame": ("p.jsonl.zst", ZST + b"more", "p.jsonl.zst: not zstandard data"),
    "zst: flipped": ("p.jsonl.zst", ZST[:9] + bytes([ZST[9] ^ 255]) + ZST[10:], "p.jsonl.zst"),
    "zst: a window of 2 GB": ("p.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00", "p.jsonl.zst: not zstandard data"),
    "gz: empty": ("p.jsonl.gz", b"", "p.jsonl.gz"),
    "gz: plain text": ("p.jsonl.gz", PLAIN, "p.jsonl.gz: not gzip data"),
    "gz: cut in its header": ("p.jsonl.gz", GZ[:5], "p.jsonl.gz: not gzip data, or cut"),
    "gz: cut in its middle": ("p.jsonl.gz", GZ[: len(GZ) // 2], "p.jsonl.gz: not gzip data, or cut"),
    "gz: cut before its checksum": ("p.jsonl.gz", GZ[:-8], "p.jsonl.gz: not gzip data, or cut"),
    "gz: cut in its checksum": ("p.jsonl.gz", GZ[:-3], "p.jsonl.gz: not gzip data, or cut"),
    "gz: its second member cut": ("p.jsonl.gz", GZ + GZ[:-9], "p.jsonl.gz: not gzip data, or cut"),
    "gz: flipped": ("p.jsonl.gz", GZ[:20] + bytes([GZ[20] ^ 255]) + GZ[21:], "p.jsonl.gz"),
    "gz: zstandard": ("p.jsonl.gz", ZST, "p.jsonl.gz: not gzip data"),
    "parquet: empty": ("p.parquet", b"", "p.parquet: not readable as Parquet"),
    "parquet: garbage": ("p.parquet", b"PAR1" + bytes(range(256)) + b"PAR1", "p.parquet: not readable as Parquet"),
    "parquet: cut": ("p.parquet", PARQUET[:-30], "p.parquet: not readable as Parquet"),
    "parquet: a page flipped": ("p.parquet", PARQUET[:20] + b"\xff" * 40 + PARQUET[60:], "p.parquet"),
    "parquet: its footer flipped": ("p.parquet", PARQUET[:-200] + b"\xff" * 100 + PARQUET[-100:], "p.parquet"),
    "parquet: no rows": ("p.parquet", parquet(pa.table({"prompt": pa.array([], pa.string())})), "holds no prompts"),
    "parquet: no columns": ("p.parquet", parquet(pa.table({})), "holds no prompts"),
    "parquet: bytes": (
        "p.parquet", parquet(pa.table({"prompt": [b"\xff"] * 4, "answer": ["1"] * 4})), "row 0, field 'prompt'"),
    "parquet: numbers": ("p.parquet", parquet(pa.table({"prompt": [1, 2], "answer": [1, 2]})), "row 0, field 'prompt'"),
    "parquet: a column twice": (
        "p.parquet", parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])), "p.parquet"),
    "parquet: text that is no UTF-8": (
        "p.parquet",
        parquet(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 1, [
            None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]), "answer": ["1"]})),
        "p.parquet"),
    "csv: a cell of lines without end": (
        "p.csv", b'prompt,answer\n"' + b"x\n" * (1 << 20), "p.csv, line"),
    "parquet: nested deep": ("p.parquet", parquet(pa.table({"prompt": ["x"], "answer": [[[[["1"]]]]]})), "holds 1 different"),
}  # fmt: skip


def bomb(levels: int) -> str:
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lists) + "\n"


CONFIG: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "c.yaml: expected a mapping of keys, found NoneType"),
    "a list": ("- 1\n", "c.yaml: expected a mapping of keys, found list"),
    "a text": ("run\n", "c.yaml: expected a mapping of keys, found str"),
    "a key twice": (config() + "run: other\n", "c.yaml"),
    "a key twice in a section": (config() + "scores: {k_max: 1, min_p: 0.1, k_max: 2}\n", "k_max"),
    "a section twice": (config() + "rollouts: {prompts: 2}\n", "rollouts"),
    "alias bomb": (config() + bomb(9), "c.yaml"),
    "alias bomb in a known key": (config(run=None).replace("run: null\n", "") + bomb(9) + "run: *a8\n", "c.yaml"),
    "alias bomb in options": ("o: &o0 {a: 1, b: 2}\n" + bomb(9) + config() + "evaluate: *a8\n", "c.yaml"),
    "an alias of itself": (config() + "scores: &s {k_max: *s}\n", "c.yaml"),
    "a list of itself": (config() + "reuse: &r [*r]\n", "c.yaml"),
    "an unknown alias": (config() + "seed: *nowhere\n", "c.yaml: not YAML"),
    "lists nested 500 deep": (config() + "reuse: " + "[" * 500 + "]" * 500 + "\n", "c.yaml"),
    "mappings nested deep": ("".join(" " * n + f"a{n}:\n" for n in range(400)), "c.yaml"),
    "options nested deep": (config().replace("  source:", f"  options: {'{a: ' * 80}1{'}' * 80}\n  source:"), "c.yaml"),
    "tabs": ("run: r\nscores:\n\tk_max: 3\n", "c.yaml: not YAML"),
    "bytes": (b"\x00\x01\x02\xff", "c.yaml: not YAML"),
    "Latin-1": ("run: \xe9\n".encode("latin-1"), "c.yaml: not YAML"),
    "UTF-16": (config().encode("utf-16"), "c.yaml: not YAML"),
    "an escape character": ("run: \x1b[31mred\n", "c.yaml: not YAML"),
    "several documents": (config() + "---\n" + config(), "c.yaml: not YAML"),
    "a Python object": (config() + "seed: !!python/object/apply:os.system [ls]\n", "c.yaml: not YAML"),
    "an unknown tag": (config() + "seed: !secret x\n", "c.yaml: not YAML"),
    "an open quote": ('run: "r\n', "c.yaml: not YAML"),
    "5,000 digits": (config() + f"seed: {'9' * 5000}\n", "c.yaml"),
    "a month 99": (config() + "seed: 2026-99-99\n", "c.yaml"),
    "!!int without digits": (config() + "seed: !!int ''\n", "c.yaml"),
    "!!int of text": (config() + "seed: !!int abc\n", "c.yaml"),
    "!!bool of text": (config() + "seed: !!bool abc\n", "c.yaml"),
    "!!timestamp of text": (config() + "seed: !!timestamp abc\n", "c.yaml"),
    "!!float of text": (config() + "seed: !!float abc\n", "c.yaml"),
    "a number of base 60": (config(rollouts__prompts=None).replace("prompts: null", "prompts: 1:30"), "1:30"),
    "an octal number": (config() + "seed: 010\n", "010"),
    "a list as a key": (config() + "? [a, b]\n: 1\n", "c.yaml"),
    "a number as a key": (config() + "1: 2\n", "`1`"),
    "null as a key": (config() + "null: 2\n", "c.yaml"),
    "JSON with a BOM and a cut": (b'\xef\xbb\xbf{"run": "r"', "c.yaml: not YAML"),
    "3,000 unknown keys": ("".join(f"k{n}: 1\n" for n in range(3_000)), "c.yaml"),
    "a text of 100 kB as a number": (config() + f"seed: {'x' * 100_000}\n", "`seed`"),
    "a merge of no mapping": (config() + "scores:\n  <<: 3\n", "c.yaml: not YAML"),
    "an unknown key": (config(trian={}), "unknown key `trian`"),
    "an unknown key in a section": (config(train__lr=1), "unknown key `train.lr`"),
    "prompts: null": (config(prompts=None), "`prompts`"),
    "prompts: text": (config(prompts="p.jsonl"), "`prompts`"),
    "no prompts": (config(prompts={}), "`prompts.source` is missing"),
    "objective: text": (config(objective="simct"), "`objective`"),
    "objective: list": (config(objective=[]), "`objective`"),
    "recipe: unknown": (config(objective__recipe="simt"), "`objective.recipe`"),
    "recipe: list": (config(objective__recipe=["simct"]), "`objective.recipe`"),
    "recipe: of one's own, nowhere": (config(objective__recipe="no_such_module:f"), "no_such_module"),
    "recipe: an expression": (config(objective__recipe="os:system('x')"), "module:function"),
    "recipe: a path": (config(objective__recipe="../x:f"), "module:function"),
    **{f"run: {run!r}": (config(run=run), "`run`") for run in (
        "..", ".", "...", "", " ", "a/../..", "/tmp/x", "a/b", "-", "~", "a b", "a\nb", "a\n", "a\0b", "..\\..", "a" * 300,
        3, 3.5, True, None, [], {}, "\u202ea", "$(ls)", "{phase}", "%s", "*", "-x", "--cores", ".hidden")},
    **{f"{place.replace('__', '.')}: {value!r}": (config(**{place: value}), place.split("__")[-1])
       for place, values in {
        "seed": (-1, 2**70, "one", 1.5, True, float("nan")),
        "train__betas": ([0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9], 0.9, "0.9", [0.9, float("nan")]),
        "train__learning_rate": (0, -1, 2, float("inf"), float("nan"), "fast", "1e-3x", [], None, True),
        "train__batch_size": (0, -1, 1.5, 10**13, "16 "*3),
        "train__weight_decay": (-0.1, float("inf"), 11),
        "train__grad_clip": (0, -1, float("inf")),
        "train__warmup_steps": (-1, 0.5),
        "train__schedule": ("exponential", 3),
        "train__lora": (3, "yes", [], {"rank": 0}, {"ranks": 1}, {"targets": []}),
        "train__ema": (0, 1, -1),
        "rollouts__temperature": (0, -1, 1e9, float("nan"), "hot"),
        "rollouts__top_p": (0, 1.1, -1),
        "rollouts__top_k": (-1, 0.5, 10**15),
        "rollouts__max_new_tokens": (0, -1, [], [4, 0], "4", 10**13),
        "rollouts__rounds": (0, -1, 10**13),
        "rollouts__prompts": (0, 3, 10**11),
        "prompts__splits__train": (0, -1, 10**13),
        "prompts__splits__test": (0, -1),
        "prompts__splits": (3, [], {"valid": 3}),
        "prompts__source": ("", None, 3, []),
        "prompts__prompt_field": ("", None, "answer"),
        "evaluate__split": ("dev", "train", "", None),
        "evaluate__kl_items": (-1, 3, 0.5),
        "evaluate__scorer": ("", "regexp", None, "a:b:c"),
        "evaluate__pattern": ("(", "(?P<"),
        "evaluate__also": ({"test": {"source": "p.jsonl"}}, {"": {"source": "p.jsonl"}}, {"a/b": {"source": "p.jsonl"}}, []),
        "student__model": ("", None, 3, []),
        "student__stop": ([""], "x", [3], None, [None]),
        "student__dtype": ("float8", 16),
        "student__roles": ({"end_turn": "x"}, {"end_turn": [""]}, []),
        "teacher__engine_options": ({"a": 1}, [], {"max_model_len": 5}),
        "scores__k_max": (0, -1, 10**13),
        "scores__min_p": (-1, 1),
        "scores__mass": (0, 1.5),
        "scores__support": ("all", "union"),
        "audit__max_delta": (0, float("inf")),
        "coverage__min_compared": (-0.1, 1.1),
        "weights__gamma": (float("nan"), "x"),
        "weights__scheme": ("", "iw", None),
        "sft__temperature": (-1, 1000),
        "reuse": ("runs/x", [""], [3], {"a": 1}),
        "cache": ("", 3),
       }.items() for value in values},
}  # fmt: skip

LOGS: dict[str, tuple[bytes, str]] = {
    "no prompt": (b'{"response": "x"}', "row 0: has neither of prompt, messages, conversations"),
    "no response": (b'{"prompt": "x"}', "row 0: has no response"),
    "response: number": (b'{"prompt": "x", "response": 3}', "row 0, field 'response'"),
    "response: object": (b'{"prompt": "x", "response": {"a": 1}}', "row 0, field 'response'"),
    "response: user's messages": (
        b'{"prompt": "x", "response": [{"role": "user", "content": "y"}]}', "must begin and end with the assistant's"),
    "ids: text": (b'{"prompt": "x", "response_ids": "1 2"}', "`response_ids` must be a list of whole numbers"),
    "ids: fractions": (b'{"prompt": "x", "response_ids": [1.5]}', "`response_ids` must be a list of whole numbers"),
    "ids: true": (b'{"prompt": "x", "response_ids": [true]}', "`response_ids` must be a list of whole numbers"),
    "ids: a list of lists": (b'{"prompt": "x", "response_ids": [[1]]}', "`response_ids` must be a list of whole numbers"),
    "ids: ragged": (b'{"prompt": "x", "response_ids": [[1], 2]}', "`response_ids` must be a list of whole numbers"),
    "ids: objects": (b'{"prompt": "x", "response_ids": [{}]}', "`response_ids` must be a list of whole numbers"),
    "ids: with null": (b'{"prompt": "x", "response_ids": [1, null]}', "`response_ids` must be a list of whole numbers"),
    "ids: beyond 64 bits": (b'{"prompt": "x", "response_ids": [99999999999999999999]}', "`response_ids` must be a list"),
    "ids: beyond 63 bits": (b'{"prompt": "x", "response_ids": [18446744073709551615]}', "`response_ids`"),
    "ids: lists nested deep": (b'{"prompt": "x", "response_ids": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than"),
    "log-probs: positive": (b'{"prompt": "x", "response_ids": [1], "logprobs": [0.5]}', "`logprobs` must be log-probs"),
    "log-probs: too few": (b'{"prompt": "x", "response_ids": [1, 2], "logprobs": [-0.5]}', "`logprobs` has 1 numbers"),
    "log-probs: text": (b'{"prompt": "x", "response_ids": [1], "logprobs": ["-1"]}', "`logprobs` must be a list"),
    "log-probs: NaN": (b'{"prompt": "x", "response_ids": [1], "logprobs": [NaN]}', "NaN is not JSON"),
    "log-probs: -1e300": (b'{"prompt": "x", "response_ids": [1], "logprobs": [-1e300]}', "`logprobs` must be log-probs"),
    "log-probs: an object": (b'{"prompt": "x", "response_ids": [1], "logprobs": {"1": -1}}', "`logprobs` must be a list"),
    "loss mask: text": (b'{"prompt": "x", "response_ids": [1], "loss_mask": "1"}', "`loss_mask` must be a list"),
    "loss mask: 7": (b'{"prompt": "x", "response_ids": [1], "loss_mask": [7]}', "`loss_mask`"),
    "loss mask: too long": (b'{"prompt": "x", "response_ids": [1], "loss_mask": [1, 1]}', "`loss_mask` has 2 numbers"),
    "finish reason: unknown": (b'{"prompt": "x", "response": "y", "finish_reason": "error"}', "`finish_reason` is 'error'"),
    "finish reason: a list": (b'{"prompt": "x", "response": "y", "finish_reason": []}', "`finish_reason` is []"),
    "text and ids of different lengths of nothing": (b'{"prompt": "", "response_ids": []}', "row 0, field 'prompt'"),
    "lone surrogate": (rb'{"prompt": "x", "response": "\ud800"}', "surrogate"),
    "answer: tool calls of numbers": (
        b'{"prompt": "x", "response": "y", "answer": {"role": "assistant", "tool_calls": [3]}}', "row 0, field 'answer'"),
    "not JSON": (b'{"prompt": ', "line 1: not JSON"),
}  # fmt: skip


def made(folder: Path) -> None:
    """Things in the working directory that aren't what they are named."""
    (folder / "c.yaml").write_text(config())
    (folder / "p.jsonl").write_bytes(PLAIN)
    (folder / "log.jsonl").write_bytes(jsonl({"prompt": "x", "response": "y"}))
    for name in ("folder.jsonl", "folder.yaml", "empty", "saved", "split", "listed", "texts"):
        (folder / name).mkdir()
    for name in ("loop", "loop.yaml", "loop.jsonl"):
        (folder / name).symlink_to(name)
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "file").write_text("x")
    (folder / "saved/state.json").write_text("{")
    (folder / "split/dataset_dict.json").write_text('{"splits": 3}')
    (folder / "listed/dataset_dict.json").write_text("[]")
    (folder / "texts/state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    (folder / "texts/dataset_info.json").write_text("{}")
    (folder / "texts/x.arrow").write_text("no arrow")
    for name in ("itself", "held", "torn", "looped"):
        (folder / f"runs/{name}/round-0/rollouts").mkdir(parents=True)
        (folder / f"runs/{name}/round-0/rollouts/000.parquet").write_text("x")
    (folder / "itself.yaml").write_text(config(run="itself", reuse=["runs/itself"]))
    (folder / "itself-roundabout.yaml").write_text(config(run="itself", reuse=["./runs/../runs/itself/round-0"]))
    (folder / "runs/held/config.yaml").write_text("[")
    (folder / "held.yaml").write_text(yaml.safe_dump({"reuse": ["runs/held"], "student": {"model": "x"}}))
    (folder / "runs/torn/config.yaml").write_bytes(b"prompts: {source: a}\nprompts: {source: b}\n")
    (folder / "torn.yaml").write_text(yaml.safe_dump({"reuse": ["runs/torn"], "student": {"model": "x"}}))
    (folder / "runs/looped/config.yaml").symlink_to("config.yaml")
    (folder / "looped.yaml").write_text(yaml.safe_dump({"reuse": ["runs/looped"], "student": {"model": "x"}}))
    (folder / "nowhere.yaml").write_text(config(reuse=["runs/nowhere"]))
    (folder / "file.yaml").write_text(config(run="f"))
    (folder / "runs/f").write_text("a file")
    (folder / "caches/loop/scores").mkdir(parents=True)
    (folder / "caches/loop/scores/a.parquet").symlink_to("a.parquet")
    (folder / "caches/looped/scores").mkdir(parents=True)
    (folder / "caches/looped/scores/a.parquet").write_text("x")
    (folder / "caches/looped/scores/a.json").symlink_to("a.json")
    (folder / "caches/folder/scores/a.parquet").mkdir(parents=True)
    (folder / "caches/manifest/scores").mkdir(parents=True)
    (folder / "caches/manifest/scores/a.parquet").write_text("x")
    (folder / "caches/manifest/scores/a.json").mkdir()
    (folder / "caches/gone/scores").mkdir(parents=True)
    (folder / "caches/gone/scores/a.parquet").symlink_to("nowhere")
    for name in ("used", "bytes"):
        (folder / f"caches/{name}/scores").mkdir(parents=True)
        (folder / f"caches/{name}/scores/a.parquet").write_text("x")
    (folder / "caches/used/users/a/b").mkdir(parents=True)
    (folder / "caches/bytes/users/a").mkdir(parents=True)
    (folder / "caches/bytes/users/a/b").write_bytes(b"\xff\0")


def source(name: str) -> list[str]:
    """A check of a config whose prompts are there."""
    Path("s.yaml").write_text(config(prompts__source=name))
    return ["config", "--check", "s.yaml"]


Command = list[str] | Callable[[], list[str]]
COMMANDS: dict[str, tuple[Command, str]] = {
    "a config that isn't there": (["prompts", "--config", "nowhere"], "nowhere: No such file"),
    "a folder as the config": (["prompts", "--config", "folder.yaml"], "folder.yaml: Is a directory"),
    "a loop as the config": (["prompts", "--config", "loop.yaml"], "loop.yaml: Too many levels"),
    "a config below a file": (["prompts", "--config", "file/c.yaml"], "file/c.yaml: Not a directory"),
    "a name of 300 characters": (["prompts", "--config", "x" * 300], "File name too long"),
    "/dev/zero as the config": (["config", "--check", "/dev/zero"], "/dev/zero"),
    "a check of nothing": (["config", "--check", ""], "."),
    "prompts: a folder": (lambda: ["prompts", "--config", source("folder.jsonl")[2]], "folder.jsonl: a folder"),
    "prompts: a loop": (lambda: ["prompts", "--config", source("loop.jsonl")[2]], "loop.jsonl: no such file"),
    "prompts: a link to nowhere": (lambda: ["prompts", "--config", source("gone.jsonl")[2]], "gone.jsonl: no such file"),
    "prompts: /dev/zero": (lambda: ["prompts", "--config", source("/dev/zero")[2]], "/dev/zero"),
    "prompts: a name of 300 characters": (lambda: source("x" * 300 + ".jsonl"), "too long"),
    "prompts: a name with NUL": (lambda: ["prompts", "--config", source("a\0b.jsonl")[2]], "no such file"),
    "prompts: an empty folder": (lambda: ["prompts", "--config", source("empty")[2]], "empty"),
    "prompts: a saved set of bad JSON": (lambda: ["prompts", "--config", source("saved")[2]], "saved"),
    "prompts: a saved set of no splits": (lambda: ["prompts", "--config", source("split")[2]], "split"),
    "prompts: a saved set that is a list": (lambda: ["prompts", "--config", source("listed")[2]], "listed"),
    "prompts: a saved set of text": (lambda: ["prompts", "--config", source("texts")[2]], "texts"),
    "prompts: code of nobody": (lambda: ["prompts", "--config", source("no_such_module:f")[2]], "no_such_module"),
    "prompts: code that is no function": (lambda: ["prompts", "--config", source("json:__doc__")[2]], "json:__doc__"),
    "reuse of itself": (["config", "--check", "itself.yaml"], "reuse"),
    "reuse of itself, roundabout": (["config", "--check", "itself-roundabout.yaml"], "reuse"),
    "reuse of a broken config": (["config", "--check", "held.yaml"], "runs/held/config.yaml: not YAML"),
    "reuse of keys twice": (["config", "--check", "torn.yaml"], "runs/torn/config.yaml"),
    "reuse of a looped config": (["config", "--check", "looped.yaml"], "runs/looped/config.yaml"),
    "reuse of nothing": (["reuse", "--config", "nowhere.yaml", "--phase", "round-0"], "reuse: runs/nowhere"),
    "a run that is a file": (["prompts", "--config", "file.yaml"], "runs/f"),
    "a cache that isn't there": (["cache", "ls", "--cache", "nowhere"], "no cache of scores here"),
    "a cache that is a file": (["cache", "ls", "--cache", "file"], "no cache of scores here"),
    "a cache that is a loop": (["cache", "ls", "--cache", "loop"], "loop"),
    "an entry that is a loop": (["cache", "verify", "--cache", "caches/loop"], "1 of 1 files"),
    "a manifest that is a loop": (["cache", "verify", "--cache", "caches/looped"], "1 of 1 files"),
    "an entry that is a folder": (["cache", "verify", "--cache", "caches/folder"], "1 of 1 files"),
    "a manifest that is a folder": (["cache", "verify", "--cache", "caches/manifest"], "1 of 1 files"),
    "an entry that points nowhere": (["cache", "verify", "--cache", "caches/gone"], "1 of 1 files"),
    "a note of use that is a folder": (["cache", "verify", "--cache", "caches/used"], "caches/used"),
    "a note of use that is bytes": (["cache", "verify", "--cache", "caches/bytes"], "1 of 1 files"),
    "shards that aren't there": (["cache", "verify", "nowhere"], "nowhere: no such file or folder"),
    "shards of a loop": (["cache", "verify", "loop"], "loop"),
    "shards of text": (["cache", "verify", "file"], "1 of 1 files"),
    "a recipe of nobody": (["recipes", "simt"], "no recipe 'simt'"),
    "a recipe of nothing": (["recipes", ""], "no recipe ''"),
    "a table of nobody": (["schema", "../x"], "no table '../x'"),
    "import: no such file": (["import", "x.jsonl", "--as", "runs/i", "--config", "c.yaml"], "x.jsonl: no such file"),
    "import: a folder": (["import", "folder.jsonl", "--as", "runs/i", "--config", "c.yaml"], "folder.jsonl"),
    "import: into another place": (["import", "p.jsonl", "--as", "i", "--config", "c.yaml"], "--as i: expected runs/<name>"),
    "import: into ..": (["import", "p.jsonl", "--as", "runs/..", "--config", "c.yaml"], "--as runs/.."),
    "import: into itself": (["import", "p.jsonl", "--as", "runs/itself", "--config", "c.yaml"], "holds rollouts already"),
    "import: into an odd name": (["import", "p.jsonl", "--as", "runs/a b", "--config", "c.yaml"], "--as runs/a b"),
    "import: into a file": (["import", "log.jsonl", "--as", "runs/f", "--config", "c.yaml"], "runs/f"),
    "import: odd spans": (["import", "p.jsonl", "--as", "runs/i", "--config", "c.yaml", "--spans", "some"], "--spans some"),
    "align: nothing": (["align", "--teacher", "empty", "--student", "empty"], "give exactly one of --text"),
    "align: everything": (
        ["align", "--teacher", "empty", "--student", "empty", "--text", "x", "--file", "file"], "give exactly one of --text"),
    "align: no model": (["align", "--teacher", "empty", "--student", "empty", "--text", "x"], "empty"),
    "align: a file as a model": (["align", "--teacher", "file", "--student", "file", "--text", "x"], "file"),
    "support: an odd package": (["support", "--teacher", "pypi:x", "--student", "pypi:x"], "pypi:<package>==<version>"),
    "support: no model": (["support", "--teacher", "", "--student", ""], "model"),
    "audit: no scores": (["audit", "--config", "c.yaml"], "no scores of this run's own to audit"),
    "summary: no run": (["summary", "--config", "c.yaml"], "runs/r"),
    "coverage: no run": (["coverage", "--config", "c.yaml", "--phase", "round-0"], "runs/r"),
    **{f"--phase {phase!r}": (["weights", "--config", "c.yaml", "--phase", phase], "--phase")
       for phase in ("", "..", "round--1", "round-", "round-9" * 2, "round-0@1x", "eval-x", "round-\u0663", "round-0\n")},
    "a round beyond the last": (["weights", "--config", "c.yaml", "--phase", "round-7"], "round-7"),
    "a shard beyond the last": (["units", "--config", "c.yaml", "--phase", "round-0", "--shard", "7"], "--shard 7"),
    "a round of 5,000 digits": (["units", "--config", "c.yaml", "--phase", "round-" + "9" * 5000], "--phase"),
}  # fmt: skip

USAGE: dict[str, tuple[list[str], str]] = {
    "an unknown command": (["trian"], "No such command 'trian'"),
    "an unknown option": (["prompts", "--confg", "c.yaml"], "No such option: --confg"),
    "a shard below 0": (["units", "--phase", "round-0", "--shard", "-1"], "should be greater than or equal to"),
    "a shard of text": (["units", "--phase", "round-0", "--shard", "one"], "unable to parse string as an integer"),
    "no threads": (["audit", "--threads", "0"], "should be greater than or equal to"),
    "no responses": (["audit", "--responses", "0"], "should be greater than or equal to"),
    "days without end": (["cache", "gc", "--days", "-inf"], "should be greater than or equal to"),
    "days below 0": (["cache", "gc", "--days", "-1"], "should be greater than or equal to"),
    "days that are none": (["cache", "gc", "--days", "nan"], "should be greater than or equal to"),
    "a name with NUL": (["config", "--check", "a\0b"], "null"),
    "no phase": (["units"], "Missing option '--phase'"),
    "no file": (["import", "--as", "runs/x"], "Missing argument"),
    "one argument too many": (["schema", "rollouts", "units"], "unexpected extra argument"),
}


@contextmanager
def in_time() -> Iterator[None]:
    """What takes longer than SECONDS fails."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("OPD_CACHE", raising=False)
    return tmp_path


def said(*arguments: str) -> str:
    """The one line with which a command refuses."""
    with in_time():
        result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (
        result.exception,
        result.output[:LONGEST],
    )
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: ") and not any(one.startswith(("error", "Traceback")) for one in before), (
        result.stderr
    )
    assert len(last) <= LONGEST, f"{len(last)} characters: {last[:LONGEST]}"
    return last


@pytest.mark.parametrize("name", DATA)
def test_data(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content, told = DATA[name]
    monkeypatch.setattr("pipeline.sources.LONGEST", 1 << 20)
    limit = csv.field_size_limit(1 << 20)
    (place / file).write_bytes(content)
    (place / "c.yaml").write_text(config(prompts__source=file))
    try:
        assert told in said("config", "--check", "c.yaml")
    finally:
        csv.field_size_limit(limit)


@pytest.mark.parametrize("name", CONFIG)
def test_config(place: Path, name: str) -> None:
    text, told = CONFIG[name]
    (place / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    (place / "p.jsonl").write_bytes(PLAIN)
    line = said("config", "--check", "c.yaml")
    assert told in line and "c.yaml" in line


@pytest.mark.parametrize("name", LOGS)
def test_logs(place: Path, name: str) -> None:
    content, told = LOGS[name]
    (place / "log.jsonl").write_bytes(content)
    with in_time(), pytest.raises(OpdError) as error:
        list(_logged(["log.jsonl"], "all"))
    line = str(error.value)
    assert told in line and "log.jsonl" in line and "\n" not in line and len(line) <= LONGEST


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(place: Path, name: str) -> None:
    arguments, told = COMMANDS[name]
    made(place)
    assert told in said(*(arguments() if callable(arguments) else arguments))


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str) -> None:
    """What typer refuses, in its own form, a box."""
    arguments, told = USAGE[name]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (result.exception, result.output)
    assert told in " ".join(result.output.replace("│", " ").split())


VALID: dict[str, tuple[str, bytes]] = {
    "a byte order mark": ("p.jsonl", b"\xef\xbb\xbf" + PLAIN),
    "Windows' line ends": ("p.jsonl", PLAIN.replace(b"\n", b"\r\n")),
    "blank lines": ("p.jsonl", PLAIN.replace(b"\n", b"\n\n")),
    "no line end at the end": ("p.jsonl", PLAIN[:-1]),
    "both halves of a character": ("p.jsonl", PLAIN + jsonl({"prompt": "\U0001f600", "answer": "1"})),
    "lists nested 90 deep": ("p.jsonl", PLAIN + deep(90).encode()),
    "4,000 digits": ("p.jsonl", PLAIN + b'{"prompt": "x", "answer": ' + b"9" * 4000 + b"}"),
    "zst of several frames": ("p.jsonl.zst", b"".join(map(zstandard.compress, PLAIN.splitlines(keepends=True)))),
    "zst without its size": ("p.jsonl.zst", zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)),
    "zst with an empty frame": ("p.jsonl.zst", ZST + zstandard.compress(b"")),
    "zst with a frame to skip": ("p.jsonl.zst", b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + ZST),
    "zst of 5 MB": ("p.jsonl.zst", zstandard.compress(PLAIN + jsonl({"prompt": "ab" * 2_500_000, "answer": "1"}))),
    "gz of several members": ("p.jsonl.gz", b"".join(map(gzip.compress, PLAIN.splitlines(keepends=True)))),
    "a list": ("p.json", b"\n " + json.dumps(ROWS, indent=1).encode() + b"\n\n"),
    "a list, compressed": ("p.json.zst", zstandard.compress(json.dumps(ROWS).encode())),
    "a list of large rows": ("p.json", json.dumps([row | {"x": "y" * 700_000} for row in ROWS]).encode()),
    "cells over lines": ("p.csv", b'prompt,answer\r\n' + b"".join(b'"a\r\n%d",b\r\n' % n for n in range(6))),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_what_is_valid_is_read(place: Path, name: str) -> None:
    file, content = VALID[name]
    (place / file).write_bytes(content)
    with in_time():
        rows = list(kind_of(file).rows(file, {}, 0, 0))
    assert len(rows) in (len(ROWS), len(ROWS) + 1) and all(isinstance(row["prompt"], str) for row in rows)


def test_a_zst_cut_anywhere_is_never_read_as_complete(place: Path) -> None:
    """Also where a frame ends whole lines: of 3 frames, each cut, only those between frames are whole files."""
    frames = [zstandard.compress(PLAIN), FLUSHED + STREAMED_END, zstandard.compress(PLAIN)]
    whole, ends = b"".join(frames), {sum(map(len, frames[:count])) for count in range(4)}
    for cut in range(len(whole) + 1):
        (place / "p.jsonl.zst").write_bytes(whole[:cut])
        rows = kind_of("p.jsonl.zst").rows("p.jsonl.zst", {}, 0, 0)
        if cut in ends:
            assert len(list(rows)) % len(ROWS) == 0
        else:
            with pytest.raises(OpdError, match=r"not zstandard data, or cut|not JSON"):
                list(rows)


def test_aliases_and_merges_are_taken_where_they_end(place: Path) -> None:
    (place / "c.yaml").write_text("a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n")
    assert read_yaml(Path("c.yaml")) == {
        "a": {"x": 1, "y": [2]},
        "b": {"x": 3, "y": [2]},
        "c": [{"x": 1, "y": [2]}] * 2,
    }


def test_a_cache_with_loops_is_listed_and_swept(place: Path) -> None:
    made(place)
    for name in ("loop", "looped", "folder", "manifest", "gone", "bytes"):
        for command in ("ls", "gc"):
            assert CliRunner().invoke(app, ["cache", command, "--cache", f"caches/{name}"]).exit_code == 0


def test_the_table_is_large_enough() -> None:
    assert sum(map(len, (DATA, CONFIG, LOGS, COMMANDS, USAGE))) > 400
