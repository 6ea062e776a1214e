"""Recipes: which objective applies to which unit. Formulas are in `objectives`, keys in `schemas.config.objective`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, cast

import torch

from pipeline import own_code
from schemas.config import objective as config
from schemas.errors import OpdError
from train import objectives
from train.batch import Batch
from train.policy import UnitLogps


@dataclass(frozen=True)
class Scored:
    """Per-unit losses (U,) and which units they were defined for (bool (U,)); others carry 0.

    `diverges`, bool (U,): where the loss is by a part that `divergence` marks; elsewhere by one that `surrogate` does.
    `beside` (U,), at all units: what is added to the loss whatever a unit weighs; None: nothing.
    """

    loss: torch.Tensor
    used: torch.Tensor
    diverges: torch.Tensor
    beside: torch.Tensor | None = None


Losses = Callable[[UnitLogps, Batch, Any, torch.Tensor], torch.Tensor]


class Part(Protocol):
    """The losses (U,) of some units under a recipe's section, given which (bool (U,)); elsewhere finite and without meaning."""

    diverges: bool

    def __call__(self, student: UnitLogps, batch: Batch, objective: Any, where: torch.Tensor, /) -> torch.Tensor: ...


def divergence(losses: Losses) -> Part:
    """Mark a part whose losses are divergences in nats: at least 0, and 0 where the student has reached the teacher."""
    return _marked(losses, True)


def surrogate(losses: Losses) -> Part:
    """Mark a part of whose losses only the gradient means something: of either sign, and no measure of a distance."""
    return _marked(losses, False)


def _marked(losses: Losses, diverges: bool) -> Part:
    part = cast(Part, losses)
    part.diverges = diverges
    return part


@dataclass(frozen=True)
class Parts:
    """The part for units of one token on both sides (stops included), and the one for longer units; None: no loss there."""

    single: Part
    longer: Part | None


