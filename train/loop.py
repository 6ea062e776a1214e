"""One round of training: stream, accumulate, step, record; resumable at every saved state."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.store.shards import file_digest, publish
from schemas.config import Config
from schemas.errors import OpdError, Stopped
from schemas.outcome import Outcome
from train.checkpoint import final_state, forget_states, newest_state, save_pieces, save_state
from train.distributed import gather, idle_pass, is_sharded, rank, ranks, student_logps, wait_for_all
from train.optimiser import MasterAdamW, learning_rate
from train.recipes import losses
from train.staleness import RATIO_SUMS, WINDOW, is_stale, ratio_figures, ratio_sums
from train.states import state_path
from train.stream import Step, Tables, batches

KINDS = ("divergence", "surrogate")
"""What the loss is made of, as `train.recipes` marks its parts."""


@dataclass(frozen=True)
class Progress:
    """Where a run of several rounds stands, in optimiser steps."""

    before: int
    """Steps that earlier rounds took."""
    budget: int
    """Steps that this round may take."""
    total: int
    """Steps of the whole run, for the learning-rate schedule."""


def _reached(
    *, step: int, steps: int, recent_ess: list[float], metrics: str | None = None, **_: Any
) -> tuple[int, int, list[float], str | None]:
    """What a state says of how far its round was: steps, its budget, the last effective sample sizes, the metrics' digest."""
    return step, steps, recent_ess, metrics


