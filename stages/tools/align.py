"""Align: the units of a text under two tokenizers, side by side."""

import base64
import binascii
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from pipeline.align.texts import Aligned, align_texts, unit_rows
from schemas.errors import OpdError
from stages.run import console
from stages.run.sides import JsonOption, StudentOption, TeacherOption, open_side

COLOURS = {"1:1": "green", "n:m": "yellow", "masked": "red"}
"""Of a text there are no other kinds."""
LINES_AT_ONCE = 1024


def main(
    teacher: TeacherOption,
    student: StudentOption,
    text: Annotated[str | None, typer.Option(help="the text itself")] = None,
    file: Annotated[Path | None, typer.Option(help="a file of raw bytes; they need not be UTF-8")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="lines with `id` and `text` or `b64`; prints one JSON a line")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the aligned units of a text: green 1:1, yellow n:m, red masked."""
    given = [value for value in (text, file, jsonl) if value is not None]
    if len(given) != 1:
        raise OpdError(f"give exactly one of --text, --file and --jsonl, found {len(given)}")
    sides = open_side(student), open_side(teacher)
    if jsonl is not None:
        for lines in _chunks(_lines(jsonl)):
            aligned = align_texts(*sides, [raw for _, raw in lines])
            for index, (name, _) in enumerate(lines):
                console.out.print(json.dumps({"id": name, **describe(aligned, index)}), markup=False, soft_wrap=True)
        return
    raw = text.encode() if text is not None else _bytes(file)
    aligned = align_texts(*sides, [raw])
    if as_json:
        console.out.print(json.dumps(describe(aligned, 0)), markup=False, soft_wrap=True)
    else:
        show(aligned, raw, student, teacher)


def describe(aligned: Aligned, text: int) -> dict[str, Any]:
    """The JSON of one text."""
    rows = unit_rows(aligned, text)
    student, teacher = (int(s.offsets[text + 1] - s.offsets[text]) for s in (aligned.student, aligned.teacher))
    by_kind = {kind: sum(row["s_len"] for row in rows if row["kind"] == kind) for kind in COLOURS}
    return {
        "units": rows,
        "masked_bytes": int(aligned.masked_bytes[text]),
        "student_tokens": student,
        "teacher_tokens": teacher,
        "student_tokens_by_kind": by_kind,
    }


def show(aligned: Aligned, raw: bytes, student: str, teacher: str) -> None:
    """Both tokenisations of a text, tokens parted by bars, units in colour."""
    rows = unit_rows(aligned, 0)
    for label, spelling, at, count in (
        (f"student {student}", aligned.student, "s_start", "s_len"),
        (f"teacher {teacher}", aligned.teacher, "t_start", "t_len"),
    ):
        line = Text()
        for row in rows:
            start = row["byte_start"]
            # A masked unit's tokens may spell other bytes than the text; it is shown as the text.
            ends = [row["byte_end"]]
            if row["kind"] != "masked":
                ends = spelling.ends[row[at] : row[at] + row[count]].tolist()
            for end in ends:
                shown = raw[start:end].decode(errors="backslashreplace").replace("\n", "⏎\n")
                line.append(shown, COLOURS[row["kind"]]).append("|", "dim")
                start = end
        console.out.print(Text(label, "bold"))
        console.out.print(line, soft_wrap=True)
    figures = describe(aligned, 0)
    counts = ", ".join(f"{n} {kind}" for kind, n in figures["student_tokens_by_kind"].items() if n)
    console.out.print(
        f"{figures['student_tokens']} student tokens ({counts or 'none'}), {figures['teacher_tokens']} teacher tokens, "
        f"{len(rows)} units, {figures['masked_bytes']} bytes masked"
    )


def _bytes(file: Path | None) -> bytes:
    assert file is not None
    try:
        return file.read_bytes()
    except OSError as error:
        raise OpdError(f"--file {file}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[tuple[Any, bytes]]:
    """(id, bytes) of each line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _line(line, f"--jsonl {path}, line {number}")
    except OSError as error:
        raise OpdError(f"--jsonl {path}: {error.strerror}") from error


def _line(line: bytes, where: str) -> tuple[Any, bytes]:
    try:
        row = json.loads(line)
        if "text" in row:
            return row["id"], row["text"].encode()
        return row["id"], base64.b64decode(row["b64"], validate=True)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OpdError(f"{where}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError, binascii.Error) as error:
        raise OpdError(
            f"{where}: expected an object with `id` and `text` (a string) or `b64` (base64): {error}"
        ) from error


def _chunks(lines: Iterator[tuple[Any, bytes]]) -> Iterator[list[tuple[Any, bytes]]]:
    while chunk := list(islice(lines, LINES_AT_ONCE)):
        yield chunk


if __name__ == "__main__":
    console.run(main)
