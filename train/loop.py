"""One round of training: stream, accumulate, step, record; resumable at every saved state."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.config import Config
from schemas.errors import OpdError
from train.checkpoint import load_state, save_state
from train.optimiser import MasterAdamW, learning_rate
from train.policy import unit_logps
from train.recipes import losses
from train.stream import Step, Triple, batches, count_steps


@dataclass(frozen=True)
class Progress:
    """Where a run of several rounds stands, in optimiser steps."""

    before: int
    """Steps that earlier rounds took."""
    total: int
    """Steps of the whole run, for the learning-rate schedule."""


def train_round(
    model: Any,
    stop: torch.Tensor,
    shards: Sequence[Triple],
    config: Config,
    round_index: int,
    progress: Progress,
    start_from: Path | None,
    state_path: Path,
    metrics_path: Path,
    identity: dict[str, Any],
    report: Callable[[dict[str, float]], None] = lambda _: None,
    workers: int = 0,
) -> None:
    """Train `model` in place on one round's shards.

    Args:
        stop: int64, the student's stop ids.
        start_from: optimiser state that the last round left; None in the first.
        state_path: this round's own state, written every `save_every` steps and at the end; found there, it is resumed,
            unless what determines the round has changed since: then the round starts anew.
        metrics_path: JSON lines, one a step; steps that a resumed run repeats replace the earlier lines.
        identity: what determines this round.
        report: called with each step's metrics.
        workers: threads that read ahead; they change nothing else.
    """
    optimiser = MasterAdamW(model, config.train)
    done = 0
    if state_path.exists():
        tensors, about = load_state(state_path)
        if about["identity"] == identity:
            optimiser.load(tensors)
            done = about["step"]
    if done == 0 and start_from is not None:
        tensors, _ = load_state(start_from)
        optimiser.load(tensors)
    lines = metrics_path.read_text().splitlines()[:done] if metrics_path.exists() else []
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    metrics_path.write_text("".join(line + "\n" for line in lines))

    # The model stays in evaluation mode: what is trained is the policy that was sampled, and dropout would differ from it.
    steps = count_steps(shards, config.train.batch_size) * config.train.epochs
    stream = batches(
        shards,
        config.train.batch_size,
        config.train.micro_batch_tokens,
        config.seed + round_index,
        range(done, steps),
        workers=workers,
    )
    with metrics_path.open("a") as metrics, closing(stream):
        began = time.perf_counter()
        for step, batch in enumerate(stream, done):
            waited = time.perf_counter() - began
            rate = learning_rate(config.train, progress.before + step, progress.total)
            figures = train_step(model, stop, batch, optimiser, rate, config)
            seconds = time.perf_counter() - began
            figures |= {
                "round": round_index,
                "step": step,
                "steps": steps,
                "learning_rate": rate,
                "seconds": seconds,
                "data_wait": waited / seconds,
                "tokens_per_second": figures["tokens"] / seconds,
            }
            metrics.write(json.dumps(figures) + "\n")
            metrics.flush()
            report(figures)
            if (step + 1) % config.train.save_every == 0 and step + 1 < steps:
                save_state(state_path, optimiser.state(), {"identity": identity, "step": step + 1})
            began = time.perf_counter()
    save_state(state_path, optimiser.state(), {"identity": identity, "step": steps})


def train_step(
    model: Any, stop: torch.Tensor, step: Step, optimiser: MasterAdamW, rate: float, config: Config
) -> dict[str, float]:
    """One optimiser step over micro-batches.

    The loss is the sum of weight times loss over the units that the recipe uses, divided by all comparable units of the
    step, so that a recipe that uses fewer units does not take larger steps on them. Raises OpdError when it diverges.
    """
    device = model.device
    units = step.units
    sums = {"loss": 0.0, "sampled_kl": 0.0, "used": 0.0}
    for part in (part.to(device) for part in step.parts):
        if not len(part.unit_row):
            continue
        student = unit_logps(model, part, stop)
        scored = losses(student, part, config.objective)
        weight = part.weight * scored.used
        loss = (weight * scored.loss).sum() / units
        loss.backward()
        sums["loss"] += float(loss.detach())
        sums["sampled_kl"] += float((student.unit.detach() - part.teacher_logp).sum())
        sums["used"] += float(scored.used.sum())
    norm = optimiser.step(rate) if units else 0.0
    if not math.isfinite(norm):
        raise OpdError(
            f"training diverged: the gradient norm is {norm} at learning rate {rate:.3g}; lower train.learning_rate "
            "(nothing of this step was saved)"
        )
    return {
        "loss": sums["loss"],
        "sampled_kl": sums["sampled_kl"] / max(1, units),
        "grad_norm": norm,
        "units": units,
        "used_share": sums["used"] / max(1, units),
        "tokens": float(sum(int(part.mask.sum()) for part in step.parts)),
    }
