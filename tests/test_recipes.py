"""Recipes beyond those of test_objectives.py, against plain Python written from the formulas, and the keys they read."""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objectives import INF, NAN, Unit, plain_kl, random_distribution, random_unit, random_units, tensors

from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.credit import weigh
from pipeline.weights.estimator import Loss
from schemas.config import (
    Config,
    Objective,
    Recipe,
    Rollouts,
    Scores,
    Section,
    Weights,
    overridden,
    parse_config,
    variants,
)
from schemas.errors import OpdError
from schemas.tables import STOP_ID
from train import objectives
from train.batch import Batch
from train.policy import UnitLogps, unit_logps
from train.recipes import RECIPES, identity, losses
from train.shards import check_log_z
from train.stream import batches

NAMES = [kind.model_fields["recipe"].default for kind in RECIPES]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("forward_kl", {"tau": 2.5}),
    ("forward_kl", {"tail": "bucket"}),
    ("jsd", {}),
    ("jsd", {"beta": 0.1, "tau": 0.7, "tail": "renormalise"}),
    ("jsd", {"beta": 0.9}),
    ("kbucket", {}),
    ("kbucket", {"direction": "forward"}),
    ("kbucket", {"direction": "jsd", "beta": 0.3}),
    ("kbucket", {"direction": "entropy_gated"}),
    ("strict_1to1", {"direction": "forward", "tau": 0.4}),
    ("hybrid", {"tau": 3.0, "clip": 0.5, "tail": "renormalise"}),
    ("hybrid", {"direction": "jsd", "max_unit": 2}),
    ("hybrid", {"direction": "entropy_gated", "tau": 1.5, "tail": "renormalise"}),
    ("simct", {"direction": "jsd", "tau": 0.5}),
    ("simct", {"direction": "entropy_gated", "unit_score": "sum", "max_unit": 2}),
    ("simct", {"direction": "jsd", "mask_first": True}),
    ("simct", {"unit_score": "mean_logit", "max_unit": 2}),
    ("simct_released", {}),
    ("simct_released", {"direction": "forward", "tau": 2.0, "mask_first": True}),
    ("sampled", {"max_unit": 1}),
    ("lightning", {}),
    ("lightning", {"clip": 0.3}),
    ("iw_opd", {"clip": 0.7}),
    ("sampled", {"ratio_clip": (0.2, 0.28)}),
    ("sampled", {"ratio_clip": (1.0, 1e9), "clip": 0.7}),
    ("lightning", {"trust_region": 0.5}),
    ("iw_opd", {"ratio_clip": (0.5, 0.1), "trust_region": 0.8, "max_unit": 2}),
    ("hybrid", {"ratio_clip": (0.2, 0.28), "trust_region": 0.6}),
    ("vopd", {}),
    ("vopd", {"clip": 0.5, "max_unit": 2}),
    ("dpca", {}),
    ("dpca", {"clip": 0.4, "max_unit": 2}),
    ("dpca", {"ratio_clip": None}),
    ("dpca_additive", {}),
    ("dpca_additive", {"clip": 0.4, "max_unit": None, "ratio_clip": (0.5, 0.1)}),
    ("rao_blackwell", {}),
    ("rao_blackwell", {"clip": 0.5, "max_unit": 2}),
    ("exopd", {}),
    ("exopd", {"scale": 2.5, "clip": 0.7, "max_unit": 2}),
    ("exopd", {"scale": 0.0, "reference": "round"}),
    ("kdrl", {}),
    ("kdrl", {"kl_weight": 2.0, "clip": 0.7, "max_unit": 2}),
    ("cr_opd", {}),
    ("cr_opd", {"cr_alpha": 0.0, "cr_eps": 0.1}),
    ("cr_opd", {"cr_alpha": 1.0, "cr_eps": 0.0, "clip": 0.5, "max_unit": 2}),
]
STRICT = {"strict_1to1", "forward_kl", "jsd", "kbucket"}
ENTROPY_THRESHOLD = 0.8


@dataclass(frozen=True)
class Numbers:
    """What a loss sees of the student at one unit."""

    cand: tuple[float, ...]
    unit: float
    tokens: tuple[float, ...]
    log_z: tuple[float, ...]

    def moved(self, i: int, by: float) -> "Numbers":
        flat = [*self.cand, self.unit, *self.tokens, *self.log_z]
        flat[i] += by
        k, n = len(self.cand), len(self.tokens)
        return Numbers(tuple(flat[:k]), flat[k], tuple(flat[k + 1 : k + 1 + n]), tuple(flat[k + 1 + n :]))


def clamp(value: float, clip: float) -> float:
    return min(clip, max(-clip, value))


def classes(row: Sequence[float], config: Objective) -> list[float]:
    """Probabilities: tempered and renormalised, or as they are with what is left of 1."""
    if config.tail == "bucket":
        mass = [exp(x) for x in row]
        return [*mass, 1 - sum(mass)]
    mass = [exp(x) ** (1 / config.tau) for x in row]
    return [m / sum(mass) for m in mass]


def divergence(u: Unit, x: Numbers, config: Objective) -> float:
    kept = [i for i, c in enumerate(u.ids) if u.one_to_one or not config.mask_first or c != u.targets[0]]
    s, t = [x.cand[i] for i in kept], [u.t_cand[i] for i in kept]
    realised = [x.unit], [u.teacher]
    if config.unit_score != "sum":
        realised = [x.unit / u.s_len], [u.teacher / u.t_len]
    if config.unit_score == "mean_logit":
        # Raw logits all of them: the candidates' too, which share the first log Z.
        s, t = [c + x.log_z[0] for c in s], [c + u.t_log_z[0] for c in t]
        realised = [(x.unit + sum(x.log_z)) / u.s_len], [(u.teacher + sum(u.t_log_z)) / u.t_len]
    if not (u.one_to_one and u.targets[0] in u.ids):
        s, t = s + realised[0], t + realised[1]
    p_s, p_t = classes(s, config), classes(t, config)
    if config.direction == "jsd":
        middle = [config.beta * b + (1 - config.beta) * a for a, b in zip(p_s, p_t, strict=True)]
        return config.beta * plain_kl(p_t, middle) + (1 - config.beta) * plain_kl(p_s, middle)
    gate = config.direction == "entropy_gated" and u.entropy > ENTROPY_THRESHOLD
    return plain_kl(p_t, p_s) if gate or config.direction == "forward" else plain_kl(p_s, p_t)


