"""Scoring and sampling give what the model itself does, whatever its layers: tiny random models of many architectures."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from pipeline.infer import prefix as prefix_module
from pipeline.infer.forward import check_head, head
from pipeline.infer.sample import sample
from pipeline.infer.score import hidden_rows
from pipeline.models import ModelRef, load_model
from schemas.errors import OpdError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 1300
STOP = np.arange(7, VOCAB, 5)  # many, so that responses end at different lengths
SHAPE = {
    "vocab_size": VOCAB,
    **tiny.SHAPE,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # dense
    "Llama": {},
    "Qwen3": {},
    "Phi3": {},
    "StableLm": {},
    "Olmo3": SLIDING,
    # experts
    "Mixtral": LOCAL_EXPERTS,
    "Qwen3Moe": EXPERTS,
    "Glm4Moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "GptOss": LOCAL_EXPERTS | SLIDING,
    # logits scaled or soft-capped
    "Granite": {"logits_scaling": 8.0},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 5},
    "Gemma2": {
        "final_logit_softcapping": 3.0,
        "sliding_window": 15,
    },  # longer than the start that rows share, shorter than they
    # keys and values shared between layers
    "Gemma4": {
        "sliding_window": 5,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
    },
    # recurrent layers, with attention and without
    "Qwen3_5": LINEAR,
    "Qwen3Next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 24},
    "GraniteMoeHybrid": MAMBA | LOCAL_EXPERTS | {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
    "NemotronH": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "attention"],
    },
    "FalconH1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Mamba": {"state_size": 8},
}
TEXT_PART = {"Gemma4", "Qwen3_5"}
"""Those whose config names the text model apart."""


@cache
def model_of(name: str) -> Any:
    """A random float32 model."""
    kind = getattr(transformers, f"{name}{'Text' if name in TEXT_PART else ''}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(kind(**SHAPE | ARCHITECTURES[name]))
    return model.eval().requires_grad_(False).to(DEVICE)


def logps_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Float64 (len(ids), vocab) of one sequence alone, by the model's own head."""
    ids = torch.from_numpy(np.asarray(ids, np.int64))[None].to(DEVICE)
    return model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1).cpu()


def prompts_and_responses() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Four prompts that share their first twelve tokens."""
    rng = np.random.default_rng(0)
    first, more = rng.integers(3, VOCAB, 12), [rng.integers(3, VOCAB, n) for n in (1, 4, 2, 6)]
    return [np.concatenate([first, rest]) for rest in more], [rng.integers(3, VOCAB, n) for n in (9, 3, 14, 0)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scoring_gives_the_models_own_logps(name: str) -> None:
    model, (prompts, responses) = model_of(name), prompts_and_responses()
    check_head(model, name)
    own, seen = model.config._attn_implementation, 0
    for batch, hidden in hidden_rows(model, prompts, responses, 60):
        for i, states in zip(batch, hidden, strict=True):
            expected = logps_of(model, np.concatenate([prompts[i], responses[i]]))[len(prompts[i]) - 1 :]
            torch.testing.assert_close(head(model, states).double().log_softmax(-1).cpu(), expected, atol=3e-5, rtol=0)
            seen += 1
    assert seen == 4 and model.config._attn_implementation == own


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampling_gives_the_models_own_logps(name: str) -> None:
    model, (prompts, _) = model_of(name), prompts_and_responses()
    # Nemotron's recurrence step by step and by chunks differ by more: by as much without us, in its own `generate`.
    near = 2e-2 if name == "NemotronH" else 5e-5
    prompts += prompts[1:]  # which are read once
    responses = sample(model, prompts, range(1, 8), STOP, 8)
    assert len({len(response.ids) for response in responses}) > 1  # rows were dropped on the way
    assert any(one.ids.tolist() != two.ids.tolist() for one, two in zip(responses[1:4], responses[4:], strict=True))
    for prompt, response in zip(prompts, responses, strict=True):
        logps = logps_of(model, np.concatenate([prompt, response.ids]))[len(prompt) - 1 : -1]
        for logp, token, found in zip(logps, response.ids, response.behavior_logp, strict=True):
            event = STOP if token in STOP else [int(token)]
            assert float(logp[event].logsumexp(0)) == pytest.approx(float(found), abs=near)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What PyTorch's attention is called with from here on: rows of queries and keys, heads, mask, causality."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(
            {
                "rows": len(query),
                "positions": (query.shape[2], key.shape[2]),
                "heads": (query.shape[1], key.shape[1]),
                "mask": options.get("attn_mask") is not None,
                "causal": options.get("is_causal"),
            }
        )
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen3Moe", "Granite"])
def test_after_a_shared_prefix_the_kernel_is_causal_and_without_a_mask(
    name: str, kernel_calls: list[dict[str, Any]]
) -> None:
    model, (prompts, responses) = model_of(name), prompts_and_responses()
    list(hidden_rows(model, prompts, responses, 1000))
    alone, together = kernel_calls[:2], kernel_calls[2:]
    assert [call["positions"] for call in alone] == [(12, 12)] * 2
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    for call in together:
        assert call == {"rows": 4, "positions": (width, width), "heads": (4, 2), "mask": False, "causal": True}


def test_a_window_that_is_shorter_keeps_its_mask(kernel_calls: list[dict[str, Any]]) -> None:
    model, (prompts, responses) = model_of("Olmo3"), prompts_and_responses()
    list(hidden_rows(model, prompts, responses, 1000))
    assert [(call["mask"], call["causal"]) for call in kernel_calls[2:]] == [(True, False), (False, True)]


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5"])
def test_a_prefix_is_shared_where_it_pays_and_the_model_can(name: str) -> None:
    model, (prompts, responses) = model_of(name), prompts_and_responses()
    widths: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        list(hidden_rows(model, prompts, responses, 1000))
        whole = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        assert widths == ([(4, whole)] if name == "Qwen3_5" else [(1, 12), (4, whole - 12)])
        widths.clear()
        # Two responses to each prompt, which is read once; the start that all have, once for all.
        sample(model, [*prompts, *prompts], range(8), STOP, 2)
        assert widths[:-1] == ([(4, 18)] if name == "Qwen3_5" else [(1, 12), (4, 6)])
        assert widths[-1][1] == 1 and widths[-1][0] > 4
        widths.clear()
        long = [
            np.resize([*response, 5], 240 - len(prompt)) for prompt, response in zip(prompts, [[3]] * 4, strict=True)
        ]
        list(hidden_rows(model, prompts, long, 1000))
        assert widths == [(4, 240)]  # 36 of 960 tokens would be saved
    finally:
        hook.remove()


def test_a_recurrent_layers_state_is_no_prefix() -> None:
    assert prefix_module.prefix_cache(model_of("Lfm2"), np.arange(3, 9)) is None


def test_attention_is_chosen_by_name(tmp_path: Any) -> None:
    model_of("Qwen3").save_pretrained(tmp_path)
    reference = ModelRef(source="tiny", path=str(tmp_path), weights="", tokenizer="")
    for name, found in ((None, "sdpa"), ("eager", "eager"), ("sdpa", "sdpa")):
        assert load_model(reference, "float32", attention=name).config._attn_implementation == found
    with pytest.raises(OpdError, match=r"tiny.*attn_implementation: flash_attention_9"):
        load_model(reference, "float32", attention="flash_attention_9")
