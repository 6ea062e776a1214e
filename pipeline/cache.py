"""The content-addressed store of teacher scores: an entry's name is the digest of all that determines it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.shards import Shard, open_shard
from schemas.errors import OpdError
from schemas.manifest import digest


def responses_digest(rollouts: Shard) -> str:
    """sha256 of what the teacher reads of the rollouts: names and texts, in their row groups."""
    running = hashlib.sha256()
    for group in rollouts.row_groups():
        for name, text in zip(group["rollout_id"].to_pylist(), group["response"].to_pylist(), strict=True):
            running.update(f"{name}\0{len(text)}\0{text}\0".encode())
        running.update(b"\1")
    return running.hexdigest()


def tokens_digest(rollouts: Shard) -> str:
    """sha256 of the sampled ids, for a teacher that reads them as they are."""
    running = hashlib.sha256()
    for group in rollouts.row_groups():
        ids = group["response_ids"].combine_chunks()
        running.update(ids.value_lengths().to_numpy().tobytes() + ids.flatten().to_numpy().tobytes() + b"\1")
    return running.hexdigest()


def entry_path(cache: Path, identity: dict[str, Any], inputs: dict[str, str]) -> Path:
    """Where the scores with this identity and these inputs lie, whether or not they exist yet."""
    return cache / "scores" / f"{digest({'identity': identity, 'inputs': inputs})}.parquet"


def fetch_or_make(
    cache: Path, identity: dict[str, Any], inputs: dict[str, str], make: Callable[[Path], None]
) -> tuple[Path, bool]:
    """Find an entry, or make it exactly once even when several runs ask at the same time.

    Args:
        make: writes the shard to the path it is given.
    Returns:
        The entry's path, and whether it was there already. A damaged entry is removed and made again.
    """
    path = entry_path(cache, identity, inputs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))  # the kernel frees it when its holder dies
        with lock:
            if path.exists() and path.with_suffix(".json").exists():
                try:
                    open_shard(path, "scores", identity, inputs)
                    return path, True
                except OpdError:
                    path.unlink()
            make(path)
    except PermissionError as error:
        raise OpdError(f"{path.parent}: cannot write here: {error.strerror}") from error
    return path, False
