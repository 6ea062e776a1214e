"""How a run came by its teacher tokens: a note beside each link to scores, for the report."""

import json
from pathlib import Path

import pyarrow.compute as pc

from pipeline.shards import Shard, write_text
from stages import layout


def write_provenance(link: Path, scores: Shard, origin: str) -> None:
    """Note beside a run's shard how it came by its teacher tokens: `scored`, `cache` or `reused from <folder>`."""
    # Rows without a token are ends of responses.
    tokens = sum(pc.sum(pc.greater_equal(group["token_id"], 0)).as_py() or 0 for group in scores.row_groups())
    about = {"origin": origin, "teacher_tokens": tokens, "rows": scores.rows, "bytes": scores.manifest.bytes}
    write_text(layout.provenance_path(link), json.dumps(about) + "\n")
