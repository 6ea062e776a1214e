"""Of what the run was made: digests of its prompts, models and tables, from the manifests that lie beside them."""

from collections.abc import Iterator
from typing import Any

from pipeline.store.shards import manifest_path, read_manifest
from schemas.manifest import digest
from stages.run.context import policy_ref, prepared
from stages.run.run import Phase, Run

TABLES = ("rollouts", "scores", "units", "weights")


def lineage(run: Run) -> dict[str, Any]:
    """The page's section on lineage: `models`, `tables` by phase, and `versions` of the software that wrote them."""
    versions: dict[str, set[str]] = {}
    for phase in run.phases:
        for place in phase:
            for name, version in read_manifest(place.path("units")).versions.items():
                versions.setdefault(name, set()).add(version)
    return {
        "config": digest(run.config.model_dump(mode="json"))[:12],
        "prompts": read_manifest(run.prompts).sha256[:12],
        "models": list(_models(run)),
        "tables": [{"phase": phase.name} | {table: _told(phase, table) for table in TABLES} for phase in run.phases],
        "versions": {name: " and ".join(sorted(found)) for name, found in sorted(versions.items())},
    }


def _models(run: Run) -> Iterator[dict[str, str]]:
    teacher = prepared(run, "teacher", weights=False)
    yield {
        "name": "teacher",
        "source": teacher.source,
        "weights": teacher.weights[:12],
        "tokenizer": teacher.tokenizer[:12],
    }
    first = -1 if run.config.sft.prompts else 0
    for number in range(first, run.rounds[-1] + 2):
        ref = policy_ref(run, number, weights=False)
        name = "student" if number == first else f"checkpoint {number}"
        yield {"name": name, "source": ref.source, "weights": ref.weights[:12], "tokenizer": ref.tokenizer[:12]}


def _told(phase: Phase, table: str) -> str:
    """Digest of a table's only shard, or of the digests of all."""
    found = [read_manifest(path).sha256 for path in phase.paths(table) if manifest_path(path).exists()]
    if len(found) < 2:
        return found[0][:12] if found else "-"
    return f"{digest(found)[:12]} ({len(found)} shards)"
