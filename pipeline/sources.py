"""Where rows of prompts come from: how `prompts.source` is written says which kind it is, and a kind is a line of SOURCES."""

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import zstandard

from pipeline import own_code, strict_json
from schemas.config.options import OWN_CODE
from schemas.errors import OpdError, excerpt, one_line, shown

GENERATED_SEED_SPACING = 1_000_003
"""reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items."""
GYM = "reasoning-gym:"
SHUFFLE_BUFFER = 10_000
"""Rows that a streamed data set's order is drawn from at a time."""
BATCH = 1_000
"""Rows that are Python objects at once where a file is read by columns."""
CHUNK = 1 << 20
LONGEST = 1 << 26
"""Characters of a row at most: what has no end in sight is no row, and must not fill the memory (64 MB, hundreds of books)."""
COMPRESSED = 1 << 12
"""Bytes that are decompressed at once: at most 128 MB of text, as zstandard writes a run of one byte in 4."""
SEPARATORS = tuple(" \t\r\n,")
csv.field_size_limit(LONGEST)  # the module's own limit, 128 kB, is shorter than long documents

SAVED_MARKS = ("dataset_dict.json", "state.json")
"""By which one tells a folder of several splits or of one that `datasets.save_to_disk` wrote,"""
SAVED_FILES = (*SAVED_MARKS, "dataset_info.json", "*.arrow", "*/state.json", "*/dataset_info.json", "*/*.arrow")
"""and all that it reads there."""

Row = Mapping[str, Any]


