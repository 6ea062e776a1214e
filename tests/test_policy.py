"""The student's log-probs at units against one plain forward per response and a loop over tokens, and against all logits."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from pipeline.infer.policy_logps import longest
from pipeline.store.shards import open_shard, open_writer
from schemas.tables import STOP_ID
from train import layers, packing, policy
from train.batch import Batch, Response, collate
from train.packing import pack, packed
from train.policy import UnitLogps, unit_logps
from train.recipes import losses

VOCAB = 90
STOP = torch.tensor([3, 50, 71])
SHAPE = {
    "vocab_size": VOCAB,
    **tiny.SHAPE,
    "max_position_embeddings": 64,
}

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_{key}_head_dim": 8 for key in ("key", "value")},
    **{f"linear_num_{key}_heads": 2 for key in ("key", "value")},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}


@cache
def model_of(name: str) -> Any:
    """Random float32 weights; `bias`: a head of its own, which has one too."""
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if name == "bias":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()
        model.lm_head = torch.nn.Linear(SHAPE["hidden_size"], VOCAB)
        return model
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
            "teacher_entropy": np.array([math.nan if unit.masked else 0.5 for unit in one.units], np.float32),
            "t_log_z": np.array([math.nan if unit.masked else len(unit.tokens) / 4 for unit in one.units], np.float32),
            "weight": np.array([1 + i + j / 8 for j in range(len(one.units))], np.float32),
            **{name: np.zeros(len(one.units), np.float32) for name in ("advantage", "credit", "student_logp")},
            **{name: np.full(len(one.units), math.nan, np.float32) for name in ("tail_logp", "dropped_logp")},
            "is_ratio": np.ones(len(one.units), np.float32),
            **{name: np.full(len(one.units), np.nan, np.float32) for name in ("reward", "reference_logp")},
            "comparable": np.array([not unit.masked for unit in one.units]),
            "stops": np.array([one.stopped and j == len(one.units) - 1 for j in range(len(one.units))])
            & np.array([not unit.masked for unit in one.units]),
        }
        ids = np.array([c for unit in one.units for c in unit.candidates], np.int32)
        prompt, response = (np.array(x, np.int32) for x in (one.prompt, one.tokens))
        logp = np.full(len(ids), -2.0, np.float32)
        sampled = np.full(len(response), -math.log(tiny.VOCAB), np.float32)  # near what a model without training says
        responses.append(Response(f"r{i}", prompt, response, sampled, columns, counts, ids, logp))
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
    batch = batch_of(TOLD)
    found = unit_logps(model, batch, STOP)
    tokens, units, candidates = loop(model, TOLD)
    compared = batch.token_unit < len(units)
    np.testing.assert_allclose(found.token.detach(), np.where(compared, numbers(tokens), 0), atol=2e-5)
    np.testing.assert_allclose(found.unit.detach(), numbers(units), atol=5e-5)
    assert len(found.cand) == len(candidates)
    for row, expected in zip(found.cand, candidates, strict=True):
        np.testing.assert_allclose(row[: len(expected)].detach(), numbers(expected), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_log_z_is_what_log_probs_lack_to_the_models_logits(name: str) -> None:
    """Also where the logits are capped; its gradient is the distribution."""
    model, batch = model_of(name), batch_of(TOLD)
    found = unit_logps(model, batch, STOP).log_z
    compared = batch.token_unit < len(batch.unit_row)
    expected = whole(model, batch).log_z[compared]
    np.testing.assert_allclose(found[compared].detach(), expected.detach(), atol=5e-6)
    assert not found[~compared].any()
    for a, b in zip(gradients(model, found.sum()), gradients(model, expected.sum()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)


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
    assert batch.targets[[8, 9]].tolist() == [STOP_ID] * 2  # the third is masked
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
    """Other tokens in a masked tail: no unit, candidate, loss or gradient moves."""
    model, config = model_of("llama"), tiny.objective(recipe=recipe)

    def with_tail(tail: tuple[int, ...]) -> tuple[UnitLogps, torch.Tensor, list[torch.Tensor]]:
        units = (Unit((27, 28), (29, STOP_ID)), Unit((33,), (33, 34, 35)), Unit(tail, (), masked=True))
        batch = batch_of([Told((24, 25, 26), units, stopped=False), TOLD[1]])
        found = unit_logps(model, batch, STOP)
        loss = losses(found, batch, config).loss
        return found, loss, gradients(model, loss.sum())

    (one, one_loss, one_slope), (two, two_loss, two_slope) = with_tail((60, 61, 62)), with_tail((80, 81, 82))
    assert len(one.unit) == 4
    assert not one.token[3:6].any() and not two.token[3:6].any()
    for a, b in ((one.unit, two.unit), (one.cand, two.cand), (one_loss, two_loss)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(one_slope, two_slope, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(a.abs().max())), rtol=0)
    assert any(slope.abs().max() > 1e-2 for slope in one_slope)


def whole(model: Any, batch: Batch) -> UnitLogps:
    """The same from the logits of every position at once."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.rows]
    logp = logits.log_softmax(-1)
    stopping = logp[:, STOP].exp().sum(-1, keepdim=True).log()
    logp = torch.cat([logp, stopping], 1)  # the last column is what STOP_ID, -1, picks
    assert STOP_ID == -1
    token = logp[torch.arange(len(logp)), batch.targets]
    units = len(batch.unit_row)
    inside = torch.nn.functional.one_hot(batch.token_unit, units + 1)[:, :units].T
    return UnitLogps(token, inside.float() @ token, logp[batch.unit_row[:, None], batch.cand_id], logits.logsumexp(-1))


