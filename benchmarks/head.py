"""The trainer's head, whole and in chunks: `python benchmarks/head.py`; time and memory of a loss and its gradients.

A Gemma 3 with random weights, in float32: the hidden size and vocabulary of the 270m model, one layer, so that the head is
nearly all of the work. Responses of random tokens in units of one to three, each unit with candidates and its own weight;
the loss is that of the default recipe. Whole: the logits of all response tokens at once, as one would write it first.
Each run is a process of its own; the alternatives take turns. Memory is the process' peak during one forward and backward
pass less what was there before: the weights and a gradient of theirs, as in any micro-batch but a step's first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import memory
import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from pipeline.infer.forward import head
from schemas.config import Hybrid
from schemas.tables import STOP_ID
from train.batch import Batch
from train.policy import UnitLogps, unit_logps
from train.recipes import losses

VOCAB, WIDTH = 262_144, 640
LENGTH = 256
"""Tokens of a response; its prompt is one token."""
SLOTS = 64
STOP = torch.tensor([1, 106])
ROUNDS = 2
MORE = ("chunks", 4096)
"""Beside both at `--tokens`: all logits of so many, in proportion 22 GB, don't fit everywhere."""
WAYS = ("whole", "chunks")


def whole(model: Any, batch: Batch, stop: torch.Tensor) -> UnitLogps:
    """What `unit_logps` finds, from all logits."""
    hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    logits = head(model, hidden.flatten(0, 1)[batch.rows]).float()
    log_z = logits.logsumexp(-1)
    stop_logp = logits[:, stop].logsumexp(-1) - log_z

    def pick(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        own = logits[rows, ids.clamp(min=0)] - log_z[rows]
        return torch.where(ids == STOP_ID, stop_logp[rows], own)

    token = pick(torch.arange(len(logits)), batch.targets)
    unit = torch.zeros(len(batch.unit_row)).index_add(0, batch.token_unit, token)
    return UnitLogps(token, unit, pick(batch.unit_row[:, None].expand_as(batch.cand_id), batch.cand_id), log_z)


def student() -> Any:
    """Random weights of the true class."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    return Gemma3ForCausalLM(config).eval()


def batch_of(tokens: int, length: int = LENGTH, vocab: int = VOCAB) -> Batch:
    """Responses of `length` and so many tokens in all, no unit masked."""
    rng = np.random.default_rng(0)
    responses = tokens // length
    ids = rng.integers(4, vocab, (responses, length + 1))
    ends = np.cumsum(rng.choice([1, 1, 1, 2, 3], length))
    starts = np.append(0, ends[ends < length])
    s_len = np.diff(np.append(starts, length))
    units = responses * len(starts)
    cand = rng.integers(4, vocab, (units, SLOTS))
    cand[:, 0] = STOP_ID
    share = rng.dirichlet(np.ones(SLOTS + 2), units)
    arrays: dict[str, Any] = {
        "ids": ids[:, :-1],
        "mask": np.ones((responses, length), np.int64),
        "rows": np.arange(responses * length),
        "targets": ids[:, 1:].ravel(),
        "unit_row": (np.arange(responses)[:, None] * length + starts).ravel(),
        "response_of_unit": np.repeat(np.arange(responses), len(starts)),
        "token_unit": np.repeat(np.arange(units), np.tile(s_len, responses)),
        "token_behavior_logp": np.full(responses * length, -1.0, np.float32),
        "s_len": np.tile(s_len, responses),
        "t_len": np.tile(s_len, responses),
        "teacher_logp": np.log(share[:, -1]).astype(np.float32),
        "teacher_entropy": -(share * np.log(share)).sum(1).astype(np.float32),
        "t_log_z": np.full(units, np.nan, np.float32),
        "behavior_logp": np.log(share[:, -1]).astype(np.float32),
        **dict.fromkeys(("policy_logp", "first_logp"), np.log(share[:, -1]).astype(np.float32)),
        "weight": (1 + rng.random(units) / 2).astype(np.float32),
        "credit_shift": np.zeros(units, np.float32),
        "reward": np.zeros(units, np.float32),
        "cand_id": cand,
        "cand_logp": np.log(share[:, :SLOTS]).astype(np.float32),
    }
    return Batch(**{k: torch.from_numpy(v) for k, v in arrays.items()}, responses=tuple(map(str, range(responses))))


def step(model: Any, batch: Batch, way: str) -> float:
    """Forward, loss and backward; gradients are added to those that lie on the model."""
    found = (whole if way == "whole" else unit_logps)(model, batch, STOP)
    scored = losses(found, batch, Hybrid())
    loss = (batch.weight * scored.loss).sum() / len(batch.unit_row)
    loss.backward()
    return float(loss.detach())


def measure(way: str, tokens: int) -> dict[str, float]:
    """One way, in this process."""
    model, batch = student(), batch_of(tokens)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(model, batch_of(LENGTH), way)  # threads, kernels and memory that PyTorch keeps
    model.zero_grad(set_to_none=False)
    memory.restart_peak()
    base, began = memory.resident(), time.perf_counter()
    loss = step(model, batch, way)
    seconds = time.perf_counter() - began
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    return {"base": base, "peak": memory.peak(), "seconds": seconds, "loss": loss, "norm": float(norm)}


def child(way: str, tokens: int) -> dict[str, float]:
    """One way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--tokens", str(tokens)]
    return dict(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens; all logits of 2048 take 11 GB")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.tokens)))
        return
    runs = [(way, tokens) for _ in range(ROUNDS) for way, tokens in (*((w, options.tokens) for w in WAYS), MORE)]
    seen: dict[tuple[str, int], list[dict[str, float]]] = {}
    for run in runs:
        seen.setdefault(run, []).append(child(*run))
    middle = {run: {key: statistics.median(m[key] for m in of) for key in of[0]} for run, of in seen.items()}
    print(f"{VOCAB:,} ids, float32, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    print("| logits | response tokens | seconds | GB | loss | gradient norm |\n|---|---|---|---|---|---|")
    for (way, tokens), m in middle.items():
        taken = (m["peak"] - m["base"]) / 1e9
        print(f"| {way} | {tokens} | {m['seconds']:.1f} | {taken:.2f} | {m['loss']:.7f} | {m['norm']:.7f} |")
    whole, chunks = (middle[way, options.tokens] for way in WAYS)
    share = (chunks["peak"] - chunks["base"]) / (whole["peak"] - whole["base"])
    print(f"\nchunks over whole: {chunks['seconds'] / whole['seconds']:.2f} of the time, {share:.3f} of the memory")


if __name__ == "__main__":
    main()
