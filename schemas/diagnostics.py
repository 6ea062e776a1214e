"""What a phase's `diagnostics.json` holds. One place defines a figure and its meaning (`opd schema diagnostics` prints it).

Whole numbers are counts, floats shares of 1 unless a unit is named. null: it can't be told, or means nothing here.
"""

from collections.abc import Iterator
from types import NoneType
from typing import get_args

from pydantic import Field

from schemas.config import Section
from schemas.manifest import Signed


class Texts(Section):
    """The responses."""

    responses: int = Field(description="number of responses")
    student_tokens: int = Field(description="their tokens as the student has them, stops included")
    truncated: float | None = Field(description="responses that were cut at max_new_tokens (`finish_reason: length`)")
    seq_rep_4: float | None = Field(
        description="mean over responses of 1 - distinct/all 4-grams of student tokens (Welleck et al., arXiv 1908.04319); 0 "
        "for a response of fewer than 4 tokens"
    )
    repetitive: float | None = Field(description="responses whose own seq-rep-4 is above 1/2")


class Loss(Section):
    """What is minimised."""

    recipe: str = Field(description="`objective.recipe`")
    direction: str | None = Field(
        description="of the KL: reverse is KL(student || teacher); the sampled path estimates that; null: a recipe of one's own"
    )
    estimator: str = Field(
        description="candidates: a sum over the support | sampled path: the log-ratio of what was sampled | both: candidates "
        "on 1:1 and stop units, sampled path on longer ones | a function of one's own"
    )
    tail: str | None = Field(
        description="mass outside the candidates: renormalise leaves it out, bucket has a class for it; null: no candidates, "
        "or a recipe of one's own"
    )
    normaliser: str = Field(description="what the sum of the units' weighted losses is divided by")
    credit: str = Field(description="`weights.credit`")
    weights: str = Field(description="`weights.scheme`")
    truncate: float | None = Field(
        description="`weights.truncate`, ceiling of importance ratios; null: none but the sampled path's to a sampler that "
        "wasn't the model itself (`sampling.sampler_logp`)"
    )
    gate: dict[str, float] = Field(default_factory=dict, description="`weights.gate`: its factors other than 1")
    reward: str = Field(
        "none", description="`weights.reward`, of the term that is added to every compared unit's loss,"
    )
    reward_coefficient: float = Field(0.0, description="and that term's coefficient, `objective.reward`")
    reference_kl: float = Field(
        0.0,
        description="coefficient of the divergence from a reference that is added likewise, `objective.reference_kl`",
    )
    reference: str | None = Field(None, description="`objective.reference`; null: the loss refers to none")


class Outcomes(Section):
    """Which of the responses are right."""

    right: int = Field(description="responses that the scorer finds right,")
    wrong: int = Field(description="wrong,")
    unknown: int = Field(description="and those that it can't judge, which are neither gated nor rewarded")
    rewarded: int = Field(description="responses whose reward isn't 0: of prompts with right and wrong ones")


class Support(Section):
    """The candidates that were kept of the teacher."""

    of: str = Field(description="whose likeliest tokens are candidates: teacher, student or union")
    min_p: float = Field(description="a candidate's least probability,")
    mass: float = Field(description="until they hold this much of the mass,")
    k_max: int = Field(description="but never more than this many")


