"""Objectives and recipes against float64 loops over units, written from the formulas of design section 4."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import exp, log

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import Objective
from schemas.tables import STOP_ID
from train import objectives
from train.batch import Batch
from train.policy import UnitLogps
from train.recipes import Scored, losses

INF, NAN = float("inf"), float("nan")
DIRECTIONS, TAILS, SCORES = ("reverse", "forward"), ("renormalise", "bucket"), ("mean", "sum")
RECIPES = ("hybrid", "simct", "strict_1to1", "sampled")
KL = {"renormalise": objectives.support_kl, "bucket": objectives.bucket_kl}
FIRST_TARGET_LISTED = "n:m whose first token is a candidate"
KINDS = ("1:1 listed", "1:1 outside", "n:m", FIRST_TARGET_LISTED, "stop listed", "stop outside")


def combinations(*options: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations that a config may ask for."""
    return [chosen for chosen in product(*options) if not {"simct", "bucket"} <= set(chosen)]


@dataclass(frozen=True)
class Unit:
    """One unit in plain numbers: candidate ids with both sides' log-probs, and the realised unit's sums."""

    s_len: int
    t_len: int
    targets: tuple[int, ...]
    ids: tuple[int, ...]
    s_cand: tuple[float, ...]
    t_cand: tuple[float, ...]
    student: float
    teacher: float
    credit_shift: float = 0.0
    reward: float = 0.0
    log_ratio: float = 0.0
    t_log_z: tuple[float, ...] = ()
    entropy: float = NAN

    @property
    def behavior(self) -> float:
        return self.student - self.log_ratio

    @property
    def one_to_one(self) -> bool:
        return self.s_len == 1 and self.t_len == 1


def random_distribution(rng: np.random.Generator, size: int, scale: float = 1.5) -> np.ndarray:
    weights = np.exp(scale * rng.normal(size=size))
    return weights / weights.sum()


def random_unit(rng: np.random.Generator, kind: str, vocab: int = 12) -> Unit:
    """A unit of a kind. The realised unit's score leaves room: with the candidates it never holds more than all mass."""
    p_s, p_t = random_distribution(rng, vocab + 1), random_distribution(rng, vocab + 1)  # the last class is the stop
    stop_listed = kind == "stop listed" or (kind != "stop outside" and rng.random() < 0.5)
    ids = [int(i) for i in rng.permutation(vocab)[: rng.integers(1, 6)]] + [vocab] * stop_listed
    outside = [i for i in range(vocab) if i not in ids]
    first = {"1:1 listed": ids[0], FIRST_TARGET_LISTED: ids[0]}.get(kind, int(rng.choice(outside)))
    if kind.startswith("stop"):
        first = vocab
    if kind.startswith(("1:1", "stop")):
        s_len = t_len = 1
        student, teacher = log(p_s[first]), log(p_t[first])
    else:
        s_len, t_len = ((1, 2), (2, 1), (2, 2), (3, 2))[rng.integers(4)]
        room_s, room_t = (1 - sum(p[i] for i in ids) for p in (p_s, p_t))
        student = s_len * log(room_s * rng.uniform(0.05, 0.95))
        teacher = t_len * log(room_t * rng.uniform(0.05, 0.95))
    targets = (first, *rng.integers(0, vocab, s_len - 1).tolist())
    named = tuple(STOP_ID if i == vocab else i for i in ids)
    return Unit(
        s_len,
        t_len,
        tuple(STOP_ID if t == vocab else int(t) for t in targets),
        named,
        tuple(log(p_s[i]) for i in ids),
        tuple(log(p_t[i]) for i in ids),
        student,
        teacher,
    )


def random_units(seed: int, each: int = 6) -> list[Unit]:
    rng, other = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    units = [random_unit(rng, kind) for kind in KINDS for _ in range(each)]
    # Neither follows from the candidates; they come from a stream of their own.
    units = [
        replace(u, t_log_z=tuple(other.normal(20, 1, u.t_len).tolist()), entropy=float(other.uniform(0, 1.6)))
        for u in units
    ]
    return [units[i] for i in rng.permutation(len(units))]


