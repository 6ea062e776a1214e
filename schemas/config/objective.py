"""The loss: a section for each recipe, with the keys that it reads, and what its paper has for them and for other sections.

A recipe is a class here, listed in `Objective`, and its line in `train.recipes.RECIPES`. `opd recipes` prints what the classes
say of themselves.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from schemas.config.options import OWN_CODE
from schemas.config.section import Section, variants

Direction = Literal["reverse", "forward", "jsd", "entropy_gated"]
Tail = Literal["renormalise", "bucket"]
UnitScore = Literal["mean", "sum", "mean_logit"]
Tau = Annotated[float, Field(ge=0.01, le=100, description="temperature of both sides of a renormalised divergence")]
Beta = Annotated[
    float,
    Field(
        ge=1e-6,
        lt=1,
        description="`direction: jsd` and `recipe: jsd`: the teacher's share of the mixture; small: nearly forward KL",
    ),
]
Clip = Annotated[
    float,
    Field(
        gt=0,
        description="nats; a unit's own advantage log p_T - log p_S is clipped to +-clip, before credit is formed of it and "
        "not after: what `weights.credit` adds up is clipped advantages (vopd: the advantage with its baseline; dpca: each "
        "token's share)",
    ),
]
MaxUnit = Annotated[
    int | None,
    Field(ge=1, description="units of more tokens than this on either side carry no loss; null: no limit"),
]
RatioClip = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0)]] | None,
    Field(
        description="[low, high], such as [0.2, 0.28]: the sampled path's loss is PPO's, with r = pi_theta / pi_sampler of a "
        "unit (dpca: of a token) clipped to 1 - low and 1 + high; the sampler's temperature and top-p count, so that away from "
        "1 r doesn't start at 1. It stands in for `weights.truncate`, and the two are refused together, which would count r "
        "twice. null: no ratio in the loss"
    ),
]
OWN = "module:function"
"""Tag of a recipe of the user's own."""
HERE = "this project"
"""Source of a recipe that is no paper's."""
WIDE: Mapping[str, Any] = {"scores.min_p": 0.0, "scores.mass": 1.0, "scores.k_max": 1024}
"""Candidates where the source compares whole vocabularies: about 2.2 kB a teacher token (`docs/cache.md`)."""
_OF_WIDE = "compares all {}; here the teacher's `scores.k_max` likeliest ones"
_CLIP = "no clip of the advantage is stated; here +-5 nats"
_LIVE = "the advantage is of the policy as it is now; that of the policy that sampled is stated nowhere we could read"


