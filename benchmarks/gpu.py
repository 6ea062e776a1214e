"""Scoring, sampling and training at size on a GPU, with random weights: `python benchmarks/gpu.py [--json PATH]`.

Models of Qwen3's 8B and 1.7B shapes (152k ids) in bfloat16, made on the device: nothing is downloaded. Every rate has its
roofline: a square bfloat16 matmul, measured first, over the operations that the tokens need (weights and causal attention); of
sampling the bytes of weights and of keys and values that a step reads, over a copy's rate. Responses are random tokens, prompts
share their first half, as a chat template gives them. `--tiny` runs all of it at toy sizes, on a CPU in a minute.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import head as head_benchmark
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.infer.forward import head
from pipeline.infer.sample import sample
from pipeline.infer.score import Candidates, hidden_rows, score
from schemas.config import Hybrid, Train
from train.optimiser import MasterAdamW
from train.policy import unit_logps
from train.recipes import losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 151_936
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B, 2 layers": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    },
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
STOP = np.array([1, 106])
PROMPT = 128
K = 64


def model_of(name: str, tiny: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Random weights, on the device."""
    torch.manual_seed(0)
    more = (
        {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048}
        if tiny
        else {"num_key_value_heads": 8, "head_dim": 128}
    )
    config = Qwen3Config(
        **{"vocab_size": VOCAB, **(TINY if tiny else SHAPES[name]), **more},
        max_position_embeddings=40960,
        tie_word_embeddings=name == "1.7B",
        initializer_range=0.02,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, peak GB on the device (0 on a CPU), and what `work` gives."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - began
    return taken, torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0, result


def best(work: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds of the fastest of several, once warm."""
    work()
    return min(timed(work)[0] for _ in range(rounds))


def rooflines(tiny: bool) -> dict[str, float]:
    """Operations a second of a square bfloat16 matmul, bytes a second of a copy (read and written)."""
    side = 512 if tiny else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    flops = 10 * 2 * side**3 / best(lambda: [a @ b for _ in range(10)])
    bulk = torch.empty((1 << 24) if tiny else (1 << 32), dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(bulk)
    return {"flops": flops, "bytes": 2 * bulk.nbytes / best(lambda: into.copy_(bulk))}


def operations(model: Any, lengths: list[int], passes: int = 1) -> float:
    """Of forward passes over sequences: two for each weight that multiplies, and causal attention's two products."""
    config = model.config
    weights = sum(p.numel() for n, p in model.base_model.named_parameters() if p.ndim == 2 and "embed" not in n)
    weights += model.get_output_embeddings().weight.numel()
    wide = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return passes * sum(2 * weights * n + 2 * wide * n**2 for n in lengths)


def texts(count: int, length: int, vocab: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts, the first half of each the same, and responses."""
    rng = np.random.default_rng(0)
    first = rng.integers(200, vocab, PROMPT // 2)
    prompts = [np.concatenate([first, rng.integers(200, vocab, PROMPT // 2)]) for _ in range(count)]
    return prompts, [rng.integers(200, vocab, length) for _ in range(count)]


def scored(model: Any, prompts: list[np.ndarray], responses: list[np.ndarray], batch_tokens: int) -> Any:
    """The scoring stage's own path: log-prob, entropy, stop, tail and K candidates of each token."""
    rows = hidden_rows(model, prompts, responses, batch_tokens, print)
    return score(rows, partial(head, model), responses, STOP, Candidates(mass=1.0, k_max=K))


@torch.inference_mode()
def naive(model: Any, prompts: list[np.ndarray], responses: list[np.ndarray]) -> list[torch.Tensor]:
    """The same as one would write it: one sequence after another, float32 `log_softmax` of all logits, `topk`."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None].to(DEVICE)
        logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logps.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
        logps[:, STOP] = -torch.inf
        (logps.exp() * logps).nan_to_num_().sum(-1).cpu(), [x.cpu() for x in logps.topk(K)]
    return found


def kernels(work: Callable[[], Any]) -> list[str]:
    """Names of the attention kernels that ran: on a GPU what was launched, on a CPU the operator."""
    with profile(activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]) as seen:
        work()
    names = {event.key for event in seen.key_averages()}
    words = ("flash", "fmha", "attention", "cudnn_generated", "sdpa")
    return sorted(n[:120] for n in names if any(w in n.lower() for w in words))


def equality(tiny: bool) -> dict[str, Any]:
    """Scores against a plain float32 forward pass of the same weights, at the teacher's width and vocabulary."""
    model = model_of("8B, 2 layers", tiny, torch.float32)
    prompts, responses = texts(3, 60 if tiny else 700, model.config.vocab_size)
    expected = torch.cat(naive(model, prompts, responses)).double().numpy()
    ends = np.cumsum([len(r) + 1 for r in responses]) - 1
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours = np.delete(scored(model.to(dtype), prompts, responses, 8192).logp, ends)
        plain = torch.cat(naive(model, prompts, responses)).double().numpy()
        name = str(dtype).removeprefix("torch.")
        for what, logps in (("ours", ours), ("plain", plain)):
            off = np.abs(logps - expected)
            found |= {f"{name} {what} max": float(off.max()), f"{name} {what} mean": float(off.mean())}
        found[f"{name} ours to plain mean"] = float(np.abs(ours - plain).mean())
    return found | {"mean logp": float(expected.mean())}


def scoring(tiny: bool, roof: dict[str, float], budget: int) -> dict[str, Any]:
    """The 8B teacher: rates by length; naive beside ours where it fits."""
    model = model_of("8B", tiny)
    vocab = model.config.vocab_size
    found: dict[str, Any] = {}
    prompts, responses = texts(2, 40, vocab)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    scored(model, prompts, responses, budget)
    found["kernels after a shared prefix"] = kernels(lambda: scored(model, prompts, responses, budget))
    for count, length in ((4, 64), (2, 128)) if tiny else ((256, 256), (16, 4096), (2, 32_640)):
        prompts, responses = texts(count, length, vocab)
        ours = partial(scored, batch_tokens=budget)
        found[f"{count} x {length}"] = rate(ours, model, prompts, responses, roof)
        if length < 5000:
            some = prompts[: max(1, count // 8)], responses[: max(1, count // 8)]
            found[f"{len(some[0])} x {length} naive"] = rate(naive, model, *some, roof)
        print(json.dumps(found), flush=True)
    return found


def rate(
    way: Callable[..., Any], model: Any, prompts: list[np.ndarray], responses: list[np.ndarray], roof: dict[str, float]
) -> dict[str, float]:
    """Response tokens a second, share of the matmul's rate, peak memory."""
    seconds, peak, _ = timed(lambda: way(model, prompts, responses))
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    return {
        "seconds": seconds,
        "tokens/s": sum(map(len, responses)) / seconds,
        "of matmul": operations(model, lengths) / seconds / roof["flops"],
        "peak GB": peak,
    }


def sampling(tiny: bool, roof: dict[str, float]) -> dict[str, Any]:
    """The 1.7B student, many responses at once."""
    model = model_of("1.7B", tiny)
    found: dict[str, Any] = {}
    # Random weights stop once in 76k tokens: nearly all responses have all their tokens.
    for count, steps in ((4, 8),) if tiny else ((128, 256), (512, 256)):
        prompts, _ = texts(count, 1, model.config.vocab_size)
        sample(model, prompts[:2], [1, 2], STOP, 4)
        work = partial(sample, model, prompts, list(range(count)), STOP, steps, batch_size=count, top_k=20)
        seconds, peak, out = timed(work)
        config, tokens = model.config, sum(len(r.ids) for r in out)
        kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = steps * (2 * sum(p.numel() for p in model.parameters()) + count * kept * (PROMPT + steps / 2))
        found[f"{count} x {steps}"] = {
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "ms a step": 1000 * seconds / steps,
            "of bandwidth": read / seconds / roof["bytes"],
            "peak GB": peak,
        }
        print(json.dumps(found), flush=True)
    return found


def training(tiny: bool, roof: dict[str, float]) -> dict[str, Any]:
    """The 1.7B student: forward, loss, backward of micro-batches of one response, then an optimiser step."""
    model = model_of("1.7B", tiny).train().requires_grad_(True)
    stop = torch.from_numpy(STOP).to(DEVICE)
    found: dict[str, Any] = {}
    optimiser = MasterAdamW(model, Train())
    for count, length in ((2, 32),) if tiny else ((16, 256), (4, 1024), (1, 4096)):
        batch = head_benchmark.batch_of(count * length, length, model.config.vocab_size).to(DEVICE)

        def passes(batch: Any = batch) -> float:
            found = unit_logps(model, batch, stop)
            loss = (batch.weight * losses(found, batch, Hybrid()).loss).sum() / len(batch.unit_row)
            loss.backward()
            return float(loss.detach())

        passes()
        optimiser.step(1e-6)  # its state is there from here on
        seconds, peak, loss = min(timed(passes) for _ in range(3))
        update, update_peak, norm = timed(lambda: optimiser.step(1e-6))
        found[f"{count} x {length}"] = {
            "seconds": seconds,
            "tokens/s": count * length / seconds,
            # Backward is twice the forward pass; the head's logits are made twice.
            "of matmul": operations(model, [length] * count, 3) / seconds / roof["flops"],
            "peak GB": peak,
            "update seconds": update,
            "update peak GB": update_peak,
            "loss": loss,
            "norm": norm,
        }
        print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure and print; a part that fails is told and the rest goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="padded tokens of a forward pass")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    roof = rooflines(options.tiny)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "roofline": roof}
    parts: dict[str, Callable[[], Any]] = {
        "equality": partial(equality, options.tiny),
        "scoring": partial(scoring, options.tiny, roof, options.batch_tokens),
        "sampling": partial(sampling, options.tiny, roof),
        "training": partial(training, options.tiny, roof),
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # the others' figures are worth having
            found[name] = f"{type(error).__name__}: {error}"
        print(name, json.dumps(found[name], indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