def tensors(units: Sequence[Unit], spare: int = 0) -> tuple[UnitLogps, Batch]:
    """The float64 tensors that a recipe sees; unused slots hold what the pipeline leaves there (id 0, a real log-prob)."""
    slots = max(len(u.ids) for u in units) + spare
    cand_id = torch.zeros(len(units), slots, dtype=torch.int64)
    cand_logp = torch.full((len(units), slots), -INF, dtype=torch.float64)
    student = torch.full((len(units), slots), -0.7, dtype=torch.float64)
    for i, unit in enumerate(units):
        cand_id[i, : len(unit.ids)] = torch.tensor(unit.ids)
        cand_logp[i, : len(unit.ids)] = torch.tensor(unit.t_cand, dtype=torch.float64)
        student[i, : len(unit.ids)] = torch.tensor(unit.s_cand, dtype=torch.float64)
    s_len = torch.tensor([u.s_len for u in units])
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        ids=none,
        mask=none,
        rows=none,
        targets=torch.tensor([t for u in units for t in u.targets]),
        unit_row=s_len.cumsum(0) - s_len,
        response_of_unit=torch.zeros_like(s_len),
        token_unit=torch.repeat_interleave(s_len),
        token_behavior_logp=torch.full((int(s_len.sum()),), NAN),
        s_len=s_len,
        t_len=torch.tensor([u.t_len for u in units]),
        teacher_logp=torch.tensor([u.teacher for u in units], dtype=torch.float64),
        teacher_entropy=torch.tensor([u.entropy for u in units], dtype=torch.float64),
        t_log_z=torch.tensor([sum(u.t_log_z) / u.t_len - u.t_log_z[0] if u.t_log_z else NAN for u in units]).double(),
        behavior_logp=torch.tensor([u.behavior for u in units], dtype=torch.float64),
        policy_logp=torch.tensor([u.student for u in units], dtype=torch.float64),
        first_logp=torch.tensor([u.student for u in units], dtype=torch.float64),
        weight=torch.ones(len(units), dtype=torch.float64),
        credit_shift=torch.tensor([u.credit_shift for u in units], dtype=torch.float64),
        reward=torch.tensor([u.reward for u in units], dtype=torch.float64),
        cand_id=cand_id,
        cand_logp=cand_logp,
        responses=(),
    )
    unit = torch.tensor([u.student for u in units], dtype=torch.float64, requires_grad=True)
    tokens = int(s_len.sum())
    return UnitLogps(torch.zeros(tokens), unit, student.requires_grad_(), torch.full((tokens,), NAN)), batch


def plain_kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True))


def score_kl(s: Sequence[float], t: Sequence[float], tail: str, direction: str) -> float:
    """KL of two rows of scores: softmax over the support, or their mass as it is and what is left of 1."""
    q_s, q_t = ([exp(x) for x in row] for row in (s, t))
    if tail == "renormalise":
        q_s, q_t = ([x / sum(q) for x in q] for q in (q_s, q_t))
    else:
        q_s, q_t = ([*q, 1 - sum(q)] for q in (q_s, q_t))
    return plain_kl(q_s, q_t) if direction == "reverse" else plain_kl(q_t, q_s)


def reference(u: Unit, s_cand: Sequence[float], student: float, advantage: float, config: Objective) -> float:
    """A unit's loss as a function of the student's numbers; `advantage` is given, so it stays as it is when they move."""
    if config.recipe == "sampled" or (config.recipe == "hybrid" and not u.one_to_one):
        return -advantage * student
    if config.recipe == "strict_1to1" and not u.one_to_one:
        return 0.0
    s, t = list(s_cand), list(u.t_cand)
    if not (u.one_to_one and u.targets[0] in u.ids):
        mean = config.unit_score == "mean"
        s.append(student / (u.s_len if mean else 1))
        t.append(u.teacher / (u.t_len if mean else 1))
    return score_kl(s, t, config.tail, config.direction)