class Divergence(Protocol):
    """What `candidate_kl` reads of a recipe's section; see there."""

    @property
    def direction(self) -> config.Direction: ...
    @property
    def tail(self) -> config.Tail: ...
    @property
    def tau(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def unit_score(self) -> config.UnitScore: ...
    @property
    def mask_first(self) -> bool: ...


def losses(student: UnitLogps, batch: Batch, objective: config.Recipe) -> Scored:
    """The unweighted loss of every unit under the configured recipe. Raises OpdError when one's own makes no such losses."""
    parts, one = parts_of(objective), one_to_one(batch)
    every = torch.ones_like(one)
    diverges = one & parts.single.diverges | ~one & (parts.longer is not None and parts.longer.diverges)
    if parts.longer is parts.single:
        scored = Scored(parts.single(student, batch, objective, every), every, diverges)
    elif parts.longer is None:
        scored = Scored(torch.where(one, parts.single(student, batch, objective, one), 0.0), one, diverges)
    else:
        single, longer = parts.single(student, batch, objective, one), parts.longer(student, batch, objective, ~one)
        scored = Scored(torch.where(one, single, longer), every, diverges)
    kept = every
    if isinstance(objective, config.Limited) and objective.max_unit is not None:
        kept = kept & (torch.maximum(batch.s_len, batch.t_len) <= objective.max_unit)
    if isinstance(objective, config.SampledPath) and objective.trust_region is not None:
        on_path = every if parts.single is sampled_path else ~one
        outside = objectives.outside_trust_region(student.unit, batch.behavior_logp, objective.trust_region)
        kept = kept & ~(on_path & outside)
    if objective.select is not None:
        kept = kept & _selected(student, batch, objective, scored.used & kept)
    return Scored(torch.where(kept, scored.loss, 0.0), scored.used & kept, diverges, _beside(student, batch, objective))


def _beside(student: UnitLogps, batch: Batch, objective: config.Recipe) -> torch.Tensor | None:
    """What the objective adds to any recipe's loss: (U,)."""
    terms = [_rewarded(student, batch, objective)] if objective.reward else []
    if objective.reference_kl:
        squared = objectives.squared_ratio(student.unit, reference_logp(batch, objective))
        terms.append(objective.reference_kl * squared)
    return sum(terms[1:], terms[0]) if terms else None


def reference_logp(batch: Batch, objective: config.Recipe) -> torch.Tensor:
    """Log-probs of units under the policy that the objective refers to: (U,), nats."""
    return batch.first_logp if objective.reference == "initial" else batch.policy_logp


def _rewarded(student: UnitLogps, batch: Batch, objective: config.Recipe) -> torch.Tensor:
    """GRPO's loss of each unit's tokens, times the reward's coefficient: (U,)."""
    compared = batch.token_unit < len(batch.unit_row)
    unit = batch.token_unit[compared]
    loss = objectives.ppo(
        batch.reward[unit], student.token[compared], batch.token_behavior_logp[compared], *objective.reward_clip
    )
    return objective.reward * torch.zeros_like(student.unit).index_add(0, unit, loss)


def _selected(student: UnitLogps, batch: Batch, objective: config.Recipe, among: torch.Tensor) -> torch.Tensor:
    """bool (U,): those `among` the units (bool (U,)) that their response's `objective.select_share` takes in."""
    used = among.nonzero()[:, 0]
    teacher, response = batch.cand_logp[used], batch.response_of_unit[used]
    policy = student.cand[used].detach().masked_fill(teacher == -torch.inf, -torch.inf)
    score = (
        objectives.entropy(policy) if objective.select == "entropy" else objectives.soft_or(policy, teacher, response)
    )
    return torch.zeros_like(among).index_put((used,), objectives.top_share(score, response, objective.select_share))


def parts_of(objective: config.Recipe) -> Parts:
    """Of a recipe by its section. Raises OpdError when one's own can't be loaded."""
    if isinstance(objective, config.Own):
        part = _own(objective.recipe)
        return Parts(part, part)
    if isinstance(objective, config.CrossEntropy):
        return Parts(_cross_entropy, _cross_entropy)
    return RECIPES[type(objective)]


def identity(objective: config.Objective) -> dict[str, Any]:
    """What of it determines training: the keys, and the source of a recipe of one's own, which need not be loaded for it.

    Raises OpdError when there is no such source.
    """
    source = {"source": own_code.source_digest(objective.recipe)} if isinstance(objective, config.Own) else {}
    return objective.model_dump(mode="json") | source


def one_to_one(batch: Batch) -> torch.Tensor:
    """bool (U,): units of one token on both sides, stops among them."""
    return (batch.s_len == 1) & (batch.t_len == 1)


@divergence
def candidate_kl(student: UnitLogps, batch: Batch, divergence: Divergence, where: torch.Tensor) -> torch.Tensor:
    """The configured divergence over the teacher's candidates and the realised unit; meaningful at `where`.

    The unit's score is the sum or the mean of its log-probs (SimCT eq. 6, arXiv 2605.07711), or, as in the authors' release,
    the mean of its raw logits. Both sides' scores are less log Z at the unit's start, which a softmax over them doesn't see:
    candidates are log-probs then, and a unit's mean raw logit its mean log-prob and by how much log Z is higher on average over
    its tokens than at the first one.

    Of the three units of `collate`'s example: where the student, among the candidates a, b and stop, gives .25, .5 and .125 to
    the teacher's .5, .25 and .125, each over its sum, KL is 2/7 log 1/2 + 4/7 log 2 = .198. At bc, which the student has as
    one token, bc itself stands beside b and stop: by .125, to the teacher's (.5 * .75)^(1/2).

    >>> with torch.no_grad():
    ...     candidate_kl(log_probs, made, config.Simct(), one_to_one(made) | True)
    tensor([0.1980, 0.1623, 0.1149])
    """
    s_unit, t_unit = student.unit, batch.teacher_logp
    if divergence.unit_score != "sum":
        s_unit, t_unit = s_unit / batch.s_len, t_unit / batch.t_len
    if divergence.unit_score == "mean_logit":
        s_unit, t_unit = s_unit + _log_z_above_start(student, batch), t_unit + batch.t_log_z
    # The realised unit joins the support unless it is a single token that is a candidate already.
    outside = ~(_listed(batch) & one_to_one(batch))
    unused = batch.cand_logp == -torch.inf
    if divergence.mask_first:
        unused = unused | (~one_to_one(batch)[:, None] & (batch.cand_id == _first_target(batch)[:, None]))
    s_score = torch.cat([student.cand.masked_fill(unused, -torch.inf), s_unit[:, None]], 1)
    t_score = torch.cat([batch.cand_logp.masked_fill(unused, -torch.inf), t_unit[:, None]], 1)
    drop = torch.cat([torch.zeros_like(unused), ~outside[:, None]], 1) | ~where[:, None] & torch.cat(
        [torch.ones_like(unused), torch.zeros_like(outside[:, None])], 1
    )
    return _divergence(
        s_score.masked_fill(drop, -torch.inf), t_score.masked_fill(drop, -torch.inf), divergence, batch.teacher_entropy
    )


def _log_z_above_start(student: UnitLogps, batch: Batch) -> torch.Tensor:
    """By how much the student's mean log Z over a unit's tokens is above that at its first one, nats (U,); see `t_log_z`."""
    compared = batch.token_unit < len(batch.unit_row)
    total = torch.zeros_like(student.unit).index_add(0, batch.token_unit[compared], student.log_z[compared])
    return total / batch.s_len - student.log_z[batch.unit_row]


def _divergence(
    s: torch.Tensor, t: torch.Tensor, divergence: Divergence, teacher_entropy: torch.Tensor
) -> torch.Tensor:
    if divergence.direction == "jsd":
        classes = (
            partial(objectives.renormalised, tau=divergence.tau)
            if divergence.tail == "renormalise"
            else objectives.with_rest
        )
        return objectives.jsd(classes(s), classes(t), divergence.beta)
    kl: Callable[..., torch.Tensor] = (
        partial(objectives.support_kl, tau=divergence.tau) if divergence.tail == "renormalise" else objectives.bucket_kl
    )
    if divergence.direction == "entropy_gated":
        return objectives.entropy_gate(kl(s, t, "forward"), kl(s, t, "reverse"), teacher_entropy)
    return kl(s, t, divergence.direction)


@surrogate
def sampled_path(student: UnitLogps, batch: Batch, objective: config.SampledPath, _: torch.Tensor) -> torch.Tensor:
    # The unit's own advantage under the model as it is now, and what credit assignment added when the weights were made.
    path, clip, shift = (student.unit, batch.teacher_logp), objective.clip, batch.credit_shift
    if objective.ratio_clip is None:
        return objectives.clipped_sampled_path(*path, clip, shift)
    return objectives.ratio_clipped(*path, batch.behavior_logp, clip, *objective.ratio_clip, shift)


@surrogate
def _vopd(student: UnitLogps, batch: Batch, objective: config.Vopd, _: torch.Tensor) -> torch.Tensor:
    policy = student.cand.detach().masked_fill(batch.cand_logp == -torch.inf, -torch.inf)
    return objectives.vopd(
        student.unit, batch.teacher_logp, objectives.bucket_kl(policy, batch.cand_logp), objective.clip
    )


@surrogate
def _rao_blackwell(student: UnitLogps, batch: Batch, objective: config.RaoBlackwell, _: torch.Tensor) -> torch.Tensor:
    policy = student.cand.masked_fill(batch.cand_logp == -torch.inf, -torch.inf)
    rest = objectives.sampled_rest(student.unit, batch.teacher_logp, policy, batch.cand_logp, objective.clip)
    return objectives.bucket_kl(policy, batch.cand_logp) + torch.where(_listed(batch), 0.0, rest)


@surrogate
def _path(student: UnitLogps, batch: Batch, objective: config.Clipped, _: torch.Tensor) -> torch.Tensor:
    return objectives.clipped_sampled_path(student.unit, batch.teacher_logp, objective.clip)


@surrogate
def _kdrl(student: UnitLogps, batch: Batch, objective: config.Kdrl, where: torch.Tensor) -> torch.Tensor:
    return objective.kl_weight * _path(student, batch, objective, where)


@surrogate
def _exopd(student: UnitLogps, batch: Batch, objective: config.ExOpd, _: torch.Tensor) -> torch.Tensor:
    target = objectives.extrapolated(batch.teacher_logp, reference_logp(batch, objective), objective.scale)
    return objectives.clipped_sampled_path(student.unit, target, objective.clip)


@surrogate
def _cr_opd(student: UnitLogps, batch: Batch, objective: config.CrOpd, _: torch.Tensor) -> torch.Tensor:
    # A longer unit is known by its first token here: other tokens that spell a part of it count as alternatives.
    others = batch.cand_id != _first_target(batch)[:, None]
    return objectives.cr_opd(
        student.unit,
        batch.teacher_logp,
        student.cand,
        batch.cand_logp,
        others,
        objective.clip,
        objective.cr_alpha,
        objective.cr_eps,
    )


@divergence
def _cross_entropy(student: UnitLogps, _: Batch, __: config.CrossEntropy, ___: torch.Tensor) -> torch.Tensor:
    # KL from all mass on what was written.
    return -student.unit


def _dpca(credit: Callable[..., torch.Tensor]) -> Part:
    """The sampled path token by token, with a unit's advantage spread over its tokens by `credit` and then clipped.

    The ratio is each token's: a unit's would multiply every share of the advantage by all of the unit's gradient, and undo
    what `credit` spreads.
    """

    @surrogate
    def part(student: UnitLogps, batch: Batch, objective: config.TokenCredit, _: torch.Tensor) -> torch.Tensor:
        compared = batch.token_unit < len(batch.unit_row)
        unit, token = batch.token_unit[compared], student.token[compared]
        advantage = credit(token, student.unit[unit], batch.teacher_logp[unit], batch.s_len[unit])
        advantage = advantage.clamp(-objective.clip, objective.clip)
        if objective.ratio_clip is None:
            loss = -advantage * token
        else:
            loss = objectives.ppo(advantage, token, batch.token_behavior_logp[compared], *objective.ratio_clip)
        return torch.zeros_like(student.unit).index_add(0, unit, loss)

    return part


_multiplicative, _additive = _dpca(objectives.dpca_multiplicative), _dpca(objectives.dpca_additive)

RECIPES: dict[type[config.Recipe], Parts] = {
    config.Hybrid: Parts(candidate_kl, sampled_path),
    config.Simct: Parts(candidate_kl, candidate_kl),
    config.SimctReleased: Parts(candidate_kl, candidate_kl),
    config.Strict1to1: Parts(candidate_kl, None),
    config.ForwardKl: Parts(candidate_kl, None),
    config.Jsd: Parts(candidate_kl, None),
    config.Kbucket: Parts(candidate_kl, None),
    config.Sampled: Parts(sampled_path, sampled_path),
    config.Lightning: Parts(sampled_path, sampled_path),
    config.IwOpd: Parts(sampled_path, sampled_path),
    config.Vopd: Parts(_vopd, _vopd),
    config.Dpca: Parts(_multiplicative, _multiplicative),
    config.DpcaAdditive: Parts(_additive, _additive),
    config.CrOpd: Parts(_cr_opd, _cr_opd),
    config.RaoBlackwell: Parts(_rao_blackwell, _path),
    config.ExOpd: Parts(_exopd, _exopd),
    config.Kdrl: Parts(_kdrl, _kdrl),
}
"""By the section that holds a recipe's keys."""


@cache
def _own(reference: str) -> Part:
    function = own_code.load(reference, "objective.recipe")

    @surrogate  # as far as can be told
    def part(student: UnitLogps, batch: Batch, objective: config.Own, _: torch.Tensor) -> torch.Tensor:
        loss = function(student, batch, objective.options)
        found = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        if found != tuple(student.unit.shape):
            raise OpdError(
                f"objective.recipe: {reference}: expected the loss of each of {len(student.unit)} units, a tensor of shape "
                f"({len(student.unit)},), found {found}"
            )
        return loss

    return part


def _listed(batch: Batch) -> torch.Tensor:
    """bool (U,): the first sampled token is a candidate."""
    return ((batch.cand_id == _first_target(batch)[:, None]) & (batch.cand_logp > -torch.inf)).any(1)


def _first_target(batch: Batch) -> torch.Tensor:
    return batch.targets[batch.unit_row]