class Rows(Protocol):
    """Gives a source's rows: what each prompt is, its reference answer and whatever else templates may use."""

    def __call__(self, source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
        """Rows of a source.

        Args:
            source: `prompts.source`.
            options: `prompts.options`.
            seed: the run's; only for what is drawn at random.
            need: how many different prompts are wanted; whoever has fewer or more gives what there is.
        Raises:
            OpdError: the source is missing or broken, or doesn't take these options.
        """


@dataclass(frozen=True)
class Source:
    """A kind of source.

    Attributes:
        written: what `prompts.source` looks like, all of it.
        rows: what gives its rows.
        shuffled: whether they come in an order drawn from the seed. Then the first `need` different ones are taken as they
            come and the rest isn't asked for; else all are read and shuffled.
        again: whether reading them again costs little and gives the same, so that those not taken needn't be kept meanwhile.
        is_there: what else must hold of it, where how it is written doesn't tell.
        verify: its own judgement of (source, answer, `prompts` row), where it has one.
        digest: of what else than the config determines the rows, where that can be told.
    """

    written: re.Pattern[str]
    rows: Rows
    shuffled: bool = False
    again: bool = False
    is_there: Callable[[str], bool] = lambda _: True
    verify: Callable[[str, str, Row], bool] | None = None
    digest: Callable[[str], str] | None = None


def kind_of(source: str) -> Source:
    """The kind of a `prompts.source`: the first of SOURCES that is written like it."""
    return next(kind for kind in SOURCES.values() if kind.written.fullmatch(source) and kind.is_there(source))


def is_shuffled(source: str, options: Mapping[str, Any]) -> bool:
    """Whether a source's rows come in an order drawn from the seed; those of a streamed data set do."""
    kind = kind_of(source)
    return kind.shuffled or (kind.rows is _hub and bool(options.get("streaming")))


def identity(source: str) -> dict[str, str]:
    """What else than the config determines the rows of a `prompts.source`: the digest of one's own code."""
    digest = kind_of(source).digest
    return {"source_code": digest(source)} if digest else {}


def _gym(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise OpdError(f"prompts: {source} needs a package: pip install 'offline-opd[demo]'") from error
    try:
        # Duplicates are dropped later, so draw a few times more than needed.
        dataset = gym.create_dataset(
            source.removeprefix(GYM), seed=(seed + 1) * GENERATED_SEED_SPACING, size=4 * need, **options
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise OpdError(f"prompts: {source} with options {options}: {error}") from error
    for item in dataset:
        nested = item["metadata"]
        yield {"prompt": item["question"], "answer": item["answer"], **nested, "metadata": nested}


def gym_verifies(dataset: str, answer: str, row: Row) -> bool:
    """Full marks of a reasoning-gym task's own scorer, for an answer to a `prompts` row; none where the scorer fails at it.

    Raises OpdError when reasoning-gym isn't installed or has no such task.
    """
    try:
        scorer = importlib.import_module("reasoning_gym").get_score_answer_fn(dataset)
    except ImportError as error:
        raise OpdError(f"reasoning-gym's {dataset} needs a package: pip install 'offline-opd[demo]'") from error
    except ValueError as error:
        raise OpdError(f"reasoning-gym has no task {dataset!r}: {error}") from error
    entry = {"question": row["prompt"], "answer": row["answer"], "metadata": gym_metadata(row)}
    try:
        return float(scorer(answer, entry)) == 1.0
    except Exception:  # of any kind: some parse an answer without a look at it
        return False


def gym_metadata(row: Row) -> dict[str, Any]:
    """What reasoning-gym knows of its item: the row's field `metadata`, as an object or as JSON; without one all its fields."""
    fields = json.loads(row["fields"])
    nested = fields.get("metadata", fields)
    try:
        found = json.loads(nested) if isinstance(nested, str) else nested
    except json.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else fields


def _file(source: str, options: dict[str, Any]) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        raise OpdError(f"prompts: {source}: a folder, expected a file")
    if not path.is_file():
        raise OpdError(f"prompts: {source}: no such file")
    if options:
        raise OpdError(f"prompts: {source} is a file, which takes no prompts.options, found {shown(options)}")
    return path


class _Zstandard(io.RawIOBase):
    """What a zstandard file says, frame by frame. `zstandard` itself takes a file that ends within a frame for a whole one."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._pieces = self._decompressed(raw)
        self._left = memoryview(b"")

    @staticmethod
    def _decompressed(raw: io.BufferedReader) -> Iterator[bytes]:
        decompressor, frame, given = zstandard.ZstdDecompressor(), None, b""
        while given := given or raw.read(COMPRESSED):
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(given)
            given, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise zstandard.ZstdError("it ends within a frame: it was cut")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and (piece := next(self._pieces, None)) is not None:
            self._left = memoryview(piece)
        taken = min(len(buffer), len(self._left))
        buffer[:taken], self._left = self._left[:taken], self._left[taken:]
        return taken


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A text file, compressed or not, decompressed piece by piece."""
    try:
        with path.open("rb") as raw:
            stream: Any = raw
            if path.suffix == ".zst":
                stream = io.BufferedReader(_Zstandard(raw))
            elif path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if _CSV.fullmatch(path.name) else None)
    except UnicodeDecodeError as error:
        raise OpdError(f"prompts: {path}: not UTF-8: {error}") from error
    except zstandard.ZstdError as error:
        raise OpdError(f"prompts: {path}: not zstandard data, or cut: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OpdError(f"prompts: {path}: not gzip data, or cut: {error}") from error


def _jsonl(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    path = _file(source, options)
    with _text(path) as lines:
        yield from _rows_of_lines(lines, path)


def _lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(partial(text.readline, LONGEST), ""), 1):
        if len(line) == LONGEST:
            raise OpdError(
                f"prompts: {path}, line {number}: longer than {LONGEST:,} characters; is there a row a line?"
            )
        yield line


def _rows_of_lines(text: io.TextIOWrapper, path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(text, path), 1):
        if not line.strip():
            continue
        try:
            row = strict_json.parse(line)
        except ValueError as error:
            raise OpdError(f"prompts: {path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise OpdError(f"prompts: {path}, line {number}: expected an object, found {type(row).__name__}")
        yield row


def _json(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    """Of a list of objects, one after another; of what doesn't begin as a list, lines."""
    path = _file(source, options)
    with _text(path) as text:
        start = text.read(CHUNK).lstrip()
        if start.startswith("["):
            yield from _elements(start[1:], text, path)
            return
    yield from _jsonl(source, options, seed, need)


def _elements(buffer: str, text: io.TextIOWrapper, path: Path) -> Iterator[Row]:
    """The objects of a JSON list whose bracket has been read, without ever holding all of its text."""
    at, number, ended, commas = 0, 0, False, 0
    while True:
        while (sign := buffer[at : at + 1]) in SEPARATORS:
            at, commas = at + 1, commas + (sign == ",")
        if sign and commas != (number > 0 and sign != "]"):
            raise OpdError(
                f"prompts: {path}, row {number}: not JSON: {commas} commas before {shown(buffer[at : at + 20])}"
            )
        if sign == "]":
            if buffer[at + 1 :].strip() or any(more.strip() for more in iter(partial(text.read, CHUNK), "")):
                raise OpdError(f"prompts: {path}: not JSON: there is more after the list of {number} rows")
            return
        try:
            row, at = strict_json.parse_at(buffer, at)
        except json.JSONDecodeError as error:
            if ended:
                raise OpdError(f"prompts: {path}, row {number}: not JSON: {error.msg}") from error
            if len(buffer) - at > LONGEST:
                raise OpdError(f"prompts: {path}, row {number}: longer than {LONGEST:,} characters") from error
            more = text.read(max(CHUNK, len(buffer) - at))  # twice as much, should one row be long
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        except ValueError as error:
            raise OpdError(f"prompts: {path}, row {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise OpdError(f"prompts: {path}, row {number}: expected an object, found {type(row).__name__}")
        yield row
        number, commas = number + 1, 0


def _csv(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    """Cells are text; an empty one is None."""
    path = _file(source, options)
    with _text(path) as text:
        reader = csv.reader(_lines(text, path), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise OpdError(f"prompts: {path}: two columns have the same name: {excerpt(', '.join(header))}")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise OpdError(
                        f"prompts: {path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}: "
                        f"{excerpt(', '.join(header))}"
                    )
                if cells:
                    yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise OpdError(f"prompts: {path}, line {reader.line_num}: not CSV: {error}") from error


def _parquet(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    path = _file(source, options)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise OpdError(f"prompts: {path}: not readable as Parquet: {one_line(error)}") from error


def _own(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    given = own_code.load(source, "prompts.source")(options, seed, need)
    try:
        rows = iter(given)
    except TypeError as error:
        raise OpdError(
            f"prompts: {source} must give rows, an iterable of dicts, found {type(given).__name__}"
        ) from error
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise OpdError(f"prompts: {source}, row {number}: expected a dict, found {type(row).__name__}")
        yield row


def _is_saved(source: str) -> bool:
    """Whether it is a folder that `datasets.save_to_disk` wrote."""
    folder = Path(source).expanduser()
    return any((folder / name).is_file() for name in SAVED_MARKS)


def _saved(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    import datasets  # noqa: PLC0415

    if rest := options.keys() - {"split"}:
        raise OpdError(f"prompts: {source} is a saved data set, whose only option is `split`, found {', '.join(rest)}")
    try:
        found = datasets.load_from_disk(Path(source).expanduser())
    # Its JSON files may hold anything, and it looks at none before it uses them.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise OpdError(f"prompts: {source}: not readable as a saved data set: {one_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        split = options.get("split", "train")
        if split not in found:
            raise OpdError(f"prompts: {source} has no split {split!r}; set prompts.options.split: {', '.join(found)}")
        found = found[split]
    elif options:
        raise OpdError(f"prompts: {source} is one saved split, which takes no prompts.options, found {options}")
    yield from _rows_of(found)


def _rows_of(found: Any) -> Iterator[Row]:
    """Rows of a `datasets.Dataset`, which decodes a batch faster than its rows."""
    for batch in found.iter(BATCH):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _hub(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    import datasets  # noqa: PLC0415

    if not isinstance(split := options.get("split", "train"), str):
        raise OpdError(
            f"prompts: {source}: prompts.options.split: expected the name of one split, found {shown(split)}"
        )
    try:
        found = datasets.load_dataset(source, **options | {"split": split})
        if options.get("streaming"):
            found = found.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from _rows_of(found)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise OpdError(
            f"prompts: {source!r} is neither a file ({', '.join(ENDINGS)}), nor a folder of datasets.save_to_disk, nor "
            f"module:function of your own, nor a dataset the hub gives us: {one_line(error.__cause__ or error)}"
        ) from error


_CSV = re.compile(r".*\.csv(\.gz|\.zst)?")
ENDINGS = (".jsonl", ".json", ".csv", "each .gz or .zst too", ".parquet")

SOURCES: dict[str, Source] = {
    "reasoning-gym": Source(
        re.compile(rf"{GYM}.*"),
        _gym,
        shuffled=True,
        verify=lambda source, *given: gym_verifies(source.removeprefix(GYM), *given),
    ),
    "jsonl": Source(re.compile(r".*\.jsonl(\.gz|\.zst)?"), _jsonl, again=True),
    "json": Source(re.compile(r".*\.json(\.gz|\.zst)?"), _json, again=True),
    "csv": Source(_CSV, _csv, again=True),
    "parquet": Source(re.compile(r".*\.parquet"), _parquet, again=True),
    "own": Source(OWN_CODE, _own, digest=own_code.source_digest),
    "saved": Source(re.compile(r".*", re.DOTALL), _saved, again=True, is_there=_is_saved),
    "hub": Source(re.compile(r".*", re.DOTALL), _hub, again=True),
}
"""Kinds of sources; the first that fits is taken, and `hub`, the last, takes anything."""
