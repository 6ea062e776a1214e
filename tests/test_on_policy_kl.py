"""The reverse KL that a run leads with: its mean by summing over all that could be drawn, its variance, and its sums."""

from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_objectives import plain_kl
from test_recipes import every_outcome

from schemas.config import Config
from train.batch import Batch
from train.on_policy_kl import FIGURES, of_unit, on_policy_kl, with_candidates
from train.policy import UnitLogps, unit_logps
from train.stream import batches


def outcomes(seed: int, kept: int, error: float = 0.0) -> tuple[np.ndarray, np.ndarray, UnitLogps, Batch]:
    """A position, a unit for each of 12 tokens that may be drawn, the teacher's `kept` likeliest as candidates, in an unused
    slot besides, each off by up to `error` nats; p_S and p_T."""
    rng = np.random.default_rng(seed)
    _, teacher, student, batch = every_outcome(seed)
    logp, vocab = student.unit.detach(), len(teacher)
    ids = teacher.argsort(descending=True)[: kept + 1]
    told = teacher[ids] + torch.from_numpy(rng.uniform(-error, error, kept + 1))
    told[kept] = -torch.inf
    batch = replace(batch, cand_id=ids.expand(vocab, -1), cand_logp=told.expand(vocab, -1), behavior_logp=logp)
    student = UnitLogps(logp, logp, logp[ids].expand(vocab, -1), student.log_z.detach())
    return logp.exp().numpy(), teacher.exp().numpy(), student, batch


@pytest.mark.parametrize("kept", [0, 1, 5, 11])
@pytest.mark.parametrize("error", [0.0, 0.5])
def test_its_mean_is_the_full_kl_whatever_the_candidates(kept: int, error: float) -> None:
    for seed in range(20):
        p, q, student, batch = outcomes(seed, kept, error)
        found = of_unit(student, batch)
        exact = plain_kl(p, q)
        for name in ("reverse_kl", "sampled_kl"):
            assert (p * found[name].numpy()).sum() == pytest.approx(exact, abs=1e-10), name
        if not error:
            assert (found["reverse_kl_bound"].numpy() <= exact + 1e-12).all()


def test_its_mean_is_the_full_kl_also_when_another_policy_sampled() -> None:
    for seed in range(20):
        p, q, student, batch = outcomes(seed, 4, 0.1)
        sampler = torch.from_numpy(np.random.default_rng(seed).normal(size=len(p))).log_softmax(-1)
        found = of_unit(student, replace(batch, behavior_logp=sampler))
        for name in ("reverse_kl", "sampled_kl"):
            assert (sampler.exp() * found[name]).sum().item() == pytest.approx(plain_kl(p, q), abs=1e-10), name


def test_its_variance_is_lower() -> None:
    """With the teacher's 5 likeliest of 12 two thirds of the sampled log-ratio's; with 11 only the last one differs."""
    variances: dict[str, list[float]] = {"reverse_kl": [], "sampled_kl": []}
    for seed in range(100):
        p, _, student, batch = outcomes(seed, 5)
        for name, of_seed in variances.items():
            value = of_unit(student, batch)[name].numpy()
            of_seed.append((p * value**2).sum() - (p * value).sum() ** 2)
    ours, plain = (np.array(variances[name]) for name in ("reverse_kl", "sampled_kl"))
    print(f"mean variance {ours.mean():.3f} against {plain.mean():.3f}, lower in {(ours < plain).mean():.0%}")
    assert ours.mean() < 0.7 * plain.mean() and (ours < plain).mean() > 0.7
    _, q, student, batch = outcomes(0, 11)
    spread = np.delete(of_unit(student, batch)["reverse_kl"].numpy(), q.argmin())
    assert np.ptp(spread) == pytest.approx(0, abs=1e-10)


