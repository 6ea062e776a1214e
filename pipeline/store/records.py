"""The one place that writes and reads JSON that proves itself: figures, references and notes that lie beside shards."""

from pathlib import Path
from typing import TypeVar

from pipeline.store.shards import write_text
from schemas.errors import OpdError
from schemas.manifest import Signed

Record = TypeVar("Record", bound=Signed)


def write_record(path: Path, record: Signed) -> None:
    """Write a record atomically."""
    write_text(path, record.dump())


def read_record(path: Path, kind: type[Record], again: str) -> Record:
    """A record of a kind. Raises OpdError when it is missing, damaged or edited; `again` is the command that writes it."""
    try:
        return kind.parse(path.read_text())
    except FileNotFoundError as error:
        raise OpdError(f"{path}: missing; run `{again}` first") from error
    except OSError as error:
        raise OpdError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise OpdError(f"{path}: damaged or edited; delete it and run `{again}` again") from error
