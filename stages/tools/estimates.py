"""What a run takes, before anything was made or loaded: tokens, memory and disk, from its config and the files of its models.

What training takes beside the weights is `train.memory`'s to say, which also knows what layers keep once a model is loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from schemas.config import Config
from stages.run.room import state_bytes
from train.memory import logits_bytes, optimiser_bytes

ROW, ENTRY, OTHER, LISTED = 12.0, 2.2, 40.0, 2.0
"""Bytes on disk of a teacher token without candidates, of a candidate (docs/cache.md), of a token's rollouts and weights, of a
listed id."""
ADAPTERS = 0.05
"""Weights that `train.lora` trains, of a model's: a rank-r pair per matrix, a few per cent whatever the model."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of the weights of a model."""

    parameters: int
    bytes: int


def weights_of(folder: Path) -> Sizes:
    """Of the model in a folder, from the headers of its safetensors files."""
    from safetensors import safe_open  # noqa: PLC0415

    count = 0
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "np") as file:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118 - no mapping
            count += sum(_product(shape) for shape in shapes)
    return Sizes(count, sum(path.stat().st_size for path in files))


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def trained_of(parameters: int, config: Config) -> float:
    """Weights that are trained."""
    return parameters * (ADAPTERS if config.train.lora else 1)


def memory_needs(
    config: Config, sizes: dict[str, Sizes], each: dict[str, int], vocabulary: dict[str, int]
) -> dict[str, float]:
    """Bytes that stages take at their peak, without what their layers keep.

    Args:
        sizes, each, vocabulary: by role: weights, bytes of one in the forward pass, ids.
    Returns:
        training: weights, and of each trained one a float32 master, its gradient and two moments (and an average, with
        `train.ema`), and the logits of a micro-batch; scoring: the teacher's weights and the logits of some rows.
    """
    student = sizes["student"].parameters
    beside = optimiser_bytes(trained_of(student, config), config.train)
    beside += logits_bytes(config.train.micro_batch_tokens, vocabulary["student"])
    found: dict[str, float] = {"training": student * each["student"] + beside}
    if "teacher" in sizes:
        rows = min(config.scores.batch_tokens, 1024)
        found["scoring"] = sizes["teacher"].parameters * each["teacher"] + 4 * rows * vocabulary["teacher"]
    return found


def tokens_of(config: Config, kl_items: int, checkpoints: int) -> dict[str, float]:
    """Response tokens that are sampled, scored and trained on, with responses as long as they may be; prompts left out."""
    options = config.rollouts
    rounds = sum(options.prompts * options.samples * options.horizon(number) for number in range(options.rounds))
    others = sum(one.count for one in config.evaluate.also.values())
    answers = (config.held_out + others) * config.evaluate.samples + kl_items
    evaluated = checkpoints * options.longest
    return {
        "rollouts": rounds + evaluated * answers,
        "scores": rounds + evaluated * kl_items,
        "train": config.train.epochs * rounds * (1 + options.replay),
    }


def disk_needs(config: Config, tokens: dict[str, float], sizes: dict[str, Sizes] | None) -> dict[str, float]:
    """Bytes at most of the run's folder and of what it adds to the cache."""
    kept = config.scores.k_max if config.scores.support != "student" else 0
    kept += config.rollouts.top_k if config.scores.support != "teacher" else 0
    scores = tokens["scores"] * (ROW + ENTRY * kept)
    sampled = (OTHER + LISTED * config.rollouts.top_k) * tokens["rollouts"]
    found = {"cache": scores + sampled, "run": scores + sampled}  # units hold the candidates once more
    if sizes:
        of = sizes["student"]
        state = state_bytes(trained_of(of.parameters, config), config.train)
        found["run"] += config.rollouts.rounds * of.bytes + (config.train.keep_states + 1) * state
    return found
