"""The schedule at its corners, and MasterAdamW against torch's own AdamW."""

from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.config import Train
from train.checkpoint import load_state, save_state
from train.optimiser import MasterAdamW, learning_rate

CONFIG = Train(
    learning_rate=1e-2, warmup_steps=4, min_lr_ratio=0.1, weight_decay=0.05, betas=(0.9, 0.95), grad_clip=0.5
)
STEPS = 8


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Two layers, and a third whose weight is frozen."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 2))
    net[3].weight.requires_grad_(False)
    return net.to(dtype)


def backward(net: torch.nn.Module, step: int, scale: float = 3.0) -> None:
    """Leave the gradients of one step's own data on the network."""
    x = torch.from_numpy(np.random.default_rng(step).normal(size=(11, 5))).to(next(net.parameters()).dtype)
    (scale * net(x).square().mean()).backward()


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_learning_rate_at_its_corners() -> None:
    rates = [learning_rate(CONFIG, step, 14) for step in range(14)]
    np.testing.assert_allclose(rates[:5], [0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2])  # the peak ends the warm-up
    np.testing.assert_allclose(np.diff(rates[4:]), -0.9e-2 / 9)  # a straight line from step 4 ...
    assert rates[-1] == pytest.approx(0.1e-2)  # ... to the last step
    assert learning_rate(CONFIG, 50, 14) == pytest.approx(0.1e-2)  # never below


