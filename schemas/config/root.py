"""The whole file: its sections, and what must fit between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from schemas.config.evaluate import Evaluate
from schemas.config.model import Model
from schemas.config.objective import RECIPES, Candidates, Hybrid, IwOpd, Objective, Own, RatioClipped
from schemas.config.options import OWN_CODE
from schemas.config.presets import with_presets
from schemas.config.prompts import Prompts
from schemas.config.rollouts import Rollouts
from schemas.config.scores import Audit, Coverage, Scores
from schemas.config.section import Section, Text
from schemas.config.sft import Sft
from schemas.config.train import Train
from schemas.config.weights import Weights
from schemas.secrets import secrets

RUN_NAME = r"^\w[\w.-]*$"
"""A folder's name that leads nowhere else, is not hidden, and is no option of a command."""


class Config(Section):
    """The whole file."""

    run: str = Field(
        "default",
        pattern=RUN_NAME,
        max_length=100,
        description="name of the run: letters, digits, `_`, `.` and `-`, the first a letter, a digit or `_`; results are under "
        "runs/<run>",
    )
    seed: int = Field(1, ge=0, description="seed of prompts, sampling and order")
    cache: Text = Field(
        "~/.cache/offline-opd",
        description="prepared models and teacher scores, shared by runs; the variable OPD_CACHE overrides it",
    )
    reuse: tuple[Text, ...] = Field(
        (),
        description="folders of runs whose rollouts and teacher scores this run's first rounds take over, whatever the "
        "student that sampled them; rounds beyond theirs are sampled and scored. Sections that are not named come from the "
        "first one's config",
    )
    cache_remote: Text | None = Field(
        None,
        description="an fsspec location (s3://..., gs://..., a shared folder) to find entries of the cache in and to copy new "
        "ones to; `${NAME}` in it is a variable of the environment, for a password: the config holds none",
    )
    cache_keys: tuple[Text, ...] = Field(
        (),
        description="PEM files of Ed25519 keys, for a cache that others can write to (pip install 'offline-opd[sign]'): what "
        "none of them signed is refused, and what the run makes is signed with the first private one",
    )
    prompts: Prompts
    student: Model
    teacher: Model
    sft: Sft = Sft()
    rollouts: Rollouts = Rollouts()
    scores: Scores = Scores()
    audit: Audit = Audit()
    coverage: Coverage = Field(Coverage(), description="gate before training")
    objective: Objective = Hybrid()
    weights: Weights = Weights()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @property
    def held_out(self) -> int:
        """How many prompts the held-out split has."""
        return int(getattr(self.prompts.splits, self.evaluate.split))

    @model_validator(mode="before")
    @classmethod
    def _as_the_recipe_has_it(cls, values: Any) -> Any:
        return with_presets(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _holds_no_credentials(cls, values: Any) -> Any:
        # The first of all validators, which pydantic runs from the last: errors of others show what was found.
        if found := ", ".join(f"`{key}`" for key in dict.fromkeys(secrets(values))):
            raise ValueError(
                f"{found} holds a credential, and runs keep, show and log their config: leave it to the environment (the file "
                "system's own variables, HF_TOKEN, WANDB_API_KEY, ...); in `cache_remote` write ${NAME} for the variable NAME"
            )
        return values

    @model_validator(mode="after")
    def _there_is_something_to_evaluate(self) -> "Config":
        split = f"prompts.splits.{self.evaluate.split}"
        if not self.held_out:
            raise ValueError(
                f"`evaluate.split: {self.evaluate.split}` needs held-out prompts, but `{split}` is 0: give it some, or "
                "evaluate on another split"
            )
        if (self.evaluate.kl_items or 0) > self.held_out:
            raise ValueError(
                f"`evaluate.kl_items: {self.evaluate.kl_items}` is more than `{split}` holds, which is {self.held_out}; lower "
                "it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_run_reuses_itself(self) -> "Config":
        own = Path("runs", self.run).resolve()
        for given in self.reuse:
            there = Path(given).expanduser().resolve()
            if own in (there, *there.parents):
                raise ValueError(
                    f"`reuse: {given}` is this run's own folder, `run: {self.run}`; give the run another name"
                )
        return self

    @model_validator(mode="after")
    def _a_round_has_no_prompt_twice(self) -> "Config":
        if not self.reuse and self.rollouts.prompts > self.prompts.splits.train:
            raise ValueError(
                f"`rollouts.prompts: {self.rollouts.prompts}` is more than `prompts.splits.train` holds, which is "
                f"{self.prompts.splits.train}; lower it, or raise that (several responses to a prompt are `rollouts.samples`)"
            )
        return self

    @model_validator(mode="after")
    def _there_are_prompts_for_the_teacher(self) -> "Config":
        if self.sft.prompts > self.prompts.splits.train:
            raise ValueError(
                f"`sft.prompts: {self.sft.prompts}` is more than `prompts.splits.train` holds, which is "
                f"{self.prompts.splits.train}; lower it, or take `sft.samples` of each"
            )
        return self

    @model_validator(mode="after")
    def _float16_cannot_train(self) -> "Config":
        if self.student.dtype == "float16":
            raise ValueError(
                "`student.dtype`: float16 overflows in training without loss scaling; use bfloat16 or float32"
            )
        return self

    @model_validator(mode="after")
    def _only_students_are_tuned(self) -> "Config":
        if self.teacher.tuned_on is not None:
            raise ValueError(
                f"`teacher.tuned_on: {self.teacher.tuned_on}` is a key of the student: whose samples it was fine-tuned on"
            )
        return self

    @model_validator(mode="after")
    def _iw_opd_weighs(self) -> "Config":
        if isinstance(self.objective, IwOpd) and self.weights.scheme == "uniform":
            raise ValueError(
                "`weights.scheme: uniform` makes `objective.recipe: iw_opd` the plain sampled path; weigh by iw_opd, or use "
                "`recipe: sampled`"
            )
        return self

    @model_validator(mode="after")
    def _credit_is_read(self) -> "Config":
        if self.weights.credit != "immediate" and not self.objective.reads_credit:
            readers = [name for name, kind in RECIPES.items() if kind.reads_credit]
            raise ValueError(
                f"`weights.credit: {self.weights.credit}` means nothing to `objective.recipe: {self.objective.recipe}`; it is "
                f"read by {', '.join(readers)}; use one of these or `weights.credit: immediate`"
            )
        return self

    @model_validator(mode="after")
    def _a_group_has_others(self) -> "Config":
        if self.weights.credit == "group" and self.rollouts.samples == 1 and not self.reuse:
            raise ValueError(
                "`weights.credit: group` compares the responses to one prompt, but `rollouts.samples: 1` gives each a single "
                "one: set `rollouts.samples` to 2 or more, or use `weights.credit: baseline`, which compares those to other "
                "prompts"
            )
        return self

    @model_validator(mode="after")
    def _outcomes_have_references(self) -> "Config":
        if self.weights.judges and self.prompts.answer_field is None and not OWN_CODE.fullmatch(self.evaluate.scorer):
            raise ValueError(
                f"`weights.{'gate' if self.weights.gate.judges else 'reward'}` takes which responses are right, but "
                "`prompts.answer_field: null` leaves nothing to judge them by: name the field of the reference answers, or a "
                "scorer of your own that needs none (`evaluate.scorer: module:function`)"
            )
        return self

    @model_validator(mode="after")
    def _a_reward_is_computed_and_read(self) -> "Config":
        computed = self.weights.reward != "none"
        read = self.objective.reward > 0 or (
            computed and isinstance(self.objective, Own)
        )  # which has it as `batch.reward`
        if read != computed:
            raise ValueError(
                f"`objective.reward: {self.objective.reward:g}` and `weights.reward: {self.weights.reward}` don't go together: "
                "the second computes the advantages of the term whose coefficient is the first; set both, or none"
            )
        if self.weights.reward != "none" and self.rollouts.samples == 1 and not self.reuse:
            raise ValueError(
                f"`weights.reward: {self.weights.reward}` compares the outcomes of the responses to one prompt, but "
                "`rollouts.samples: 1` gives each a single one: set `rollouts.samples` to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _one_ratio(self) -> "Config":
        ratio_clip = self.objective.ratio_clip if isinstance(self.objective, RatioClipped) else None
        if ratio_clip is not None and self.weights.truncate is not None:
            raise ValueError(
                f"`objective.ratio_clip` and `weights.truncate: {self.weights.truncate:g}` would both multiply the loss by "
                "pi_theta / pi_sampler; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _raw_logits_need_log_z(self) -> "Config":
        raw = isinstance(self.objective, Candidates) and self.objective.unit_score == "mean_logit"
        if raw and not self.scores.log_z:
            raise ValueError(
                f"`objective.recipe: {self.objective.recipe}` with `unit_score: mean_logit` scores units by raw logits, which "
                "take the teacher's log Z beside its log-probs: set `scores.log_z: true`"
            )
        return self

    @model_validator(mode="after")
    def _student_support_is_recorded(self) -> "Config":
        if self.scores.support != "teacher" and not self.rollouts.top_k:
            raise ValueError(
                f"`scores.support: {self.scores.support}` needs the student's own candidates: set `rollouts.top_k`"
            )
        return self


def overridden(config: Config) -> list[str]:
    """What the config has otherwise than its recipe presets it: for people, one each."""
    found = {place: (attrgetter(place)(config), value) for place, value in config.objective.presets.items()}
    return [
        f"`{place}: {own}`, where `objective.recipe: {config.objective.recipe}` presets {value}"
        for place, (own, value) in found.items()
        if own != value
    ]


@dataclass(frozen=True)
class Tuning:
    """Whose samples the student was fine-tuned on, and how that is told."""

    source: str
    """Name of that teacher."""
    same: bool
    """Whether it is the run's own."""
    told_by: str
    """A key of the config, or the file of a checkpoint that says so."""


def declared(config: Config) -> Tuning | None:
    """What the config alone tells: by `sft` it is the run's own teacher, else what `student.tuned_on` names."""
    tuned_on, teacher = config.student.tuned_on, config.teacher.model
    if config.sft.prompts:
        return Tuning(teacher, True, "sft")
    return None if tuned_on is None else Tuning(tuned_on, tuned_on == teacher, "student.tuned_on")


def credit_in_part(config: Config) -> str | None:
    """Why credit assignment doesn't act on all that is trained on: a sentence for people; None where it does, or is none."""
    if config.weights.credit == "immediate" or "1:1" in config.objective.sampled:
        return None
    return (
        f"`weights.credit: {config.weights.credit}` acts on units longer than a token alone: at all others "
        f"`objective.recipe: {config.objective.recipe}` compares candidates, which have no credit; `sampled` and `lightning` "
        "have it everywhere"
    )


def consistency(config: Config, tuning: Tuning | None) -> str | None:
    """Why the student and the teacher may not fit, and the remedy: a sentence for people; None where nothing tells against
    them.

    Teacher consistency (Lightning OPD, arXiv 2604.13010): distilling a student from another teacher than the one it was
    fine-tuned on leaves a persistent bias. Lightning OPD 2.0 (arXiv 2607.28449) takes that off by `weights.credit: residual`.
    """
    if tuning is None or tuning.same:
        return None
    residual = "`weights.credit: residual` (Lightning OPD 2.0, arXiv 2607.28449)"
    remedy = (
        f"{residual}, which is in use here, is the remedy"
        if config.weights.credit == "residual" and not credit_in_part(config)
        else f"the remedy is {residual} on the sampled path (`objective.recipe: lightning`), that teacher, or `sft`"
    )
    return (
        f"the student was fine-tuned on samples of {tuning.source} (`{tuning.told_by}`), and the teacher is "
        f"{config.teacher.model}: another one than in fine-tuning leaves a persistent bias (teacher consistency, Lightning "
        f"OPD, arXiv 2604.13010); {remedy}"
    )