class Recipe(Section):
    """What one may ask of any recipe.

    A preset is a key of another section, `section.key`, as the recipe's source has it; it applies where a config doesn't name
    that key. Presets are of what makes the gradient and of which rollouts it is taken on; models, learning rates, batches,
    lengths and sampling temperatures are of a paper's experiments.
    """

    recipe: str
    select: Literal["entropy", "soft_or"] | None = Field(
        None,
        description="train on some units of each response only, as TIP does (arXiv 2604.14084). entropy: those where the "
        "student is least sure | soft_or: or far from the teacher, by h + d - h d of its entropy and reverse KL, each over the "
        "response's largest; both over the candidates and a class for all else. The loss is divided by all units as ever, and "
        "memory is not saved. null: all",
    )
    select_share: float = Field(
        0.5, gt=0, le=1, description="`select`: share of a response's units that carry loss; 1: all"
    )
    reward: float = Field(
        0.0,
        ge=0,
        description="coefficient of a reward term that is added to the loss of every compared unit, GRPO's for the advantage "
        "that `weights.reward` gives to its response: -min(r A, clip(r) A) of each of its tokens, r = pi_theta / pi_sampler "
        "(arXiv 2402.03300, without a KL of its own; like all of the loss it is divided by the step's compared units, not by "
        "each response's tokens first, so that longer responses count more). 0: none",
    )
    reward_clip: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0)]] = Field(
        (0.2, 0.2), description="`reward`: r is clipped to 1 - the first and 1 + the second"
    )
    reference_kl: float = Field(
        0.0,
        ge=0,
        description="coefficient of a divergence from a reference policy that is added to the loss of every compared unit, "
        "(log pi_theta / pi_reference)^2 / 2 of what was sampled, whose gradient on policy is that of KL(pi_theta || "
        "pi_reference), not quite that of what another policy or temperature sampled (one of StableOPD's cures of responses "
        "that grow long and repeat themselves, arXiv 2604.08527). 0: none",
    )
    reference: Literal["round", "initial"] = Field(
        "round",
        description="the reference policy of `reference_kl` and of exopd. round: the policy that a round starts from | "
        "initial: the one that the first round starts from, for all rounds: it reads each later round's responses once",
    )
    source: ClassVar[str] = HERE
    """What it is called where it is from, with the arXiv number."""
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "uniform"}
    departs: ClassVar[tuple[str, ...]] = ()
    """Where it is not what its source has, or the source says nothing."""
    estimator: ClassVar[str]
    """What the loss is a sum over, for `diagnostics.json`."""
    reads_credit: ClassVar[bool] = False
    """Whether `weights.credit` other than `immediate` changes the loss."""
    sampled: ClassVar[tuple[str, ...]] = ()
    """Kinds of unit whose loss is an estimate from what was sampled there, so that how it was sampled matters."""
    reads_candidates: ClassVar[bool] = False
    """Whether the teacher's candidates, which `scores` keeps, change the loss."""
    on_policy: ClassVar[bool] = True
    """Whether a policy of the student's sampled what it is trained on, so that ratios to that one say something."""

    @model_validator(mode="after")
    def _share_is_of_select(self) -> Self:
        if self.select is None and self.select_share != type(self).model_fields["select_share"].default:
            raise ValueError(f"`select_share: {self.select_share:g}` means nothing without `select`; set that too")
        return self

    @property
    def adds(self) -> bool:
        """Whether something is added to the recipe's own loss."""
        return self.reward > 0 or self.reference_kl > 0

    @property
    def refers(self) -> bool:
        """Whether the loss reads a reference policy."""
        return self.reference_kl > 0

    @model_validator(mode="after")
    def _reference_is_read(self) -> Self:
        if not self.refers and self.reference != type(self).model_fields["reference"].default:
            raise ValueError(f"`reference: {self.reference}` means nothing with `reference_kl: 0`; set that too")
        return self

    @model_validator(mode="after")
    def _reward_clip_is_of_reward(self) -> Self:
        if not self.reward and self.reward_clip != type(self).model_fields["reward_clip"].default:
            raise ValueError(f"`reward_clip: {list(self.reward_clip)}` means nothing with `reward: 0`; set that too")
        return self


class Candidates(Recipe):
    """Recipes that compare distributions over the teacher's candidates (`train.recipes.candidate_kl`)."""

    estimator: ClassVar[str] = "candidates"
    reads_candidates: ClassVar[bool] = True


class OneToOne(Candidates):
    """Candidates at units of one token only, whose score is the token's own log-prob."""

    unit_score: ClassVar[UnitScore] = "mean"
    mask_first: ClassVar[bool] = False


class Directed(Candidates):
    """Which divergence."""

    direction: Direction = Field(
        "reverse",
        description="reverse: KL(student || teacher) | forward: the other way | jsd: generalised Jensen-Shannon | "
        "entropy_gated: forward where the teacher's entropy is above 0.8 nats, else reverse",
    )
    beta: Beta = 0.5

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> Self:
        if self.beta != 0.5 and self.direction != "jsd":
            raise ValueError(
                f"`beta: {self.beta:g}` is of `direction: jsd` and means nothing to `direction: {self.direction}`"
            )
        return self