class Sampling(Section):
    """The policy that sampled the responses, and how."""

    checkpoint: int | None = Field(
        description="its number in this run, -1 before `sft`; null: another run sampled them (`reuse`)"
    )
    source: str | None = Field(description="name of the model or checkpoint that it was loaded from")
    weights: str | None = Field(description="sha256 of its weights")
    tokenizer: str | None = Field(description="sha256 of its tokenizer's files, the chat template included")
    template: str | None = Field(description="sha256 of what determines its rendered prompts, worked examples included")
    engine: str | None = Field(description="what computed it")
    dtype: str | None = Field(description="dtype of its forward pass")
    temperature: float | None = Field(description="sampling temperature")
    top_p: float | None = Field(description="nucleus mass")
    max_new_tokens: int | None = Field(description="tokens per response at most")
    seed: int | None = Field(description="`seed` of the run that sampled")
    tokens: dict[str, int] = Field(
        description="student tokens by origin: sampled, or cache, where another run had sampled the same; empty where another "
        "run's rollouts are reused and where a round is replayed"
    )
    sampler_logp: float | None = Field(
        description="share of responses with the sampler's own log-probs, temperature and top-p applied, which ratios are to; "
        "0 where nothing but the model itself was sampled from"
    )
    warning: str | None = Field(
        description="what does not hold where temperature or top-p isn't 1 and the sampler's log-probs were not kept"
    )


class Teacher(Section):
    """Who scored the responses."""

    source: str | None = Field(description="its name when it scored them, `@revision` behind it when one was given")
    weights: str = Field(description="sha256 of its weights")
    tokenizer: str = Field(description="sha256 of its tokenizer's files, the chat template included")
    template: str = Field(description="sha256 of what determines its rendered prompts, worked examples included")
    reads: str = Field(
        description="tokens: the sampled ids (same tokenizer as the student) | text: the response's text"
    )
    engine: str = Field(description="what computed it")
    dtype: str = Field(description="dtype of its forward pass")
    tokens: dict[str, int] = Field(description="teacher tokens by origin: scored, cache or `reused from <folder>`")
    student_tuned_on: str | None = Field(
        description="the teacher whose samples the student was fine-tuned on: by `sft`, by what a checkpoint has on record, "
        "or as `student.tuned_on` declares; null: not declared"
    )
    warning: str | None = Field(description="why and what to do where that is another model than the teacher")


class Ratios(Section):
    """Importance ratios r = pi_theta / pi_sampler; in since_start to the policy that the round started from."""

    ess: float | None = Field(description="effective sample size as a share, (sum r)^2 / (n sum r^2)")
    chi2: float | None = Field(
        description="n sum r^2 / (sum r)^2 - 1 = 1 / ess - 1, estimates chi^2(pi_theta || pi_sampler)"
    )


class Distance(Section):
    """Log-ratios log pi_theta / pi_sampler per compared unit, l_i = 1/n_i sum_u log r_u over the n_i of response i."""

    log_ratio: float | None = Field(
        description="nats per unit, mean of l_i over responses; its negative estimates how far pi_theta is from pi_sampler"
    )
    log_ratio_sd: float | None = Field(description="nats per unit, standard deviation of l_i over responses")


class Staleness(Section):
    """How far the policy that is trained is from what was sampled from, before the phase's first step."""

    rounds_behind: int | None = Field(
        description="rounds from the sampling checkpoint to the trained one; null: reused"
    )
    same_weights: bool = Field(description="whether both policies' weights have one digest")
    units: Ratios = Field(description="over the compared units")
    responses: Distance = Field(description="over the responses")


class Coverage(Section):
    """What of the responses can be compared with the teacher."""

    kinds: dict[str, float] = Field(description="share of student tokens in each kind of unit")
    dropped_mass: float | None = Field(
        description="teacher's mass on kept candidates that have no student id, mean over compared units"
    )
    compared: float | None = Field(
        description="`coverage.json`: student tokens in units that carry loss; null: eval phase"
    )
    one_to_one: float | None = Field(
        description="`coverage.json`: student tokens in 1:1 units and stops; null: eval phase"
    )
    shared_mass: float | None = Field(
        description="`coverage.json`: share of the teacher's kept mass that has a student id; null: eval phase"
    )