def clipped(u: Unit, clip: float) -> float:
    """What one unit says is clipped; what others add to it is not."""
    return min(clip, max(-clip, u.teacher - u.student)) + u.credit_shift


def slope(u: Unit, config: Objective, width: int) -> tuple[list[float], float]:
    """Central differences of the reference in each candidate slot and in the unit's own log-prob."""
    x, h, advantage = [*u.s_cand, u.student], 1e-6, clipped(u, getattr(config, "clip", 1.5))

    def at(i: int, by: float) -> float:
        y = [value + by * (j == i) for j, value in enumerate(x)]
        return reference(u, y[:-1], y[-1], advantage, config)

    out = [(at(i, h) - at(i, -h)) / (2 * h) for i in range(len(x))]
    return out[:-1] + [0.0] * (width - len(out) + 1), out[-1]


def objective(recipe: str, direction: str = "reverse", score: str = "mean", tail: str = "renormalise") -> Objective:
    keys = {"direction": direction, "unit_score": score, "tail": tail, "clip": 1.5}
    plain = tiny.objective(recipe=recipe)
    return tiny.objective(recipe=recipe, **{key: keys[key] for key in keys.keys() & type(plain).model_fields.keys()})


def run(units: Sequence[Unit], config: Objective, spare: int = 0) -> tuple[Scored, np.ndarray, np.ndarray]:
    """What the recipe says, and its gradients in `cand` and `unit`."""
    student, batch = tensors(units, spare)
    scored = losses(student, batch, config)
    gradients = torch.autograd.grad(scored.loss.sum(), (student.cand, student.unit), materialize_grads=True)
    return scored, gradients[0].numpy(), gradients[1].numpy()


