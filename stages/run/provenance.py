"""How a run came by what it has from the cache: a note beside each link, which says what belongs there, and each copy."""

from pathlib import Path

from pipeline.store.cache import entry_name
from pipeline.store.records import write_record
from pipeline.store.shards import read_manifest
from schemas.manifest import Manifest
from schemas.records import Provenance, Sampled
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


def write_sampled(place: Place, entry: Path, found: bool) -> None:
    """Note beside a run's rollouts which entry of the cache they are a copy of, and whether it was there already."""
    about = Sampled(
        decided=place.phase.run.decided,
        phase=place.phase.name,
        shard=place.number,
        rollouts=read_manifest(place.path("rollouts")).sha256,
        entry=entry.stem,
        origin="cache" if found else "sampled",
        tokens=read_manifest(entry).figures["tokens"],
    )
    write_record(place.provenance("rollouts"), about)