class Tailed(Candidates):
    """What becomes of the mass outside the candidates."""

    tail: Tail = Field(
        "renormalise",
        description="renormalise: over the candidates alone (SimCT) | bucket: all else as one more class, a lower bound of "
        "the full KL",
    )
    tau: Tau = 1.0

    @model_validator(mode="after")
    def _tau_is_of_renormalise(self) -> Self:
        if self.tau != 1 and self.tail != "renormalise":
            raise ValueError(
                f"`tau: {self.tau:g}` does not go with `tail: {self.tail}`: the mass of all else at another temperature is not "
                "known from its mass at 1; use `tail: renormalise`"
            )
        return self


class Limited(Recipe):
    """Long units may be left out."""

    max_unit: MaxUnit = None


class Clipped(Limited):
    """Recipes whose loss is an advantage times the log-prob of what was sampled."""

    estimator: ClassVar[str] = "sampled path"
    sampled: ClassVar[tuple[str, ...]] = ("1:1", "n:m", "stop")
    clip: Clip = 5.0


class RatioClipped(Clipped):
    """Recipes that may have the ratio to the policy that sampled in the loss."""

    ratio_clip: RatioClip = None


class SampledPath(RatioClipped):
    """Recipes with a unit's credit times its log-prob (`train.recipes.sampled_path`)."""

    reads_credit: ClassVar[bool] = True
    trust_region: float | None = Field(
        None,
        gt=0,
        description="nats; a unit of the sampled path whose |log r| is above it carries no loss, with or without "
        "`ratio_clip`; null: no limit",
    )


class Hybrid(SampledPath, Tailed, Directed, OneToOne):
    """KL over the candidates on 1:1 and stop units, the sampled path on longer ones."""

    recipe: Literal["hybrid"] = "hybrid"
    tail: Tail = Field("bucket", description=Tailed.model_fields["tail"].description)
    estimator: ClassVar[str] = "candidates and sampled path"
    sampled: ClassVar[tuple[str, ...]] = ("n:m",)


class EveryUnit(Limited, Directed):
    """SimCT's divergence at units of any length; at longer ones the candidates already hold mass of the realised unit, so
    that no class of all else could stand beside them."""

    tail: ClassVar[Tail] = "renormalise"
    tau: Tau = 1.0
    mask_first: bool = Field(
        False,
        description="take the first student token of an n:m unit out of the shared candidates; false: as in the "
        "authors' code it is a candidate beside the unit that it starts, and so counts twice",
    )


class Simct(EveryUnit):
    """KL over shared tokens and the realised unit, everywhere: SimCT, eq. 6 and 9 (arXiv 2605.07711)."""

    recipe: Literal["simct"] = "simct"
    source: ClassVar[str] = "SimCT, arXiv 2605.07711"
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "uniform", **WIDE}
    departs: ClassVar[tuple[str, ...]] = (
        _OF_WIDE.format("shared tokens"),
        "the student is first fine-tuned on the teacher's samples; here it is taken as it is",
        "rollouts are sampled at temperature 0.6 with top-p 0.95; here as `rollouts` says",
        "a temperature of the divergence is not stated; here 1",
    )
    unit_score: UnitScore = Field(
        "mean",
        description="score of an n:m unit: mean or sum of log-probs, or mean of raw logits (needs `scores.log_z`)",
    )


class SimctReleased(EveryUnit):
    """`simct` with units scored by the mean of their raw logits, as in its authors' code; needs `scores.log_z`."""

    recipe: Literal["simct_released"] = "simct_released"
    source: ClassVar[str] = "SimCT, its authors' code, arXiv 2605.07711"
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "uniform", **WIDE, "scores.log_z": True}
    departs: ClassVar[tuple[str, ...]] = (
        _OF_WIDE.format("shared tokens"),
        "tokens are shared where their strings are equal; here where their bytes are",
        "text is tokenised anew, and an end is appended also where a response was cut; here ids are as sampled",
        "rows whose candidates hold under half of the teacher's mass are left out in a later version; here all count, and "
        "`coverage` tells",
    )
    unit_score: ClassVar[UnitScore] = "mean_logit"