def path(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    advantage = clamp(u.teacher - at.unit, config.clip)
    return ppo(advantage, x.unit, u.behavior, config.ratio_clip)


def ppo(advantage: float, logp: float, behavior: float, bounds: tuple[float, float] | None) -> float:
    if bounds is None:
        return -advantage * logp
    low, high = bounds
    r = exp(logp) / exp(behavior)
    return -min(r * advantage, min(1 + high, max(1 - low, r)) * advantage)


def on_path(u: Unit, recipe: str) -> bool:
    return recipe in ("sampled", "lightning", "iw_opd") or (recipe == "hybrid" and not u.one_to_one)


def left_out(u: Unit, config: Objective) -> bool:
    """Carries no loss for its length, or for how far the policy has moved there."""
    longest, radius = (getattr(config, name, None) for name in ("max_unit", "trust_region"))
    if longest is not None and max(u.s_len, u.t_len) > longest:
        return True
    return radius is not None and on_path(u, config.recipe) and abs(u.student - u.behavior) > radius


def vopd(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    p_s, p_t = ([*(exp(c) for c in row), 1 - sum(exp(c) for c in row)] for row in (at.cand, u.t_cand))
    return -clamp(u.teacher - at.unit + plain_kl(p_s, p_t), config.clip) * x.unit


def sampled_at(u: Unit, tokens: Sequence[float]) -> list[float]:
    """Log-probs of a unit's tokens under the policy that sampled; each token has moved otherwise since."""
    return [token - (1 + j) * u.log_ratio for j, token in enumerate(tokens)]


def dpca(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    loss, total = 0.0, sum(at.tokens)
    for token, was, behavior in zip(x.tokens, at.tokens, sampled_at(u, at.tokens), strict=True):
        if config.recipe == "dpca_additive" or abs(total) < 1e-8:
            credit = (u.teacher - total) / len(x.tokens)
        else:
            credit = (u.teacher / total - 1) * was
        loss += ppo(clamp(credit, config.clip), token, behavior, config.ratio_clip)
    return loss


def rao_blackwell(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    """The candidates exactly; the sampled token within the class of all else. Longer units are the sampled path's."""
    if not u.one_to_one:
        return -clamp(u.teacher - at.unit, config.clip) * x.unit
    s_rest, was_rest, t_rest = (1 - sum(map(exp, row)) for row in (x.cand, at.cand, u.t_cand))
    p_s, p_t = [*map(exp, x.cand), s_rest], [*map(exp, u.t_cand), t_rest]
    if u.targets[0] in u.ids:
        return plain_kl(p_s, p_t)
    above = log(exp(at.unit) / was_rest) - log(exp(u.teacher) / t_rest)
    return plain_kl(p_s, p_t) + clamp(above, config.clip) * x.unit


def exopd(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    logp = first(u) if config.reference == "initial" else started(u)
    advantage = config.scale * (u.teacher - logp) - (at.unit - logp)
    return -clamp(advantage, config.clip) * x.unit


def started(u: Unit) -> float:
    """What the round's first policy says of a unit; neither the student nor the sampler."""
    return u.student - 0.7 * u.log_ratio - 0.1


def first(u: Unit) -> float:
    """What the first round's first policy says of it, likewise."""
    return u.student + 0.4 * u.log_ratio - 0.2


def cr_opd(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    advantage = clamp(u.teacher - at.unit, config.clip)
    chosen = [i for i, c in enumerate(u.ids) if c != u.targets[0] and exp(at.cand[i]) >= config.cr_eps]
    if advantage >= 0 or not chosen:
        return -advantage * x.unit
    a = config.cr_alpha
    q = [exp(u.t_cand[i]) ** a * exp(at.cand[i]) ** (1 - a) for i in chosen]
    return abs(advantage) * (x.unit - sum(w / sum(q) * x.cand[i] for w, i in zip(q, chosen, strict=True)))


def reference(u: Unit, x: Numbers, at: Numbers, config: Objective) -> float:
    """A unit's loss where the student says `x`; what is detached sees `at`."""
    if left_out(u, config):
        return 0.0
    special = {
        "vopd": vopd,
        "dpca": dpca,
        "dpca_additive": dpca,
        "cr_opd": cr_opd,
        "rao_blackwell": rao_blackwell,
        "exopd": exopd,
        "kdrl": lambda u, x, at, config: -config.kl_weight * clamp(u.teacher - at.unit, config.clip) * x.unit,
    }.get(config.recipe)
    if special:
        return special(u, x, at, config)
    if on_path(u, config.recipe):
        return path(u, x, at, config)
    return 0.0 if config.recipe in STRICT and not u.one_to_one else divergence(u, x, config)


def moved_units(seed: int) -> list[Unit]:
    """Units that another policy than the student sampled, within and beyond the bounds that the cases set."""
    units = random_units(seed)
    log_ratios = np.random.default_rng(seed).normal(0, 0.5, len(units))
    return [replace(u, log_ratio=log_ratio) for u, log_ratio in zip(units, log_ratios.tolist(), strict=True)]


def told(units: Sequence[Unit], seed: int = 0, spare: int = 0) -> tuple[list[Numbers], UnitLogps, Batch]:
    """The same units as plain numbers and as float64 leaves; every unit's tokens add up to it."""
    rng = np.random.default_rng(seed)
    student, batch = tensors(units, spare)
    numbers = [
        Numbers(
            u.s_cand,
            u.student,
            tuple((u.student * random_distribution(rng, u.s_len)).tolist()),
            tuple(rng.normal(18, 1, u.s_len).tolist()),
        )
        for u in units
    ]
    token, log_z = (
        torch.tensor([t for n in numbers for t in getattr(n, name)], dtype=torch.float64, requires_grad=True)
        for name in ("tokens", "log_z")
    )
    of_token = torch.repeat_interleave(torch.arange(len(units)), batch.s_len)
    behavior = [logp for u, n in zip(units, numbers, strict=True) for logp in sampled_at(u, n.tokens)]
    policy, initial = (torch.tensor([of(u) for u in units], dtype=torch.float64) for of in (started, first))
    batch = replace(batch, policy_logp=policy, first_logp=initial)
    batch = replace(batch, token_unit=of_token, token_behavior_logp=torch.tensor(behavior, dtype=torch.float64))
    return numbers, replace(student, token=token, log_z=log_z), batch


def run(student: UnitLogps, batch: Batch, config: Objective) -> tuple[np.ndarray, list[np.ndarray], list[bool]]:
    scored = losses(student, batch, config)
    leaves = (student.cand, student.unit, student.token, student.log_z)
    slopes = torch.autograd.grad(scored.loss.sum(), leaves, materialize_grads=True)
    return scored.loss.detach().numpy(), [g.numpy() for g in slopes], scored.used.tolist()


@pytest.mark.parametrize(("recipe", "options"), CASES)
def test_recipe_and_its_gradient_are_the_formula(recipe: str, options: dict[str, Any]) -> None:
    config, units, h = tiny.objective(recipe=recipe, **options), moved_units(seed=21), 1e-6
    numbers, student, batch = told(units)
    loss, (cand, unit, token, log_z), used = run(student, batch, config)
    expected = [reference(u, n, n, config) for u, n in zip(units, numbers, strict=True)]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-12)
    assert np.ptp(loss[loss != 0]) > 0.01
    at_token = 0
    for i, (u, n) in enumerate(zip(units, numbers, strict=True)):
        size, slots = 1 + len(n.cand) + 2 * len(n.tokens), len(n.cand)
        slope = [
            (reference(u, n.moved(j, h), n, config) - reference(u, n.moved(j, -h), n, config)) / (2 * h)
            for j in range(size)
        ]
        mine = slice(at_token, at_token + u.s_len)
        ours = [*cand[i, :slots], unit[i], *token[mine], *log_z[mine]]
        np.testing.assert_allclose(ours, slope, rtol=1e-6, atol=1e-7)
        assert not cand[i, slots:].any()
        at_token += u.s_len
    assert used == [not left_out(u, config) and (recipe not in STRICT or u.one_to_one) for u in units]


def test_the_cases_reach_every_branch() -> None:
    units = moved_units(seed=21)
    assert {recipe for recipe, _ in CASES} == set(NAMES)
    assert 0 < sum(u.entropy > ENTROPY_THRESHOLD for u in units) < len(units)
    negative = [u for u in units if u.teacher < u.student]
    assert 0 < len(negative) < len(units)
    choices = [sum(c != u.targets[0] and exp(p) >= 0.1 for c, p in zip(u.ids, u.s_cand, strict=True)) for u in negative]
    assert min(choices) == 0 and max(choices) > 1
    assert {max(u.s_len, u.t_len) for u in units} >= {1, 2, 3}
    longer = [u for u in units if not u.one_to_one]
    for gains in (True, False):
        ratios = [exp(u.log_ratio) for u in longer if (u.teacher > u.student) == gains]
        assert min(ratios) < 0.8 and max(ratios) > 1.28 and any(0.8 < r < 1.28 for r in ratios)
    assert 0 < sum(abs(u.log_ratio) > 0.6 for u in longer) < len(longer)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_unit_is_the_same_alone_and_beside_others_and_padding(recipe: str) -> None:
    config, units = tiny.objective(recipe=recipe), random_units(seed=22, each=2)
    _, student, batch = told(units)
    _, wide_student, wide_batch = told(units, spare=4)
    (loss, slopes, _), (wide, wide_slopes, _) = run(student, batch, config), run(wide_student, wide_batch, config)
    np.testing.assert_allclose(wide, loss, rtol=1e-12)
    slots = student.cand.shape[1]
    np.testing.assert_allclose(wide_slopes[0][:, :slots], slopes[0], rtol=1e-12, atol=1e-15)
    assert not wide_slopes[0][:, slots:].any()  # NaN would count as true
    first = 0
    for i, u in enumerate(units):
        mine = slice(first, first + u.s_len)
        one = {name: getattr(batch, name)[i : i + 1] for name in ("s_len", "t_len", "teacher_logp", "credit_shift")}
        one |= {
            name: getattr(batch, name)[i : i + 1]
            for name in (
                *("reward", "first_logp", "weight", "cand_id", "cand_logp", "response_of_unit"),
                *("t_log_z", "teacher_entropy", "behavior_logp", "policy_logp"),
            )
        }
        zero = torch.zeros(1, dtype=torch.int64)
        alone = replace(
            batch,
            **one,
            targets=batch.targets[mine],
            unit_row=zero,
            token_unit=torch.zeros_like(batch.targets[mine]),
            token_behavior_logp=batch.token_behavior_logp[mine],
        )
        found = UnitLogps(student.token[mine], student.unit[i : i + 1], student.cand[i : i + 1], student.log_z[mine])
        assert losses(found, alone, config).loss.item() == pytest.approx(loss[i], rel=1e-12)
        first += u.s_len


@pytest.mark.parametrize("recipe", NAMES)
def test_masked_tokens_carry_nothing_and_a_batch_of_them_is_empty(recipe: str) -> None:
    """Tokens of masked units come with the unit number U."""
    config, units = tiny.objective(recipe=recipe), random_units(seed=23, each=1)
    _, student, batch = told(units)
    loss, slopes, _ = run(student, batch, config)
    masked = replace(batch, token_unit=torch.cat([batch.token_unit, torch.full((3,), len(units))]))
    masked = replace(
        masked,
        targets=torch.cat([batch.targets, torch.tensor([1, 2, 3])]),
        token_behavior_logp=torch.cat([batch.token_behavior_logp, torch.full((3,), -9.0)]),
    )
    token, log_z = (
        torch.cat([x.detach(), torch.full((3,), -9.0, dtype=torch.float64)]).requires_grad_()
        for x in (student.token, student.log_z)
    )
    beside, beside_slopes, _ = run(replace(student, token=token, log_z=log_z), masked, config)
    np.testing.assert_array_equal(beside, loss)
    for ours, alone in zip(beside_slopes[2:], slopes[2:], strict=True):
        np.testing.assert_array_equal(ours, [*alone, 0, 0, 0])

    per_unit = (
        "unit_row",
        "s_len",
        "t_len",
        "teacher_logp",
        "t_log_z",
        "teacher_entropy",
        "behavior_logp",
        "policy_logp",
        "first_logp",
        "weight",
        "credit_shift",
        "reward",
        "cand_id",
        "cand_logp",
        "response_of_unit",
    )
    none = replace(
        masked,
        **{name: getattr(batch, name)[:0] for name in per_unit},
        token_unit=torch.zeros_like(masked.token_unit),
    )
    empty = UnitLogps(token, *(torch.zeros_like(x[:0]).requires_grad_() for x in (student.unit, student.cand)), log_z)
    nothing, (_, _, slope, _), used = run(empty, none, config)
    assert nothing.shape == (0,) and used == [] and not slope.any()


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("forward_kl", {}),
        ("jsd", {"beta": 0.25}),
        ("kbucket", {}),
        ("strict_1to1", {"tau": 2.0}),
        ("kbucket", {"direction": "entropy_gated"}),
    ],
)
def test_same_tokenizer_and_every_token_a_candidate_is_the_exact_divergence(
    recipe: str, options: dict[str, Any]
) -> None:
    rng, vocab, count = np.random.default_rng(24), 30, 20
    config = tiny.objective(recipe=recipe, **options)
    scale = np.linspace(0.2, 4, count)[:, None]  # from flat to sharp teachers
    logits, teacher = (torch.from_numpy(scale * rng.normal(size=(count, vocab))) for _ in range(2))
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    realised = torch.from_numpy(rng.integers(0, vocab, count))
    pick = torch.arange(count), realised
    _, batch = tensors([random_unit(rng, "1:1 listed") for _ in range(count)])
    full = replace(
        batch,
        targets=realised,
        cand_id=torch.arange(vocab).expand(count, -1),
        cand_logp=teacher,
        teacher_logp=teacher[pick],
        teacher_entropy=-(teacher.exp() * teacher).sum(1),
    )
    scored = losses(UnitLogps(student[pick], student[pick], student, torch.full((count,), NAN)), full, config)
    expected = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([exp(x / config.tau) / sum(exp(y / config.tau) for y in row) for x in row] for row in (s, t))
        if config.direction == "jsd":
            m = [0.25 * b + 0.75 * a for a, b in zip(p, q, strict=True)]
            expected.append(0.25 * plain_kl(q, m) + 0.75 * plain_kl(p, m))
        else:
            sure = -sum(x * log(x) for x in q) <= ENTROPY_THRESHOLD
            forward = config.direction == "forward" or (config.direction == "entropy_gated" and not sure)
            expected.append(plain_kl(q, p) if forward else plain_kl(p, q))
    # 2e-5: with no class left over, both sides' rest counts as 1e-6.
    np.testing.assert_allclose(scored.loss, expected, rtol=1e-6, atol=2e-5 if config.tail == "bucket" else 1e-9)


def test_the_gate_opens_by_the_whole_distributions_entropy() -> None:
    """A sharp pair of candidates and a flat rest: what the two classes show is below the threshold, the entropy above."""
    unit = Unit(1, 1, (3,), (3, 4), (log(0.6), log(0.2)), (log(0.9), log(0.05)), log(0.6), log(0.9))
    found = {}
    for entropy in (0.79, 0.81):
        _, student, batch = told([replace(unit, entropy=entropy)])
        found[entropy] = losses(student, batch, tiny.objective(recipe="kbucket", direction="entropy_gated")).loss.item()
    s, t = [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]
    assert -sum(x * log(x) for x in t) < ENTROPY_THRESHOLD
    assert found == pytest.approx({0.79: plain_kl(s, t), 0.81: plain_kl(t, s)}, rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.floats(0.05, 0.95))
def test_jsd_between_its_limits(seed: int, size: int, beta: float) -> None:
    rng = np.random.default_rng(seed)
    p_s, p_t = (random_distribution(rng, size) for _ in range(2))
    s, t = (torch.from_numpy(np.log(p)) for p in (p_s, p_t))
    near = 1e-7
    assert float(objectives.jsd(s, t, near)) / near == pytest.approx(plain_kl(p_t, p_s), rel=1e-2, abs=1e-6)
    assert float(objectives.jsd(s, t, 1 - near)) / near == pytest.approx(plain_kl(p_s, p_t), rel=1e-2, abs=1e-6)
    assert float(objectives.jsd(s, t, beta)) == pytest.approx(float(objectives.jsd(t, s, 1 - beta)), rel=1e-9)
    bound = -beta * log(beta) - (1 - beta) * log(1 - beta)
    assert -1e-15 <= float(objectives.jsd(s, t, beta)) <= bound
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=torch.float64)
    assert float(objectives.jsd(apart[0], apart[1], beta)) == pytest.approx(bound, rel=1e-12)


def test_temperature_has_its_limits() -> None:
    """Hot: both sides are uniform. Cold: each is its likeliest candidate, so agreement on it is all that counts."""
    s, t = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.3, 0.2], [0.6, 0.1, 0.3]))
    assert float(objectives.support_kl(s, t, "reverse", 1e4)) == pytest.approx(0, abs=1e-7)
    assert float(objectives.support_kl(s, t, "forward", 1e-2)) == pytest.approx(0, abs=1e-7)
    assert float(objectives.support_kl(s, t, "reverse", 1.0)) == float(objectives.support_kl(s, t, "reverse"))


