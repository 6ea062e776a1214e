"""What training and scoring took beside the weights, and what was estimated before: `python benchmarks/estimates.py`.

Models of Llama's layers with random weights, in float32. Training: two optimiser steps of two micro-batches each
(`--tokens` response tokens and their prompts); scoring: 78 candidates of each token of one forward pass. Each row is a process
of its own; what was taken is the peak of resident memory less what was resident once the model was there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import numpy as np
import torch
from stream import PROMPT, TABLES, VOCABULARY, fabricate
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.infer import score
from pipeline.infer.forward import head
from pipeline.infer.memory import scoring
from pipeline.infer.policy_logps import longest
from pipeline.infer.score import Candidates
from pipeline.store.shards import open_shard
from schemas.config import parse_config
from train.layers import recompute
from train.loop import train_step
from train.memory import needs
from train.optimiser import MasterAdamW
from train.packing import pack
from train.stream import batches

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "51M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
KEY_VALUE_HEADS = {"135M": 3, "51M": 4}
LENGTH = 256
WAYS = ("kept", "recomputed", "scored")


def model_of(shape: str) -> Any:
    """In evaluation mode, without padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=KEY_VALUE_HEADS[shape], tie_word_embeddings=True, **SHAPES[shape]
    )
    model = LlamaForCausalLM(config).eval()
    return model


def measured(shape: str, way: str, tokens: int, folder: Path) -> dict[str, float]:
    """In this process: megabytes that were estimated and that were taken."""
    count = tokens // LENGTH  # responses of a micro-batch
    fabricate(folder, 2 * count, LENGTH)
    opened: Any = tuple(open_shard(folder / f"{name}.parquet", name) for name in TABLES)
    model = model_of(shape)
    before = memory.resident()
    memory.restart_peak()
    if way == "scored":
        rng = np.random.default_rng(0)
        texts = [rng.integers(3, VOCABULARY, LENGTH, np.int32) for _ in range(tokens // LENGTH)]
        prompts = [text[:2] for text in texts]
        estimate = float(scoring(model.config, 4, tokens, score.CHUNK_BYTES))
        rows = score.hidden_rows(model, prompts, texts, tokens + 2 * len(texts))
        score.score(rows, lambda hidden: head(model, hidden), texts, np.array([2], np.int32), Candidates(1.0, 78))
    else:
        sections = {"prompts": {"source": "-"}, "student": {"model": "-"}, "teacher": {"model": "-"}}
        micro = count * (LENGTH + PROMPT + 10)
        train = {"micro_batch_tokens": micro, "batch_size": 2 * count}
        config = parse_config({**sections, "train": train}, "benchmark")
        assert pack(model) is None
        steps = list(batches([opened], 2 * count, micro, 1, range(2)))
        assert [step.passes for step in steps] == [2, 2]
        found = needs(model, config.train, longest(opened[0]))
        estimate = float(found.total(way == "recomputed"))
        if way == "recomputed":
            recompute(model)
        optimiser = MasterAdamW(model, config.train)
        for step in steps:
            train_step(model, torch.tensor([2]), step, optimiser, 1e-6, config)
    return {"estimate": estimate / 1e6, "taken": (memory.peak() - before) / 1e6}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all by default")
    parser.add_argument("--way", choices=WAYS, action="append", help="all by default")
    parser.add_argument("--tokens", type=int, action="append", help="1,024 and 2,048 by default")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measured(options.shape[0], options.way[0], options.tokens[0], options.folder)))
        return
    print("| model | | tokens | estimated, MB | taken, MB | off by |\n|---|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        for way in options.way or WAYS:
            for tokens in options.tokens or (1024, 2048):
                with tempfile.TemporaryDirectory(prefix="opd-estimates-") as folder:
                    command = [sys.executable, __file__, "--folder", folder, "--shape", shape, "--way", way]
                    got = json.loads(subprocess.check_output([*command, "--tokens", str(tokens)], text=True))
                error = got["estimate"] / got["taken"] - 1
                print(
                    f"| {shape} | {way} | {tokens:,} | {got['estimate']:,.0f} | {got['taken']:,.0f} | {100 * error:+.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