class Strict1to1(Tailed, Directed, OneToOne):
    """KL over the candidates on 1:1 and stop units only."""

    recipe: Literal["strict_1to1"] = "strict_1to1"
    source: ClassVar[str] = "1:1 units over the shared vocabulary, arXiv 2610.08448"
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "uniform", **WIDE}
    departs: ClassVar[tuple[str, ...]] = (_OF_WIDE.format("shared tokens"),)


class ForwardKl(Tailed, OneToOne):
    """`strict_1to1` with KL(teacher || student)."""

    recipe: Literal["forward_kl"] = "forward_kl"
    direction: ClassVar[Direction] = "forward"
    beta: ClassVar[float] = 0.5


class Jsd(Tailed, OneToOne):
    """`strict_1to1` with the generalised Jensen-Shannon divergence: GKD, eq. 1 (arXiv 2306.13649)."""

    recipe: Literal["jsd"] = "jsd"
    source: ClassVar[str] = "GKD, arXiv 2306.13649"
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "uniform", **WIDE}
    departs: ClassVar[tuple[str, ...]] = (
        _OF_WIDE.format("tokens of one vocabulary") + ", and all else as one more class",
        "beta is 0.1, 0.5 or 0.9 by task; here 0.5",
        "a share of the responses may be a data set's; here all are the student's",
    )
    direction: ClassVar[Direction] = "jsd"
    tail: Tail = Field("bucket", description=Tailed.model_fields["tail"].description)
    beta: Beta = 0.5


class Kbucket(Directed, OneToOne):
    """`strict_1to1` with one more class for all else, a bound of the full divergence."""

    recipe: Literal["kbucket"] = "kbucket"
    tail: ClassVar[Tail] = "bucket"
    tau: ClassVar[float] = 1.0


class Sampled(SampledPath):
    """The sampled path everywhere: a policy gradient of reverse KL (Thinking Machines' on-policy distillation)."""

    recipe: Literal["sampled"] = "sampled"
    source: ClassVar[str] = "on-policy distillation, Thinking Machines"
    departs: ClassVar[tuple[str, ...]] = (
        _CLIP,
        "the advantage is that of the policy that sampled, and the policy's ratio to it is in the loss; here the advantage is "
        "that of the policy as it is now, and there is a ratio with `ratio_clip` only",
    )


class Lightning(SampledPath):
    """`sampled` as Lightning OPD has it (arXiv 2604.13010): another clip, and all rollouts are the first student's."""

    recipe: Literal["lightning"] = "lightning"
    source: ClassVar[str] = "Lightning OPD, arXiv 2604.13010"
    presets: ClassVar[Mapping[str, Any]] = {
        "weights.scheme": "uniform",
        "weights.credit": "immediate",
        "weights.truncate": None,
        "rollouts.rounds": 1,
        "rollouts.samples": 1,
    }
    departs: ClassVar[tuple[str, ...]] = (
        "the student is fine-tuned on the teacher's samples first; here `sft.prompts` has that done, and without it the "
        "student is taken as it is, and `student.tuned_on` says what it was tuned on",
    )
    clip: Clip = 10.0


class IwOpd(SampledPath):
    """`sampled` with units that `weights.scheme` must weigh: IW-OPD (arXiv 2606.22600)."""

    recipe: Literal["iw_opd"] = "iw_opd"
    source: ClassVar[str] = "IW-OPD, arXiv 2606.22600"
    presets: ClassVar[Mapping[str, Any]] = {"weights.scheme": "iw_opd", "weights.gamma": 0.5}
    departs: ClassVar[tuple[str, ...]] = (
        _CLIP,
        "weights are those of the policy that a round starts from, for the whole round",
    )


class Vopd(Clipped):
    """The sampled path less the policy's own value, -KL, as a baseline: vOPD (arXiv 2605.07865)."""

    recipe: Literal["vopd"] = "vopd"
    source: ClassVar[str] = "vOPD, arXiv 2605.07865"
    reads_candidates: ClassVar[bool] = True
    departs: ClassVar[tuple[str, ...]] = (
        _CLIP,
        "the baseline is KL over the candidates and a class for all else, a bound; of a longer unit that at its first token",
    )


