"""Every credit and weight estimator against plain loops over responses, written from the formulas in float64."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.weights import cross_fitting as estimates
from pipeline.weights.credit import (
    check_candidates,
    compares_responses,
    discounted,
    gae,
    partial_sums,
    return_to_go,
    weigh,
)
from pipeline.weights.cross_fitting import FOLDS, add, sums_by, values
from pipeline.weights.estimator import PLAIN, Loss
from pipeline.weights.importance import iw_opd, prefix, signed
from schemas.config import Weights
from schemas.config.weights import CREDITS, SCHEMES
from schemas.errors import OpdError


@dataclass(frozen=True)
class Unit:
    """Teacher's sum (None: masked), (policy, behaviour) log-prob of each student token, candidates, tail, first id."""

    teacher: float | None
    tokens: tuple[tuple[float, float], ...]
    candidates: tuple[float, ...] = (-0.5, -2.0)
    tail: float = -3.0
    token_id: int = 0

    @property
    def student(self) -> float:
        return math.fsum(p for p, _ in self.tokens)

    @property
    def advantage(self) -> float:
        return 0.0 if self.teacher is None else self.teacher - self.student

    @property
    def ratio(self) -> float:
        if self.teacher is None:
            return 1.0
        return math.exp(max(-20.0, min(20.0, self.student - math.fsum(b for _, b in self.tokens))))


Response = Sequence[Unit]
nats = st.floats(-12, 0, width=32)
unit = st.builds(
    Unit,
    st.one_of(st.none(), nats),
    st.lists(st.tuples(nats, nats), min_size=1, max_size=3).map(tuple),
    st.lists(st.one_of(nats, st.just(-math.inf)), min_size=1, max_size=4).map(tuple),
    st.one_of(nats, st.just(-math.inf)),
    st.integers(0, 3),
)
masked = unit.map(lambda u: Unit(None, u.tokens, u.candidates, u.tail, u.token_id))
response = st.one_of(st.lists(unit, max_size=12), st.lists(masked, max_size=3), st.lists(unit, min_size=1, max_size=1))
batch = st.lists(response, min_size=1, max_size=8)
shares = st.floats(0, 1, allow_subnormal=False)


def names(responses: Sequence[Response], first: int = 0) -> list[str]:
    return [f"r{first + i:03}" for i in range(len(responses))]


def prompt_of(name: str) -> str:
    """Three prompts in turn, so that the responses to one lie in different shards."""
    return f"p{int(name[1:]) % 3}"


