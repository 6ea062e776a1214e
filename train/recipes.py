"""Recipes: which objective applies to which unit. The functions themselves are in `objectives`, presets in `schemas.config`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from schemas.config import Objective
from train import objectives
from train.batch import Batch
from train.policy import UnitLogps


@dataclass(frozen=True)
class Scored:
    """Per-unit losses (U,) and which units they were defined for (bool (U,)); others carry 0."""

    loss: torch.Tensor
    used: torch.Tensor


Part = Callable[[UnitLogps, Batch, Objective, torch.Tensor], torch.Tensor]
"""The losses (U,) of some units, given which (bool (U,)); elsewhere finite and without meaning."""


@dataclass(frozen=True)
class Recipe:
    """The part for units of one token on both sides (stops included), and the one for longer units; None: no loss there."""

    single: Part
    longer: Part | None


def losses(student: UnitLogps, batch: Batch, config: Objective) -> Scored:
    """The unweighted loss of every unit under the configured recipe."""
    recipe, one = RECIPES[config.recipe], one_to_one(batch)
    every = torch.ones_like(one)
    if recipe.longer is recipe.single:
        scored = Scored(recipe.single(student, batch, config, every), every)
    elif recipe.longer is None:
        scored = Scored(torch.where(one, recipe.single(student, batch, config, one), 0.0), one)
    else:
        single, longer = recipe.single(student, batch, config, one), recipe.longer(student, batch, config, ~one)
        scored = Scored(torch.where(one, single, longer), every)
    kept = every
    if config.max_unit is not None:
        kept = kept & (torch.maximum(batch.s_len, batch.t_len) <= config.max_unit)
    if config.trust_region is not None:
        on_path = every if recipe.single is _path else ~one
        outside = objectives.outside_trust_region(student.unit, batch.behavior_logp, config.trust_region)
        kept = kept & ~(on_path & outside)
    return Scored(torch.where(kept, scored.loss, 0.0), scored.used & kept)


def one_to_one(batch: Batch) -> torch.Tensor:
    """bool (U,): units of one token on both sides, stops among them."""
    return (batch.s_len == 1) & (batch.t_len == 1)


def candidate_kl(student: UnitLogps, batch: Batch, config: Objective, where: torch.Tensor) -> torch.Tensor:
    """The configured divergence over the teacher's candidates and the realised unit; meaningful at `where`.

    The unit's score is the sum or the mean of its log-probs (SimCT eq. 6, arXiv 2605.07711), or, as in the authors' release,
    the mean of its raw logits. Both sides' scores are less log Z at the unit's start, which a softmax over them doesn't see:
    candidates are log-probs then, and a unit's mean raw logit its mean log-prob and by how much log Z is higher on average over
    its tokens than at the first one.
    """
    s_unit, t_unit = student.unit, batch.teacher_logp
    if config.unit_score != "sum":
        s_unit, t_unit = s_unit / batch.s_len, t_unit / batch.t_len
    if config.unit_score == "mean_logit":
        s_unit, t_unit = s_unit + _log_z_above_start(student, batch), t_unit + batch.t_log_z
    # The realised unit joins the support unless it is a single token that is a candidate already.
    listed = ((batch.cand_id == _first_target(batch)[:, None]) & (batch.cand_logp > -torch.inf)).any(1)
    outside = ~(listed & one_to_one(batch))
    unused = batch.cand_logp == -torch.inf
    if config.mask_first:
        unused = unused | (~one_to_one(batch)[:, None] & (batch.cand_id == _first_target(batch)[:, None]))
    s_score = torch.cat([student.cand.masked_fill(unused, -torch.inf), s_unit[:, None]], 1)
    t_score = torch.cat([batch.cand_logp.masked_fill(unused, -torch.inf), t_unit[:, None]], 1)
    drop = torch.cat([torch.zeros_like(unused), ~outside[:, None]], 1) | ~where[:, None] & torch.cat(
        [torch.ones_like(unused), torch.zeros_like(outside[:, None])], 1
    )
    return _divergence(
        s_score.masked_fill(drop, -torch.inf), t_score.masked_fill(drop, -torch.inf), config, batch.teacher_entropy
    )


def _log_z_above_start(student: UnitLogps, batch: Batch) -> torch.Tensor:
    """By how much the student's mean log Z over a unit's tokens is above that at its first one, nats (U,); see `t_log_z`."""
    compared = batch.token_unit < len(batch.unit_row)
    total = torch.zeros_like(student.unit).index_add(0, batch.token_unit[compared], student.log_z[compared])
    return total / batch.s_len - student.log_z[batch.unit_row]


def _divergence(s: torch.Tensor, t: torch.Tensor, config: Objective, teacher_entropy: torch.Tensor) -> torch.Tensor:
    if config.direction == "jsd":
        classes = (
            partial(objectives.renormalised, tau=config.tau)
            if config.support == "renormalise"
            else objectives.with_rest
        )
        return objectives.jsd(classes(s), classes(t), config.beta)
    kl: Callable[..., torch.Tensor] = (
        partial(objectives.support_kl, tau=config.tau) if config.support == "renormalise" else objectives.bucket_kl
    )
    if config.direction == "entropy_gated":
        return objectives.entropy_gate(kl(s, t, "forward"), kl(s, t, "reverse"), teacher_entropy)
    return kl(s, t, config.direction)


def _path(student: UnitLogps, batch: Batch, config: Objective, _: torch.Tensor) -> torch.Tensor:
    # The unit's own advantage under the model as it is now, and what credit assignment added when the weights were made.
    teacher = batch.teacher_logp + batch.credit_shift
    if config.ratio_clip is None:
        return objectives.clipped_sampled_path(student.unit, teacher, config.clip)
    return objectives.ratio_clipped(student.unit, teacher, batch.behavior_logp, config.clip, *config.ratio_clip)


def _vopd(student: UnitLogps, batch: Batch, config: Objective, _: torch.Tensor) -> torch.Tensor:
    policy = student.cand.detach().masked_fill(batch.cand_logp == -torch.inf, -torch.inf)
    return objectives.vopd(student.unit, batch.teacher_logp, objectives.bucket_kl(policy, batch.cand_logp), config.clip)


def _cr_opd(student: UnitLogps, batch: Batch, config: Objective, _: torch.Tensor) -> torch.Tensor:
    # A longer unit is known by its first token here: other tokens that spell a part of it count as alternatives.
    others = batch.cand_id != _first_target(batch)[:, None]
    return objectives.cr_opd(
        student.unit,
        batch.teacher_logp,
        student.cand,
        batch.cand_logp,
        others,
        config.clip,
        config.cr_alpha,
        config.cr_eps,
    )


def _dpca(credit: Callable[..., torch.Tensor]) -> Part:
    """The sampled path token by token, with a unit's advantage spread over its tokens by `credit` and then clipped."""

    def part(student: UnitLogps, batch: Batch, config: Objective, _: torch.Tensor) -> torch.Tensor:
        compared = batch.token_unit < len(batch.unit_row)
        unit, token = batch.token_unit[compared], student.token[compared]
        advantage = credit(token, student.unit[unit], batch.teacher_logp[unit], batch.s_len[unit])
        loss = -advantage.clamp(-config.clip, config.clip) * token
        return torch.zeros_like(student.unit).index_add(0, unit, loss)

    return part


_multiplicative, _additive = _dpca(objectives.dpca_multiplicative), _dpca(objectives.dpca_additive)

RECIPES: dict[str, Recipe] = {
    "hybrid": Recipe(candidate_kl, _path),
    "simct": Recipe(candidate_kl, candidate_kl),
    "simct_released": Recipe(candidate_kl, candidate_kl),
    "strict_1to1": Recipe(candidate_kl, None),
    "forward_kl": Recipe(candidate_kl, None),
    "jsd": Recipe(candidate_kl, None),
    "kbucket": Recipe(candidate_kl, None),
    "sampled": Recipe(_path, _path),
    "lightning": Recipe(_path, _path),
    "iw_opd": Recipe(_path, _path),
    "vopd": Recipe(_vopd, _vopd),
    "dpca": Recipe(_multiplicative, _multiplicative),
    "dpca_additive": Recipe(_additive, _additive),
    "cr_opd": Recipe(_cr_opd, _cr_opd),
}
"""By name in the config; `schemas.config.PRESETS` holds the values that a recipe brings along."""


def _first_target(batch: Batch) -> torch.Tensor:
    return batch.targets[batch.unit_row]