class RaoBlackwell(Clipped):
    """The sampled path with all that the candidates say of a unit of one token taken exactly: what was sampled tells only of
    the class of all else, where it lies there. Its expected gradient is that of full reverse KL."""

    recipe: Literal["rao_blackwell"] = "rao_blackwell"
    estimator: ClassVar[str] = "candidates and sampled path"
    reads_candidates: ClassVar[bool] = True


class ExOpd(Clipped):
    """The sampled path towards more of what the teacher adds to a reference policy, the student before training: ExOPD (arXiv
    2602.12125)."""

    recipe: Literal["exopd"] = "exopd"
    source: ClassVar[str] = "ExOPD, arXiv 2602.12125"
    departs: ClassVar[tuple[str, ...]] = (
        _CLIP,
        "the reference may be any model, such as the teacher before its own training; here it is a policy of the run",
    )
    reference: Literal["round", "initial"] = Field("initial", description=Recipe.model_fields["reference"].description)
    scale: float = Field(
        1.25,
        ge=0,
        description="factor of log p_T - log p_ref; 1: plain distillation, above: beyond the teacher, 0: stay",
    )

    @property
    def refers(self) -> bool:
        """Always: it is what the teacher is compared with."""
        return True


class Kdrl(Clipped):
    """A small coefficient of the sampled path beside a reward: KDRL (arXiv 2506.02208), GRPO's loss less beta times the reverse
    KL to the teacher, whose k2 estimate has the sampled path's gradient. Needs reference answers."""

    recipe: Literal["kdrl"] = "kdrl"
    source: ClassVar[str] = "KDRL, arXiv 2506.02208"
    presets: ClassVar[Mapping[str, Any]] = {
        "weights.scheme": "uniform",
        "weights.reward": "grpo",
        "rollouts.samples": 8,
    }
    departs: ClassVar[tuple[str, ...]] = (
        _CLIP,
        "the policy makes one step on what it sampled; here a round's, with the clip of the ratio that GRPO has for them",
        "the loss is divided by the tokens of a batch; here by its units, and tokens that can't be aligned carry none",
        "the coefficient of KL is 0.002, and best falling from 0.005 to 0.001; here it doesn't fall",
        "KL may be left out of right responses (`weights.gate.right: 0`), or of prompts with any right one, which isn't here",
        "how many responses a prompt has is stated nowhere we could read; here 8",
        "a prompt whose outcomes are all alike has advantages of 0; else the deviation is that of its responses, and nothing "
        "is added to it",
    )
    reward: float = Field(1.0, ge=0, description=Recipe.model_fields["reward"].description)
    kl_weight: float = Field(0.002, ge=0, description="beta, the coefficient of the sampled path; 0: the reward alone")


class TokenCredit(RatioClipped):
    """DPCA's two recipes; clips, bounds and longest unit are those of its authors' code."""

    source: ClassVar[str] = "DPCA, arXiv 2606.09456"
    departs: ClassVar[tuple[str, ...]] = (
        "chunks are found by two pointers over decoded text, and all behind a failure is masked; here units are found by "
        "bytes, and only what can't be aligned is masked",
        _LIVE,
    )
    clip: Clip = 10.0
    ratio_clip: RatioClip = (0.2, 0.28)
    max_unit: MaxUnit = 6


class Dpca(TokenCredit):
    """The sampled path with a unit's advantage spread over its tokens in proportion to their surprisal: DPCA's
    multiplicative solution (arXiv 2606.09456)."""

    recipe: Literal["dpca"] = "dpca"


class DpcaAdditive(TokenCredit):
    """`dpca` with the advantage spread evenly: its additive solution, which its paper doesn't train with (arXiv 2606.09456)."""

    recipe: Literal["dpca_additive"] = "dpca_additive"


