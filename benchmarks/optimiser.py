"""An optimiser step over the default run's student: torch's plain AdamW against its fused one, in turns in one process.

Shapes are SmolLM2-135M's, values random. Prints seconds a step (median of `--steps` after the first) and the largest
difference between the two after all of them.

    python benchmarks/optimiser.py
"""

import argparse
import statistics
import time

import torch

LAYERS, WIDTH, KEYS, INNER, VOCABULARY = 30, 576, 192, 1536, 49152


def weights() -> list[torch.Tensor]:
    """The student's, the same at each call."""
    torch.manual_seed(0)
    layer = [(WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH)] + 2 * [(INNER, WIDTH)] + [(WIDTH, INNER)]
    return [0.02 * torch.randn(shape) for shape in [(VOCABULARY, WIDTH), *LAYERS * layer]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    both = {fused: weights() for fused in (False, True)}
    adams = {fused: torch.optim.AdamW(of, lr=1e-4, betas=(0.9, 0.95), fused=fused) for fused, of in both.items()}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + options.steps):
        slopes = [1e-3 * torch.randn_like(weight) for weight in both[False]]
        for fused, adam in adams.items():
            for weight, slope in zip(both[fused], slopes, strict=True):
                weight.grad = slope
            began = time.perf_counter()
            adam.step()
            seconds[fused].append(time.perf_counter() - began)
    plain, fused = (statistics.median(seconds[fused][1:]) for fused in (False, True))
    apart = max(float((a - b).abs().max()) for a, b in zip(both[False], both[True], strict=True))
    print(f"plain {plain:.3f} s, fused {fused:.3f} s, {plain / fused:.1f} times; at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
