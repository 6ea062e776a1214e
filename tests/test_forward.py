"""Forward passes, scoring and sampling against small random models of `transformers`, one plain forward at a time."""

import copy
import math
from collections.abc import Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.infer import score as score_module
from pipeline.infer.forward import batches, check_head, common_start, halving, head, pad, top_k
from pipeline.infer.room import RoomyLayer, make_room
from pipeline.infer.sample import Response, _draw, sample, seed_of
from pipeline.infer.score import Candidates, Scores, hidden_rows, score
from pipeline.models import ModelRef, load_model
from schemas.errors import OpdError

VOCAB = 1300  # 20 groups of 64 and 20 ids more: top_k's prefilter serves k <= 9
STOP = np.arange(7, VOCAB, 13)  # many, so that random models do stop now and then
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.35,  # peaked next-token distributions, as real models have
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "gemma3 window 5": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, **LAYERS, sliding_window=5)),
    "gemma3 window 100": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, **LAYERS, sliding_window=100)),
    "gemma2 cap 3": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **LAYERS, sliding_window=5, final_logit_softcapping=3.0)),
    # Absolute positions: rotary models can't tell when all of a row's positions are off by the same number.
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.35),
    ),
}


@cache
def model_of(name: str) -> Any:
    """A random float32 model; the two Gemma 3 share their weights."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False)


def next_logps(model: Any, ids: np.ndarray) -> np.ndarray:
    """float64 (len(ids), vocab): one sequence alone, no padding, no cache, the model's own head."""
    return next_logits(model, ids).log_softmax(-1).numpy()


def next_logits(model: Any, ids: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))[None], use_cache=False).logits[0].double()


def log_sum_exp(x: np.ndarray) -> float:
    return float(np.logaddexp.reduce(x))


def random_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(1, VOCAB, length).astype(np.int32)


# ---- pieces ----


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 4),
    st.integers(1, 700),
    st.sampled_from([1, 3, 16, 64]),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_top_k_is_topk(rows: int, vocab: int, group: int, k: int, seed: int) -> None:
    rng, k = np.random.default_rng(seed), min(k, vocab)
    values = rng.integers(-9, 9, (rows, vocab)).astype(np.float32)  # ties everywhere
    values[rng.random((rows, vocab)) < 0.1] = -np.inf
    logits = torch.from_numpy(values)
    found, index = top_k(logits, k, group)
    assert torch.equal(found, logits.topk(k, dim=-1).values)
    assert torch.equal(logits.gather(1, index), found)
    assert all(len(set(row)) == k for row in index.tolist())


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 300))
def test_batches_cover_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = [batch.tolist() for batch in batches(lengths, budget)]
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    widths = [max([1, *(lengths[i] for i in batch)]) for batch in found]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(found, widths, strict=True):
        assert len(batch) == 1 or len(batch) * width <= budget
    for batch, width in zip(found[:-1], widths, strict=False):
        assert (len(batch) + 1) * width > budget  # one row more wouldn't have fit


def test_a_long_shared_start_has_fewer_rows_go_on_from_it() -> None:
    """Its keys and values are copied for each row: 10 of 10 tokens fill a batch of 100, 4 after 190 have 8 times as many."""
    assert [len(batch) for batch in batches([10] * 10, 100)] == [10]
    assert [len(batch) for batch in batches([10] * 10, 100, 70)] == [10]
    assert [len(batch) for batch in batches([10] * 10, 100, 190)] == [4, 4, 2]
    assert [len(batch) for batch in batches([10] * 3, 100, 9000)] == [1, 1, 1]


@given(st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=5), st.booleans())
def test_pad_and_common_start(rows: list[list[int]], left: bool) -> None:
    arrays = [np.array(row, np.int64) for row in rows]
    ids, mask = pad(arrays, left)
    for row, padded, real in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        spare = [0] * (max(map(len, rows)) - len(row))
        assert padded == (spare + row if left else row + spare)
        assert real == (spare + [1] * len(row) if left else [1] * len(row) + spare)
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    assert common_start(arrays) == len(list(same))


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_models_own_logits(name: str) -> None:
    model, ids = model_of(name), torch.arange(3, 40)[None]
    check_head(model, name)
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(head(model, model.base_model(input_ids=ids).last_hidden_state), logits)
    assert logits.abs().max() > 2.5  # where a cap of 3 bends them


