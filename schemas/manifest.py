"""What proves a file: JSON that holds its own digest. A shard's manifest is one: what it was made from, where it belongs, its
content digest; and how two of them differ."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 5
"""Version of the on-disk contracts that shards are written in."""
READABLE = (3, 4, FORMAT)
"""Versions that are read; what an older one lacks is null. A shard of any other is refused. 4 added segments of responses, 5
rewards and references to weights."""


PHASE = re.compile(r"sft|eval-(?P<of_eval>base|\d{1,9})|round-(?P<of_round>\d{1,9})(@(?P<replayed>\d{1,9}))?", re.ASCII)
"""Name of a phase of a run."""
PLACED = ("rollouts", "units", "policy", "reference", "outcomes", "weights")
"""Tables whose shards belong to one place of a run. Scores and the teacher's answers are of a content: runs share them."""


class Signed(BaseModel):
    """JSON that proves itself: an object with its own digest as the last value."""

    model_config = ConfigDict(extra="forbid")

    decided: dict[str, Any] | None = Field(
        default=None, description="what of the config decided it (`schemas.decides`); null: nothing, or not told"
    )

    def dump(self) -> str:
        """JSON for people and `parse`; a changed byte anywhere shows there."""
        body = {name: value for name, value in self.model_dump(mode="json").items() if name not in self._untold()}
        return _json({**body, "self": digest(body)})

    def _untold(self) -> set[str]:
        """Fields that are left out."""
        return {"decided"} if self.decided is None else set()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `dump` wrote. Raises ValueError if a byte of it was changed."""
        return cls.model_validate(stated(text))


def stated(text: str) -> dict[str, Any]:
    """What a `Signed` of any kind states. Raises ValueError if a byte of it was changed."""
    try:
        body = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(body, dict) or "self" not in body:
        raise ValueError("not an object with its digest, `self`")
    told = {key: value for key, value in body.items() if key != "self"}
    if digest(told) != body["self"] or _json(body) != text:
        raise ValueError("its digest differs")
    return told


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


class Manifest(Signed):
    """Manifest of one shard. `identity` and `inputs` are what determined its content; the rest describes the file."""

    format: int
    kind: str
    identity: dict[str, Any]
    inputs: dict[str, str]
    origin: dict[str, str]
    """Names for people, such as the model's source and revision: the same weights may be had under several."""
    versions: dict[str, str]
    figures: dict[str, Any]
    """What was measured while it was written, such as the audit of scores."""
    rows: int
    row_groups: int
    bytes: int
    sha256: str
    place: dict[str, Any] | None = None
    """`phase` and `shard` (`place_of`); None: of no place, or written before places were told. Then none is asked for."""

    def _untold(self) -> set[str]:
        return super()._untold() | ({"place"} if self.place is None else set())


def place_of(path: Path, kind: str) -> dict[str, Any] | None:
    """Where in a run a shard lies, `<phase>/<table>/<number>.parquet`; without the phase where its folder is no phase's.

    None for what belongs to no place: other tables, entries of a cache and links to them, files under other names.
    """
    if kind not in PLACED or path.parent.name != kind or not re.fullmatch(r"\d{3,9}", path.stem):
        return None
    phase = path.parent.parent.name
    return ({"phase": phase} if PHASE.fullmatch(phase) else {}) | {"shard": int(path.stem)}


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value's canonical form: the same for equal values whatever the key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """Each field in which two nested JSON-able values differ, as `field: expected X, found Y`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            yield from differences(
                expected.get(key, "nothing"), found.get(key, "nothing"), f"{path}.{key}" if path else key
            )
    elif expected != found:
        yield f"{path}: expected {expected!r}, found {found!r}"