def tables(responses: Sequence[Response], first: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Units and rollouts, which come in another order than their units; an empty response has no unit."""
    units: list[dict[str, Any]] = []
    for name, told in zip(names(responses, first), responses, strict=True):
        at = 0
        for index, u in enumerate(told):
            hidden = u.teacher is None
            units.append(
                {"rollout_id": name, "unit": index, "kind": "masked" if hidden else "n:m", "s_start": at}
                | {"s_len": len(u.tokens), "teacher_logp": u.teacher, "cand_logp": [] if hidden else list(u.candidates)}
                | {"tail_logp": None if hidden else u.tail}
            )
            at += len(u.tokens)
    rollouts = [
        {"rollout_id": name, "prompt_id": prompt_of(name), "policy_logp": [p for u in told for p, _ in u.tokens]}
        | {"behavior_logp": [b for u in told for _, b in u.tokens]}
        | {"response_ids": [t for u in told for t in [u.token_id] + [9] * (len(u.tokens) - 1)]}
        for name, told in zip(names(responses, first), responses, strict=True)
    ]
    floats = pl.List(pl.Float32)
    return (
        pl.DataFrame(
            units,
            {"rollout_id": pl.String, "unit": pl.Int32, "kind": pl.String, "s_start": pl.Int32, "s_len": pl.Int32}
            | {"teacher_logp": pl.Float32, "cand_logp": floats, "tail_logp": pl.Float32},
        ),
        pl.DataFrame(
            rollouts[::-1],
            {"rollout_id": pl.String, "prompt_id": pl.String, "policy_logp": floats, "behavior_logp": floats}
            | {"response_ids": pl.List(pl.Int32)},
        ),
    )


def in_shards(responses: Sequence[Response], size: int, options: Weights, loss: Loss = PLAIN) -> pl.DataFrame:
    """The weights of all responses, `size` of them a shard: two passes over the shards, and sums added between them."""
    if not compares_responses(options):
        return weigh(*tables(responses), options, loss=loss)
    tables_of = [tables(responses[at : at + size], first=at) for at in range(0, len(responses), size)]
    sums = reduce(add, (partial_sums(*shard, options, loss) for shard in tables_of))
    return pl.concat([weigh(*shard, options, sums, loss) for shard in tables_of])


def reading(key: str, name: str, **values: float) -> Weights:
    """`name` with those of `values` that it reads; the others are refused."""
    read = {"credit": CREDITS, "scheme": SCHEMES}[key][name].reads
    return Weights(**{key: name}, **{k: v for k, v in values.items() if k in read})  # type: ignore[arg-type]


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [x for row in rows for x in row]


def close(got: Any, expected: Sequence[Sequence[float]], scale: float = 1.0) -> None:
    """Within 1e-6 of each value, or of the size of what was added up to get it."""
    np.testing.assert_allclose(np.asarray(got, float), flat(expected), rtol=1e-6, atol=1e-6 * scale)


def returns(a: Sequence[float], gamma: float) -> list[float]:
    return [math.fsum(gamma ** (k - t) * a[k] for k in range(t, len(a))) for t in range(len(a))]


def baselined(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    out = []
    for i, row in enumerate(rows):
        out.append([])
        for t, own in enumerate(row):
            others = [other[t] for j, other in enumerate(rows) if j != i and t < len(other)]
            out[-1].append(own - (math.fsum(others) / len(others) if others else 0.0))
    return out


def grouped(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each response's return less the mean one of the others to its prompt; one without any unit counts as none."""
    prompts = [prompt_of(name) for name in names(rows)]
    out = []
    for i, row in enumerate(rows):
        others = [math.fsum(other) for j, other in enumerate(rows) if j != i and other and prompts[j] == prompts[i]]
        out.append([math.fsum(row) - (math.fsum(others) / len(others) if others else 0.0)] * len(row))
    return out


def gae_of(a: Sequence[float], v: Sequence[float], gamma: float, lam: float) -> list[float]:
    delta = [a[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(a))]
    return returns(delta, gamma * lam)


def features_of(told: Response, clip: float) -> list[list[float]]:
    """What is known before each unit."""
    rows = []
    for t, u in enumerate(told):
        hidden = u.teacher is None
        before = [min(clip, max(-clip, x.advantage)) for x in told[:t]]
        kept = [c for c in u.candidates if c > -math.inf]
        last = told[t - 1] if t else None
        rows.append(
            [
                1.0,
                math.log(1 + t),
                0.0 if hidden else -math.fsum(math.exp(c) * c for c in kept),
                0.0 if hidden else math.exp(u.tail),
                before[-1] if last else 0.0,
                -last.student if last and last.teacher is not None else 0.0,
                math.fsum(before) / t if t else 0.0,
            ]
        )
    return rows


def folds_of(responses: Sequence[Response]) -> list[int]:
    """By checksum of the name, so that no shard needs to know the names of others."""
    return [zlib.crc32(name.encode()) % FOLDS for name in names(responses)]


def values_of(responses: Sequence[Response], gamma: float, clip: float) -> list[list[float]]:
    """Ridge regression by stacking rows: least squares with sqrt(penalty) pseudo-rows, not normal equations."""
    folds = folds_of(responses)
    out = []
    for told, fold in zip(responses, folds, strict=True):
        x = [f for other, g in zip(responses, folds, strict=True) if g != fold for f in features_of(other, clip)]
        y = [
            value
            for other, g in zip(responses, folds, strict=True)
            if g != fold
            for value in returns([min(clip, max(-clip, u.advantage)) for u in other], gamma)
        ]
        if not x:
            out.append([0.0] * len(told))
            continue
        penalty = math.sqrt(estimates.RIDGE) * np.eye(len(x[0]))
        beta = np.linalg.lstsq(np.vstack([x, penalty]), np.concatenate([y, np.zeros(len(penalty))]), rcond=None)[0]
        out.append([float(np.dot(f, beta)) for f in features_of(told, clip)])
    return out


def advantage_frame(*rows: Sequence[float]) -> pl.DataFrame:
    return pl.DataFrame(
        {"rollout_id": [n for n, row in enumerate(rows) for _ in row], "advantage": flat(rows)},
        {"rollout_id": pl.Int32, "advantage": pl.Float64},
    )


@settings(deadline=None, max_examples=25)
@given(batch, shares, shares, st.integers(1, 8), st.sampled_from([math.inf, 5.0, 1.5]))
def test_credit(responses: list[Response], gamma: float, lam: float, size: int, clip: float) -> None:
    """Whatever the responses are cut into, the estimates are those over all of them, and of clipped advantages."""
    own = [[u.advantage for u in told] for told in responses]
    a = [[min(clip, max(-clip, x)) for x in row] for row in own]
    total = [returns(row, 1.0) for row in a]
    scale = 1 + max(map(abs, flat(total)), default=0.0) + max(map(abs, flat(a)), default=0.0) * 12
    v = values_of(responses, gamma, clip)
    expected = {
        "immediate": a,
        "return_to_go": total,
        "discounted": [returns(row, gamma) for row in a],
        "baseline": baselined(total),
        "group": grouped(a),
        "gae": [gae_of(row, guess, gamma, lam) for row, guess in zip(a, v, strict=True)],
        "residual": residuals_of(responses, clip),
    }
    loss = Loss(clip=clip)
    for credit, rows in expected.items():
        options = reading("credit", credit, discount=gamma, gae_lambda=lam)
        table = in_shards(responses, size, options, loss)
        close(table["credit"], rows, scale)
        close(table["advantage"], own)
        # Credit and importance are separate: the weight is always made of advantages.
        assert table["weight"].equals(weigh(*tables(responses), Weights())["weight"])
        if size >= len(responses):
            assert table.equals(weigh(*tables(responses), options, loss=loss))


def test_discount_is_stable_over_a_long_response() -> None:
    """gamma^k underflows after some 700 units here; the recursion does not care."""
    a = np.random.default_rng(5).normal(size=5000).tolist()
    for gamma in (0.35, 0.9, 0.999, 1 - 1e-9, 1e-20):
        g, expected = 0.0, []
        for x in reversed(a):
            g = x + gamma * g
            expected.append(g)
        got = advantage_frame(a, a[:3]).select(g=discounted(gamma))["g"]
        np.testing.assert_allclose(got[:5000], expected[::-1], rtol=1e-9, atol=1e-10)


def test_discount_limits() -> None:
    frame = advantage_frame([0.2, -0.3, 0.5], [1.0])
    assert frame.select(g=discounted(0.0))["g"].to_list() == frame["advantage"].to_list()
    assert frame.select(g=discounted(1.0)).equals(frame.select(g=return_to_go()))
    np.testing.assert_allclose(frame.select(g=discounted(0.5))["g"], [0.175, -0.05, 0.5, 1.0], rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(nats, nats), min_size=1, max_size=9), shares)