def test_released_simct_is_simct_where_log_z_says_nothing() -> None:
    """At units of one token on both sides always; at longer ones while log Z is the same at each of their tokens."""
    released, paper = tiny.objective(recipe="simct_released"), tiny.objective(recipe="simct")
    units = random_units(seed=30)
    one = torch.tensor([u.one_to_one for u in units])
    flat = [replace(u, t_log_z=(7.0,) * u.t_len) for u in units]
    for given_units, level in ((units, None), (flat, None), (flat, 5.0)):
        _, student, batch = told(given_units)
        if level is not None:
            student = replace(student, log_z=torch.full_like(student.log_z, level))
        ours, theirs = (losses(student, batch, config).loss.detach() for config in (released, paper))
        np.testing.assert_allclose(ours[one], theirs[one], rtol=1e-12)
        apart = (ours - theirs)[~one].abs()
        assert apart.max() < 1e-12 if level is not None else apart.max() > 0.1


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    """What the softmax over units sees of raw logits are differences: a model's logits are known up to a constant."""
    units, config = random_units(seed=31), tiny.objective(recipe="simct_released")
    _, student, batch = told(units)
    _, moved, moved_batch = told([replace(u, t_log_z=tuple(z + 40 for z in u.t_log_z)) for u in units])
    moved = replace(moved, log_z=moved.log_z - 30)
    np.testing.assert_allclose(
        losses(moved, moved_batch, config).loss.detach(), losses(student, batch, config).loss.detach(), rtol=1e-9
    )