def test_a_candidate_that_begins_longer_units_costs_no_bias() -> None:
    """Token 0 is a candidate of its own, yet what is sampled with it goes on with 0 or 1, in one token of the teacher's.

    To sum over candidates only where the unit turned out to be 1:1 would be another mean.
    """
    student, second = np.log([0.5, 0.3, 0.2]), np.log([0.6, 0.4])
    teacher, whole = np.log([0.05, 0.4, 0.15]), np.log([0.3, 0.1])  # of the tokens 0, 1, 2 and the units 00, 01
    chance = np.exp([student[0] + second[0], student[0] + second[1], student[1], student[2]])
    log_ratio = np.array([*(student[0] + second - whole), *(student - teacher)[1:]])
    cand = np.tile([0, 1], (4, 1))
    drawn = np.array([[True, False], [True, False], [False, True], [False, False]])
    found = with_candidates(
        *(torch.from_numpy(x) for x in (log_ratio, student[cand], teacher[cand], drawn, np.ones(4)))
    )
    mean = (chance * log_ratio).sum()
    assert (chance * found.numpy()).sum() == pytest.approx(mean, abs=1e-10)
    on_candidates = (np.exp(student) * (student - teacher))[:2].sum()
    only_1to1 = np.where([False, False, True, True], on_candidates + np.where(drawn.any(1), 0, log_ratio), log_ratio)
    assert abs((chance * only_1to1).sum() - mean) > 0.1


def test_by_hand() -> None:
    """p_S = (1/2, 1/4, 1/4), p_T = (1/4, 1/4, 1/2) of tokens a, b, c; a is the candidate. KL is 1/2 log 2 - 1/4 log 2."""
    student = torch.tensor([0.5, 0.25, 0.25]).double().log()
    teacher = torch.tensor([0.25, 0.25, 0.5]).double().log()
    drawn = torch.tensor([[True], [False], [False]])
    one = torch.ones(3, dtype=torch.float64)
    found = with_candidates(student - teacher, student[:1].expand(3, 1), teacher[:1].expand(3, 1), drawn, one)
    assert found.tolist() == pytest.approx([0.5 * log(2), 0.5 * log(2), -0.5 * log(2)])
    assert float((student.exp() * found).sum()) == pytest.approx(0.25 * log(2))


def test_sums_over_responses_are_those_of_plain_loops(tmp_path: Path) -> None:
    shards, model = tiny.shards(tmp_path), tiny.model()
    values = {"prompts": {"source": "p"}, "student": {"model": "a"}, "teacher": {"model": "b"}, "seed": 3}
    config = Config.model_validate(values | {"train": {"batch_size": 7, "micro_batch_tokens": 60}})
    found = on_policy_kl(model, tiny.STOP, shards, config)
    (step,) = batches(shards, 40, 10_000, 0, range(1))
    kl, sampled, tokens = 0.0, 0.0, 0
    for batch in step.parts:
        with torch.no_grad():
            student = unit_logps(model, batch, torch.from_numpy(tiny.STOP.astype("int64")))
        for u in range(len(batch.unit_row)):
            log_ratio = float(student.unit[u] - batch.teacher_logp[u])
            ratio = exp(float(student.unit[u] - batch.behavior_logp[u]))
            first = int(batch.targets[batch.unit_row[u]])
            value = ratio * log_ratio
            for c, t, s in zip(
                batch.cand_id[u].tolist(), batch.cand_logp[u].tolist(), student.cand[u].tolist(), strict=True
            ):
                if t > -np.inf:
                    value += (exp(s) - ratio * (c == first)) * (s - t)
            kl, sampled, tokens = kl + value, sampled + ratio * log_ratio, tokens + int(batch.s_len[u])
    assert found["kl_tokens"] == tokens and found["kl_responses"] == 40
    assert found["reverse_kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert found["sampled_kl"] == pytest.approx(sampled / tokens, rel=1e-5)
    assert found["reverse_kl"] != pytest.approx(found["sampled_kl"], rel=1e-3)
    for name in FIGURES:
        low, high = found[f"{name}_95"]
        assert low < found[name] < high
