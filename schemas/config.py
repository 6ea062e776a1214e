"""The run's configuration: every key, its type, default and meaning. Errors name the key and say what it takes."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.errors import OpdError
from schemas.reuse import INHERITED, inherit, stored_config


class Section(BaseModel):
    """A mapping in the YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, always or where it isn't null."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


class Splits(Section):
    """How many source rows go where; the splits share no prompt."""

    examples: int = Field(4, ge=0, description="worked examples that templates can show a model")
    train: int = Field(320, ge=1, description="prompts that rollouts are sampled for, taken in order over the rounds")
    dev: int = Field(0, ge=0, description="prompts to choose settings on")
    test: int = Field(300, ge=0, description="held-out prompts that the report's figures come from")


class Prompts(Section):
    """Where prompts come from."""

    source: str = Field(
        description="`reasoning-gym:<dataset>`, a .jsonl, .jsonl.zst or .parquet file, or a dataset id of the hub"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the generator, or of `datasets.load_dataset` (name, split, ...)"
    )
    prompt_field: str = Field("prompt", description="field of the source that holds the question")
    answer_field: str | None = Field(
        "answer",
        description="field that holds the reference answer; null: there is none, and accuracy is not measured",
    )
    splits: Splits = Field(Splits(), description="how many rows go where")


VLLM_OPTIONS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_expert_parallel",
    "distributed_executor_backend",
    "disable_custom_all_reduce",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "cpu_offload_gb",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "attention_backend",
)
"""Arguments of `vllm.LLM` that say where and how fast it computes; those that say what (quantization, ...) stay out."""


class Model(Section):
    """A model and how it is prompted."""

    model: str = Field(
        description="hub id, local folder, or `pypi:<package>==<version>` of a package that ships a GGUF file"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="dtype of the forward pass; auto: bfloat16 where the machine computes in it, else float32 (where a run's "
        "machines differ, name one)",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what samples its rollouts or computes its scores; vllm: pip install 'offline-opd[vllm]'",
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of `vllm.LLM` that leave the result as it is: tensor_parallel_size, gpu_memory_utilization, "
        "max_num_seqs, ...; they are not part of a result's identity",
    )
    chat: bool | None = Field(
        None, description="wrap the prompt in the tokenizer's chat template; null: exactly when it has one"
    )
    system: str | None = Field(None, description="Jinja text of a system message (chat only)")
    prompt: str = Field(
        "{{ prompt }}",
        description="Jinja text of the prompt; knows `prompt`, `answer`, the source's other fields, and `examples` "
        "(a list of rows with the same names)",
    )
    stop: tuple[str, ...] = Field(
        (),
        description="strings that end a response beside the model's own end tokens: every token that starts with one stops",
    )

    tuned_on: str | None = Field(
        None,
        description="student only: `model` of the teacher whose samples it was fine-tuned on; the run warns where "
        "`teacher.model` is another one. null: not declared",
    )

    @model_validator(mode="after")
    def _system_needs_chat(self) -> "Model":
        if self.system is not None and self.chat is False:
            raise ValueError("`system` needs a chat template, but `chat` is false")
        return self

    @model_validator(mode="after")
    def _options_change_no_result(self) -> "Model":
        if self.engine_options and self.engine != "vllm":
            raise ValueError("`engine_options` are for `engine: vllm`")
        if unknown := self.engine_options.keys() - set(VLLM_OPTIONS):
            raise ValueError(f"`engine_options` takes {', '.join(VLLM_OPTIONS)}, found {', '.join(sorted(unknown))}")
        return self