def test_released_simct_is_pinned() -> None:
    """One unit of two tokens on both sides, one candidate: the released score is the mean of two raw logits."""
    _, batch = tensors([Unit(2, 2, (1, 2), (5,), (-1.0,), (-2.0,), -3.0, -2.4, t_log_z=(9.0, 10.0))])
    batch = replace(batch, token_unit=torch.zeros(2, dtype=torch.int64))
    one = torch.ones(1, dtype=torch.float64)
    student = UnitLogps(-1.5 * one.expand(2), -3 * one, -one[:, None], torch.tensor([4.0, 6.0], dtype=torch.float64))
    # Logits of the candidate: 4 - 1 and 9 - 2; of the unit: the means of (4 - 1.5, 6 - 1.5) and (9 - 1.2, 10 - 1.2).
    p_s, p_t = ([exp(x) / (exp(x) + exp(y)) for x, y in ((a, b), (b, a))] for a, b in ((3.0, 3.5), (7.0, 8.3)))
    found = losses(student, batch, tiny.objective(recipe="simct_released")).loss.item()
    assert found == pytest.approx(plain_kl(p_s, p_t), rel=1e-12) and found == pytest.approx(0.06896, abs=5e-6)


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 0), min_size=1, max_size=8),
    st.floats(-60, 0),
    st.sampled_from([objectives.dpca_additive, objectives.dpca_multiplicative]),
)
def test_credit_adds_up_to_the_advantage(tokens: list[float], teacher: float, credit: Any) -> None:
    p = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    total, m = p.sum().expand(len(p)), torch.full((len(p),), len(p))
    given_to = credit(p, total, torch.full_like(p, teacher), m)
    assert not given_to.requires_grad
    assert float(given_to.sum()) == pytest.approx(teacher - sum(tokens), rel=1e-9, abs=1e-7)
    if len(tokens) == 1:
        assert float(given_to[0]) == pytest.approx(teacher - tokens[0], rel=1e-9, abs=1e-7)
    if abs(sum(tokens)) < 1e-8:
        assert given_to.tolist() == pytest.approx([(teacher - sum(tokens)) / len(tokens)] * len(tokens))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([-0.01, -0.03], [-0.24, -0.72]), ([-1e-5, -3e-5], [-0.24999, -0.74997]), ([0, 0], [-0.5, -0.5])],
)
def test_credit_is_pinned(tokens: list[float], expected: list[float]) -> None:
    """By surprisal, however sure the student is, and evenly where it leaves no doubt; the teacher's sum is -1."""
    p = torch.tensor(tokens, dtype=torch.float64)
    given_to = objectives.dpca_multiplicative(p, p.sum().expand(2), -torch.ones_like(p), torch.tensor([2, 2]))
    assert given_to.tolist() == pytest.approx(expected, rel=1e-9)


def test_both_credits_are_the_sampled_path_on_single_tokens() -> None:
    units = [u for u in random_units(seed=25) if u.s_len == 1]
    assert any(u.t_len > 1 for u in units) and any(u.one_to_one for u in units)
    rows = []
    for recipe in ("dpca", "dpca_additive", "sampled"):
        _, student, batch = told(units)
        loss, (_, unit, token, _), _ = run(student, batch, tiny.objective(recipe=recipe, clip=10.0, ratio_clip=None))
        rows.append((loss, unit + token))
    for loss, slope in rows[1:]:
        np.testing.assert_allclose(loss, rows[0][0], rtol=1e-12)
        np.testing.assert_allclose(slope, rows[0][1], rtol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20))
def test_the_bucket_loses_the_kl_within_the_rest(seed: int, vocab: int) -> None:
    """The coarsening of SimCT's proposition with one class c: full KL - bucket KL = Q_S(c) KL(q_S(.|c) || q_T(.|c))."""
    rng = np.random.default_rng(seed)
    p_s, p_t = (random_distribution(rng, vocab) for _ in range(2))
    kept = int(rng.integers(0, vocab))
    rest_s, rest_t = p_s[kept:].sum(), p_t[kept:].sum()
    if min(rest_s, rest_t) < 1e-5:
        return
    lost = rest_s * plain_kl(p_s[kept:] / rest_s, p_t[kept:] / rest_t)
    s, t = (torch.from_numpy(np.log(p[:kept])) for p in (p_s, p_t))
    assert plain_kl(p_s, p_t) - float(objectives.bucket_kl(s, t)) == pytest.approx(lost, abs=1e-9)


