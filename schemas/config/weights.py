"""Importance weights and credit of units."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from schemas.config.options import Option, describe, one_of, refuse_unread
from schemas.config.section import Section

SCHEMES = {
    "uniform": Option("all 1"),
    "iw_opd": Option("arXiv 2606.22600, less weight the more |advantage| lies before", ("gamma",)),
    "signed": Option("likewise, but advantages before cancel", ("gamma",)),
    "ideal": Option(
        "(teacher's over student's prob. of all before)^alpha, over its mean at the same unit index in all shards of the phase",
        ("alpha",),
    ),
    "prefix": Option(
        "1 on the first `prefix_share` of the units, 0 after; the rest is sampled and scored all the same. A share of a "
        "response is known only once it has ended: a short `rollouts.max_new_tokens`, a number of tokens, saves what it "
        "leaves out",
        ("prefix_share",),
    ),
}
"""What `weights.scheme` takes; `pipeline.weights.importance.SCHEMES` computes them."""

CREDITS = {
    "immediate": Option("a unit's own advantage"),
    "return_to_go": Option("the sum from it on"),
    "discounted": Option("likewise, by `discount` a unit", ("discount",)),
    "baseline": Option("return_to_go less the mean of the phase's other responses at the same unit index"),
    "group": Option(
        "RLOO: a response's whole return, the sum of its advantages, less the mean one of the phase's other responses to its "
        "prompt; the same at each of its units (needs `rollouts.samples` above 1)"
    ),
    "gae": Option(
        "generalised advantages with a value cross-fitted over the phase's responses (a hypothesis of arXiv 2606.22793)",
        ("discount", "gae_lambda"),
    ),
    "residual": Option(
        "a unit's own advantage less what is usual for its token id and for its position and surprisal, cross-fitted likewise "
        "(Lightning OPD 2.0, arXiv 2607.28449; for a student that was fine-tuned on another teacher's samples)"
    ),
}
"""What `weights.credit` takes; `pipeline.weights.credit.CREDITS` computes them."""

REWARDS = {
    "none": Option("none is computed"),
    "rloo": Option("less the mean of the others, which leaves the expected gradient as it is (arXiv 2402.14740)"),
    "grpo": Option(
        "less the mean of all of them, over their standard deviation (arXiv 2402.03300), which weighs prompts that are nearly "
        "always or hardly ever answered rightly more"
    ),
}
"""What `weights.reward` takes; `pipeline.weights.rewards.REWARDS` computes them."""


OF_OUTCOMES = ("right", "wrong", "agreeing", "conflicting")
"""Gates by which responses are right."""


class Gate(Section):
    """Factors of weights: of whole responses, such as `texts.truncated` and `texts.repetitive` in `diagnostics.json` count, and
    by their outcome."""

    truncated: float = Field(
        1.0,
        ge=0,
        description="of a response that was cut at `rollouts.max_new_tokens`; 0: it carries no loss. That such responses may "
        "come to make up most of the rollouts, and repeat themselves, is a finding of StableOPD (arXiv 2604.08527), whose "
        "cures are others: a divergence from a reference (`objective.reference_kl`), and rollouts that are mixed in",
    )
    repetitive: float = Field(
        1.0,
        ge=0,
        description="of a response of whose 4-grams more than half have been there before; 0: it carries no loss",
    )
    right: float = Field(
        1.0,
        ge=0,
        description="of a response that `evaluate.scorer` finds right; 0: the teacher is followed where that is not so (KDRL's "
        "mask of responses, arXiv 2506.02208). One that can't be judged has 1, here and below",
    )
    wrong: float = Field(
        1.0, ge=0, description="of a response that it finds wrong; 0: the teacher is followed in right ones only"
    )
    agreeing: float = Field(
        1.0,
        ge=0,
        description="of a unit whose advantage log p_T - log p_S has the sign of its response's outcome: above 0 where that is "
        "right, below 0 where it is wrong",
    )
    conflicting: float = Field(
        1.0,
        ge=0,
        description="of a unit whose advantage has the other sign; 0: the teacher never speaks against the outcome (OPDVR, "
        "arXiv 2608.24696). 1 with `agreeing: 1.8` are the coefficients of SG-OPD's gate (arXiv 2606.09304)",
    )

    @property
    def judges(self) -> bool:
        """Whether it reads which responses are right."""
        return any(getattr(self, name) != 1 for name in OF_OUTCOMES)


class Weights(Section):
    """Importance weights and credit of units."""

    scheme: Annotated[str, AfterValidator(one_of(SCHEMES))] = Field("uniform", description=describe(SCHEMES))
    gamma: float = Field(0.5, ge=0, description="strength of iw_opd and signed; 0 is uniform")
    alpha: float = Field(0.05, ge=0, description="exponent of ideal; 0 is uniform, 0.1 collapses within tens of tokens")
    prefix_share: float = Field(
        0.3, gt=0, le=1, description="share of a response's units that prefix keeps; 1 is uniform"
    )
    truncate: float | None = Field(
        None,
        gt=0,
        description="truncated importance sampling, a factor min(pi_theta / pi_sampler, truncate) of any scheme's weight, "
        "with the pi_theta that the round starts from; matters to `reuse`d and replayed rollouts, and where "
        "`rollouts.temperature` or `rollouts.top_p` isn't 1: pi_sampler is what was really sampled from. Not with "
        "`objective.ratio_clip`, whose loss has the ratio already. null: no factor, but for units of the sampled path that "
        "weren't sampled from the model as it is: pi_model / pi_sampler, without which their gradient is another one",
    )
    gate: Gate = Gate()
    credit: Annotated[str, AfterValidator(one_of(CREDITS))] = Field(
        "immediate",
        description="what the sampled path of hybrid (units longer than a token), sampled, lightning and iw_opd multiplies "
        "log-probs by; formed of advantages that are clipped to `objective.clip`. " + describe(CREDITS),
    )
    reward: Annotated[str, AfterValidator(one_of(REWARDS))] = Field(
        "none",
        description="the advantage of a response's outcome, right 1 and wrong 0 by `evaluate.scorer`, over those of the "
        "phase's other responses to its prompt (needs `rollouts.samples` above 1), for the term that `objective.reward` adds "
        "to the loss; no other weight or gate multiplies it. " + describe(REWARDS),
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

    @model_validator(mode="after")
    def _keys_mean_something(self) -> "Weights":
        refuse_unread(self, "scheme", SCHEMES)
        refuse_unread(self, "credit", CREDITS)
        return self

    @property
    def judges(self) -> bool:
        """Whether it takes which responses are right."""
        return self.gate.judges or self.reward != "none"

    @property
    def unjudged(self) -> "Weights":
        """The same for responses whose outcomes nobody asks for."""
        gate = self.gate.model_copy(update=dict.fromkeys(OF_OUTCOMES, 1.0))
        return self.model_copy(update={"gate": gate, "reward": "none"})

    def identity(self) -> dict[str, Any]:
        """What of it determines the weights."""
        return self.model_dump(exclude={"scheduler"})
