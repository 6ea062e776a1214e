"""The model card of an exported checkpoint: where the model comes from, what made it, what it came to, how to chat with it.

It is written with the checkpoint, and again with what evaluation found at the end of the run. It is no part of what identifies
the checkpoint.
"""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import yaml
from huggingface_hub import EvalResult, ModelCardData

from pipeline.models import ModelRef
from pipeline.store.shards import read_manifest, versions, write_text
from schemas.config import Model, consistency
from schemas.manifest import Manifest
from stages.run.context import policy_ref, prepared, tuning
from stages.run.results import gate_of
from stages.run.run import BASE, Run

TEMPLATES = Path(__file__).parent
TAGS = ["distillation", "on-policy-distillation"]
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
FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
KL_LABEL = "on-policy reverse KL to the teacher, nats per token"


def write_cards(run: Run, summary: Mapping[str, Any]) -> None:
    """Write the card of every checkpoint of a run again, with what was measured (`schemas.records.RunSummary`)."""
    for number in run.rounds:
        write_text(run.checkpoint(number) / "README.md", model_card(run, number, summary))
    if run.config.sft.prompts:
        write_text(run.phase("sft").checkpoint / "README.md", sft_card(run, summary))


def model_card(run: Run, round_index: int, summary: Mapping[str, Any] | None = None) -> str:
    """The README.md of a round's checkpoint, in the hub's format; with a run's summary also what was measured of it."""
    gate, phase = gate_of(run.phase(f"round-{round_index}")), run.phase(f"round-{round_index}")
    places = [place for part in run.trained_on(round_index) for place in part]
    units = [place.path("units") for place in places]
    tokens = pl.scan_parquet(units).select(pl.col("s_len", "t_len").sum()).collect()
    rollouts = [read_manifest(place.path("rollouts")) for place in places]
    config, found = run.config, tuning(run)
    return _rendered(
        "card.md.jinja",
        run,
        summary,
        round_index + 1,
        student=described(config.student, policy_ref(run, round_index, weights=False)),
        sampling=config.rollouts.model_dump(include={"temperature", "top_p", "max_new_tokens"}),
        candidates=config.scores.model_dump(exclude={"batch_tokens"}),
        consistency=consistency(config, found) or ("consistent" if found else "not declared"),
        responses=sum(manifest.rows for manifest in rollouts),
        units=sum(read_manifest(path).rows for path in units),
        tokens=tokens.row(0, named=True),
        digests=[manifest.sha256[:16] for manifest in rollouts],
        objective=config.objective.model_dump(mode="json"),
        meaning=" ".join((type(config.objective).__doc__ or "").split()),
        coverage=gate and gate.model_dump(),
        figures=figures(phase.metrics),
    )


def sft_card(run: Run, summary: Mapping[str, Any] | None = None) -> str:
    """The same of what `sft` made."""
    config = run.config
    rollouts = [read_manifest(path) for path in run.phase("sft").paths("rollouts")]
    return _rendered(
        "sft-card.md.jinja",
        run,
        summary,
        0,
        student=described(config.student, policy_ref(run, BASE, weights=False)),
        counts=counts(rollouts),
        sampling=rollouts[0].identity["sampling"],
        digests=[manifest.sha256[:16] for manifest in rollouts],
        train=config.sft.optimiser(config.train).model_dump(mode="json"),
        figures=figures(run.phase("sft").metrics, SFT_FIGURES),
    )


def _rendered(template: str, run: Run, summary: Mapping[str, Any] | None, checkpoint: int, **values: Any) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)  # noqa: S701 - Markdown
    config, base = run.config, prepared(run, "student", weights=False)
    found = measured(run, summary, checkpoint)
    return environment.get_template(template).render(
        **values,
        config=config,
        front=front(run, base, found and found["here"]),
        teacher=described(config.teacher, prepared(run, "teacher", weights=False)),
        licence=licence(base),
        chats=chats(config.student, base),
        longest=config.rollouts.longest,
        measured=found,
        kl_label=KL_LABEL,
        checkpoint=checkpoint,
        cost=summary and {key: summary[key] for key in ("seconds", "teacher_tokens")},
        versions={"python": platform.python_version(), **versions()},
        json=json.dumps,
        share=share,
        nats=nats,
    )


