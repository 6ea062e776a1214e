"""The audit's own arithmetic, on small random models: against float64 and in bounded memory; what it can't compare."""

from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.infer import audit
from pipeline.infer.audit import LIKELY, Deltas, deltas, figures

STOP = np.array([2, 5], np.int32)


def model_of(vocab: int, tokens: int) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, max_position_embeddings=tokens, initializer_range=0.5, **shape)
    ).eval()


def table(logp: np.ndarray, ids: list[list[int]], candidates: list[list[float]]) -> pa.Table:
    """Rows of a scores shard, as far as an audit reads them."""
    lists = {"cand_id": pa.array(ids, pa.list_(pa.int32())), "cand_logp": pa.array(candidates, pa.list_(pa.float32()))}
    return pa.table({"logp": pa.array(logp, pa.float32()), **lists})


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_deltas_are_those_of_one_softmax_over_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, rng = 40, np.random.default_rng(0)
    model, prompt, response = (
        model_of(vocab, 64),
        np.array([3, 4], np.int32),
        rng.integers(0, vocab, 7).astype(np.int32),
    )
    monkeypatch.setattr(audit, "CHUNK_BYTES", rows * 8 * vocab)
    with torch.no_grad():
        all_ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logits = model(input_ids=all_ids).logits[0, 1:].double().numpy()
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    right = np.append(logp[np.arange(7), response], np.logaddexp(*logp[-1, STOP]))
    ids = [rng.choice(vocab, n, replace=False).tolist() for n in (3, 0, 5, 1, 0, 2, 4, 2)]
    off = [[0.01 * (i + 1) for i in range(len(row))] for row in ids]
    stored = [[logp[at, i] + d for i, d in zip(*two, strict=True)] for at, two in enumerate(zip(ids, off, strict=True))]
    found = deltas(model, prompt, response, STOP, table(right + 0.25, ids, stored))
    np.testing.assert_allclose(found.realised, 0.25, atol=1e-5)
    compared = np.concatenate(stored) > LIKELY
    np.testing.assert_allclose(found.candidates, np.concatenate(off)[compared], atol=1e-5)
    assert 3 < len(found.candidates) < 17
    # What is no number is compared too, and isn't hidden by what is.
    for wrong in (table(right * np.nan, ids, stored), table(right, ids, [[np.nan] * len(row) for row in ids])):
        told = figures([found, deltas(model, prompt, response, STOP, wrong)], "float32")
        assert np.isnan(told["audit_max_delta"]) and np.isnan(told["audit_mean_delta"])
    assert figures([Deltas(np.zeros(0), np.zeros(0))], "float32")["audit_mean_delta"] == 0


def test_memory_does_not_grow_with_copies_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model's own logits, 41 MB of float32 here: it took two more copies in float64."""
    vocab, tokens = 20_000, 512
    monkeypatch.setattr(audit, "CHUNK_BYTES", 16 * 8 * vocab)
    model, response = model_of(vocab, 1024), np.arange(tokens, dtype=np.int32)
    rows = table(np.zeros(tokens + 1), [[1]] * (tokens + 1), [[-1.0]] * (tokens + 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        deltas(model, response[:5], response, STOP, rows)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert 4 * vocab * tokens < peak < 1.5 * 4 * vocab * tokens