def every_outcome(seed: int, vocab: int = 12) -> tuple[torch.Tensor, torch.Tensor, UnitLogps, Batch]:
    """One position and a unit for each token that could be sampled there: logits, p_T, and what a recipe sees."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=vocab)).requires_grad_()
    teacher = torch.from_numpy(rng.normal(size=vocab)).log_softmax(-1)
    student = logits.log_softmax(-1)
    _, batch = tensors([random_unit(rng, "1:1 listed") for _ in range(vocab)])
    ids = torch.arange(vocab)
    batch = replace(
        batch, targets=ids, token_unit=ids, cand_id=ids.expand(vocab, -1), cand_logp=teacher.expand(vocab, -1)
    )
    found = UnitLogps(student, student, student.expand(vocab, -1), logits.logsumexp(-1).expand(vocab))
    return logits, teacher, found, replace(batch, teacher_logp=teacher, token_behavior_logp=student.detach())


@pytest.mark.parametrize("recipe", ["sampled", "vopd", "dpca", "dpca_additive"])
def test_the_expected_gradient_is_that_of_reverse_kl(recipe: str) -> None:
    """DPCA's with its ratio, which is 1 for the policy that samples."""
    logits, teacher, student, batch = every_outcome(seed=26)
    p = student.unit.detach().exp()
    loss = losses(student, batch, tiny.objective(recipe=recipe, clip=50.0)).loss
    (ours,) = torch.autograd.grad((p * loss).sum(), logits, retain_graph=True)
    s = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((s.exp() * (s - teacher)).sum(), logits)
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("candidates", [0, 1, 5, 11])
def test_candidates_taken_exactly_leave_the_expected_gradient_and_take_variance(candidates: int) -> None:
    """Every token, as often as it is sampled: `rao_blackwell` has the mean of `sampled`, and no more variance."""
    logits, teacher, student, batch = every_outcome(seed=41)
    s = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((s.exp() * (s - teacher)).sum(), logits, retain_graph=True)
    few = replace(batch, cand_logp=batch.cand_logp.clone())
    few.cand_logp[:, candidates:] = -INF
    spread = {}
    for recipe in ("sampled", "rao_blackwell"):
        loss = losses(student, few, tiny.objective(recipe=recipe, clip=50.0)).loss
        slopes = torch.stack([torch.autograd.grad(one, logits, retain_graph=True)[0] for one in loss])
        p = student.unit.detach().exp()
        np.testing.assert_allclose(p @ slopes, exact, atol=1e-5)
        spread[recipe] = float(p @ (slopes - exact).square().sum(1))
    assert spread["rao_blackwell"] < spread["sampled"] if candidates else spread["rao_blackwell"] == spread["sampled"]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25, 3.0])
def test_the_gradient_of_exopd_is_that_of_the_kl_to_the_extrapolated_teacher(scale: float) -> None:
    """p_ref (p_T / p_ref)^scale, normalised; nothing is left to gain once the policy is that."""
    logits, teacher, student, batch = every_outcome(seed=37)
    reference = torch.from_numpy(np.random.default_rng(38).normal(size=len(logits))).log_softmax(-1)
    target = (reference + scale * (teacher - reference)).log_softmax(-1)
    config = tiny.objective(recipe="exopd", scale=scale, clip=50.0)
    for there in (False, True):
        if there:
            logits = target.clone().requires_grad_()
            student = replace(student, unit=logits.log_softmax(-1))
        s = logits.log_softmax(-1)
        p = s.detach().exp()
        loss = losses(student, replace(batch, first_logp=reference), config).loss
        (ours,) = torch.autograd.grad((p * loss).sum(), logits, retain_graph=True)
        (exact,) = torch.autograd.grad((s.exp() * (s - target)).sum(), logits)
        np.testing.assert_allclose(ours, exact, atol=1e-12)
        assert bool(exact.abs().max() < 1e-12) == there
    if scale == 1:
        plain = losses(student, batch, tiny.objective(recipe="sampled", clip=50.0)).loss
        torch.testing.assert_close(loss, plain)


def test_importance_sampling_from_another_policy_has_the_gradient_of_reverse_kl() -> None:
    """The ratio without bounds: sum over y of p_b(y) grad loss(y) is exact whatever p_b; without it, it is another one."""
    logits, teacher, student, batch = every_outcome(seed=28)
    behavior = torch.from_numpy(np.random.default_rng(29).normal(size=len(logits))).log_softmax(-1)
    batch = replace(batch, behavior_logp=behavior)
    s = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((s.exp() * (s - teacher)).sum(), logits)
    errors = {}
    for ratio_clip in (None, (1.0, 1e9)):
        loss = losses(student, batch, tiny.objective(recipe="sampled", clip=50.0, ratio_clip=ratio_clip)).loss
        (ours,) = torch.autograd.grad((behavior.exp() * loss).sum(), logits, retain_graph=True)
        errors[ratio_clip] = float((ours - exact).abs().max())
    assert errors[1.0, 1e9] < 1e-12 and errors[None] > 0.05


@pytest.mark.parametrize(("top_p", "wrong"), [(1.0, 0.95), (0.95, 0.92)])
def test_sampling_away_from_temperature_one_keeps_the_gradient_of_reverse_kl(top_p: float, wrong: float) -> None:
    """Every token of 40 positions, as often as temperature .6 and top-p draw it, weighed by the stage and scored by the recipe.

    With a nucleus what was never drawn stays missing: exact is the sum over the nucleus, and how near that is to the whole
    depends on how flat the distributions are.
    """
    rng, vocab = np.random.default_rng(30), 200
    sums = {name: np.zeros(3) for name in ("plain", "weighed")}
    for _ in range(40):
        logits, teacher, student, batch = every_outcome(seed=int(rng.integers(1 << 30)), vocab=vocab)
        logp = student.unit.detach().numpy()
        q = np.exp(logp / 0.6) / np.exp(logp / 0.6).sum()
        order = np.argsort(-q)
        inside = np.zeros(vocab, bool)
        inside[order[np.cumsum(q[order]) - q[order] < top_p]] = True
        q = np.where(inside, q, 0) / q[inside].sum()
        names = [f"{y:03}" for y in range(vocab)]
        units = pl.DataFrame({"rollout_id": names, "unit": 0, "kind": "1:1", "s_start": 0, "s_len": 1, "t_len": 1})
        logps = {"behavior_logp": logp, "sampler_logp": np.log(np.where(inside, q, 1.0))}
        rollouts = pl.DataFrame({"rollout_id": names, **{name: values[:, None] for name, values in logps.items()}})
        rollouts = rollouts.with_columns(pl.col(name).arr.to_list() for name in logps)
        config = tiny.objective(recipe="sampled", clip=50.0)
        units = units.with_columns(teacher_logp=pl.Series(teacher.numpy()))
        table = weigh(
            units,
            rollouts,
            parse_config(MINIMAL | {"weights": {"scheme": "uniform"}}, "my.yaml").weights,
            loss=Loss.of(config),
        )
        loss = losses(student, batch, config).loss
        s = logits.log_softmax(-1)
        terms = {
            "exact": s.exp() * (s - teacher),
            "plain": torch.from_numpy(q) * loss,
            "weighed": torch.from_numpy(q * table["weight"].to_numpy()) * loss,
            "nucleus": s.detach().exp() * torch.from_numpy(inside) * loss,
        }
        found = {
            name: torch.autograd.grad(term.sum(), logits, retain_graph=True)[0].numpy() for name, term in terms.items()
        }
        np.testing.assert_allclose(found["weighed"], found["nucleus"], atol=1e-6)
        for name, total in sums.items():
            total += [found[name] @ found["exact"], found[name] @ found[name], found["exact"] @ found["exact"]]
    cosine = {name: total[0] / (total[1] * total[2]) ** 0.5 for name, total in sums.items()}
    assert cosine["plain"] < wrong and cosine["weighed"] > (0.99 if top_p < 1 else 1 - 1e-9)