class Rollouts(Section):
    """Sampling from the student."""

    rounds: int = Field(2, ge=1, description="rounds of sample, score, train; each starts from the last checkpoint")
    replay: int = Field(
        0,
        ge=0,
        description="rounds before it whose rollouts a round trains on too; their weights are made anew with the policy that "
        "the round starts from. `weights.truncate` or `objective.ratio_clip` corrects for their age",
    )
    prompts: int = Field(128, ge=1, description="train prompts per round")
    samples: int = Field(1, ge=1, description="responses per prompt")
    max_new_tokens: int = Field(16, ge=1, description="tokens per response at most")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass")
    top_k: int = Field(
        0, ge=0, description="the student's likeliest ids to record at each position, for `scores.support`"
    )
    shard_size: int = Field(1024, ge=1, description="responses per shard; a shard is one job")
    batch_size: int = Field(128, ge=1, description="responses generated at once")


class Scores(Section):
    """What is kept of the teacher."""

    support: Literal["teacher", "student", "union"] = Field(
        "teacher",
        description="whose likeliest tokens are the candidates; `student` and `union` need `rollouts.top_k`",
    )
    min_p: float = Field(0.0005, ge=0, lt=1, description="candidates are kept that are at least so likely,")
    mass: float = Field(1.0, gt=0, le=1, description="until they hold this much of the mass,")
    k_max: int = Field(128, ge=1, description="but never more than this many")
    log_z: bool = Field(
        False,
        description="keep the teacher's log Z at each token too, 4 bytes: what `objective.recipe: simct_released` needs beside "
        "log-probs",
    )
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per forward pass")


class Audit(Section):
    """A second look at some of the scores when a shard of them is made; differences are kept in its manifest."""

    responses: int = Field(4, ge=0, description="responses per shard that are scored again, one by one; 0: none")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the second look; choose the teacher's own where memory is short"
    )
    max_delta: float = Field(5.0, gt=0, description="nats; a log-prob that differs by more stops the run")
    max_mean_delta: float = Field(0.3, gt=0, description="nats; differences that are larger on average stop the run")


class Coverage(Section):
    """What a round must reach before anything is trained on it; shares of student tokens."""

    min_compared: float = Field(0.5, ge=0, le=1, description="tokens in units that carry loss (not masked), at least")
    min_one_to_one: float = Field(0.3, ge=0, le=1, description="tokens in 1:1 units and stops, at least")
    min_shared_mass: float = Field(
        0.9, ge=0, le=1, description="share of the teacher's kept mass that has a student id, at least"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "simct_released": {"unit_score": "mean_logit"},
    "forward_kl": {"direction": "forward"},
    "jsd": {"direction": "jsd"},
    "kbucket": {"support": "bucket"},
    "lightning": {"clip": 10.0},
    "dpca": {"clip": 10.0, "max_unit": 6},
    "dpca_additive": {"clip": 10.0, "max_unit": 6},
}
"""What a recipe sets where the config says nothing; else the keys' own defaults hold."""

_DIVERGENCE, _PATH = {"direction", "support", "tau", "beta"}, {"clip", "max_unit"}
_RATIO = {"ratio_clip", "trust_region"}
READS: dict[str, set[str]] = {
    "hybrid": _DIVERGENCE | _PATH | _RATIO,
    "simct": {"direction", "unit_score", "mask_first", "tau", "beta", "max_unit"},
    "simct_released": {"direction", "mask_first", "tau", "beta", "max_unit"},
    "strict_1to1": _DIVERGENCE,
    "forward_kl": {"support", "tau"},
    "jsd": {"support", "tau", "beta"},
    "kbucket": {"direction", "beta"},
    "sampled": _PATH | _RATIO,
    "lightning": _PATH | _RATIO,
    "iw_opd": _PATH | _RATIO,
    "vopd": _PATH,
    "dpca": _PATH,
    "dpca_additive": _PATH,
    "cr_opd": _PATH | {"cr_alpha", "cr_eps"},
}
"""The keys that change what a recipe does; any other must be left at its preset."""

_LENIENT = {"hybrid", "simct", "strict_1to1", "sampled"}
_SHARED = {("direction", "forward"), ("unit_score", "sum"), ("support", "bucket")}