def counts(shards: Sequence[Manifest]) -> dict[str, int | None]:
    """Of the teacher's answers, summed over shards: what the `retokenise` stage counted; None where it didn't."""
    every = [manifest.figures for manifest in shards]
    return {
        name: None if value is None else sum(figures[name] for figures in every) for name, value in every[0].items()
    }


def measured(run: Run, summary: Mapping[str, Any] | None, checkpoint: int) -> dict[str, Any] | None:
    """What evaluation found `before` everything and of the checkpoint, `here`; None where that was not evaluated."""
    of = dict(zip(run.checkpoints, summary["measured"], strict=True)) if summary else {}
    if checkpoint not in of:
        return None
    before, here = of[run.checkpoints[0]], of[checkpoint]
    sets = {
        here["split"]: (before, here),
        **{name: (before["also"][name], here["also"][name]) for name in here["also"]},
    }
    return {"before": before, "here": here, "sets": sets}


def front(run: Run, base: ModelRef, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """A card's front matter, what was measured as its `model-index`. The hub refuses a base model that isn't one of its own."""
    config = run.config
    base_model = config.student.model if on_hub(config.student.model) else None
    sources = {config.prompts.source, *(held_out.source for held_out in config.evaluate.also.values())}
    found = results(run, result) if result else []
    data = ModelCardData(
        license=licence(base) or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=sorted(filter(on_hub, sources)) or None,
        model_name=config.run if found else None,
        eval_results=found or None,
        base_model=base_model,
        base_model_relation=base_model and "finetune",
    )
    told: dict[str, Any] = data.to_dict()
    return told


def results(run: Run, result: Mapping[str, Any]) -> list[EvalResult]:
    """What evaluation found of a checkpoint, as the hub has it; intervals are arguments of their metrics."""
    config = run.config
    sets = {result["split"]: (config.prompts, result)}
    sets |= {name: (config.evaluate.also[name], figures) for name, figures in result["also"].items()}
    how = "greedy" if result["samples"] == 1 else f"avg@{result['samples']}"
    found = []
    for name, (source, figures) in sets.items():
        where = {
            "task_type": "text-generation",
            "dataset_type": source.source,
            "dataset_name": f"{source.source}, {name}",
            "dataset_split": name,
            "dataset_args": source.options or None,
        }
        if figures["accuracy"] is not None:
            about = {
                "interval_95": list(figures["accuracy_95"]),
                "prompts": figures["judged"],
                "scorer": figures["scorer"],
            }
            accuracy = {"metric_value": figures["accuracy"], "metric_name": f"accuracy, {how}", "metric_args": about}
            found.append(EvalResult(metric_type="accuracy", **accuracy, **where))
        if figures.get("reverse_kl") is not None:
            about = {"interval_95": list(figures["reverse_kl_95"]), "prompts": figures["kl_responses"]}
            kl = {"metric_value": figures["reverse_kl"], "metric_name": KL_LABEL, "metric_args": about}
            found.append(EvalResult(metric_type="reverse_kl", **kl, **where))
    return found


def on_hub(source: str) -> bool:
    """Whether a name may be one of the hub's; it isn't asked."""
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists()


def licence(base: ModelRef) -> str | None:
    """The licence that the base model's own card names, where one lies in its folder."""
    try:
        found = FRONT_MATTER.match((Path(base.path) / "README.md").read_text())
        told = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = told.get("license") if isinstance(told, dict) else None
    return name if isinstance(name, str) else None


def chats(model: Model, base: ModelRef) -> bool:
    """Whether prompts go through a chat template."""
    folder = Path(base.path)
    has_template = (folder / "chat_template.jinja").exists() or (
        (told := folder / "tokenizer_config.json").exists() and "chat_template" in json.loads(told.read_text())
    )
    return has_template if model.chat is None else model.chat


def share(value: float, interval: Sequence[float]) -> str:
    """A share and its interval."""
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def nats(value: float, interval: Sequence[float]) -> str:
    """Nats and their interval."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


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
