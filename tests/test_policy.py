"""The student's log-probs at units against one plain forward per response and a loop over tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from schemas.config import Objective
from schemas.tables import STOP_ID
from train.policy import UnitLogps, unit_logps
from train.recipes import losses
from train.stream import Batch, _Response, collate

VOCAB = 90
STOP = torch.tensor([3, 50, 71])
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.35,
    "max_position_embeddings": 64,
}


@cache
def model_of(name: str) -> Any:
    """Random float32 weights."""
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4, final_logit_softcapping=3.0)).eval()


@dataclass(frozen=True)
class Unit:
    """Student tokens and candidates of one unit; the teacher's numbers don't matter to the policy."""

    tokens: tuple[int, ...]
    candidates: tuple[int, ...]
    masked: bool = False


@dataclass(frozen=True)
class Told:
    """A response and its units."""

    prompt: tuple[int, ...]
    units: tuple[Unit, ...]
    stopped: bool

    @property
    def tokens(self) -> list[int]:
        return [token for unit in self.units for token in unit.tokens]


TOLD = (
    Told(
        (5, 6, 7, 8, 9, 10),
        (
            Unit((11,), (11, 12, STOP_ID)),
            Unit((13, 14, 15), (20, 13)),
            Unit((16, 17), (), masked=True),
            Unit((18,), ()),
        ),
        stopped=False,
    ),
    Told((21, 22), (Unit((23,), (STOP_ID, 30, 31, 32, 33)), Unit((50,), (23, STOP_ID))), stopped=True),
    Told((40,), (Unit((71,), (1, STOP_ID, 0)),), stopped=True),
    Told((24, 25, 26), (Unit((27, 28), (29,)), Unit((60, 61, 3), (), masked=True)), stopped=True),
)


def batch_of(told: Sequence[Told]) -> Batch:
    responses = []
    for i, one in enumerate(told):
        counts = np.array([len(unit.candidates) for unit in one.units])
        s_len = np.array([len(unit.tokens) for unit in one.units], np.int32)
        columns = {
            "s_start": (np.cumsum(s_len) - s_len).astype(np.int32),
            "s_len": s_len,
            "t_len": s_len,
            "teacher_logp": np.array([math.nan if unit.masked else -1.0 - i for unit in one.units], np.float32),
            "weight": np.array([1 + i + j / 8 for j in range(len(one.units))], np.float32),
            **{name: np.zeros(len(one.units), np.float32) for name in ("advantage", "credit", "student_logp")},
            **{name: np.full(len(one.units), math.nan, np.float32) for name in ("tail_logp", "dropped_logp")},
            "is_ratio": np.ones(len(one.units), np.float32),
            "comparable": np.array([not unit.masked for unit in one.units]),
        }
        ids = np.array([c for unit in one.units for c in unit.candidates], np.int32)
        prompt, response = (np.array(x, np.int32) for x in (one.prompt, one.tokens))
        logp = np.full(len(ids), -2.0, np.float32)
        responses.append(_Response(f"r{i}", prompt, response, one.stopped, columns, counts, ids, logp))
    return collate(responses)


def loop(model: Any, told: Sequence[Told]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor]]]:
    """Tokens, sums of the units that count, and their candidates, each a float64 scalar with its gradient."""
    tokens, units, candidates = [], [], []
    for one in told:
        logits = model(input_ids=torch.tensor([[*one.prompt, *one.tokens]])).logits[0].double()
        at = len(one.prompt) - 1
        for unit in one.units:
            start, own = at, []
            for token in unit.tokens:
                logp = logits[at].log_softmax(0)
                last = at == len(one.prompt) + len(one.tokens) - 2
                own.append(logp[STOP].exp().sum().log() if one.stopped and last else logp[token])
                at += 1
            tokens += own
            if not unit.masked:
                units.append(sum(own))
                logp = logits[start].log_softmax(0)
                candidates.append([logp[STOP].exp().sum().log() if c == STOP_ID else logp[c] for c in unit.candidates])
    return tokens, units, candidates


def numbers(values: Sequence[torch.Tensor]) -> list[float]:
    return [float(value.detach()) for value in values]


def gradients(model: Any, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_unit_logps_are_a_loop_over_plain_logits(name: str) -> None:
    model = model_of(name)
    found = unit_logps(model, batch_of(TOLD), STOP)
    tokens, units, candidates = loop(model, TOLD)
    np.testing.assert_allclose(found.token.detach(), numbers(tokens), atol=2e-5)
    np.testing.assert_allclose(found.unit.detach(), numbers(units), atol=5e-5)
    assert len(found.cand) == len(candidates)
    for row, expected in zip(found.cand, candidates, strict=True):
        np.testing.assert_allclose(row[: len(expected)].detach(), numbers(expected), atol=2e-5)


def test_gradients_are_those_of_the_loop() -> None:
    model = model_of("llama")
    batch = batch_of(TOLD)
    found = unit_logps(model, batch, STOP)
    used = batch.cand_logp > -math.inf
    _, units, candidates = loop(model, TOLD)
    ours = gradients(model, found.unit.sum() + found.cand[used].sum())
    theirs = gradients(model, sum(units) + sum(c for row in candidates for c in row))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-4 * float(b.abs().max()), rtol=1e-3)


def test_what_collate_says_about_units() -> None:
    batch = batch_of(TOLD)
    assert batch.responses == ("r0", "r1", "r2", "r3")
    assert batch.response_of_unit.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert batch.s_len.tolist() == [1, 3, 1, 1, 1, 1, 2]
    assert batch.weight.tolist() == [1, 1.125, 1.375, 2, 2.125, 3, 4]
    assert batch.teacher_logp.tolist() == [-1, -1, -1, -2, -2, -3, -4]
    assert batch.unit_row.tolist() == [0, 1, 6, 7, 8, 9, 10]
    assert batch.token_unit.tolist() == [0, 1, 1, 1, 7, 7, 2, 3, 4, 5, 6, 6, 7, 7, 7]
    assert batch.targets[[8, 9, 14]].tolist() == [STOP_ID] * 3
    assert batch.mask.sum(1).tolist() == [6 + 7 - 1, 2 + 2 - 1, 1, 3 + 5 - 1]


def test_each_response_is_the_same_alone_and_in_any_company() -> None:
    """Padding and neighbours change nothing."""
    model = model_of("llama")
    alone = [unit_logps(model, batch_of([one]), STOP) for one in TOLD]
    together = unit_logps(model, batch_of(TOLD[::-1]), STOP)
    for name in ("token", "unit"):
        expected = torch.cat([getattr(one, name) for one in alone[::-1]])
        torch.testing.assert_close(getattr(together, name), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["hybrid", "simct", "sampled"])
def test_masked_tokens_leak_nowhere(recipe: str) -> None:
    """Other tokens in a masked tail: the tokens' own log-probs move, no unit, candidate, loss or gradient does."""
    model, config = model_of("llama"), Objective(recipe=recipe)

    def with_tail(tail: tuple[int, ...]) -> tuple[UnitLogps, torch.Tensor, list[torch.Tensor]]:
        units = (Unit((27, 28), (29, STOP_ID)), Unit((33,), (33, 34, 35)), Unit(tail, (), masked=True))
        batch = batch_of([Told((24, 25, 26), units, stopped=False), TOLD[1]])
        found = unit_logps(model, batch, STOP)
        loss = losses(found, batch, config).loss
        return found, loss, gradients(model, loss.sum())

    (one, one_loss, one_slope), (two, two_loss, two_slope) = with_tail((60, 61, 62)), with_tail((80, 81, 82))
    assert len(one.unit) == 4
    assert (one.token[3:6] != two.token[3:6]).all()
    for a, b in ((one.unit, two.unit), (one.cand, two.cand), (one_loss, two_loss)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(one_slope, two_slope, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(a.abs().max())), rtol=0)
    assert any(slope.abs().max() > 1e-2 for slope in one_slope)