class Objective(Section):
    """The loss."""

    recipe: Literal[
        "hybrid",
        "simct",
        "simct_released",
        "strict_1to1",
        "forward_kl",
        "jsd",
        "kbucket",
        "sampled",
        "lightning",
        "iw_opd",
        "vopd",
        "dpca",
        "dpca_additive",
        "cr_opd",
    ] = Field(
        "hybrid",
        description="hybrid: KL on 1:1 and stop units, sampled path on the rest | simct: KL over shared tokens and the "
        "realised unit, everywhere | simct_released: simct with `unit_score: mean_logit`, as in its authors' code, needs "
        "`scores.log_z` | strict_1to1: KL on 1:1 and stop units only | forward_kl, jsd, kbucket: strict_1to1 "
        "with `direction: forward`, `direction: jsd`, `support: bucket` | sampled: the sampled path everywhere | lightning: "
        "sampled with `clip: 10` (Lightning OPD; its paper has `weights.scheme: uniform`) | iw_opd: sampled, and "
        "`weights.scheme` must weigh | vopd: sampled less the KL as a baseline | dpca, dpca_additive: sampled, a unit's "
        "advantage spread over its tokens in proportion to their surprisal or evenly, with `clip: 10` and `max_unit: 6` | "
        "cr_opd: sampled, and what a unit with a negative advantage loses goes to likely candidates (a hypothesis of a "
        "survey, without experiments)",
    )
    direction: Literal["reverse", "forward", "jsd", "entropy_gated"] = Field(
        "reverse",
        description="reverse: KL(student || teacher) | forward: the other way | jsd: generalised Jensen-Shannon | "
        "entropy_gated: forward where the teacher's entropy is above 0.8 nats, else reverse",
    )
    unit_score: Literal["mean", "sum", "mean_logit"] = Field(
        "mean",
        description="score of an n:m unit (SimCT): mean or sum of log-probs, or mean of raw logits (needs `scores.log_z`)",
    )
    mask_first: bool = Field(
        False,
        description="simct: take the first student token of an n:m unit out of the shared candidates; false: as in the "
        "authors' code it is a candidate beside the unit that it starts, and so counts twice",
    )
    support: Literal["renormalise", "bucket"] = Field(
        "renormalise", description="candidates renormalised (SimCT), or all else as one more class (a bound of full KL)"
    )
    clip: float = Field(
        5.0, gt=0, description="advantages of the sampled path (dpca: of each token) are clipped to +-clip nats"
    )
    ratio_clip: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="[low, high], such as [0.2, 0.28]: the sampled path's loss is PPO's, with r = pi_theta / pi_behavior of a "
        "unit clipped to 1 - low and 1 + high. It stands in for `weights.truncate`, and the two are refused together, which "
        "would count r twice. null: no ratio in the loss",
    )
    trust_region: float | None = Field(
        None,
        gt=0,
        description="nats; a unit of the sampled path whose |log r| is above it carries no loss, with or without "
        "`ratio_clip`; null: no limit",
    )
    tau: float = Field(1.0, gt=0, description="temperature of both sides of a renormalised divergence")
    beta: float = Field(
        0.5, gt=0, lt=1, description="`direction: jsd`: the teacher's share of the mixture; small: nearly forward KL"
    )
    cr_alpha: float = Field(0.5, ge=0, le=1, description="cr_opd: the teacher's share in where mass is routed")
    cr_eps: float = Field(0.001, ge=0, lt=1, description="cr_opd: candidates the student finds less likely get nothing")
    max_unit: int | None = Field(
        None, ge=1, description="units of more tokens than this on either side carry no loss; null: no limit"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("recipe"), str):
            return {**PRESETS.get(values["recipe"], {}), **values}
        return values

    @model_validator(mode="after")
    def _bucket_needs_a_distribution(self) -> "Objective":
        if self.support == "bucket" and self.recipe in ("simct", "simct_released"):
            raise ValueError(
                f"`support: bucket` does not go with `recipe: {self.recipe}`: at longer units the candidates already hold the "
                "realised unit's mass, so the classes overlap; use hybrid or strict_1to1"
            )
        return self

    @model_validator(mode="after")
    def _keys_mean_something(self) -> "Objective":
        preset = {name: field.default for name, field in type(self).model_fields.items()}
        preset |= PRESETS.get(self.recipe, {})
        for name, value in self:
            if name == "recipe" or name in READS[self.recipe] or value == preset[name]:
                continue
            # A file may hold these for several recipes, as it always could.
            if self.recipe in _LENIENT and (name == "clip" or (name, value) in _SHARED):
                continue
            raise ValueError(
                f"`{name}: {value}` means nothing to `recipe: {self.recipe}`, which reads "
                f"{', '.join(sorted(READS[self.recipe]))}"
            )
        if self.tau != 1 and self.support == "bucket":
            raise ValueError(
                f"`tau: {self.tau:g}` does not go with `support: bucket`: the mass of all else at another temperature is "
                "not known from its mass at 1; use `support: renormalise`"
            )
        if self.beta != preset["beta"] and self.direction != "jsd":
            raise ValueError(
                f"`beta: {self.beta:g}` is of `direction: jsd` and means nothing to `direction: {self.direction}`"
            )
        return self


