"""What of the config decides each stage's result: one table, from which the Snakefile's rules and the stages both take it.

A stage opens its config through `settings`, which has no other keys than those that the table names for it: one that is read
without being declared is an error at once, so a rule can't miss a change that its stage would see. What a shard's manifest
says of the config, and when Snakemake makes it anew, are both `decided`.

Keys are `section.key`, or `section` for all of it. What the config gives round by round (`rollouts.max_new_tokens`) a phase
has as its own value, so a change for a later round leaves the earlier ones valid. Beside the keys that decide, a stage may read
keys that say how it works and leave its result as it is, but for the last bits of a sum.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from schemas.config import SFT_OPTIMISER, TRAIN_OPERATION, Config, Evaluate, Judged, Section
from schemas.config.section import variants

Part = TypeVar("Part", bound=Section)


@dataclass(frozen=True)
class Keys:
    """Keys of the config that a stage reads: those that decide its result, and those that only say how it works."""

    decide: tuple[str, ...] = ()
    operate: tuple[str, ...] = ()

    def __add__(self, other: "Keys") -> "Keys":
        return Keys(self.decide + other.decide, self.operate + other.operate)


def _computes(role: str) -> Keys:
    """A model's forward pass. Its revision and stops are told by its prepared files."""
    return Keys((f"{role}.model", f"{role}.dtype"), (f"{role}.attn_implementation",))


def _prompted(role: str) -> Keys:
    """A model's prompts."""
    keys = ("model", "chat", "chat_template_kwargs", "system", "prompt", "prefill")
    return Keys(tuple(f"{role}.{key}" for key in keys))


def _conversed(role: str) -> Keys:
    """A model's prompts and responses, in which it says roles."""
    return _prompted(role) + Keys((f"{role}.roles",))


def _on_engine(role: str) -> Keys:
    """Which code computes, and where it does so."""
    return Keys((f"{role}.engine",), (f"{role}.engine_options",))


def _named(role: str) -> Keys:
    """A model whose prepared files are inputs; its name is for messages."""
    return Keys((), (f"{role}.model",))


_ROUND = Keys(("rollouts.prompts", "rollouts.samples"))

STAGES: dict[str, Keys] = {
    "prompts": Keys(("prompts", "seed"), ("evaluate",)),
    "also": Keys(("evaluate.also", "seed")),
    "models student": Keys(("student.model", "student.revision", "student.stop", "student.roles")),
    "models teacher": Keys(("teacher.model", "teacher.revision", "teacher.stop", "teacher.roles", "reuse")),
    "fit": _prompted("student")
    + _prompted("teacher")
    + Keys(
        (
            "reuse",
            "evaluate.split",
            "evaluate.kl_items",
            "evaluate.also",
            "rollouts.rounds",
            "rollouts.prompts",
            "rollouts.max_new_tokens",
            "rollouts.top_k",
            "sft.prompts",
            "sft.max_new_tokens",
            *(f"evaluate.{key}" for key in Judged.model_fields),
            "prompts.source",
            "weights.gate",
            "weights.reward",
        )
    ),
    "reuse": _conversed("student") + Keys(("reuse",)),
    "answers": _computes("teacher")
    + _conversed("teacher")
    + _on_engine("teacher")
    + Keys(
        (
            "seed",
            *(f"sft.{key}" for key in ("prompts", "samples", "temperature", "top_p")),
            "rollouts.max_new_tokens",
            "rollouts.shard_size",
            "rollouts.shard_tokens",
        ),
        ("teacher.revision", "rollouts.batch_size", "cache_remote"),
    ),
    "retokenise": _conversed("student")
    + _named("teacher")
    + Keys(("sft.right_only", *(f"evaluate.{key}" for key in Judged.model_fields), "prompts.source")),
    "sft": _computes("student")
    + Keys(
        (
            *(f"sft.{key}" for key in SFT_OPTIMISER),
            *(
                f"train.{key}"
                for key in Config.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]
                if key not in (*TRAIN_OPERATION, *SFT_OPTIMISER, "min_ess")
            ),
            "seed",
        ),
        tuple(f"train.{key}" for key in sorted(TRAIN_OPERATION)),
    ),
    "rollouts": _computes("student")
    + _conversed("student")
    + _on_engine("student")
    + Keys(
        (
            "seed",
            "rollouts.max_new_tokens",
            "rollouts.temperature",
            "rollouts.top_p",
            "rollouts.top_k",
            "rollouts.shard_size",
            "rollouts.shard_tokens",
        ),
        ("rollouts.batch_size", "cache_remote"),
    ),
    "scores": _computes("teacher")
    + _conversed("teacher")
    + _on_engine("teacher")
    + _named("student")
    + Keys(
        ("scores.support", "scores.min_p", "scores.mass", "scores.k_max", "scores.log_z"),
        ("teacher.revision", "scores.batch_tokens", "audit", "cache_remote"),
    ),
    "units": _named("student") + _named("teacher"),
    "policy": _computes("student") + _on_engine("student") + Keys((), ("scores.batch_tokens",)),
    "reference": _computes("student") + _on_engine("student") + Keys((), ("scores.batch_tokens",)),
    "outcomes": Keys((*(f"evaluate.{key}" for key in Judged.model_fields), "prompts.source")),
    "weights": Keys(
        (
            *(f"weights.{key}" for key in Config.model_fields["weights"].annotation.model_fields if key != "scheduler"),  # type: ignore[union-attr]
            *(f"objective.{key}" for key in ("recipe", "clip", "ratio_clip")),
        ),
        ("weights.scheduler",),
    ),
    "coverage": _named("student") + Keys(("coverage",)),
    "train": _computes("student")
    + _ROUND
    + Keys(
        (
            "objective",
            *(
                f"train.{key}"
                for key in Config.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]
                if key not in TRAIN_OPERATION
            ),
            "seed",
            "rollouts.rounds",
            "rollouts.replay",
        ),
        ("audit.required", *(f"train.{key}" for key in sorted(TRAIN_OPERATION))),
    ),
    "diagnostics": Keys(("objective", "weights", "teacher.model", "student.tuned_on")),
    "evaluate": _computes("student")
    + _conversed("student")
    + _on_engine("student")
    + Keys(
        (
            # Whether a checkpoint is measured changes nothing of how.
            *(f"evaluate.{key}" for key in Evaluate.model_fields if key != "every_round"),
            "prompts.source",
            "rollouts.max_new_tokens",
            "seed",
        ),
        ("rollouts.batch_size", "train.batch_size", "train.micro_batch_tokens"),
    ),
    "report": Keys(tuple(name for name in Config.model_fields if name not in ("cache", "cache_remote", "cache_keys"))),
}
"""By stage; `models` by role too."""