def test_the_ratio_of_a_token_leaves_the_spread_of_credit_as_it_is() -> None:
    """Two tokens of a unit that have moved by .9 and 1.1: within the bounds each has r A of its own, not of the unit."""
    _, batch = tensors([Unit(2, 2, (1, 2), (5,), (-1.0,), (-2.0,), -4.0, -3.0)])
    tokens = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([0.9, 1.1], dtype=torch.float64)
    batch = replace(
        batch, token_unit=torch.zeros(2, dtype=torch.int64), token_behavior_logp=tokens.detach() - moved.log()
    )
    cases = {(0.2, 0.28): [0.9, 1.1], None: [1.0, 1.0], (0.05, 0.28): [0.9, 1.1], (0.2, 0.05): [0.9, 0.0]}
    for ratio_clip, ratios in cases.items():
        student = UnitLogps(tokens, tokens.sum()[None], torch.full((1, 1), -1.0), torch.zeros(2))
        scored = losses(student, batch, tiny.objective(recipe="dpca", ratio_clip=ratio_clip))
        (slope,) = torch.autograd.grad(scored.loss.sum(), tokens)
        # A = (3/4 - 1) log p: .25 and .75, which add up to the unit's 1.
        np.testing.assert_allclose(slope, [-r * a for r, a in zip(ratios, [0.25, 0.75], strict=True)], rtol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.2, -2.4, -2.4),
        (2.0, 1.5, -2.56, 0.0),
        (2.0, 0.5, -1.0, -1.0),
        (-2.0, 0.9, 1.8, 1.8),
        (-2.0, 0.5, 1.6, 0.0),
        (-2.0, 3.0, 6.0, 6.0),
        (2.0, exp(500), -2.56, 0.0),
        (-2.0, exp(-500), 1.6, 0.0),
        (2.0, exp(-500), -2 * exp(-20), 0.0),
        (-2.0, exp(500), 2 * exp(20), 0.0),
    ],
)
def test_ratio_clipping_is_pinned(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """With low .2 and high .28; slopes are in log p_S, so that they are r A where nothing is clipped."""
    s = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    found = objectives.ratio_clipped(s, s.detach() + advantage, s.detach() - log(ratio), 5.0, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(found.sum(), s)
    assert found.item() == pytest.approx(loss, rel=1e-12) and gradient.item() == pytest.approx(slope, rel=1e-12)


def test_a_trust_region_is_as_wide_either_way() -> None:
    s = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    b = torch.tensor([-1.0, -0.49, -0.51, -1.49, -1.51])
    assert objectives.outside_trust_region(s, b, 0.5).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("select", ["entropy", "soft_or"])
@pytest.mark.parametrize("recipe", ["hybrid", "strict_1to1", "sampled", "dpca"])
def test_what_is_selected_of_each_response_is_the_formula(recipe: str, select: str) -> None:
    """Of the units that the recipe has a loss for, response by response; these keep theirs, and the others have none."""
    units, share = random_units(seed=35), 0.4
    responses = np.sort(np.random.default_rng(36).integers(0, 5, len(units)))
    _, student, batch = told(units)
    batch = replace(batch, response_of_unit=torch.from_numpy(responses))
    plain, config = tiny.objective(recipe=recipe), tiny.objective(recipe=recipe, select=select, select_share=share)
    everywhere, scored = (losses(student, batch, each) for each in (plain, config))
    expected = [False] * len(units)
    for response in range(5):
        mine = [i for i in range(len(units)) if responses[i] == response and everywhere.used[i]]
        h, d = [], []
        for u in (units[i] for i in mine):
            s, t = ([*(exp(x) for x in row), 1 - sum(exp(x) for x in row)] for row in (u.s_cand, u.t_cand))
            h.append(-sum(p * log(p) for p in s))
            d.append(plain_kl(s, t))
        score = h
        if select == "soft_or":
            score = [a / max(h) + b / max(d) - a / max(h) * b / max(d) for a, b in zip(h, d, strict=True)]
        for rank, i in enumerate(sorted(range(len(mine)), key=lambda i: -score[i])):
            expected[mine[i]] = rank < share * len(mine)
    assert scored.used.tolist() == expected and 0 < sum(expected) < len(units)
    np.testing.assert_array_equal(scored.loss.detach(), torch.where(scored.used, everywhere.loss, 0.0).detach())
    whole = losses(student, batch, tiny.objective(recipe=recipe, select=select, select_share=1.0))
    assert torch.equal(whole.used, everywhere.used) and torch.equal(whole.loss, everywhere.loss)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=30), st.sampled_from([0.05, 0.3, 0.5, 0.55, 1.0])
)
def test_a_share_of_each_group_is_its_highest_and_the_first_of_equals(
    pairs: list[tuple[int, int]], share: float
) -> None:
    group, score = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    found = objectives.top_share(score.double(), group, share).tolist()
    for g in {g for g, _ in pairs}:
        mine = sorted((-s, i) for i, (h, s) in enumerate(pairs) if h == g)
        count = next(n for n in range(len(mine) + 1) if n / len(mine) >= share)
        assert {i for _, i in mine if found[i]} == {i for _, i in mine[:count]}


def test_soft_or_finds_where_the_student_is_sure_and_wrong() -> None:
    """The entropy of two such units is the same; where every token is a candidate it is the exact one."""
    s = torch.tensor([[0.98, 0.01, 0.01], [0.98, 0.01, 0.01], [0.4, 0.3, 0.3]], dtype=torch.float64)
    t = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.4, 0.3, 0.3]], dtype=torch.float64)
    one = torch.zeros(3, dtype=torch.int64)
    np.testing.assert_allclose(objectives.entropy(s.log()), -(s * s.log()).sum(-1), atol=2e-5)
    score = objectives.soft_or(s.log(), t.log(), one)
    h = float(objectives.entropy(s.log())[0] / objectives.entropy(s.log())[2])
    np.testing.assert_allclose(score, [h, 1.0, 1.0], atol=1e-6)
    assert objectives.soft_or(s[:1].log(), s[:1].log(), one[:1]).tolist() == [1.0]
    sure = torch.tensor([[0.0, -INF]], dtype=torch.float64)
    assert 0 <= float(objectives.soft_or(sure, sure, one[:1])) <= 1
    assert objectives.top_share(torch.zeros(0), one[:0], 0.5).shape == (0,)


def test_the_baseline_centres_the_advantage() -> None:
    _, teacher, student, _ = every_outcome(seed=27)
    s = student.unit.detach().requires_grad_()
    kl = (s.exp() * (s - teacher)).sum().detach().expand_as(s)
    (slope,) = torch.autograd.grad(objectives.vopd(s, teacher, kl, 50.0).sum(), s)
    assert float((s.detach().exp() * slope).sum()) == pytest.approx(0, abs=1e-12)


def test_routing_moves_mass_to_candidates_only_where_the_advantage_is_negative() -> None:
    s, t = (
        torch.tensor([row] * 2, dtype=torch.float64).log() for row in ([0.5, 0.3, 0.1999, 1e-4], [0.1, 0.2, 0.6, 0.1])
    )
    realised = torch.tensor([0, 2])  # A < 0, A > 0
    others = torch.arange(4) != realised[:, None]
    student, cand = s[torch.arange(2), realised].requires_grad_(), s.clone().requires_grad_()
    loss = objectives.cr_opd(student, t[torch.arange(2), realised], cand, t, others, clip=10.0)
    unit, slope = torch.autograd.grad(loss.sum(), (student, cand))
    advantage = log(0.1 / 0.5)
    q = np.array([0, (0.3 * 0.2) ** 0.5, (0.1999 * 0.6) ** 0.5, 0])  # the last is too unlikely for the student
    np.testing.assert_allclose(slope[0], advantage * q / q.sum(), rtol=1e-9)
    assert not slope[1].any()
    np.testing.assert_allclose(unit, [-advantage, -log(0.6 / 0.1999)], rtol=1e-9)