def train_round(
    model: Any,
    stop: torch.Tensor,
    shards: Sequence[Tables],
    config: Config,
    round_index: int,
    progress: Progress,
    start_from: Path | None,
    folder: Path,
    identity: dict[str, Any],
    report: Callable[[dict[str, float]], None] = lambda _: None,
    workers: int = 0,
    stop_asked: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Train `model` in place on one round's shards, until its budget is spent or, with `train.min_ess`, they are stale.

    All ranks do so together; rank 0 writes.

    Args:
        stop: int64, the student's stop ids.
        start_from: the last round's `folder`; None in the first.
        folder: states and `metrics.jsonl` (a line a step) of this round. A state is saved every `save_every` steps and at
            the end; the newest intact one is resumed, unless what determines the round has changed since: then the round
            starts anew. Lines of steps that are taken again are replaced.
        identity: what determines this round.
        report: called with each step's metrics.
        workers: threads that read ahead; they change nothing else.
        stop_asked: asked after each step; once true on any rank, the state is saved and the round left.
        say: called with a line for the person watching when a damaged state was passed over.
    Returns:
        what it ended with; steps that it didn't take are the next round's.
    Raises:
        OpdError: training diverged, or no state that is needed is intact.
        Stopped: `stop_asked` said so.
    """
    optimiser = MasterAdamW(model, config.train)
    done, steps, told = 0, progress.budget, None
    recent: list[float] = []
    if found := newest_state(folder, identity, say):
        done, steps, recent, told = _reached(**found[1])
    elif start_from is not None:
        found = final_state(start_from, together=True)
    if found:
        optimiser.load(found[0])
        restore_rng(found[0])
        del found  # whose files are open
    metrics_path = folder / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
    if rank() == 0:
        go_on(folder, identity, done, told, config.train.keep_states)

    # The model stays in evaluation mode: what is trained is the policy that was sampled, and dropout would differ from it.
    stream = batches(
        shards,
        config.train.batch_size,
        config.train.micro_batch_tokens,
        config.seed + round_index,
        range(done, steps),
        rank(),
        ranks(),
        workers,
    )
    with metrics_path.open("a") as metrics, closing(stream):

        def save(step: int) -> None:
            """The schedule and the place in the stream follow from the step."""
            about = {"identity": identity, "step": step, "steps": steps, "recent_ess": recent}
            if rank() == 0:
                os.fsync(metrics.fileno())  # a state must not outlive the lines of its steps
                about["metrics"] = file_digest(metrics_path)
            keep_state(folder, optimiser.state() | rng_state(), about, is_sharded(model), config.train.keep_states)

        began = time.perf_counter()
        for step, batch in enumerate(stream, done):
            waited = time.perf_counter() - began
            rate = learning_rate(config.train, progress.before + step, progress.total)
            figures = train_step(model, stop, batch, optimiser, rate, config)
            if config.objective.on_policy:
                recent = [*recent, figures["drift_ess"]][-WINDOW:]
            if is_stale(recent, config.train.min_ess):
                steps = step + 1
            seconds = time.perf_counter() - began
            waited += sum(batch.waits)
            figures |= {
                "round": round_index,
                "step": step,
                "steps": progress.budget,
                "learning_rate": rate,
                "seconds": seconds,
                "data_wait": waited / seconds,
                "tokens_per_second": figures["tokens"] / seconds,
            }
            metrics.write(json.dumps(figures) + "\n")
            metrics.flush()
            stopping = bool(gather([stop_asked()]).any())
            if stopping or ((step + 1) % config.train.save_every == 0 and step + 1 < steps):
                save(step + 1)  # before the report, whose reader may be gone already
            report(figures)
            if stopping:
                raise Stopped(
                    f"asked to stop: step {step + 1} of {steps} is saved, the same command goes on from there"
                )
            if step + 1 == steps:
                break
            began = time.perf_counter()
        if not done or done < steps:
            save(steps)
    return Outcome(
        budget=progress.budget,
        steps=steps,
        ended="min_ess" if steps < progress.budget else "budget",
        ess=sum(recent) / len(recent) if recent else None,
    )


def keep_state(folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], sharded: bool, keep: int) -> None:
    """Save the state after `about["step"]` steps, and forget all but the `keep` newest; all ranks call it."""
    path = state_path(folder, about["step"])
    if sharded:
        save_pieces(path.with_suffix(""), tensors, about)
    elif rank() == 0:
        save_state(path, tensors, about)
    if rank() == 0:
        forget_states(folder, about["identity"], about["step"], keep)
    wait_for_all()  # a rank that left now could take the one that writes with it


def go_on(folder: Path, identity: dict[str, Any], done: int, told: str | None, keep: int) -> None:
    """Leave of a folder what belongs to the steps that are done: a killed process may have left more."""
    keep_lines(folder / "metrics.jsonl", done, told)
    if done:
        forget_states(folder, identity, done, keep)


def keep_lines(metrics: Path, done: int, told: str | None) -> None:
    """Cut `metrics.jsonl` to the steps that are done. Raises OpdError when its bytes are not those that the state tells of.

    A missing one is begun anew.
    """
    lines = metrics.read_bytes().splitlines(keepends=True)[:done] if metrics.exists() else []
    if lines and told is not None and hashlib.sha256(b"".join(lines)).hexdigest() != told:
        raise OpdError(
            f"{metrics}: damaged or edited, its lines are not those that the state of step {done} tells of; delete it to go on "
            "without them"
        )
    with publish(metrics) as temporary:
        temporary.write_bytes(b"".join(lines))


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's random number generators, as tensors."""
    cuda = {"rng/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"rng/cpu": torch.get_rng_state(), **cuda}


def restore_rng(tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the generators where `rng_state` found them; a device that was not there then keeps its own."""
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def train_step(
    model: Any, stop: torch.Tensor, step: Step, optimiser: MasterAdamW, rate: float, config: Config
) -> dict[str, float]:
    """One optimiser step over the micro-batches of all ranks; `step` has this one's, perhaps none.

    The loss is the sum of weight times loss over the units that the recipe uses, and of what is added beside it over all that
    are comparable, divided by these, so that a recipe that uses fewer units does not take larger steps on them. The two kinds
    of part that a recipe has mean different things (`train.recipes`), so each is told alone, as an unweighted mean over the
    units that it is used on, if there are any: `divergence`, nats, and `surrogate`. `sampled_kl` is the mean of log p_S - log
    p_T over all comparable units, nats; `beside` that of what is added, part of the loss.
    Ratios (`train.staleness`) are told of an on-policy objective. Figures are of all ranks. Raises OpdError when training
    diverges.
    """
    units = step.units
    # Asked before the first pass: those of a sharded model are collective themselves, and the order is the same everywhere.
    passes = int(gather([step.passes]).max())
    sums = dict.fromkeys(
        ("loss", "beside", "sampled_kl", "tokens", *KINDS, *(f"{kind}_units" for kind in KINDS), *RATIO_SUMS), 0.0
    )
    for given in step.parts:
        sums["tokens"] += int(given.mask.sum())
        if not len(given.unit_row):
            continue
        part = given.to(model.device)
        student = student_logps(model, part, stop)
        scored = losses(student, part, config.objective)
        weight = part.weight * scored.used
        loss = (weight * scored.loss).sum() / units
        beside = 0.0
        if scored.beside is not None:
            added = scored.beside.sum() / units
            loss, beside = loss + added, float(added.detach())
        loss.backward()
        of_part = {
            "loss": float(loss.detach()),
            "beside": beside,
            "sampled_kl": float((student.unit.detach() - part.teacher_logp).sum()),
        }
        for kind, of_kind in zip(KINDS, (scored.diverges, ~scored.diverges), strict=True):
            used = scored.used & of_kind
            of_part |= {kind: float(scored.loss.detach()[used].sum()), f"{kind}_units": float(used.sum())}
        if config.objective.on_policy:
            of_part |= ratio_sums(student.unit, part.behavior_logp, part.policy_logp, part.response_of_unit)
        for name, value in of_part.items():
            sums[name] += value
    if is_sharded(model):
        for _ in range(passes - step.passes):
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
        **({"beside": sums["beside"]} if config.objective.adds else {}),
        "sampled_kl": sums["sampled_kl"] / max(1, units),
        **{kind: sums[kind] / sums[f"{kind}_units"] for kind in KINDS if sums[f"{kind}_units"]},
        "grad_norm": norm,
        "units": units,
        "used_share": sum(sums[f"{kind}_units"] for kind in KINDS) / max(1, units),
        **(ratio_figures(sums) if config.objective.on_policy else {}),
        "tokens": sums["tokens"],
    }