ROUND: dict[str, Keys] = {"rollouts": _ROUND}
"""What a stage reads beside that in phases whose rollouts are trained on,"""
EVAL: dict[str, Keys] = {"rollouts": Keys(("evaluate.split", "evaluate.kl_items"))}
"""and in phases that only measure."""


def keys(stage: str, phase: str = "") -> Keys:
    """What a stage reads; `phase` by name, where the stage works on one."""
    special = EVAL if phase.startswith("eval") else ROUND if phase.startswith("round") else {}
    return STAGES[stage] + special.get(stage, Keys())


def settings(config: Config, stage: str, phase: str = "") -> Config:
    """The config as a stage sees it: only keys that it has declared are there, any other is an AttributeError."""
    declared = keys(stage, phase)
    return _only(of_phase(config, phase), {*declared.decide, *declared.operate})


def decided(config: Config, stage: str, phase: str = "") -> dict[str, Any]:
    """The JSON-able values that decide a stage's result, nested like the config."""
    return _only(of_phase(config, phase), set(keys(stage, phase).decide)).model_dump(mode="json", warnings=False)


def of_phase(config: Config, phase: str) -> Config:
    """The config with one horizon, that of the round which the phase's rollouts are of; of evaluation the longest, and without
    what takes outcomes, which only responses that are trained on have."""
    options, weights, numbers = config.rollouts, config.weights, re.findall(r"\d{1,9}", phase)
    if phase.startswith("eval"):
        horizon, weights = options.longest, weights.unjudged
    elif phase == "sft":
        horizon = config.sft.horizon(options)
    elif numbers:
        horizon = options.horizon(int(numbers[-1]))  # round-2@1 replays round 1
    else:  # no phase, or what the run will refuse as the name of none
        return config
    rollouts = options.model_copy(update={"max_new_tokens": horizon})
    return config.model_copy(update={"rollouts": rollouts, "weights": weights})


def _only(config: Config, wanted: set[str]) -> Config:
    """A config without validation that has nothing but the wanted keys. Raises KeyError for a key that is none."""
    if unknown := wanted - set(_paths(config)):
        raise KeyError(f"no such keys in the config: {', '.join(sorted(unknown))}")
    kept: dict[str, Any] = {}
    for name, value in config:
        if name in wanted:
            kept[name] = value
        elif isinstance(value, Section) and (inner := [key for key, _ in value if f"{name}.{key}" in wanted]):
            kept[name] = _construct(type(value), {key: getattr(value, key) for key in inner})
    return _construct(Config, kept)


def _construct(kind: type[Part], values: dict[str, Any]) -> Part:
    """As `model_construct`, but without defaults for what is missing."""
    made = cast(Part, kind.model_construct(_fields_set=set(values), **values))
    for name in made.__dict__.keys() - values.keys():
        del made.__dict__[name]
    return made


def _paths(config: Config) -> Iterator[str]:
    """All sections and keys; of a section that is one of several kinds, those of every kind: another may lack them."""
    for name, value in config:
        yield name
        if isinstance(value, Section):
            kinds = variants(Config.model_fields[name].annotation).values() or (type(value),)
            yield from (f"{name}.{key}" for kind in kinds for key in kind.model_fields)