class Weights(Section):
    """Importance weights and credit of units."""

    scheme: Literal["uniform", "iw_opd", "signed", "ideal", "prefix"] = Field(
        "iw_opd",
        description="uniform: all 1 | iw_opd: arXiv 2606.22600, less weight the more |advantage| lies before | signed: "
        "likewise, but advantages before cancel | ideal: (teacher's over student's prob. of all before)^alpha, over its mean "
        "at the same unit index in all shards of the phase | prefix: 1 on the first `prefix_share` of the units, 0 after",
    )
    gamma: float = Field(0.5, ge=0, description="strength of iw_opd and signed; 0 is uniform")
    alpha: float = Field(0.05, ge=0, description="exponent of ideal; 0 is uniform, 0.1 collapses within tens of tokens")
    prefix_share: float = Field(
        0.3, gt=0, le=1, description="share of a response's units that prefix keeps; 1 is uniform"
    )
    truncate: float | None = Field(
        None,
        gt=0,
        description="truncated importance sampling, a factor min(pi_theta / pi_behavior, truncate) of any scheme's weight, "
        "with the pi_theta that the round starts from; matters to `reuse`d and replayed rollouts; not with "
        "`objective.ratio_clip`, whose loss has the ratio already; null: no factor",
    )
    credit: Literal["immediate", "return_to_go", "discounted", "baseline", "gae", "residual"] = Field(
        "immediate",
        description="what the sampled path of hybrid, sampled, lightning and iw_opd multiplies log-probs by. immediate: a "
        "unit's own advantage | return_to_go: the sum from it on | discounted: likewise, by `discount` a unit | baseline: "
        "return_to_go less the mean of the phase's other responses at the same unit index | gae: generalised advantages "
        "with a value cross-fitted over the phase's responses (a hypothesis of arXiv 2606.22793) | residual: a unit's own "
        "advantage less what is usual for its token id and for its position and surprisal, cross-fitted likewise (Lightning "
        "OPD 2.0, arXiv 2607.28449; for a student that was fine-tuned on another teacher's samples)",
    )
    discount: float = Field(0.99, ge=0, le=1, description="of discounted and gae, per unit; 1: none")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of gae; 0: one step and the value, 1: all and the value")
    scheduler: str = Field(
        "local",
        description="what computes weights: local, shard after shard in one process, or the address of a dask scheduler, "
        "tcp://<host>:<port>; the result is the same, and not identified by it",
    )

    @field_validator("scheduler")
    @classmethod
    def _local_or_an_address(cls, value: str) -> str:
        if value != "local" and not re.fullmatch(r"tcp://([^\s/:\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}", value):
            raise ValueError("takes `local` or the address of a dask scheduler, tcp://<host>:<port>")
        return value

    def identity(self) -> dict[str, Any]:
        """What of it determines the weights."""
        return self.model_dump(exclude={"scheduler"})