def test_learning_rate_without_warm_up_or_decay() -> None:
    bare = Train(learning_rate=1.0, warmup_steps=0, min_lr_ratio=0.0)
    np.testing.assert_allclose([learning_rate(bare, step, 5) for step in range(5)], [1.0, 0.75, 0.5, 0.25, 0.0])
    assert learning_rate(bare, 0, 1) == 1.0  # a run of one step takes it in full
    flat = Train(learning_rate=1.0, warmup_steps=2, min_lr_ratio=1.0)
    assert [learning_rate(flat, step, 5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("fused", [True, False])
def test_float32_is_adamw(fused: bool) -> None:
    """Bit for bit torch's fused one, and its plain one but for the last bits."""
    ours, theirs = network(), network()
    masters = MasterAdamW(ours, CONFIG)
    options = {"betas": CONFIG.betas, "weight_decay": CONFIG.weight_decay, "fused": fused}
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.0, **options)
    norms = []
    for step in range(STEPS):
        rate = learning_rate(CONFIG, step, STEPS)
        scale = 3.0 if step % 2 else 0.3
        backward(ours, step, scale)
        norm = masters.step(rate)
        backward(theirs, step, scale)
        flat = torch.cat([p.grad.ravel().double() for p in theirs.parameters() if p.grad is not None])
        assert norm == pytest.approx(float(flat.norm()), rel=1e-6)  # before clipping
        norms.append(norm)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CONFIG.grad_clip)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad()
        if fused:
            assert_same(weights(ours), weights(theirs))
        else:
            torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-7)
        assert all(p.grad is None for p in ours.parameters())
    assert min(norms) < CONFIG.grad_clip < max(norms)  # some were clipped, some were not
    assert torch.equal(ours[3].weight, network()[3].weight)
    assert not torch.equal(ours[3].bias, network()[3].bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    """Through the file that the trainer writes, into a network whose own weights are others."""

    def run(net: torch.nn.Module, optimiser: MasterAdamW, steps: range) -> None:
        for step in steps:
            backward(net, step)
            optimiser.step(learning_rate(CONFIG, step, STEPS))

    whole = network(dtype)
    straight = MasterAdamW(whole, CONFIG)
    run(whole, straight, range(3))
    save_state(tmp_path / "state.safetensors", straight.state(), {})
    at_three = weights(whole)
    run(whole, straight, range(3, STEPS))

    resumed = network(dtype)
    with torch.no_grad():
        for p in resumed.parameters():
            if p.requires_grad:
                p.add_(1.0)
    again = MasterAdamW(resumed, CONFIG)
    again.load(load_state(tmp_path / "state.safetensors")[0])
    assert_same(weights(resumed), at_three)
    run(resumed, again, range(3, STEPS))
    assert_same(weights(resumed), weights(whole))
    assert_same(again.state(), straight.state())
    trained = [name for name, p in resumed.named_parameters() if p.requires_grad]
    kinds = ("master", "step", "exp_avg", "exp_avg_sq")
    assert again.state().keys() == {f"{kind}/{name}" for kind in kinds for name in trained}


def test_state_before_the_first_step() -> None:
    net = network()
    state = MasterAdamW(net, CONFIG).state()
    other = network()
    with torch.no_grad():
        other[0].weight.zero_()
    optimiser = MasterAdamW(other, CONFIG)
    optimiser.load(state)
    assert_same(weights(other), weights(net))
    again = network()
    fresh = MasterAdamW(again, CONFIG)
    for each in (again, other):
        backward(each, 0)
    assert fresh.step(1e-2) == optimiser.step(1e-2)
    assert_same(weights(other), weights(again))


@pytest.mark.parametrize("passes", [64, 256])
def test_gradients_of_many_passes_are_summed_in_float32(passes: int) -> None:
    """bf16 gradients against their float64 sum. Summed in bf16, as autograd would, they are wrong by far more.

    Without momentum or clipping, AdamW's first moment is the gradient.
    """
    ours, theirs = network(torch.bfloat16), network(torch.bfloat16)
    optimiser = MasterAdamW(ours, Train(betas=(0.0, 0.95), grad_clip=1e9))
    exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in theirs.named_parameters() if p.requires_grad}
    summed = {name: torch.zeros_like(p) for name, p in theirs.named_parameters() if p.requires_grad}
    for step in range(passes):
        backward(ours, step)
        backward(theirs, step)
        for name, p in theirs.named_parameters():
            if name in exact:
                exact[name] += p.grad.double()
                summed[name] += p.grad
        theirs.zero_grad()
    optimiser.step(0.0)
    state = optimiser.state()

    def error(found: dict[str, torch.Tensor]) -> float:
        parts = [(found[name].double() - want).ravel() for name, want in exact.items()]
        return float(torch.cat(parts).norm() / torch.cat([want.ravel() for want in exact.values()]).norm())

    before, after = error(summed), error({name: state[f"exp_avg/{name}"] for name in exact})
    print(f"{passes} passes: {before:.2e} in bf16, {after:.2e} in float32")
    assert after < 1e-6 and before > 1e-3
    backward(ours, 0)  # the next step begins at nothing
    backward(theirs, 0)
    optimiser.step(0.0)
    state = optimiser.state()
    assert all(torch.equal(state[f"exp_avg/{n}"], p.grad.float()) for n, p in theirs.named_parameters() if n in exact)


def test_bf16_keeps_updates_too_small_for_it() -> None:
    """Each step moves a weight of 1 by 1e-4; bf16 has nothing between 1 and 1 - 1/256."""
    quiet = Train(weight_decay=0.0, grad_clip=1e9)

    def one() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    module = torch.nn.Module()
    module.weight = one()
    masters, lost = MasterAdamW(module, quiet), one()
    plain = torch.optim.AdamW([lost], lr=1e-4, betas=quiet.betas, weight_decay=0.0)
    seen = []
    for _ in range(60):
        module.weight.sum().backward()
        lost.grad = torch.ones_like(lost)
        masters.step(1e-4)
        plain.step()
        seen.append(float(module.weight[0].detach()))
    assert seen[0] == 1.0
    assert seen[-1] == 1 - 2 / 256  # 1 - 60e-4, rounded
    assert sorted(set(seen)) == [1 - 2 / 256, 1 - 1 / 256, 1.0]
    np.testing.assert_allclose(masters.state()["master/weight"], 1 - 60e-4, atol=1e-6)
    assert masters.state()["master/weight"].dtype == torch.float32
    assert float(lost[0].detach()) == 1.0  # what the masters are for