@pytest.mark.parametrize(("recipe", "direction", "score", "tail"), combinations(RECIPES, DIRECTIONS, SCORES, TAILS))
def test_recipe_is_the_formula(recipe: str, direction: str, score: str, tail: str) -> None:
    config = objective(recipe, direction, score, tail)
    # Only the sampled path may see what credit assignment added.
    units = [replace(u, credit_shift=(2 + u.student) / 3) for u in random_units(seed=11)]
    scored, cand_gradient, unit_gradient = run(units, config)
    expected = [reference(u, u.s_cand, u.student, clipped(u, getattr(config, "clip", 1.5)), config) for u in units]
    np.testing.assert_allclose(scored.loss.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    slopes = [slope(u, config, cand_gradient.shape[1]) for u in units]
    np.testing.assert_allclose(cand_gradient, [s for s, _ in slopes], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(unit_gradient, [s for _, s in slopes], rtol=1e-6, atol=1e-7)
    assert scored.used.tolist() == [recipe != "strict_1to1" or u.one_to_one for u in units]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strict_leaves_longer_units_alone(direction: str) -> None:
    units = random_units(seed=12)
    scored, cand_gradient, unit_gradient = run(units, objective("strict_1to1", direction))
    longer = np.array([not u.one_to_one for u in units])
    assert 0 < longer.sum() < len(units)
    for values in (scored.loss.detach().numpy(), unit_gradient, cand_gradient):
        assert not values[longer].any()
    moving = ~longer & np.array([len(u.ids) > 1 for u in units])  # one candidate that is the realised token: no choice
    assert (scored.loss.detach().numpy()[moving] > 0).all()
    assert cand_gradient[moving].any(1).all()


@pytest.mark.parametrize(("recipe", "direction", "tail"), combinations(RECIPES, DIRECTIONS, TAILS))
def test_padded_slots_change_nothing(recipe: str, direction: str, tail: str) -> None:
    units, config = random_units(seed=13), objective(recipe, direction, tail=tail)
    (bare, bare_cand, bare_unit), (padded, cand, unit) = run(units, config), run(units, config, spare=3)
    np.testing.assert_allclose(padded.loss.detach(), bare.loss.detach(), rtol=1e-13)
    np.testing.assert_allclose(unit, bare_unit, rtol=1e-13)
    np.testing.assert_allclose(cand[:, :-3], bare_cand, rtol=1e-12, atol=1e-15)
    unused = np.arange(cand.shape[1]) >= np.array([len(u.ids) for u in units])[:, None]
    assert not cand[unused].any()  # NaN would count as true


def test_bucket_is_refused_for_longer_units() -> None:
    """At an n:m unit the candidates hold the realised unit's mass already: K + 1 classes would be no distribution."""
    for recipe in ("simct", "simct_released"):
        with pytest.raises(ValueError, match=f"{recipe}.tail\n.*Extra inputs are not permitted"):
            tiny.objective(recipe=recipe, tail="bucket")


@pytest.mark.parametrize(("recipe", "tail", "direction"), combinations(("simct", "hybrid"), TAILS, DIRECTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_vocabulary_as_candidates_is_exact_kl(recipe: str, tail: str, direction: str, dtype: torch.dtype) -> None:
    """Same tokenizer, every token a candidate: the loss and its gradient in the logits are those of full KL."""
    rng, vocab, units = np.random.default_rng(3), 40, 25
    logits = torch.from_numpy(3 * rng.normal(size=(units, vocab))).to(dtype).requires_grad_()
    teacher = torch.from_numpy(3 * rng.normal(size=(units, vocab))).to(dtype).log_softmax(-1)
    student, realised = logits.log_softmax(-1), torch.from_numpy(rng.integers(0, vocab, units))
    _, batch = tensors([random_unit(rng, "1:1 listed") for _ in range(units)])
    pick = torch.arange(units), realised
    full = {
        "targets": realised,
        "cand_id": torch.arange(vocab).expand(units, -1),
        "cand_logp": teacher,
        "teacher_logp": teacher[pick],
    }
    scored = losses(
        UnitLogps(student[pick], student[pick], student, torch.full((units,), NAN)),
        Batch(**vars(batch) | full),
        objective(recipe, direction, tail=tail),
    )
    q_s, q_t = (x.detach().double().softmax(-1).numpy() for x in (logits, teacher))
    expected = [plain_kl(*((s, t) if direction == "reverse" else (t, s))) for s, t in zip(q_s, q_t, strict=True)]
    np.testing.assert_allclose(scored.loss.detach(), expected, atol=1e-6 if dtype == torch.float64 else 1e-5)
    (gradient,) = torch.autograd.grad(scored.loss.sum(), logits)
    ratio = np.log(q_s / q_t)
    known = q_s * (ratio - (q_s * ratio).sum(1, keepdims=True)) if direction == "reverse" else q_s - q_t
    np.testing.assert_allclose(gradient, known, atol=1e-6 if dtype == torch.float64 else 1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.floats(0.1, 1.0))
def test_bucket_is_a_lower_bound_that_grows_with_the_support(seed: int, vocab: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    s, t = (torch.from_numpy(np.log(random_distribution(rng, vocab, scale))) for _ in range(2))
    order, cut = rng.permutation(vocab), sorted(rng.integers(0, vocab + 1, 2))
    for direction in DIRECTIONS:
        p, q = (s, t) if direction == "reverse" else (t, s)
        full = plain_kl(p.exp().tolist(), q.exp().tolist())
        # One class, a few, more, all: each refines the one before it.
        kl = [float(objectives.bucket_kl(s[order[:k]], t[order[:k]], direction)) for k in (0, *cut, vocab)]
        # 2e-5: with no class left over, both sides' rest counts as 1e-6.
        assert kl[0] == 0
        assert all(few <= more + 2e-5 for few, more in pairwise(kl))
        assert kl[-1] <= full + 2e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rest_s", "rest_t"), [(1e-3, 1e-5), (2e-6, 0.3), (0.2, 2e-6)])
def test_bucket_is_exact_down_to_a_millionth(rest_s: float, rest_t: float, direction: str) -> None:
    q_s, q_t = [0.6, 0.4 - rest_s, rest_s], [0.3, 0.7 - rest_t, rest_t]
    s, t = (torch.tensor([q[:2]], dtype=torch.float64).log() for q in (q_s, q_t))
    expected = plain_kl(q_s, q_t) if direction == "reverse" else plain_kl(q_t, q_s)
    assert objectives.bucket_kl(s, t, direction).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rest", [0.0, 1e-12, 1e-7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bucket_stays_finite_when_nothing_is_left(rest: float, direction: str) -> None:
    p = torch.tensor([[0.7, 0.3 - rest], [0.7, 0.3]], dtype=torch.float32)
    s = p.log().requires_grad_()
    kl = objectives.bucket_kl(s, torch.tensor([[0.6, 0.4], [0.5, 0.2]]).log(), direction)
    (gradient,) = torch.autograd.grad(kl.sum(), s)
    assert torch.isfinite(kl).all()
    assert torch.isfinite(gradient).all()
    assert kl[0].item() == pytest.approx(
        plain_kl(*([0.7, 0.3], [0.6, 0.4])[:: 1 if direction == "reverse" else -1]), abs=1e-5
    )


@pytest.mark.parametrize(("tail", "direction"), combinations(TAILS, DIRECTIONS))
def test_kl_passes_gradcheck_beside_padding(tail: str, direction: str) -> None:
    rng = np.random.default_rng(5)
    full_s, full_t = (torch.from_numpy(np.log([random_distribution(rng, 9) for _ in range(6)])) for _ in range(2))
    unused = torch.from_numpy(np.arange(6) >= rng.integers(1, 6, 6)[:, None])
    teacher = full_t[:, :6].masked_fill(unused, -INF)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return KL[tail](student.masked_fill(unused, -INF), teacher, direction)

    assert torch.autograd.gradcheck(loss, full_s[:, :6].clone().requires_grad_())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_support_kl_ignores_the_scale_of_each_side(direction: str) -> None:
    rng = np.random.default_rng(6)
    s, t = (torch.from_numpy(rng.normal(size=(4, 7))) for _ in range(2))
    shifted = objectives.support_kl(s - 3.0, t + 1.0, direction)
    expected = [score_kl(a, b, "renormalise", direction) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
    np.testing.assert_allclose(shifted, expected, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5))
def test_coarsening_loses_the_conditional_kl(seed: int, classes: int, members: int) -> None:
    """Chain rule: fine KL - coarse KL = sum_c Q_S(c) KL(q_S(.|c) || q_T(.|c))."""
    rng = np.random.default_rng(seed)
    fine_s, fine_t = (random_distribution(rng, classes * members).reshape(classes, members) for _ in range(2))
    coarse_s, coarse_t = fine_s.sum(1), fine_t.sum(1)
    delta = sum(coarse_s[c] * plain_kl(fine_s[c] / coarse_s[c], fine_t[c] / coarse_t[c]) for c in range(classes))
    fine, coarse = (
        float(objectives.support_kl(*(torch.from_numpy(np.log(q).ravel()) for q in pair)))
        for pair in ((fine_s, fine_t), (coarse_s, coarse_t))
    )
    assert fine - coarse == pytest.approx(delta, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-40, 0), st.floats(-40, 0)), min_size=1, max_size=9), st.floats(0.1, 20))
def test_sampled_path_detaches_and_clips(pairs: list[tuple[float, float]], clip: float) -> None:
    s = torch.tensor([a for a, _ in pairs], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    loss = objectives.clipped_sampled_path(s, t, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    advantages = [min(clip, max(-clip, b - a)) for a, b in pairs]
    np.testing.assert_allclose(loss.detach(), [-x * a for x, (a, _) in zip(advantages, pairs, strict=True)], rtol=1e-12)
    np.testing.assert_allclose(gradient, [-x for x in advantages], rtol=1e-12)  # not -A + log p: A is a constant