class CrOpd(Clipped):
    """The sampled path, and what a unit with a negative advantage loses goes to likely candidates: CR-OPD, a hypothesis of a
    survey without experiments on it (arXiv 2606.22793)."""

    recipe: Literal["cr_opd"] = "cr_opd"
    source: ClassVar[str] = "a survey, arXiv 2606.22793"
    reads_candidates: ClassVar[bool] = True
    departs: ClassVar[tuple[str, ...]] = (
        "the survey has no experiments: alpha, eps and the clip are not stated",
        "a longer unit is known by its first token",
    )
    cr_alpha: float = Field(0.5, ge=0, le=1, description="the teacher's share in where mass is routed")
    cr_eps: float = Field(0.001, ge=0, lt=1, description="candidates the student finds less likely get nothing")


class Own(Limited):
    """A function of your own in the working directory or on the Python path, for every unit: `function(student: UnitLogps,
    batch: Batch, options) -> (U,)`, nats (`train.policy`, `train.batch`). Its module's source is part of what identifies
    training; `weights.credit` is `batch.credit_shift`, for it to read."""

    recipe: str
    options: dict[str, Any] = Field({}, description="what the function takes as its options")
    source: ClassVar[str] = "yours"
    estimator: ClassVar[str] = "a function of one's own"
    # A loss that doesn't depend on what was sampled is none the worse for it: the ratio's mean is 1.
    sampled: ClassVar[tuple[str, ...]] = Clipped.sampled
    reads_credit: ClassVar[bool] = True
    reads_candidates: ClassVar[bool] = True

    @field_validator("recipe")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not OWN_CODE.fullmatch(value):
            raise ValueError("takes the name of a recipe or module:function of your own, such as my_recipes:loss")
        return value

    @property
    def refers(self) -> bool:
        """Also where it asks for the first policy, which it may read as `batch.first_logp`."""
        return self.reference_kl > 0 or self.reference == "initial"


class CrossEntropy(Recipe):
    """-log p of each token that the teacher wrote: what `sft` minimises, and no recipe that one may name."""

    recipe: Literal["cross_entropy"] = "cross_entropy"
    estimator: ClassVar[str] = "the teacher's samples"
    on_policy: ClassVar[bool] = False


def recipe_of(values: Any) -> str:
    """The tag of a config's mapping or of a section; what is no mapping is for the default recipe to refuse."""
    recipe = values.get("recipe", "hybrid") if isinstance(values, dict) else getattr(values, "recipe", "hybrid")
    return OWN if ":" in str(recipe) else str(recipe)


Objective = Annotated[
    Annotated[Hybrid, Tag("hybrid")]
    | Annotated[Simct, Tag("simct")]
    | Annotated[SimctReleased, Tag("simct_released")]
    | Annotated[Strict1to1, Tag("strict_1to1")]
    | Annotated[ForwardKl, Tag("forward_kl")]
    | Annotated[Jsd, Tag("jsd")]
    | Annotated[Kbucket, Tag("kbucket")]
    | Annotated[Sampled, Tag("sampled")]
    | Annotated[Lightning, Tag("lightning")]
    | Annotated[IwOpd, Tag("iw_opd")]
    | Annotated[Vopd, Tag("vopd")]
    | Annotated[Dpca, Tag("dpca")]
    | Annotated[DpcaAdditive, Tag("dpca_additive")]
    | Annotated[CrOpd, Tag("cr_opd")]
    | Annotated[RaoBlackwell, Tag("rao_blackwell")]
    | Annotated[ExOpd, Tag("exopd")]
    | Annotated[Kdrl, Tag("kdrl")]
    | Annotated[Own, Tag(OWN)],
    Discriminator(recipe_of),
]
"""The section `objective`: that of its `recipe`, `hybrid` where it names none."""
RECIPES: dict[str, type[Recipe]] = {
    tag: kind for tag, kind in variants(get_args(Objective)[0]).items() if issubclass(kind, Recipe)
}
"""By tag, which is a recipe's name or `module:function`."""