class Entropy(Section):
    """How undecided both models are on the student's responses."""

    teacher: float | None = Field(
        description="nats per teacher token: mean entropy of its next-token distribution where a token or stop was sampled"
    )
    student: float | None = Field(
        description="nats per student token: mean of -behavior_logp, unbiased for its own samples at temperature 1 and top-p "
        "1; null for others"
    )
    teacher_per_byte: float | None = Field(
        description="nats per byte of the responses, which two tokenizers can be compared in"
    )
    student_per_byte: float | None = Field(description="likewise")


class Credit(Section):
    """Advantages A = log p_T - log p_S and weights of the units, when the weights were made."""

    advantage_mean: float | None = Field(description="nats per compared unit")
    advantage_share: dict[int, float] = Field(description="share of the sum of |A| by tenth of the response, 0 to 9")
    clipped: float | None = Field(
        description="share of what the recipe clips that is above `objective.clip`: |A| of the sampled path's units, or of all "
        "compared ones where `weights.credit` sums over them; dpca and dpca_additive: of tokens. null: nothing is clipped, or "
        "it takes a forward pass to know (vopd, rao_blackwell)"
    )
    weight_ess: float | None = Field(
        description="effective sample size of the weights over the compared units, (sum w)^2 / (n sum w^2)"
    )


class Drift(Section):
    """Importance ratios and log-ratios within one batch, as the trainer measured them before that step's update."""

    units: Ratios = Field(description="over the batch's compared units")
    responses: Distance = Field(description="over its responses")
    since_start: Ratios = Field(
        description="over units, of the policy in training over the one that the round started from: "
        "what `train.min_ess` bounds"
    )


class Training(Section):
    """The round's optimiser steps, from `train/metrics.jsonl`."""

    steps: int = Field(description="optimiser steps that were taken")
    budget: int = Field(description="steps that the round could take, with what the rounds before it left over")
    ended: str | None = Field(
        description="budget: all were taken | min_ess: `train.min_ess` ended the round; null: it is still under way"
    )
    sampled_kl_first: float | None = Field(description="nats per unit, log p_S - log p_T of the first step's batch")
    sampled_kl_last: float | None = Field(description="likewise of the last step's")
    divergence_first: float | None = Field(
        description="nats per unit that has one, unweighted mean of the loss's divergence over candidates at the first step; "
        "null: the recipe has none, or the batch no such unit"
    )
    divergence_last: float | None = Field(description="likewise at the last step")
    first: Drift = Field(description="at the first step")
    last: Drift = Field(description="at the last step")


class Diagnostics(Section, Signed):
    """The whole file."""

    phase: str = Field(
        description="round-<r>, eval-<c> (eval-base: before `sft`), or round-<r>@<q>: round q as round r replays it"
    )
    texts: Texts
    loss: Loss
    outcomes: Outcomes | None = Field(None, description="null: nothing is judged")
    support: Support
    sampling: Sampling
    teacher: Teacher
    staleness: Staleness
    coverage: Coverage
    entropy: Entropy
    credit: Credit
    training: Training | None = Field(description="null: an eval phase, a replayed round, or nothing was trained yet")
    seconds: dict[str, float] = Field(
        description="wall seconds of each stage, summed over its jobs, as Snakemake timed them"
    )


def fields(section: type[Section] = Diagnostics, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field of the file: its path, type and meaning."""
    for name, field in section.model_fields.items():
        options = get_args(field.annotation)
        nullable = NoneType in options
        kind = options[0] if nullable else field.annotation
        below = kind if isinstance(kind, type) and issubclass(kind, Section) else None
        if below is None or field.description:
            named = "mapping" if below else kind.__name__ if isinstance(kind, type) else str(kind)
            yield prefix + name, named + " or null" * nullable, field.description or ""
        if below is not None:
            yield from fields(below, f"{prefix}{name}.")


def markdown() -> str:
    """The fields as a Markdown table."""
    escaped = ([part.replace("|", "\\|") for part in row] for row in fields())
    return "\n".join(
        ["| field | type | meaning |", "|---|---|---|", *(f"| `{a}` | {b} | {c} |" for a, b, c in escaped)]
    )