@pytest.fixture
def squashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama does to its logits what no model does."""
    plain = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.sin()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


@pytest.mark.usefixtures("squashed")
def test_check_head_refuses_logits_that_are_changed_otherwise() -> None:
    with pytest.raises(OpdError, match=r"llama-tiny.*LlamaForCausalLM"):
        check_head(model_of("llama"), "llama-tiny")


def test_a_model_that_is_its_own_body_is_refused() -> None:
    """Llama 4's text model calls its body otherwise than its class says."""
    shape = SHAPE | {"num_hidden_layers": 1, "intermediate_size_mlp": 48, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**shape))
    with pytest.raises(OpdError, match=r"model scout: Llama4ForCausalLM can't be run without its head"):
        check_head(model, "scout")


@pytest.mark.parametrize("name", MODELS)
def test_the_head_without_the_layers(name: str, tmp_path: Path) -> None:
    whole = model_of(name)
    whole.save_pretrained(tmp_path)
    bare = load_model(reference_to(tmp_path), "float32", layers=False, device="cpu")
    assert len(list(bare.parameters())) < len(list(whole.parameters()))
    check_head(bare, name)
    hidden = torch.randn(5, 32)
    assert torch.equal(head(bare, hidden), head(whole, hidden))


def test_changed_logits_are_refused_without_the_layers_too(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model_of("llama").save_pretrained(tmp_path)
    bare = load_model(reference_to(tmp_path), "float32", layers=False, device="cpu")
    check_head(bare, "llama-tiny")
    request.getfixturevalue("squashed")
    with pytest.raises(OpdError, match=r"llama-tiny.*LlamaForCausalLM"):
        check_head(bare, "llama-tiny")


def reference_to(folder: Path) -> ModelRef:
    return ModelRef(source="tiny", path=str(folder), weights="", tokenizer="")


# ---- scoring ----


def scored(
    model: Any,
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    stop: np.ndarray,
    mass: float,
    k_max: int,
    batch_tokens: int,
    requested: list[np.ndarray] | None = None,
    advance: Any = lambda _: None,
) -> Scores:
    """`score` on a `transformers` model."""
    rows = hidden_rows(model, prompts, responses, batch_tokens)
    return score(rows, partial(head, model), responses, stop, Candidates(mass, k_max, 0.0, requested), advance)


def naive_scores(
    model: Any,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    mass: float,
    k_max: int,
    requested: Sequence[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Every row of `score`, from whole forwards and sums over the whole vocabulary in float64."""
    rows = []
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = next_logits(model, np.concatenate([prompt, response]))[len(prompt) - 1 :].numpy()
        for at, (row, realised) in enumerate(zip(logits, [*response.tolist(), None], strict=True)):
            log_z = log_sum_exp(row)
            logp = row - log_z
            p, stop = np.exp(logp), log_sum_exp(logp[STOP])
            held, kept = math.exp(stop), []
            for i in sorted(set(range(VOCAB)) - set(STOP.tolist()), key=lambda i: -logp[i]):
                if held >= mass or len(kept) == k_max:
                    break
                kept.append(i)
                held += p[i]
            extra = [] if requested is None else requested[index][at].tolist()
            kept += [i for i in extra if i not in {-1, *STOP.tolist(), *kept}]
            rest = np.setdiff1d(np.arange(VOCAB), [*STOP, *kept])
            rows.append(
                {
                    "logp": stop if realised is None else logp[realised],
                    "entropy": -(p * logp).sum(),
                    "stop_logp": stop,
                    "log_z": log_z,
                    "tail": p[rest].sum(),
                    "cand_id": kept,
                    "cand_logp": logp[kept],
                    "all": logp,
                }
            )
    return rows


def assert_scores(scores: Scores, expected: Sequence[dict[str, Any]]) -> None:
    for name in ("logp", "entropy", "stop_logp", "log_z"):
        np.testing.assert_allclose(getattr(scores, name), [row[name] for row in expected], atol=1e-5, rtol=1e-5)
    # Mass, not its log: what rounding leaves of 1 has no digits of its own.
    np.testing.assert_allclose(np.exp(scores.tail_logp), [row["tail"] for row in expected], atol=2e-6)
    assert scores.cand_count.tolist() == [len(row["cand_id"]) for row in expected]
    np.testing.assert_allclose(scores.cand_logp, np.concatenate([row["cand_logp"] for row in expected]), atol=1e-5)
    bounds = np.cumsum(scores.cand_count)[:-1]
    # The ids that the reference ranks there, or others as likely: rounding decides between those, machine by machine.
    for ids, row in zip(np.split(scores.cand_id, bounds), expected, strict=True):
        np.testing.assert_allclose(row["all"][ids], row["cand_logp"], atol=1e-5)
        assert len(set(ids.tolist())) == len(ids)
    for cand, stop, tail in zip(np.split(scores.cand_logp, bounds), scores.stop_logp, scores.tail_logp, strict=True):
        assert np.exp(cand.astype(np.float64)).sum() + math.exp(stop) + math.exp(tail) == pytest.approx(1, abs=1e-6)


def rows_with(rng: np.random.Generator, shared: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts with so many ids in common, and responses of several lengths, two of them empty, one with a stop id."""
    start = random_ids(rng, shared)
    prompts = [
        np.concatenate([start, [10 + i], random_ids(rng, n)]).astype(np.int32) for i, n in enumerate((3, 0, 6, 1, 9))
    ]
    responses = [random_ids(rng, n) for n in (4, 0, 9, 0, 1)]
    responses[2][3] = STOP[1]
    return prompts, responses


@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
@pytest.mark.parametrize("shared", [0, 3, 17])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:.past_key_values")  # a name that transformers drops in 5.40
def test_score_is_the_naive_forward(name: str, shared: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    prompts, responses = rows_with(np.random.default_rng(shared), shared)
    assert common_start(prompts) == shared
    monkeypatch.setattr(score_module, "CHUNK_BYTES", 4 * VOCAB * 4)  # four rows of logits at once
    advanced: list[int] = []
    scores = scored(model, prompts, responses, STOP, 0.9, 8, batch_tokens, None, advanced.append)
    assert_scores(scores, naive_scores(model, prompts, responses, 0.9, 8))
    assert sum(advanced) == sum(map(len, responses))


@pytest.mark.parametrize(("mass", "k_max"), [(1.0, 1), (0.3, 9), (0.7, 200), (0.999, 900)])
def test_candidates_stop_at_mass_or_k_max(mass: float, k_max: int) -> None:
    model, rng = model_of("gemma3 window 5"), np.random.default_rng(2)
    prompts, responses = rows_with(rng, 4)
    scores = scored(model, prompts, responses, STOP, mass, k_max, 64)
    assert_scores(scores, naive_scores(model, prompts, responses, mass, k_max))
    assert not set(scores.cand_id.tolist()) & set(STOP.tolist())
    assert scores.cand_count.max() <= k_max


def test_whole_vocabulary_leaves_no_tail() -> None:
    model, prompt = model_of("llama"), random_ids(np.random.default_rng(10), 6)
    scores = scored(model, [prompt], [random_ids(np.random.default_rng(11), 5)], STOP, 1.0, VOCAB, 64)
    # float32 probabilities may add up to 1 before the last ones, of 1e-8 and less, are reached.
    assert (scores.cand_count > 0.95 * (VOCAB - len(STOP))).all()
    assert (np.exp(scores.tail_logp) < 1e-6).all()


def test_likely_stop_leaves_no_candidates() -> None:
    model = model_of("llama")
    prompt = random_ids(np.random.default_rng(3), 6)
    likely = np.argsort(-next_logps(model, prompt)[-1])[:30]
    held = math.exp(log_sum_exp(next_logps(model, prompt)[-1][likely]))
    scores = scored(model, [prompt], [np.zeros(0, np.int32)], likely, held - 1e-3, 9, 64)
    assert scores.cand_count.tolist() == [0]
    assert math.exp(scores.tail_logp[0]) == pytest.approx(1 - held, abs=1e-6)


def test_identical_prompts_and_one_prompt() -> None:
    """The cached prefix leaves every row a token of its own, also when the prompts have nothing else."""
    model, rng = model_of("gemma3 window 5"), np.random.default_rng(4)
    prompt, responses = random_ids(rng, 12), [random_ids(rng, n) for n in (3, 0, 5)]
    assert_scores(
        scored(model, [prompt] * 3, responses, STOP, 0.9, 8, 30), naive_scores(model, [prompt] * 3, responses, 0.9, 8)
    )
    assert_scores(
        scored(model, [prompt], responses[:1], STOP, 0.9, 8, 30), naive_scores(model, [prompt], responses[:1], 0.9, 8)
    )


@pytest.mark.parametrize("k_max", [0, 8])
def test_what_is_requested_is_kept_beside_the_likeliest(k_max: int) -> None:
    """`scores.support: student` (no candidates of the teacher's own) and `union`."""
    model, rng = model_of("gemma2 cap 3"), np.random.default_rng(6)
    prompts, responses = rows_with(rng, 3)
    requested = [np.stack([rng.choice(VOCAB, 5, replace=False) for _ in range(len(r) + 1)]) for r in responses]
    for row in requested:
        row[rng.random(row.shape) < 0.3] = -1
    requested[2][1] = np.argsort(-next_logps(model, np.concatenate([prompts[2], responses[2][:1]]))[-1])[
        [0, 1, 20, 40, 60]
    ]
    requested[0][0] = [STOP[0], STOP[1], 1, 0, -1]
    result = scored(model, prompts, responses, STOP, 0.9, k_max, 64, requested)
    assert_scores(result, naive_scores(model, prompts, responses, 0.9, k_max, requested))


def test_unlikely_candidates_are_not_kept() -> None:
    model, rng = model_of("llama"), np.random.default_rng(7)
    prompts, responses = rows_with(rng, 3)
    rows = hidden_rows(model, prompts, responses, 64)
    every, floor = scored(model, prompts, responses, STOP, 0.99, 50, 64), 0.01
    found = score(rows, partial(head, model), responses, STOP, Candidates(0.99, 50, floor))
    keep = np.exp(every.cand_logp.astype(np.float64)) >= floor
    assert 0.1 < keep.mean() < 0.9
    np.testing.assert_array_equal(found.cand_id, every.cand_id[keep])
    sums = [np.exp(a.cand_logp.astype(np.float64)).sum() + np.exp(a.tail_logp).sum() for a in (every, found)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)


def test_out_of_memory_halves_what_is_left_and_goes_on() -> None:
    model, rng = model_of("llama"), np.random.default_rng(8)
    prompts, responses = rows_with(rng, 3)
    sizes: list[int] = []

    def full(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    hook = model.base_model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        rows = hidden_rows(model, prompts, responses, 10_000, said.append)
        result = score(rows, partial(head, model), responses, STOP, Candidates(0.9, 8))
    finally:
        hook.remove()
    assert_scores(result, naive_scores(model, prompts, responses, 0.9, 8))
    assert sizes == [1, 5, 3, 2, 1, 1, 1] and len(said) == 2 and "half as many" in said[0]


def test_out_of_memory_in_the_head_halves_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = model_of("llama"), np.random.default_rng(8)
    prompts, responses = rows_with(rng, 3)
    monkeypatch.setattr(score_module, "CHUNK_BYTES", 4 * VOCAB * 8)  # eight rows of logits at once
    sizes: list[int] = []

    def full(most: int) -> Any:
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return head(model, hidden)

        return logits

    said: list[str] = []
    rows = list(hidden_rows(model, prompts, responses, 10_000))
    result = score(rows, full(4), responses, STOP, Candidates(0.9, 8), say=said.append)
    assert_scores(result, naive_scores(model, prompts, responses, 0.9, 8))
    assert sizes == [1, 7, 4, 3, 3, 3, 3, 3] and "memory with 7 rows of logits at once" in said[0]
    with pytest.raises(OpdError, match=r"single token.*scores\.batch_tokens"):
        score(rows, full(0), responses, STOP, Candidates(0.9, 8))


def test_halving_gives_up_on_one_row_and_passes_other_errors_on() -> None:
    def fails(error: Exception) -> Any:
        def work(rows: np.ndarray) -> None:
            raise error

        return work

    with pytest.raises(OpdError, match="single response"):
        list(halving([np.arange(4)], fails(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))))
    with pytest.raises(RuntimeError, match="shape"):
        list(halving([np.arange(4)], fails(RuntimeError("shape mismatch"))))


def test_sampling_records_the_likeliest_ids() -> None:
    model = model_of("llama")
    prompt = random_ids(np.random.default_rng(12), 6)
    (response,) = sample(model, [prompt], [3], STOP, 6, top_k=7)
    logps = next_logps(model, np.concatenate([prompt, response.ids]))[len(prompt) - 1 : -1]
    assert response.top_id.tolist() == np.argsort(-logps, axis=1, kind="stable")[:, :7].tolist()


def test_the_window_matters_here() -> None:
    """Were it ignored, the tests with a small window would prove nothing."""
    ids = random_ids(np.random.default_rng(5), 30)
    narrow, wide = (next_logps(model_of(f"gemma3 window {w}"), ids) for w in (5, 100))
    np.testing.assert_allclose(narrow[:5], wide[:5], atol=1e-4)
    assert np.abs(narrow[8:] - wide[8:]).max() > 0.1


# ---- sampling ----


def sampler_reference(logp: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Tempered, cut to the smallest set of the likeliest tokens that holds top_p, renormalised. (vocab,) -> (vocab,)."""
    p = np.exp(logp / temperature)
    p /= p.sum()
    out, held = np.zeros_like(p), 0.0
    for i in np.argsort(-p):
        if held >= top_p:
            break
        out[i] = p[i]
        held += p[i]
    with np.errstate(divide="ignore"):
        return np.log(out / out.sum())


def assert_well_formed(response: Response, steps: int) -> None:
    halts = np.isin(response.ids, STOP)
    assert not halts[:-1].any()
    assert response.stopped == halts[-1]
    assert len(response.ids) == steps or response.stopped
    assert len(response.ids) == len(response.behavior_logp) == len(response.sampler_logp) <= steps


def assert_logps(model: Any, prompt: np.ndarray, response: Response, temperature: float, top_p: float) -> None:
    """Behaviour and sampler log-probs are those of a forward over what was drawn; a stop is the whole stop set."""
    logps = next_logps(model, np.concatenate([prompt, response.ids]))[len(prompt) - 1 : -1]
    for i, (token, logp) in enumerate(zip(response.ids, logps, strict=True)):
        event = STOP if token in STOP else [token]
        sampler = sampler_reference(logp, temperature, top_p)
        assert response.behavior_logp[i] == pytest.approx(log_sum_exp(logp[event]), abs=2e-5)
        assert response.sampler_logp[i] == pytest.approx(log_sum_exp(sampler[event]), abs=2e-4)


PROMPT_LENGTHS = (9, 2, 5, 14, 1, 7, 7)


def some_prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(6)
    return [random_ids(rng, n) for n in PROMPT_LENGTHS]


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_those_of_a_forward_over_the_response(name: str) -> None:
    model, prompts, seeds, steps = model_of(name), some_prompts(), list(range(50, 57)), 16
    ended = set()
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.8)):
        finished: list[int] = []
        responses = sample(
            model, prompts, seeds, STOP, steps, temperature, top_p, batch_size=4, advance=finished.append
        )
        assert finished == [4, 3]
        for prompt, response in zip(prompts, responses, strict=True):
            assert_well_formed(response, steps)
            assert_logps(model, prompt, response, temperature, top_p)
            ended.add(response.stopped)
    assert ended == {True, False}


@pytest.mark.parametrize("name", ["llama", "gemma3 window 5"])
def test_same_seed_same_response_whatever_the_batch(name: str) -> None:
    model, prompts, seeds = model_of(name), some_prompts(), [seed_of("run", i) for i in range(7)]
    alone = sample(model, prompts, seeds, STOP, 12, batch_size=1)
    shuffled = np.random.default_rng(7).permutation(7)
    for order, size in ((np.arange(7), 7), (np.arange(7)[::-1], 3), (shuffled, 2)):
        again = sample(model, [prompts[i] for i in order], [seeds[i] for i in order], STOP, 12, batch_size=size)
        for i, response in zip(order, again, strict=True):
            assert response.ids.tolist() == alone[i].ids.tolist()
            np.testing.assert_allclose(response.behavior_logp, alone[i].behavior_logp, atol=2e-5)
    other = sample(model, prompts, [seed + 1 for seed in seeds], STOP, 12)
    assert [r.ids.tolist() for r in other] != [r.ids.tolist() for r in alone]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 20), st.lists(st.integers(0, 2), min_size=1, max_size=4)), min_size=1, max_size=12
    )
)
def test_keys_and_values_with_room_are_those_put_together_anew(done: list[int | list[int]]) -> None:
    """Numbers are new positions, lists the rows that are kept of them; now and then another one replaces what is kept."""
    generator = torch.Generator().manual_seed(len(done))
    usual, rows = DynamicCache(), 3

    def grow(kept: DynamicCache, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kept.update(states, states + 1, 0)

    first = torch.randn(rows, 2, 4, 5, generator=generator)
    grow(usual, first)
    roomy = copy.deepcopy(usual)
    make_room(roomy)
    assert type(roomy.layers[0]) is RoomyLayer
    for at, step in enumerate(done):
        if isinstance(step, int):
            new = torch.randn(rows, 2, step, 5, generator=generator)
            expected, found = grow(usual, new), grow(roomy, new)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        else:
            chosen = torch.tensor(step) % rows
            for kept in (usual, roomy):
                (kept.reorder_cache if at % 3 == 0 else kept.batch_select_indices)(chosen)
            rows = len(step)
        layer, same = roomy.layers[0], usual.layers[0]
        assert torch.equal(layer.keys, same.keys) and torch.equal(layer.values, same.values)
        assert layer.get_seq_length() == same.get_seq_length() and layer.get_mask_sizes(1) == same.get_mask_sizes(1)


def test_new_positions_move_the_earlier_ones_now_and_then() -> None:
    kept = DynamicCache()
    kept.update(torch.zeros(2, 1, 400, 8), torch.zeros(2, 1, 400, 8), 0)
    make_room(kept)
    places = set()
    for _ in range(200):
        keys, values = kept.update(torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 8), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert keys.shape == (2, 1, 600, 8) and len(places) <= 5
    assert keys.untyped_storage().nbytes() <= 1.15 * keys.numel() * 4


def test_a_shorter_horizon_samples_the_beginning_of_the_same_responses() -> None:
    model, prompts, seeds = model_of("llama"), some_prompts(), [seed_of("run", i) for i in range(7)]
    whole = sample(model, prompts, seeds, STOP, 12)
    assert max(len(response.ids) for response in whole) == 12
    for short, long in zip(sample(model, prompts, seeds, STOP, 5), whole, strict=True):
        assert short.ids.tolist() == long.ids[:5].tolist()
        assert short.stopped == (long.stopped and len(long.ids) <= 5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:.past_key_values")  # a name that transformers drops in 5.40
def test_temperature_zero_is_greedy_generate(name: str) -> None:
    model, prompts = model_of(name), some_prompts()

    def generate(prompt: np.ndarray, stop: list[int]) -> list[int]:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        rules = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": stop or None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **rules)[0, len(prompt) :].tolist()

    free = [generate(prompt, []) for prompt in prompts]
    stop = [free[0][4], free[2][0], free[3][7]]  # so that some stop on the way
    responses = sample(model, prompts, [0] * len(prompts), np.array(stop), 12, temperature=0.0, batch_size=3)
    assert sum(response.stopped for response in responses) >= 2
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.ids.tolist() == generate(prompt, stop)
        assert response.stopped == (response.ids[-1] in stop)
        assert not response.sampler_logp.any()


def assert_drawn_from(counts: np.ndarray, p: np.ndarray) -> None:
    """Pearson's chi-square within five standard deviations; classes that expect fewer than 5 are one class."""
    assert not counts[p == 0].any()
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom >= 5
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 1.0), (1.0, 0.7), (1.5, 0.5)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    model, prompt, n = model_of("llama"), random_ids(np.random.default_rng(8), 5), 6000
    responses = sample(model, [prompt] * n, list(range(n)), STOP, 1, temperature, top_p, batch_size=1000)
    counts = np.bincount([int(r.ids[0]) for r in responses], minlength=VOCAB)
    assert_drawn_from(counts, np.exp(sampler_reference(next_logps(model, prompt)[-1], temperature, top_p)))


def test_steps_draw_independently() -> None:
    """First and second token together: by quarters of the ids, 16 pairs, and one class for a stop at once."""
    model, prompt, n = model_of("llama"), random_ids(np.random.default_rng(9), 5), 4000
    quarter = np.arange(VOCAB) * 4 // VOCAB
    first = np.exp(next_logps(model, prompt)[-1])
    follow = torch.from_numpy(np.stack([np.append(prompt, i) for i in range(VOCAB)]).astype(np.int64))
    second = model(input_ids=follow).logits[:, -1].double().softmax(-1).numpy()
    p, live = np.zeros(17), ~np.isin(np.arange(VOCAB), STOP)
    np.add.at(p, 4 * quarter[:, None] + quarter, np.where(live, first, 0)[:, None] * second)
    p[16] = first[STOP].sum()
    responses = sample(model, [prompt] * n, list(range(n)), STOP, 2, batch_size=1000)
    classes = [4 * quarter[r.ids[0]] + quarter[r.ids[1]] if len(r.ids) == 2 else 16 for r in responses]
    assert_drawn_from(np.bincount(classes, minlength=17), p)


@pytest.mark.parametrize("scales", [(4.0, 8.0), (4.0, 0.01)])
def test_a_nucleus_of_a_large_vocabulary(scales: tuple[float, float]) -> None:
    """Of tens of tokens, for which not all are sorted, and of nearly all of them, beside a small one."""
    rng = np.random.default_rng(4)
    logits = np.outer(np.repeat(scales, 3), np.ones(3000)) * rng.normal(size=(6, 3000))
    logp = torch.from_numpy(logits).float().log_softmax(-1)
    _, sampler = _draw(logp, torch.full((6,), 0.5, dtype=torch.float64), 1.0, 0.9)
    expected = np.stack([sampler_reference(row, 1.0, 0.9) for row in logp.double().numpy()])
    sizes = np.isfinite(expected).sum(1)
    assert sizes[:3].max() < 128 and (sizes[3:].min() > 2000) == (scales[1] == 0.01)
    # Where float32 and float64 sums meet the border at different tokens, one more or less is kept.
    assert np.abs(np.isfinite(sampler.numpy()).sum(1) - sizes).max() <= 1
    both = np.isfinite(expected) & np.isfinite(sampler.numpy())
    np.testing.assert_allclose(sampler.numpy()[both], expected[both], atol=1e-3)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_outermost_uniforms_draw_tokens_that_have_mass(uniform: float, top_p: float) -> None:
    logp = torch.from_numpy(np.random.default_rng(12).normal(size=(200, 50))).float()
    logp[:, [0, -1]] = -torch.inf
    token, sampler = _draw(logp.log_softmax(-1), torch.full((200,), uniform, dtype=torch.float64), 1.0, top_p)
    assert (sampler.gather(1, token[:, None]) > -torch.inf).all()


def test_sampling_leaves_out_the_kernel_that_plans_for_each_length() -> None:
    model, seen = model_of("llama"), []
    hook = model.base_model.register_forward_pre_hook(
        lambda *_: seen.append(
            (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())  # of CPUs too
        )
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        sample(model, [np.array([3, 4])], [1], STOP, 2)
    finally:
        hook.remove()
    assert set(seen) == {(False, True)} and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_seeds_depend_on_every_part() -> None:
    parts = [("a", 1), ("a", 2), ("b", 1), ("a1",), ("a", 1, 0)]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**64 for p in parts)
    assert seed_of("a", 1) == 6966089651946105093  # the same on every machine