class Lora(Section):
    """Low-rank adapters."""

    rank: int = Field(16, ge=1, description="rank of each update")
    alpha: int = Field(32, ge=1, description="updates are scaled by alpha / rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="names of the modules that get one, such as [q_proj, v_proj]; all-linear: every linear layer but the head",
    )


TRAIN_OPERATION = {"gradient_checkpointing", "save_every", "keep_states", "trackers"}
"""Keys of `train` that leave the trained weights as they are, so a round need not be trained again for them."""


class Train(Section):
    """The optimiser."""

    learning_rate: float = Field(4e-5, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(4, ge=0, description="linear warm-up, in steps of the whole run")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate after the warm-up, over the whole run; constant: the peak"
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the peak that linear and cosine end at, at the run's last step"
    )
    batch_size: int = Field(16, ge=1, description="responses per step")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="padded tokens per forward pass, prompt and response; one response at least"
    )
    epochs: int = Field(1, ge=1, description="passes over a round's rollouts, which are its budget of steps")
    min_ess: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="end a round before its budget is spent once the effective sample size over the last steps' units of the "
        "policy in training over the one that the round started from falls below this share; the next round samples from there "
        "and may spend what was left. null: never",
    )
    grad_clip: float = Field(1.0, gt=0, description="gradient norm at most")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moments")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of an exponential moving average of the weights, which then is what a round ends with and "
        "what is sampled next; the optimiser goes on from the weights themselves; null: none",
    )
    lora: Lora | None = Field(
        None,
        description="train adapters instead of all weights (pip install 'offline-opd[lora]'; `{}`: with the defaults below); "
        "a round's checkpoint has them merged, the next round goes on with the same adapters; null: all weights",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute layers again in backward instead of keeping what is in them: less memory, more time"
    )
    save_every: int = Field(50, ge=1, description="steps between resumable states")
    keep_states: int = Field(2, ge=1, description="newest states of a round that are kept, the final one included")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="where each step's figures go beside train/metrics.jsonl: tensorboard (runs/<run>/tensorboard), wandb, "
        "trackio; pip install 'offline-opd[trackers]'",
    )

    @model_validator(mode="after")
    def _constant_does_not_decay(self) -> "Train":
        if self.schedule == "constant" and self.min_lr_ratio != type(self).model_fields["min_lr_ratio"].default:
            raise ValueError(f"`min_lr_ratio: {self.min_lr_ratio:g}` means nothing to `schedule: constant`")
        return self


class Evaluate(Section):
    """How before and after are measured."""

    split: Literal["test", "dev"] = Field("test", description="held-out split")
    kl_items: int | None = Field(
        None,
        ge=0,
        description="prompts of it on which the on-policy reverse KL is measured, which takes the teacher; null: 100, or "
        "all where it holds fewer, or 0 with `reuse`",
    )
    extract: Literal["last_number", "whole"] = Field("last_number", description="what of the response is the answer")