def test_gae_limits(pairs: list[tuple[float, float]], gamma: float) -> None:
    """lambda 0: A_t + gamma V_(t+1) - V_t; lambda 1: the discounted return less V_t."""
    a, v = [x for x, _ in pairs], [y for _, y in pairs]
    frame = advantage_frame(a).with_columns(value=pl.Series(v))
    one = [a[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(a))]
    np.testing.assert_allclose(frame.select(c=gae(gamma, 0.0))["c"], one, rtol=1e-9, atol=1e-9)
    all_of_it = [g - b for g, b in zip(returns(a, gamma), v, strict=True)]
    np.testing.assert_allclose(frame.select(c=gae(gamma, 1.0))["c"], all_of_it, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("credit", ["baseline", "group", "gae", "residual"])
def test_baseline_and_value_ignore_the_response_itself(credit: str) -> None:
    """What is subtracted at its first unit stays the same when all that the response sampled there changes."""
    rng = np.random.default_rng(1)

    def told(n: int) -> list[Unit]:
        return [Unit(float(-rng.random()), ((float(-rng.random()),) * 2,)) for _ in range(n)]

    responses = [told(n) for n in (3, 5, 2, 4)]
    changed = [[Unit(-9.0, ((-0.5, -0.5),)), *responses[0][1:]], *responses[1:]]
    # With lambda and discount 1 gae is the return to go less the value.
    options = reading("credit", credit, discount=1.0, gae_lambda=1.0)
    taken = []
    for rows in (responses, changed):
        table = weigh(*tables(rows), options)
        own = [u.advantage for u in rows[0]]
        taken.append((own if credit == "residual" else returns(own, 1.0))[0] - table["credit"][0])
    assert taken[0] == pytest.approx(taken[1], abs=1e-5) and abs(taken[0]) > 1e-3


def test_a_group_is_centred_and_a_single_response_is_not() -> None:
    """Returns of -1 and -3 to p0, -2 alone to p1: their credits are 2, -2 and -2, at every unit."""
    rows = [[Unit(-2.0, ((-1.0, -1.0),))], [Unit(-2.0, ((-1.5, -1.5),)), Unit(-2.0, ((-0.5, -0.5),))]]
    rows += [[Unit(None, ((-1.0, -1.0),))] * 0, [Unit(-1.5, ((-0.5, -0.5),)), Unit(-2.5, ((-0.5, -0.5),))]]
    table = in_shards(rows, 1, Weights(credit="group"))
    assert table.select("rollout_id", "credit").rows() == [
        ("r000", 2.0), ("r001", -2.0), ("r001", -2.0), ("r003", -2.0), ("r003", -2.0)
    ]  # fmt: skip


def test_ratios_are_to_what_was_sampled_from_and_correct_what_the_loss_takes_from_samples() -> None:
    """By unit, in nats: policy -1, behaviour -2, sampler -1.5; the next response's sampler is the model, or wasn't kept."""
    units = pl.DataFrame({"rollout_id": ["a", "a", "a", "b"], "unit": [0, 1, 2, 0], "s_start": [0, 1, 3, 0]})
    units = units.with_columns(s_len=pl.Series([1, 2, 1, 1]), kind=pl.Series(["1:1", "n:m", "masked", "n:m"]))
    units = units.with_columns(t_len=pl.col("s_len"), teacher_logp=pl.Series([-3.0, -3.0, None, -3.0]))
    rollouts = pl.DataFrame(
        {
            "rollout_id": ["a", "b"],
            "policy_logp": [[-1.0, -0.5, -0.5, -1.0], [-1.0]],
            "behavior_logp": [[-2.0, -1.5, -0.5, -9.0], [-2.0]],
            "sampler_logp": [[-1.5, -1.0, -0.5, -3.0], None],
        }
    )
    half = math.exp(0.5)
    for loss, expected in (
        (PLAIN, [1.0, 1.0, 1.0, 1.0]),
        (Loss.of(tiny.objective(recipe="sampled")), [1 / half, 1 / half, 1.0, 1.0]),
        (Loss.of(tiny.objective(recipe="dpca")), [1.0, 1.0, 1.0, 1.0]),  # has a ratio of its own
        (Loss.of(tiny.objective(recipe="dpca", ratio_clip=None)), [1 / half, 1 / half, 1.0, 1.0]),
        (Loss.of(tiny.objective(recipe="hybrid")), [1.0, 1 / half, 1.0, 1.0]),
        (Loss.of(tiny.objective(recipe="hybrid", ratio_clip=(0.2, 0.2))), [1.0, 1.0, 1.0, 1.0]),
        (Loss.of(tiny.objective(recipe="simct")), [1.0, 1.0, 1.0, 1.0]),
    ):
        table = weigh(units, rollouts, Weights(scheme="uniform"), loss=loss)
        assert table["is_ratio"].to_list() == pytest.approx([half, half, 1.0, math.e])
        assert table["advantage"].to_list() == [-2.0, -2.0, 0.0, -2.0]  # at temperature 1, of the policy
        assert table["weight"].to_list() == pytest.approx(expected)
        bounded = weigh(units, rollouts, Weights(scheme="uniform", truncate=2.0), loss=loss)
        assert bounded["weight"].to_list() == pytest.approx([half, half, 1.0, 2.0])
    own = weigh(units, rollouts.drop("policy_logp"), Weights(scheme="uniform"), loss=Loss(corrected=("1:1", "n:m")))
    assert own["is_ratio"].equals(own["weight"].rename("is_ratio"))
    plain = weigh(units, rollouts.drop("sampler_logp"), Weights(scheme="uniform"), loss=Loss(corrected=("1:1", "n:m")))
    assert plain["is_ratio"].to_list() == pytest.approx([math.e, math.e, 1.0, math.e])
    assert plain["weight"].to_list() == [1.0] * 4


@settings(deadline=None, max_examples=25)
@given(
    batch,
    st.floats(0, 2),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.one_of(st.none(), st.floats(0.1, 10)),
    st.integers(1, 8),
)
def test_weights(
    responses: list[Response], gamma: float, alpha: float, share: float, truncate: float | None, size: int
) -> None:
    a = [[u.advantage for u in told] for told in responses]
    unsigned, with_sign, powers, first = [], [], [], []
    for row in a:
        total = math.fsum(map(abs, row))
        before = [math.fsum(map(abs, row[:t])) for t in range(len(row))]
        unsigned.append([1 + gamma * (1 - (d / total if total else 0.0)) for d in before])
        before = [abs(math.fsum(row[:t])) for t in range(len(row))]
        with_sign.append([1 + gamma * (1 - (d / total if total else 0.0)) for d in before])
        powers.append([math.exp(max(-300, min(300, alpha * math.fsum(row[:t])))) for t in range(len(row))])
        first.append([1.0 if t / len(row) < share else 0.0 for t in range(len(row))])
    ideal = [
        [r / (math.fsum(column := [p[t] for p in powers if t < len(p)]) / len(column)) for t, r in enumerate(row)]
        for row in powers
    ]
    expected = {"iw_opd": unsigned, "signed": with_sign, "ideal": ideal, "prefix": first}
    expected["uniform"] = [[1.0] * len(row) for row in a]
    for scheme, rows in expected.items():
        options = reading("scheme", scheme, gamma=gamma, alpha=alpha, prefix_share=share)
        options = options.model_copy(update={"truncate": truncate})
        if truncate is not None:
            rows = [  # noqa: PLW2901
                [w * min(u.ratio, truncate) for w, u in zip(row, told, strict=True)]
                for row, told in zip(rows, responses, strict=True)
            ]
        table = in_shards(responses, size, options)
        np.testing.assert_allclose(table["weight"], flat(rows), rtol=2e-6, atol=1e-9)
        assert table.select("rollout_id", "unit").equals(tables(responses)[0].select("rollout_id", "unit"))


def test_pinned_weights() -> None:
    frame = advantage_frame([0.2, -0.3, 0.5])
    np.testing.assert_allclose(frame.select(w=iw_opd(0.5))["w"], [1.5, 1.4, 1.25], rtol=1e-12)
    np.testing.assert_allclose(frame.select(w=signed(0.5))["w"], [1.5, 1.4, 1.45], rtol=1e-12)
    for scheme in (iw_opd, signed):
        assert frame.select(w=scheme(0.0))["w"].to_list() == [1.0] * 3


def test_prefix_share_is_exact() -> None:
    for n, share, kept in ((100, 0.55, 55), (10, 0.3, 3), (10, 0.31, 4), (1, 0.01, 1), (7, 1.0, 7)):
        assert advantage_frame([0.0] * n).select(w=prefix(share))["w"].sum() == kept


def test_ideal_weights_survive_ratios_beyond_float() -> None:
    """4000 units of +-19 nats: the ratio itself would be e^+-76000."""
    sure, lost = ([Unit(t, ((s, s),))] * 4000 for t, s in ((-0.5, -19.5), (-19.5, -0.5)))
    table = weigh(*tables([sure, lost]), Weights(scheme="ideal", alpha=1.0))
    assert table["weight"].is_finite().all()
    assert (table["weight"][3999], table["weight"][7999]) == (2.0, 0.0)


def residuals_of(responses: Sequence[Response], clip: float) -> list[list[float]]:
    folds = folds_of(responses)

    def bins(t: int, u: Unit) -> tuple[int, int]:
        return sum(t >= e for e in estimates.POSITION_EDGES), sum(-u.student >= e for e in estimates.SURPRISAL_EDGES)

    out = []
    for told, fold in zip(responses, folds, strict=True):
        others = [
            (u.token_id, bins(t, u), min(clip, max(-clip, u.advantage)))
            for other, g in zip(responses, folds, strict=True)
            if g != fold
            for t, u in enumerate(other)
            if u.teacher is not None
        ]

        def mean(matches: Callable[[int, tuple[int, int]], bool], others: list = others) -> float:
            found = [d for token, place, d in others if matches(token, place)] or [d for *_, d in others]
            return math.fsum(found) / len(found) if found else 0.0

        out.append([])
        for t, u in enumerate(told):
            by_token = mean(lambda token, _, u=u: token == u.token_id)  # type: ignore[misc]
            by_bin = mean(lambda _, place, t=t, u=u: place == bins(t, u))  # type: ignore[misc]
            d = min(clip, max(-clip, u.advantage))
            out[-1].append(0.0 if u.teacher is None else d - (by_token + by_bin) / 2)
    return out


def test_sums_add_in_row_order() -> None:
    """Order matters to the bits: 1e16 + 1 - 1e16 is 0 from the left."""
    table = pl.DataFrame({"k": [1, 1, 1, 0], "x": [1e16, 1.0, -1e16, 3.0]})
    assert sums_by(table, ["k"], ["x"]).to_dict(as_series=False) == {"k": [0, 1], "count": [1, 3], "x_sum": [3.0, 0.0]}


def test_adding_is_in_float64_and_from_the_left() -> None:
    """1e16 + 1 - 1e16 is 0 from the left; a key that one side lacks counts 0 there."""
    parts = [
        {"position": pl.DataFrame({"unit": [i, 9], "count": [1.0] * 2, "x_sum": [x] * 2})}
        for i, x in enumerate((1e16, 1.0, -1e16))
    ]
    assert reduce(add, parts)["position"].to_dict(as_series=False) == {
        "unit": [0, 1, 2, 9],
        "count": [1.0, 1.0, 1.0, 3.0],
        "x_sum": [1e16, 1.0, -1e16, 0.0],
    }


def test_value_without_others_is_zero() -> None:
    table = pl.DataFrame({"fold": [0, 0], "target": [1.0, 2.0]} | {name: [1.0, 0.5] for name in estimates.FEATURES})
    assert values(table, estimates.value_sums(table)).to_list() == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("column", ["teacher_logp", "behavior_logp", "policy_logp"])
def test_what_is_not_finite_is_refused(column: str, value: float | None) -> None:
    responses = [
        [Unit(-1.0, ((-1.0, -1.0), (-0.5, -0.5)))] * 3,
        [Unit(-1.0, ((-1.0, -1.0),))],
        [Unit(None, ((-1.0, -1.0),))],
    ]
    units, rollouts = tables(responses)
    hidden = weigh(units, rollouts, Weights())
    bad = pl.lit(value, pl.Float32)
    if column == "teacher_logp":
        where = (pl.col("rollout_id") == "r000") & (pl.col("unit") > 0)
        broken = units.with_columns(pl.when(where).then(bad).otherwise(column).alias(column)), rollouts
    else:  # one token of each of the last two units of r000; a token of a masked unit is nobody's business
        spoilt = {"r000": [-1.0, -0.5, -1.0, value, value, -0.5], "r001": [-1.0], "r002": [value]}
        lists = pl.Series(column, [spoilt[name] for name in rollouts["rollout_id"]], dtype=pl.List(pl.Float32))
        broken = units, rollouts.with_columns(lists)
        fine = pl.Series(
            column, [[value] if n == "r002" else v for n, v in rollouts.select("rollout_id", column).rows()]
        )
        allowed = weigh(units, rollouts.with_columns(fine.cast(pl.List(pl.Float32))), Weights())
        assert allowed.equals(hidden)
    with pytest.raises(OpdError) as caught:
        weigh(*broken, Weights())
    text = str(caught.value)
    assert f"`{column}` is missing, NaN or infinite in 2 units of 1 rollouts, first in rollout r000, unit 1" in text


def test_units_of_other_rollouts_are_refused() -> None:
    units, rollouts = tables([[Unit(-1.0, ((-1.0, -1.0),))] * 3, [Unit(-1.0, ((-1.0, -1.0),))]])
    with pytest.raises(OpdError, match=r"`behavior_logp` is missing.* in 1 units of 1 rollouts, first in rollout r001"):
        weigh(units, rollouts.filter(pl.col("rollout_id") == "r000"), Weights())
    short = rollouts.with_columns(pl.col("behavior_logp").list.head(2))
    with pytest.raises(OpdError, match="rollout r000: a unit reaches beyond the 2 values of `behavior_logp`"):
        weigh(units, short, Weights())


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("column", ["cand_logp", "tail_logp", "dropped_logp"])
def test_what_is_no_log_of_a_mass_is_refused(column: str, value: float | None) -> None:
    responses = [[Unit(-1.0, ((-1.0, -1.0),), (-0.5, -math.inf), -math.inf)] * 3, [Unit(None, ((-1.0, -1.0),))]]
    units = tables(responses)[0].with_columns(dropped_logp=pl.lit(-math.inf, pl.Float32))
    check_candidates(units)
    where, bad = pl.col("unit") == 2, pl.lit(value, pl.Float32)
    if column == "cand_logp":
        bad = pl.concat_list(pl.lit(-0.5, pl.Float32), bad)
    broken = units.with_columns(pl.when(where).then(bad).otherwise(column).alias(column))
    with pytest.raises(OpdError) as caught:
        check_candidates(broken)
    text = str(caught.value)
    assert f"`{column}` is missing, NaN or +inf in 1 units of 1 rollouts, first in rollout r000, unit 2" in text
    check_candidates(broken.with_columns(kind=pl.lit("masked")))
