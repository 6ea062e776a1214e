"""The model card of an exported checkpoint: where the model comes from, what made it, and how to load it."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from pipeline.models import ModelRef
from pipeline.prepared import PreparedModel
from pipeline.store.shards import Shard, versions
from schemas.config import Model, consistency
from stages.run.context import prepared, tuning
from stages.run.results import gate_of
from stages.run.run import Run
from train.stream import Tables

TEMPLATES = Path(__file__).parent
FRONT = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["distillation", "on-policy-distillation"],
}
"""What the hub reads of every card of ours."""
FIGURES = {
    "sampled_kl": "sampled reverse KL, nats per unit",
    "divergence": "divergence over candidates, nats per unit that has it",
    "surrogate": "surrogate of the sampled path, per unit that has it; only its gradient means something",
}
"""Of the trainer's, those that the card tells; a recipe may have no part of one kind."""
SFT_FIGURES = {
    "loss": "cross-entropy, nats per token",
    "sampled_kl": "log p of the student less that of the teacher, likewise",
}
"""The same of `sft`."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: Run, round_index: int, student: PreparedModel, shards: Sequence[Tables], metrics: Path) -> str:
    """The folder's README.md, in the hub's format.

    Args:
        student: the checkpoint that the round started from.
        shards: what it was trained on.
        metrics: the round's metrics.jsonl.
    """
    gate = gate_of(run.phase(f"round-{round_index}"))
    rollouts, units, _ = zip(*shards, strict=True)
    tokens = pl.scan_parquet([shard.path for shard in units]).select(pl.col("s_len", "t_len").sum()).collect()
    config, found = run.config, tuning(run)
    return _rendered(
        "card.md.jinja",
        config=config,
        round=round_index + 1,
        front=front(config.student.model),
        sampling=config.rollouts.model_dump(include={"temperature", "top_p", "max_new_tokens"}),
        candidates=config.scores.model_dump(exclude={"batch_tokens"}),
        teacher=described(config.teacher, prepared(run, "teacher", weights=False)),
        student=described(config.student, student.ref),
        consistency=consistency(config, found) or ("consistent" if found else "not declared"),
        responses=sum(shard.rows for shard in rollouts),
        units=sum(shard.rows for shard in units),
        tokens=tokens.row(0, named=True),
        digests=[shard.manifest.sha256[:16] for shard in rollouts],
        objective=config.objective.model_dump(mode="json"),
        coverage=gate and gate.model_dump(),
        figures=figures(metrics),
    )


def sft_card(run: Run, student: PreparedModel, shards: list[Shard], metrics: Path) -> str:
    """The same of what `sft` made.

    Args:
        student: as given.
        shards: the teacher's answers in its tokens.
        metrics: the metrics.jsonl of the fine-tuning.
    """
    config = run.config
    return _rendered(
        "sft-card.md.jinja",
        config=config,
        front=front(config.student.model),
        teacher=described(config.teacher, prepared(run, "teacher", weights=False)),
        student=described(config.student, student.ref),
        counts=counts(shards),
        sampling=shards[0].manifest.identity["sampling"],
        digests=[shard.manifest.sha256[:16] for shard in shards],
        train=config.sft.optimiser(config.train).model_dump(mode="json"),
        figures=figures(metrics, SFT_FIGURES),
    )


def _rendered(template: str, **values: Any) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - Markdown
    made_with = {"python": platform.python_version(), **versions()}
    return environment.from_string((TEMPLATES / template).read_text()).render(
        **values, versions=made_with, json=json.dumps
    )


def counts(shards: Sequence[Shard]) -> dict[str, int | None]:
    """Of the teacher's answers, summed over shards: what the `retokenise` stage counted; None where it didn't."""
    every = [shard.manifest.figures for shard in shards]
    return {
        name: None if value is None else sum(figures[name] for figures in every) for name, value in every[0].items()
    }


def front(source: str) -> dict[str, Any]:
    """A card's front matter. The hub refuses a base model that is not one of its own."""
    return ({"base_model": source} if HUB_ID.fullmatch(source) and not Path(source).exists() else {}) | FRONT


def described(model: Model, ref: ModelRef) -> dict[str, str]:
    """A model's name, revision and digests. The commit of a hub model is what its snapshot's folder is called."""
    folder = Path(ref.path)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {
        "source": ref.source,
        "revision": commit or model.revision or "none but its weights' digest",
        "weights": ref.weights[:16],
        "tokenizer": ref.tokenizer[:16],
    }


def figures(metrics: Path, labels: Mapping[str, str] = FIGURES) -> dict[str, Any] | None:
    """Sampled KL and the loss's parts, or what else has `labels`, at the first and the last step, and totals; None where no
    step was taken."""
    if not metrics.stat().st_size:
        return None
    steps = pl.read_ndjson(metrics, infer_schema_length=None)
    # Steps none of whose units had a part of the loss don't tell of it.
    told = {name: steps[name].drop_nulls() for name in labels if name in steps.columns}
    ends = [{"label": labels[name], "first": of[0], "last": of[-1]} for name, of in told.items() if len(of)]
    totals = steps.select(pl.col("seconds", "tokens", "units").sum()).row(0, named=True)
    return {"ends": ends, **totals, "steps": len(steps)}
