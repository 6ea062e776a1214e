"""The loss: recipes, what each presets and reads."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section

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
