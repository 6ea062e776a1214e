"""What a shard is: the identity it was made from, its inputs, its content digest; and how two of them differ."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

FORMAT = 4
"""Version of the on-disk contracts that shards are written in."""
READABLE = (3, FORMAT)
"""Versions that are read; what an older one lacks is null. A shard of any other is refused. 4 added segments of responses."""


class Manifest(BaseModel):
    """Manifest of one shard. `identity` and `inputs` are what determined its content; the rest describes the file."""

    model_config = ConfigDict(extra="forbid")

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

    def dump(self) -> str:
        """Canonical JSON with its own digest as the last line's value; a changed byte anywhere shows on `parse`."""
        body = self.model_dump()
        return json.dumps({**body, "self": digest(body)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Read what `dump` wrote. Raises ValueError if a byte of it was changed."""
        body = json.loads(text)
        if not isinstance(body, dict) or "self" not in body:
            raise ValueError("not a manifest")
        manifest = cls.model_validate({key: value for key, value in body.items() if key != "self"})
        if manifest.dump() != text:
            raise ValueError("its digest differs")
        return manifest


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