def set_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """So many rows of logits at a time."""
    monkeypatch.setattr(policy, "CHUNK_BYTES", rows * VOCAB * 4)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("recipe", ["hybrid", "simct_released", "dpca"])
@pytest.mark.parametrize("name", ["llama", "bias", "gemma2"])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    name: str, recipe: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rows(monkeypatch, rows)
    model, batch, config = model_of(name), batch_of(TOLD), tiny.objective(recipe=recipe)
    ours, theirs = (
        (batch.weight * losses(found, batch, config).loss).sum()
        for found in (unit_logps(model, batch, STOP), whole(model, batch))
    )
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    slopes = gradients(model, theirs)
    scale = max(float(slope.abs().max()) for slope in slopes)
    for a, b in zip(gradients(model, ours), slopes, strict=True):
        torch.testing.assert_close(
            a, b, atol=2e-6 * scale, rtol=0
        )  # dpca's ratio is the exponential of what is rounded


@pytest.mark.parametrize(("start", "few"), [(0, 32), (5, 0), (5, 32)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["llama", "bias"])
def test_packed_is_padded(name: str, recompute: bool, start: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, of four responses of 2 to 12 tokens, or with a start that all share; the body sees real tokens alone,
    and the start once; attention sees rows of like lengths, or all at once."""
    monkeypatch.setattr(packing, "FEW", few)
    told = [replace(one, prompt=[*range(9, 9 + start), *one.prompt]) for one in TOLD]
    model, batch, config = copy.deepcopy(model_of(name)), batch_of(told), tiny.objective(recipe="hybrid")
    theirs = (batch.weight * losses(unit_logps(model, batch, STOP), batch, config).loss).sum()
    slopes = gradients(model, theirs)
    assert pack(model) is None
    if recompute:
        layers.recompute(model)
    seen: list[torch.Size] = []
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    ours = (batch.weight * losses(unit_logps(model, batch, STOP), batch, config).loss).sum()
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    a, b = (torch.cat([slope.flatten() for slope in every]).double() for every in (gradients(model, ours), slopes))
    assert float((a - b).norm() / b.norm()) < 1e-6
    tokens = int(batch.mask.sum()) - start * (len(TOLD) - 1)
    assert set(seen) == {(1, tokens, SHAPE["hidden_size"])} and len(seen) == 1 + recompute


class MixesTokens(LlamaForCausalLM):
    """A Llama whose embeddings run over the row, as a recurrent layer would."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda _, __, out: out.cumsum(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: model_of("gemma2"), "Gemma2ForCausalLM has layers of sliding_attention"),
        (lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)), "sliding window of 4 tokens"),
        (lambda: MixesTokens(LlamaConfig(**SHAPE)), "MixesTokens mixes tokens by more than attention"),
        (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **LINEAR)), "layers of linear_attention"),
        (lambda: LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager"), "own .eager"),
    ],
)
def test_what_cannot_be_packed_is_told_and_stays_padded(model: Callable[[], Any], why: str) -> None:
    made = model().eval()
    assert re.search(why, pack(made) or "")
    assert not packed(made)
    batch = batch_of(TOLD)
    compared = batch.token_unit < len(batch.unit_row)
    found, expected = (way(made, batch).token[compared] for way in (lambda *x: unit_logps(*x, STOP), whole))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_body_that_recomputes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 3)
    model, batch = copy.deepcopy(model_of("gemma2")), batch_of(TOLD)
    plain = gradients(model, unit_logps(model, batch, STOP).unit.sum())
    model.train()  # without which `transformers` checkpoints nothing; there is no dropout
    model.gradient_checkpointing_enable({"use_reentrant": False})
    passes: list[int] = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    again = gradients(model, unit_logps(model, batch, STOP).unit.sum())
    assert len(passes) == 2
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max()), rtol=0)


