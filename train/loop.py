"""One round of training: stream, accumulate, step, record; resumable at every saved state."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from schemas.config import Config
from schemas.errors import OpdError
from train.checkpoint import load_state, save_state
from train.distributed import gather, idle_pass, is_sharded, rank, ranks, student_logps
from train.optimiser import MasterAdamW, learning_rate
from train.recipes import losses
from train.stream import Batch, Triple, batches, count_batches


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
) -> None:
    """Train `model` in place on one round's shards, together with all ranks; rank 0 writes and reports.

    Args:
        stop: int64, the student's stop ids.
        start_from: optimiser state that the last round left; None in the first.
        state_path: this round's own state, written every `save_every` steps and at the end; found there, it is resumed,
            unless what determines the round has changed since: then the round starts anew.
        metrics_path: JSON lines, one a step; steps that a resumed run repeats replace the earlier lines.
        identity: what determines this round.
        report: called with each step's metrics.
    """
    metrics_path = metrics_path if rank() == 0 else Path(os.devnull)
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
    per_epoch = count_batches(shards, config.train.batch_size)
    steps = per_epoch * config.train.epochs
    stream = (
        parts
        for epoch in range(config.train.epochs)
        for parts in batches(
            shards,
            config.train.batch_size,
            config.train.micro_batch_size,
            config.seed + round_index,
            epoch,
            rank(),
            ranks(),
        )
    )

    def save(step: int) -> None:
        tensors = optimiser.state()  # all ranks have a part in it
        if rank() == 0:
            save_state(state_path, tensors, {"identity": identity, "step": step})

    with metrics_path.open("a") as metrics:
        began = time.perf_counter()
        for step, parts in enumerate(islice(stream, done, None), done):
            waited = time.perf_counter() - began
            rate = learning_rate(config.train, progress.before + step, progress.total)
            figures = train_step(model, stop, parts, optimiser, rate, config)
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
                save(step + 1)
            began = time.perf_counter()
    save(steps)


def train_step(
    model: Any, stop: torch.Tensor, parts: Sequence[Batch], optimiser: MasterAdamW, rate: float, config: Config
) -> dict[str, float]:
    """One optimiser step over the micro-batches of all ranks; `parts` are this rank's, perhaps none.

    The loss is the sum of weight times loss over the units that the recipe uses, divided by all comparable units of the
    batch, so that a recipe that uses fewer units does not take larger steps on them. Figures are of all ranks. Raises
    OpdError when it diverges.
    """
    tokens = sum(int(part.mask.sum()) for part in parts)
    compared = [part.to(model.device) for part in parts if len(part.unit_row)]
    counts = gather([sum(len(part.unit_row) for part in compared), tokens, len(compared)])
    (units, tokens, _), passes = counts.sum(0).long().tolist(), int(counts[:, 2].max())
    sums = {"loss": 0.0, "sampled_kl": 0.0, "used": 0.0}
    for part in compared:
        student = student_logps(model, part, stop)
        scored = losses(student, part, config.objective)
        weight = part.weight * scored.used
        loss = (weight * scored.loss).sum() / units
        loss.backward()
        sums["loss"] += float(loss.detach())
        sums["sampled_kl"] += float((student.unit.detach() - part.teacher_logp).sum())
        sums["used"] += float(scored.used.sum())
    if is_sharded(model):
        for _ in range(passes - len(compared)):
            idle_pass(model, stop)
    sums = dict(zip(sums, gather(list(sums.values())).sum(0).tolist(), strict=True))
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
        "tokens": float(tokens),
    }
