"""How a run came by its teacher tokens: a note beside each link to scores, for the report."""

import json

from pipeline.store.shards import write_text
from schemas.manifest import Manifest
from stages.run.run import Place


def write_provenance(place: Place, scores: Manifest, responses: int, origin: str) -> None:
    """Note beside a run's shard how it came by its teacher tokens: `scored`, `cache` or `reused from <folder>`."""
    # Every response has one row more than tokens, its end.
    about = {"origin": origin, "teacher_tokens": scores.rows - responses, "rows": scores.rows, "bytes": scores.bytes}
    write_text(place.provenance, json.dumps(about) + "\n")