def test_the_head_is_called_for_compared_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module, so that hooks fire, in chunks of nearly one size; all but the last once more in backward."""
    set_rows(monkeypatch, 4)
    model, seen = model_of("llama"), []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        found = unit_logps(model, batch_of(TOLD), STOP)
        assert seen == [4, 4, 2]
        gradients(model, found.unit.sum())
        assert sorted(seen) == [2, 4, 4, 4, 4]
        with torch.inference_mode():
            unit_logps(model, batch_of(TOLD), STOP)
        assert seen[5:] == [4, 4, 2]
    finally:
        hook.remove()


def test_nothing_to_compare() -> None:
    model = model_of("llama")
    told = [Told((5, 6), (Unit((7, 8), (), masked=True),), stopped=False)]
    found = unit_logps(model, batch_of(told), STOP)
    assert found.token.tolist() == [0, 0]
    assert (found.unit.shape, found.cand.shape) == ((0,), (0, 1))
    assert not any(slope.any() for slope in gradients(model, found.unit.sum() + found.cand.sum()))


@pytest.mark.parametrize("grad", [True, False])
def test_memory_does_not_grow_with_tokens_times_vocabulary(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of all tensors alive during a step, beyond those before it; logits of all tokens would take 41 MB a copy."""
    vocab, tokens, rows = 20_000, 512, 16
    monkeypatch.setattr(policy, "CHUNK_BYTES", rows * vocab * 4)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": vocab, "max_position_embeddings": tokens})).eval()
    units = tuple(Unit((token,), (token, 5, STOP_ID)) for token in range(10, 10 + tokens))
    batch = batch_of([Told((4,), units, stopped=False)])

    def peak(way: Callable[[], UnitLogps]) -> int:
        with torch.set_grad_enabled(grad), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            found = way()
            if grad:
                (found.unit.sum() + found.cand.sum()).backward()
        model.zero_grad()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

    logits, chunk, weights = (4 * vocab * count for count in (tokens, rows, SHAPE["hidden_size"]))
    print(peak(lambda: whole(model, batch)), peak(lambda: unit_logps(model, batch, STOP)), logits, chunk, weights)
    assert peak(lambda: whole(model, batch)) > 2 * logits
    assert peak(lambda: unit_logps(model, batch, STOP)) < 3 * chunk + (3 * weights if grad else 0) + 0.1 * logits


def test_the_longest_of_a_shard_may_lie_beside_an_empty_row_group(tmp_path: Path) -> None:
    """Which is what is left of one of whose answers none is right."""
    tiny.shards(tmp_path)
    path = tmp_path / "rollouts/000.parquet"
    groups = list(open_shard(path, "rollouts").row_groups())
    with open_writer(path, "rollouts", {}, {}) as writer:
        for group in (groups[0].slice(0, 0), *groups):
            writer.write(group)
    rows = [row for group in groups for row in group.select(["prompt_ids", "response_ids"]).to_pylist()]
    assert longest(open_shard(path, "rollouts")) == max(sum(map(len, row.values())) for row in rows) > 0
