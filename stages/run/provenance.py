"""How a run came by what it links from the cache: a note beside each link, which says what belongs there."""

from pipeline.store.cache import entry_name
from pipeline.store.records import write_record
from pipeline.store.shards import read_manifest
from schemas.manifest import Manifest
from schemas.records import Provenance
from stages.run.run import Place


def scored_tokens(scores: Manifest, responses: int) -> int:
    """Tokens that the teacher scored: every response has one row more, its end."""
    return scores.rows - responses


def write_provenance(place: Place, table: str, teacher_tokens: int, origin: str) -> None:
    """Note beside a run's link: `origin` is `scored`, `sampled`, `cache` or `reused from <folder>`."""
    entry = read_manifest(place.path(table))
    about = Provenance(
        decided=place.phase.run.decided,
        phase=place.phase.name,
        shard=place.number,
        entry=entry_name(entry.identity, entry.inputs),
        origin=origin,
        teacher_tokens=teacher_tokens,
        rows=entry.rows,
        bytes=entry.bytes,
    )
    write_record(place.provenance(table), about)