class Config(Section):
    """The whole file."""

    run: str = Field("default", pattern=r"^[\w.-]+$", description="name of the run; results are under runs/<run>")
    seed: int = Field(1, ge=0, description="seed of prompts, sampling and order")
    cache: str = Field(
        "~/.cache/offline-opd",
        description="prepared models and teacher scores, shared by runs; the variable OPD_CACHE overrides it",
    )
    reuse: tuple[str, ...] = Field(
        (),
        description="folders of runs whose rollouts and teacher scores this run's first rounds take over, whatever the "
        "student that sampled them; rounds beyond theirs are sampled and scored. Sections that are not named come from the "
        "first one's config",
    )
    cache_remote: str | None = Field(
        None,
        description="an fsspec location (s3://..., gs://..., a shared folder) to find scores in and to copy new ones to",
    )
    prompts: Prompts
    student: Model
    teacher: Model
    rollouts: Rollouts = Rollouts()
    scores: Scores = Scores()
    audit: Audit = Audit()
    coverage: Coverage = Field(Coverage(), description="gate before training")
    objective: Objective = Objective()
    weights: Weights = Weights()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()

    @property
    def held_out(self) -> int:
        """How many prompts the held-out split has."""
        return int(getattr(self.prompts.splits, self.evaluate.split))

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
        if self.objective.recipe == "iw_opd" and self.weights.scheme == "uniform":
            raise ValueError(
                "`weights.scheme: uniform` makes `objective.recipe: iw_opd` the plain sampled path; weigh by iw_opd, or use "
                "`recipe: sampled`"
            )
        return self

    @model_validator(mode="after")
    def _one_ratio(self) -> "Config":
        if self.objective.ratio_clip is not None and self.weights.truncate is not None:
            raise ValueError(
                f"`objective.ratio_clip` and `weights.truncate: {self.weights.truncate:g}` would both multiply the loss by "
                "pi_theta / pi_behavior; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _raw_logits_need_log_z(self) -> "Config":
        if self.objective.unit_score == "mean_logit" and not self.scores.log_z:
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


def consistency(config: Config) -> str | None:
    """Why the student and the teacher may not fit, and the remedy: a sentence for people; None where nothing is declared
    against them.

    Teacher consistency (Lightning OPD, arXiv 2604.13010): distilling a student from another teacher than the one it was
    fine-tuned on leaves a persistent bias. Lightning OPD 2.0 (arXiv 2607.28449) takes that off by `weights.credit: residual`.
    """
    tuned_on, teacher = config.student.tuned_on, config.teacher.model
    if tuned_on is None or tuned_on == teacher:
        return None
    remedy = (
        "`weights.credit: residual` (Lightning OPD 2.0, arXiv 2607.28449), which is in use here, is the remedy"
        if config.weights.credit == "residual"
        else "the remedy is `weights.credit: residual` (Lightning OPD 2.0, arXiv 2607.28449), or that teacher"
    )
    return (
        f"the student was fine-tuned on samples of {tuned_on} (`student.tuned_on`), and the teacher is {teacher}: another one "
        f"than in fine-tuning leaves a persistent bias (teacher consistency, Lightning OPD, arXiv 2604.13010); {remedy}"
    )


def parse_config(values: Any, where: str) -> Config:
    """Validate a mapping read from `where` (a file's name), with what it takes from the run that it reuses.

    Raises OpdError naming each wrong key.
    """
    if not isinstance(values, dict):
        raise OpdError(f"{where}: expected a mapping of keys, found {type(values).__name__}")
    try:
        return Config.model_validate(inherit(values, where))
    except ValidationError as error:
        wrong = [_explain(e) for e in error.errors()]
        taken = [name for name in INHERITED if name not in values and any(f"`{name}" in text for text in wrong)]
        if taken and (stored := stored_config(values)):
            gone = "" if stored.is_file() else ", which isn't there"
            wrong.append(f"what a run with `reuse` doesn't name comes from {stored}{gone}")
        raise OpdError(f"{where}: " + "; ".join(wrong)) from error


def load_config(path: str | Path) -> Config:
    """Read a YAML file. Raises OpdError naming the file, and the line or key that is wrong."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OpdError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OpdError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_config(values, str(path))


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Config
        for part in error["loc"][:-1]:
            known = section(known.model_fields[part].annotation)  # type: ignore[assignment]
        return f"unknown key `{key}`; known keys here: {', '.join(known.model_fields)}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"`{key}`: {message[:1].lower()}{message[1:]}, found {error['input']!r}"
