"""Where rows of prompts come from: how `prompts.source` is written says which kind it is, and a kind is a line of SOURCES."""

import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import zstandard

from pipeline import own_code
from schemas.config.options import OWN_CODE
from schemas.errors import OpdError

GENERATED_SEED_SPACING = 1_000_003
"""reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items."""
GYM = "reasoning-gym:"

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
        verify: its own judgement of (source, answer, `prompts` row), where it has one.
        digest: of what else than the config determines the rows, where that can be told.
    """

    written: re.Pattern[str]
    rows: Rows
    shuffled: bool = False
    verify: Callable[[str, str, Row], bool] | None = None
    digest: Callable[[str], str] | None = None


def kind_of(source: str) -> Source:
    """The kind of a `prompts.source`: the first of SOURCES that is written like it."""
    return next(kind for kind in SOURCES.values() if kind.written.fullmatch(source))


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
    """Full marks of a reasoning-gym task's own scorer, for an answer to a `prompts` row.

    Raises OpdError when reasoning-gym isn't installed or has no such task.
    """
    try:
        scorer = importlib.import_module("reasoning_gym").get_score_answer_fn(dataset)
    except ImportError as error:
        raise OpdError(f"reasoning-gym's {dataset} needs a package: pip install 'offline-opd[demo]'") from error
    except ValueError as error:
        raise OpdError(f"reasoning-gym has no task {dataset!r}: {error}") from error
    entry = {"question": row["prompt"], "answer": row["answer"], "metadata": gym_metadata(row)}
    return float(scorer(answer, entry)) == 1.0


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
    if not path.is_file():
        raise OpdError(f"prompts: {source}: no such file")
    if options:
        raise OpdError(f"prompts: {source} is a file, which takes no prompts.options, found {options}")
    return path


def _jsonl(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    path = _file(source, options)
    with path.open("rb") as raw:
        stream: Any = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise OpdError(f"prompts: {path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise OpdError(f"prompts: {path}, line {number}: expected an object, found {type(row).__name__}")
                yield row
        except UnicodeDecodeError as error:
            raise OpdError(f"prompts: {path}: not UTF-8: {error}") from error
        except zstandard.ZstdError as error:
            raise OpdError(f"prompts: {path}: not zstandard data: {error}") from error


def _parquet(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    path = _file(source, options)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise OpdError(f"prompts: {path}: not readable as Parquet: {error}") from error


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


def _hub(source: str, options: dict[str, Any], seed: int, need: int) -> Iterator[Row]:
    import datasets  # noqa: PLC0415

    try:
        yield from datasets.load_dataset(source, **{"split": "train", **options})
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise OpdError(
            f"prompts: {source!r} is neither a .jsonl, .jsonl.zst or .parquet file, nor module:function of your own, nor a "
            f"dataset the hub gives us: {text}"
        ) from error


SOURCES: dict[str, Source] = {
    "reasoning-gym": Source(
        re.compile(rf"{GYM}.*"),
        _gym,
        shuffled=True,
        verify=lambda source, *given: gym_verifies(source.removeprefix(GYM), *given),
    ),
    "jsonl": Source(re.compile(r".*\.jsonl(\.zst)?"), _jsonl),
    "parquet": Source(re.compile(r".*\.parquet"), _parquet),
    "own": Source(OWN_CODE, _own, digest=own_code.source_digest),
    "hub": Source(re.compile(r".*", re.DOTALL), _hub),
}
"""Kinds of sources; the first that fits is taken, and `hub`, the last, takes anything."""
