"""Exact reverse KL against plain sums over two vocabularies, and gradients against autograd's own."""

from math import exp, log
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from pipeline.infer.forward import head
from train.gradient import Gradient, exact_reverse_kl, gradient


def test_exact_reverse_kl_is_a_sum_over_what_both_can_say() -> None:
    """Six and five ids: three pairs, one of which stops the student; two stops on either side; the rest is one class."""
    rng = np.random.default_rng(0)
    own, theirs = rng.normal(size=(7, 6)), rng.normal(size=(7, 5))
    pairs = np.array([4, -1, 2, 5, -1])  # teacher id -> student id
    student_stop, teacher_stop = [0, 5], [1]
    found = exact_reverse_kl(
        torch.from_numpy(own).float(),
        torch.from_numpy(theirs).float(),
        pairs,
        torch.tensor(student_stop),
        torch.tensor(teacher_stop),
    )

    def kl(s: Any, t: Any) -> float:
        p = [exp(x) / sum(map(exp, s)) for x in s]
        q = [exp(x) / sum(map(exp, t)) for x in t]
        classes = [(p[4], q[0]), (p[2], q[2])]  # the third pair is a stop of the student's
        classes.append((p[0] + p[5], q[1]))
        classes.append((p[1] + p[3], q[3] + q[4]))
        assert sum(a for a, _ in classes) == pytest.approx(1) == pytest.approx(sum(b for _, b in classes))
        return sum(a * log(a / b) for a, b in classes)

    np.testing.assert_allclose(found, [kl(s, t) for s, t in zip(own, theirs, strict=True)], rtol=1e-5)
    same = torch.from_numpy(own).float()
    none = exact_reverse_kl(same, same, np.arange(6), torch.tensor([0]), torch.tensor([0]))
    np.testing.assert_allclose(none, np.zeros(7), atol=1e-6)


@pytest.mark.parametrize("parameters", [True, False])
def test_the_gradient_is_autograds_over_all_micro_batches(parameters: bool) -> None:
    model = tiny.model().float()
    inputs = [torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        return head(model, hidden.flatten(0, 1)).float().log_softmax(-1)[:, 3].square().sum()

    found = gradient(model, [lambda ids=ids: loss(ids) for ids in inputs], parameters)
    assert all(p.grad is None for p in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_()
    total = torch.stack([loss(ids) for ids in inputs]).sum()
    assert found.loss == pytest.approx(total.item(), rel=1e-5)
    slopes = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    states = [model.base_model(input_ids=ids).last_hidden_state.detach().requires_grad_() for ids in inputs]
    with torch.enable_grad():
        for hidden in states:
            head(model, hidden.flatten(0, 1)).float().log_softmax(-1)[:, 3].square().sum().backward()
    torch.testing.assert_close(found.hidden, torch.cat([h.grad.flatten() for h in states]), rtol=1e-4, atol=1e-6)
    if not parameters:
        assert found.parameters is None and found.norm == pytest.approx(float(found.hidden.norm()), rel=1e-5)
        return
    assert found.parameters is not None
    assert float(found.parameters.double().norm()) == pytest.approx(
        float(torch.cat([s.flatten() for s in slopes]).double().norm()), rel=1e-4
    )
    doubled = Gradient(0.0, 2 * found.hidden, -found.parameters)
    assert found.cosines(doubled) == pytest.approx((1, -1))
