"""The loss: a section for each recipe, with the keys that it reads and the defaults of its paper.

A recipe is a class here, listed in `Objective`, and its line in `train.recipes.RECIPES`.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from schemas.config.options import OWN_CODE
from schemas.config.section import Section

Direction = Literal["reverse", "forward", "jsd", "entropy_gated"]
Tail = Literal["renormalise", "bucket", "sampled"]
UnitScore = Literal["mean", "sum", "mean_logit"]
Tau = Annotated[float, Field(gt=0, description="temperature of both sides of a renormalised divergence")]
Beta = Annotated[
    float,
    Field(
        gt=0,
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
OWN = "module:function"
"""Tag of a recipe of the user's own."""


class Recipe(Section):
    """What one may ask of any recipe."""

    recipe: str
    estimator: ClassVar[str]
    """What the loss is a sum over, for `diagnostics.json`."""
    reads_credit: ClassVar[bool] = False
    """Whether `weights.credit` other than `immediate` changes the loss."""
    sampled: ClassVar[tuple[str, ...]] = ()
    """Kinds of unit whose loss is an estimate from what was sampled there, so that how it was sampled matters."""


class Candidates(Recipe):
    """Recipes that compare distributions over the teacher's candidates (`train.recipes.candidate_kl`)."""

    estimator: ClassVar[str] = "candidates"


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
        "renormalise", description="candidates renormalised (SimCT), or all else as one more class (a bound of full KL)"
    )
    tau: Tau = 1.0

    @model_validator(mode="after")
    def _tau_is_of_renormalise(self) -> Self:
        if self.tau != 1 and self.tail == "bucket":
            raise ValueError(
                f"`tau: {self.tau:g}` does not go with `tail: bucket`: the mass of all else at another temperature is not "
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


class SampledPath(Clipped):
    """Recipes with a unit's credit times its log-prob (`train.recipes.sampled_path`)."""

    reads_credit: ClassVar[bool] = True
    ratio_clip: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="[low, high], such as [0.2, 0.28]: the sampled path's loss is PPO's, with r = pi_theta / pi_sampler of a "
        "unit clipped to 1 - low and 1 + high; the sampler's temperature and top-p count, so that away from 1 r doesn't start "
        "at 1. It stands in for `weights.truncate`, and the two are refused together, which "
        "would count r twice. null: no ratio in the loss",
    )
    trust_region: float | None = Field(
        None,
        gt=0,
        description="nats; a unit of the sampled path whose |log r| is above it carries no loss, with or without "
        "`ratio_clip`; null: no limit",
    )


class Hybrid(SampledPath, Tailed, Directed, OneToOne):
    """KL over the candidates on 1:1 and stop units, the sampled path on longer ones."""

    recipe: Literal["hybrid"] = "hybrid"
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
    unit_score: UnitScore = Field(
        "mean",
        description="score of an n:m unit: mean or sum of log-probs, or mean of raw logits (needs `scores.log_z`)",
    )


class SimctReleased(EveryUnit):
    """`simct` with units scored by the mean of their raw logits, as in its authors' code; needs `scores.log_z`."""

    recipe: Literal["simct_released"] = "simct_released"
    unit_score: ClassVar[UnitScore] = "mean_logit"


class Strict1to1(Tailed, Directed, OneToOne):
    """KL over the candidates on 1:1 and stop units only."""

    recipe: Literal["strict_1to1"] = "strict_1to1"


class ForwardKl(Tailed, OneToOne):
    """`strict_1to1` with KL(teacher || student)."""

    recipe: Literal["forward_kl"] = "forward_kl"
    direction: ClassVar[Direction] = "forward"
    beta: ClassVar[float] = 0.5


class Jsd(Tailed, OneToOne):
    """`strict_1to1` with the generalised Jensen-Shannon divergence: GKD, eq. 1 (arXiv 2306.13649)."""

    recipe: Literal["jsd"] = "jsd"
    direction: ClassVar[Direction] = "jsd"
    beta: Beta = 0.5


class Kbucket(Directed, OneToOne):
    """`strict_1to1` with one more class for all else, a bound of the full divergence."""

    recipe: Literal["kbucket"] = "kbucket"
    tail: ClassVar[Tail] = "bucket"
    tau: ClassVar[float] = 1.0


class Sampled(SampledPath):
    """The sampled path everywhere: a policy gradient of reverse KL (Thinking Machines' on-policy distillation)."""

    recipe: Literal["sampled"] = "sampled"


class Lightning(SampledPath):
    """`sampled` with the clip of Lightning OPD (arXiv 2604.13010), whose paper has `weights.scheme: uniform`."""

    recipe: Literal["lightning"] = "lightning"
    clip: Clip = 10.0


class IwOpd(SampledPath):
    """`sampled` with units that `weights.scheme` must weigh: IW-OPD (arXiv 2606.22600)."""

    recipe: Literal["iw_opd"] = "iw_opd"


class Vopd(Clipped):
    """The sampled path less the policy's own value, -KL, as a baseline: vOPD (arXiv 2605.07865)."""

    recipe: Literal["vopd"] = "vopd"


class Dpca(Clipped):
    """The sampled path with a unit's advantage spread over its tokens in proportion to their surprisal: DPCA's
    multiplicative solution (arXiv 2606.09456)."""

    recipe: Literal["dpca"] = "dpca"
    clip: Clip = 10.0
    max_unit: MaxUnit = 6


class DpcaAdditive(Clipped):
    """`dpca` with the advantage spread evenly: its additive solution (arXiv 2606.09456)."""

    recipe: Literal["dpca_additive"] = "dpca_additive"
    clip: Clip = 10.0
    max_unit: MaxUnit = 6


class CrOpd(Clipped):
    """The sampled path, and what a unit with a negative advantage loses goes to likely candidates: CR-OPD, a hypothesis of a
    survey without experiments on it (arXiv 2606.22793)."""

    recipe: Literal["cr_opd"] = "cr_opd"
    cr_alpha: float = Field(0.5, ge=0, le=1, description="the teacher's share in where mass is routed")
    cr_eps: float = Field(0.001, ge=0, lt=1, description="candidates the student finds less likely get nothing")


class Own(Limited):
    """A function of your own in the working directory or on the Python path, for every unit: `function(student: UnitLogps,
    batch: Batch, options) -> (U,)`, nats (`train.policy`, `train.batch`). Its module's source is part of what identifies
    training; `weights.credit` is `batch.credit_shift`, for it to read."""

    recipe: str
    options: dict[str, Any] = Field({}, description="what the function takes as its options")
    estimator: ClassVar[str] = "a function of one's own"
    # A loss that doesn't depend on what was sampled is none the worse for it: the ratio's mean is 1.
    sampled: ClassVar[tuple[str, ...]] = Clipped.sampled
    reads_credit: ClassVar[bool] = True

    @field_validator("recipe")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not OWN_CODE.fullmatch(value):
            raise ValueError("takes the name of a recipe or module:function of your own, such as my_recipes:loss")
        return value


def _recipe_of(values: Any) -> str:
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
    | Annotated[Own, Tag(OWN)],
    Discriminator(_recipe_of),
]
"""The section `objective`: that of its `recipe`, `hybrid` where it names none."""