@pytest.mark.parametrize(("recipe", "options"), CASES)
def test_a_models_gradient_is_finite(recipe: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Float32 from a forward pass to the weights."""
    model, stop = tiny.model(), torch.from_numpy(tiny.STOP.astype("int64"))
    (step,) = batches(tiny.shards(tmp_path), 6, 1000, 1, range(1))
    batch = next(iter(step.parts))
    student = unit_logps(model, batch, stop)
    near = student.unit.detach() + torch.linspace(-1, 1, len(student.unit))  # within and beyond a trust region
    scored = losses(student, replace(batch, behavior_logp=near), tiny.objective(recipe=recipe, **options))
    assert scored.loss.shape == scored.used.shape == batch.unit_row.shape
    assert not scored.loss[~scored.used].any()
    gradients = torch.autograd.grad(scored.loss.sum(), list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients)


@pytest.mark.parametrize(("recipe", "options"), CASES)
def test_what_is_marked_a_divergence_is_one(recipe: str, options: dict[str, Any]) -> None:
    """No loss of one is below 0; of a surrogate some are."""
    _, student, batch = told(moved_units(seed=24))
    scored = losses(student, batch, tiny.objective(recipe=recipe, **options))
    one = (batch.s_len == 1) & (batch.t_len == 1)
    expected = torch.ones_like(one) if recipe.startswith("simct") else one & (recipe in STRICT | {"hybrid"})
    assert torch.equal(scored.diverges & scored.used, expected & scored.used)
    assert (scored.loss[scored.diverges] >= -1e-12).all()
    assert bool((scored.loss < -1e-12).any()) == bool((scored.used & ~scored.diverges).any())


EVERY = {"select", "select_share", "reward", "reward_clip", "reference", "reference_kl"}
DIVERGENCE, PATH, RATIO = {"direction", "tail", "tau", "beta"}, {"clip", "max_unit"}, {"ratio_clip", "trust_region"}
WIDE = {"scores.min_p": 0.0, "scores.mass": 1.0, "scores.k_max": 1024}
READS = {
    "hybrid": DIVERGENCE | PATH | RATIO,
    "simct": {"direction", "unit_score", "mask_first", "tau", "beta", "max_unit"},
    "simct_released": {"direction", "mask_first", "tau", "beta", "max_unit"},
    "strict_1to1": DIVERGENCE,
    "forward_kl": {"tail", "tau"},
    "jsd": {"tail", "tau", "beta"},
    "kbucket": {"direction", "beta"},
    "sampled": PATH | RATIO,
    "lightning": PATH | RATIO,
    "iw_opd": PATH | RATIO,
    "vopd": PATH,
    "dpca": PATH | {"ratio_clip"},
    "dpca_additive": PATH | {"ratio_clip"},
    "cr_opd": PATH | {"cr_alpha", "cr_eps"},
    "rao_blackwell": PATH,
    "exopd": PATH | {"scale"},
    "kdrl": PATH | {"kl_weight"},
}
DPCA = {"clip": 10.0, "max_unit": 6, "ratio_clip": (0.2, 0.28)}
PAPERS = {
    "hybrid": {"tail": "bucket"},
    "lightning": {"clip": 10.0},
    "jsd": {"tail": "bucket"},
    "dpca": DPCA,
    "dpca_additive": DPCA,
}
UNIFORM, IW_OPD = {"weights.scheme": "uniform"}, {"weights.scheme": "iw_opd", "weights.gamma": 0.5}
OFFLINE = {"weights.credit": "immediate", "weights.truncate": None, "rollouts.rounds": 1, "rollouts.samples": 1}
PRESETS = dict.fromkeys(READS, UNIFORM) | {
    "iw_opd": IW_OPD,
    "simct": UNIFORM | WIDE,
    "simct_released": UNIFORM | WIDE | {"scores.log_z": True},
    "strict_1to1": UNIFORM | WIDE,
    "jsd": UNIFORM | WIDE,
    "lightning": UNIFORM | OFFLINE,
    "kdrl": UNIFORM | {"weights.reward": "grpo", "rollouts.samples": 8},
}
KINDS = variants(Config.model_fields["objective"].annotation)


def test_every_recipe_has_its_keys_and_no_others() -> None:
    assert {name: set(kind.model_fields) - {"recipe"} - EVERY for name, kind in KINDS.items()} == READS | {
        "module:function": {"max_unit", "options"}
    }
    assert {name: kind for name, kind in KINDS.items() if name in NAMES} == dict(zip(NAMES, RECIPES, strict=True))
    assert all(kind.__doc__ for kind in KINDS.values())


@pytest.mark.parametrize("recipe", NAMES)
def test_defaults_are_the_papers(recipe: str) -> None:
    plain = tiny.objective(recipe=recipe)
    own = PAPERS.get(recipe, {})
    plainly = {"clip": 5.0, "max_unit": None, "beta": 0.5, "tau": 1.0, "tail": "renormalise", "ratio_clip": None}
    for key, value in plainly.items():
        assert key not in READS[recipe] or getattr(plain, key) == own.get(key, value)
    assert tiny.objective(**plain.model_dump()) == plain
    if "clip" in READS[recipe]:
        assert tiny.objective(recipe=recipe, clip=2.0, max_unit=None) == plain.model_copy(
            update={"clip": 2.0, "max_unit": None}
        )


def effective(recipe: str, **sections: dict[str, Any]) -> Config:
    return parse_config({**MINIMAL, "objective": {"recipe": recipe}, **sections}, "my.yaml")


@pytest.mark.parametrize("recipe", [*NAMES, "my_recipes:loss"])
def test_a_recipe_sets_what_its_paper_sets_and_nothing_else(recipe: str) -> None:
    """Every key is its preset, or as it is without any; what a run stores says so, and says the same when it is read again."""
    config = effective(recipe)
    plain = {section: kind() for section, kind in (("weights", Weights), ("scores", Scores), ("rollouts", Rollouts))}
    expected = {place: value for section in plain for place, value in flat(section, plain[section]).items()}
    found = {place: value for section in plain for place, value in flat(section, getattr(config, section)).items()}
    assert found == expected | PRESETS.get(recipe, UNIFORM) and overridden(config) == []
    assert parse_config(config.model_dump(mode="json"), "runs/x/config.yaml") == config


def flat(section: str, values: Section) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values}


def test_what_the_file_names_wins_over_a_preset() -> None:
    """Also where it names a default, and key by key."""
    config = effective("simct_released", scores={"k_max": 20}, weights={"scheme": "iw_opd", "gamma": 0.3})
    assert (config.scores.k_max, config.scores.min_p, config.scores.log_z) == (20, 0.0, True)
    assert (config.weights.scheme, config.weights.gamma) == ("iw_opd", 0.3)
    assert overridden(config) == [
        "`weights.scheme: iw_opd`, where `objective.recipe: simct_released` presets uniform",
        "`scores.k_max: 20`, where `objective.recipe: simct_released` presets 1024",
    ]
    assert effective("lightning", rollouts={"rounds": 2}).rollouts.rounds == 2
    assert effective("hybrid", weights={"scheme": "uniform"}).weights.scheme == "uniform"
    # A whole section is named altogether.
    given = Config(objective=tiny.objective(recipe="simct"), scores=Scores(), **MINIMAL)
    assert (given.scores, given.weights.scheme) == (Scores(), "uniform")


def test_an_error_says_where_a_value_comes_from_that_the_file_does_not_name() -> None:
    with pytest.raises(OpdError) as caught:
        effective("lightning", weights={"gamma": 0.1})
    text = str(caught.value)
    assert "`gamma: 0.1` means nothing to `scheme: uniform`" in text
    assert text.endswith("; `weights.scheme: uniform` is what `objective.recipe: lightning` presets")
    with pytest.raises(OpdError) as caught:
        effective("lightning", weights={"gamma": 0.1, "scheme": "uniform"})
    assert "presets" not in str(caught.value)


@pytest.mark.parametrize("recipe", NAMES)
def test_candidates_are_read_where_the_recipe_says_so(recipe: str) -> None:
    _, student, batch = told(random_units(seed=34))
    config = tiny.objective(recipe=recipe)
    fewer = batch.cand_logp.clone()
    fewer[:, 0] = -INF
    plain, moved = (losses(student, given, config).loss.tolist() for given in (batch, replace(batch, cand_logp=fewer)))
    assert KINDS[recipe].reads_candidates == (plain != moved)


@pytest.mark.parametrize("recipe", NAMES)
def test_credit_is_read_where_the_recipe_says_so(recipe: str) -> None:
    """What credit assignment added moves the loss of recipes that read it, where they estimate from samples, and no others."""
    kind, units = KINDS[recipe], random_units(seed=32)
    assert issubclass(kind, Recipe)
    config = tiny.objective(recipe=recipe)
    _, student, batch = told(units)
    plain = losses(student, batch, config).loss
    moved = losses(student, replace(batch, credit_shift=torch.ones_like(batch.credit_shift) / 7), config).loss
    kinds = ["stop" if u.targets[0] == STOP_ID else "1:1" if u.one_to_one else "n:m" for u in units]
    changed = {kind for kind, a, b in zip(kinds, plain.tolist(), moved.tolist(), strict=True) if a != b}
    assert changed == (set(kind.sampled) if kind.reads_credit else set())
    weighed = {**MINIMAL, "objective": {"recipe": recipe}, "weights": {"credit": "gae"}}
    if kind.reads_credit:
        assert parse_config(weighed, "my.yaml").weights.credit == "gae"
        return
    with pytest.raises(
        OpdError, match=f"`weights.credit: gae` means nothing to `objective.recipe: {recipe}`; .*hybrid, sa"
    ):
        parse_config(weighed, "my.yaml")


MINIMAL: dict[str, Any] = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a/b"}, "teacher": {"model": "c/d"}}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"recipe": "hybrid", "tail": "bucket", "tau": 2}, "`tau: 2` does not go with `tail: bucket`"),
        ({"recipe": "hybrid", "beta": 0.1}, "`beta: 0.1` is of `direction: jsd`"),
        ({"recipe": "jsd", "beta": 1.0}, "`objective.beta`: input should be less than 1"),
        ({"recipe": "sampled", "ratio_clip": [1.5, 2]}, "`objective.ratio_clip.0`: input should be less than or equal"),
        ({"recipe": "sampled", "ratio_clip": [0.2]}, "`objective.ratio_clip.1` is missing"),
        ({"recipe": "sampled", "trust_region": 0}, "`objective.trust_region`: input should be greater than 0"),
        ({"tau": 0}, "`objective.tau`: input should be greater than or equal to 0.01"),
        (
            {"recipe": "jsd", "clip": 5.0},
            "unknown key `objective.clip`; known keys here, with `recipe: jsd`: recipe, select, select_share, reward, ",
        ),
        (
            {"clp": 5.0},
            "unknown key `objective.clp`; known keys here, with `recipe: hybrid`: recipe, select, select_sha",
        ),
        ({"select_share": 0.3}, "`select_share: 0.3` means nothing without `select`"),
        (
            {"recipe": "hybrid", "support": "bucket"},
            "unknown key `objective.support`, which is `tail` now; known keys here, with `recipe: hybrid`",
        ),
        ({"recipe": "simct", "support": "bucket"}, "unknown key `objective.support`; known keys here"),
        ({"recipe": "my:loss", "clip": 5.0}, "unknown key `objective.clip`; known keys here, with `recipe: module:fun"),
        ({"recipe": "my-loss:f"}, "`objective.recipe`: takes the name of a recipe or module:function of your own"),
        ({"recipe": 3}, "`objective.recipe`: input should be 'hybrid', 'simct'"),
        (3, "`objective`: input should be a valid dictionary"),  # type: ignore[list-item]
    ],
)
def test_combinations_without_meaning_are_refused_by_name(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(OpdError) as caught:
        parse_config({**MINIMAL, "objective": objective}, "my.yaml")
    assert message in str(caught.value)


def test_a_key_that_a_recipe_does_not_read_is_refused_even_at_its_default() -> None:
    every = {key: kind.model_fields[key].default for kind in KINDS.values() for key in kind.model_fields}
    for recipe in NAMES:
        for key in set(every) - READS[recipe] - EVERY - {"recipe"}:
            with pytest.raises(
                OpdError, match=f"unknown key `objective.{key}`; known keys here, with `recipe: {recipe}`:"
            ):
                parse_config({**MINIMAL, "objective": {"recipe": recipe, key: every[key]}}, "my.yaml")


OWN = """
def loss(student, batch, options):
    return options["scale"] * (student.unit - batch.teacher_logp)

def short(student, batch, options):
    return student.unit[1:]

def number(student, batch, options):
    return 3.0
"""


def test_a_recipe_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"recipes_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    units = random_units(seed=33)
    _, student, batch = told(units)
    config = tiny.objective(recipe=f"{name}:loss", options={"scale": 3.0}, max_unit=2)
    loss, (_, unit, _, _), used = run(student, batch, config)
    kept = np.array([max(u.s_len, u.t_len) <= 2 for u in units])
    assert used == kept.tolist() and 0 < kept.sum() < len(units)
    np.testing.assert_allclose(loss, kept * [3 * (u.student - u.teacher) for u in units], rtol=1e-12)
    np.testing.assert_array_equal(unit, 3.0 * kept)
    for wrong, found in (("short", f"({len(units) - 1},)"), ("number", "float"), ("none", "no function 'none'")):
        with pytest.raises(OpdError, match=f"objective.recipe.*{re.escape(found)}"):
            losses(student, batch, tiny.objective(recipe=f"{name}:{wrong}"))
    with pytest.raises(OpdError, match="no module 'nowhere'"):
        identity(tiny.objective(recipe="nowhere:loss"))

    # What was trained is another thing once a byte of the source, or an option, is another one.
    before = identity(config)
    assert before["source"] == hashlib.sha256(OWN.encode()).hexdigest() and before["options"] == {"scale": 3.0}
    (tmp_path / f"{name}.py").write_text(OWN + "\n")
    assert {key for key, value in identity(config).items() if value != before[key]} == {"source"}


def test_raw_logits_need_log_z(tmp_path: Path) -> None:
    for objective in ({"recipe": "simct_released"}, {"recipe": "simct", "unit_score": "mean_logit"}):
        with pytest.raises(
            OpdError, match=r"`objective.recipe: simct.* take the teacher's log Z .* `scores.log_z: true`"
        ):
            parse_config({**MINIMAL, "objective": objective, "scores": {"log_z": False}}, "my.yaml")
        parsed = parse_config({**MINIMAL, "objective": objective, "scores": {"log_z": True}}, "my.yaml").objective
        # Scores may be those of another run.
        for kept in (True, False):
            with open_writer(tmp_path / f"{kept}.parquet", "units", {"log_z": kept}, {}):
                pass
        check_log_z(parsed, open_shard(tmp_path / "True.parquet", "units"))
        with pytest.raises(OpdError, match=r"False.parquet: .*t_log_z, which is null .* `scores.log_z: true`"):
            check_log_z(parsed, open_shard(tmp_path / "False.parquet", "units"))
    check_log_z(tiny.objective(), open_shard(tmp_path / "False.parquet", "units"))


def test_the_ratio_counts_once() -> None:
    both = {"objective": {"recipe": "sampled", "ratio_clip": [0.2, 0.28]}, "weights": {"truncate": 2}}
    with pytest.raises(
        OpdError, match=r"`objective.ratio_clip` and `weights.truncate: 2` would both multiply the loss"
    ):
        parse_config(MINIMAL | both, "my.yaml")
    region = {"objective": {"recipe": "sampled", "trust_region": 1}, "weights": {"truncate": 2}}
    assert parse_config(MINIMAL | region, "my.yaml").objective.trust_region == 1


def test_iw_opd_needs_weights() -> None:
    with pytest.raises(OpdError, match=r"`weights.scheme: uniform` makes `objective.recipe: iw_opd`"):
        parse_config({**MINIMAL, "objective": {"recipe": "iw_opd"}, "weights": {"scheme": "uniform"}}, "my.yaml")
    config: Config = parse_config({**MINIMAL, "objective": {"recipe": "iw_opd"}}, "my.yaml")
    assert config.weights.scheme == "iw_opd"
