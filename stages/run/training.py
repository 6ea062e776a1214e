"""Training as a stage of a run does it: over the processes that torchrun started, with progress, until SIGTERM or the end."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock

from pipeline.infer.forward import check_head
from pipeline.infer.memory import free
from pipeline.infer.policy_logps import longest as longest_of
from pipeline.models import model_config
from pipeline.prepared import PreparedModel
from pipeline.store.records import write_record
from pipeline.store.shards import file_digest
from schemas.config import Config
from schemas.errors import one_line
from schemas.outcome import Outcome
from stages.run import console, processors
from stages.run.context import prepared
from stages.run.room import check_room, training_bytes
from stages.run.run import Phase
from train.adapters import attach
from train.checkpoint import export, final_state, trained
from train.distributed import gather, processes, rank, ranks, ranks_here, shard, wait_for_all
from train.layers import layers, recompute
from train.loop import Progress, train_round
from train.memory import FREE_SHARE, needs
from train.packing import pack
from train.stream import Tables
from train.trackers import trackers


class Parallel(StrEnum):
    """How several processes train one model; no key of the config, for it leaves the result as it is."""

    ddp = "ddp"
    fsdp = "fsdp"


WorkersOption = Annotated[int, typer.Option(min=0, help="threads that read ahead; they change no result")]
ParallelOption = Annotated[
    Parallel, typer.Option(help="under torchrun, each process holds the model (ddp), or a part of it (fsdp)")
]


@dataclass(frozen=True)
class Training:
    """What a phase trains.

    Attributes:
        phase: where its states, metrics, outcome and checkpoint lie.
        config: the sections that training reads.
        student: the checkpoint that it starts from.
        base: the weights that adapters belong to, else `student`.
        shards: what it is trained on.
        progress: its budget, and its place in the run.
        start_from: the states of the round before; None: the optimiser begins.
        identity: what determines it.
        name: of its figures among those of the run, and of their log; of a round none.
    """

    phase: Phase
    config: Config
    student: PreparedModel
    base: PreparedModel
    shards: Sequence[Tables]
    progress: Progress
    start_from: Path | None
    identity: dict[str, Any]
    name: str = ""


@contextmanager
def only_trainer(phase: Phase, threads: int | None) -> Iterator[None]:
    """Join the processes that torchrun started, and keep any other trainer off the phase meanwhile."""
    phase.folder.mkdir(parents=True, exist_ok=True)
    with processes(), ExitStack() as held:
        processors.take(threads and max(1, threads // ranks_here()))
        # A killed run may have left its trainer behind.
        held.enter_context(FileLock(phase.folder / ".train.lock") if rank() == 0 else console.silence())
        wait_for_all()  # nobody reads the states before the lock is ours
        yield


def train(
    job: Training, detail: Callable[[dict[str, float]], str], workers: int, parallel: Parallel
) -> tuple[Outcome, dict[str, float]]:
    """Train to the end; what it ended with, and the figures of the last step that was taken now, if any.

    SIGTERM saves and leaves after the step under way, by Stopped. Rank 0 writes.

    Args:
        detail: a step's figures, for the progress bar.
        workers: threads that read ahead.
    """
    run, config, progress = job.phase.run, job.config, job.progress
    model = job.base.load(device="cpu" if parallel is Parallel.fsdp else None)
    check_head(model, job.base.ref.source)
    if config.train.lora:
        attach(model, config.train.lora)
    if (why := pack(model)) and rank() == 0:
        console.say(f"{job.phase.name} train: micro-batches are padded, for {why}")
    if recomputes(job, model, parallel):
        recompute(model)
    if rank() == 0:
        needed = training_bytes(model, config.train, progress.budget, job.phase.states)
        check_room(job.phase.folder, needed, f"{job.phase.name} train")
    if parallel is Parallel.fsdp:
        shard(model)
    about = run.config.model_dump(mode="json")
    last: dict[str, float] = {}
    tracked = config.train.trackers if rank() == 0 else ()
    prefix = f"{job.name}/" if job.name else ""
    with (
        stop_on_sigterm() as stop_asked,
        trackers(tracked, run.root, run.config.run, about, job.name) as track,
        console.progress(f"{job.phase.name} train", progress.budget, "steps") as advance,
    ):

        def report(figures: dict[str, float]) -> None:
            step = int(figures["step"])
            told = {f"{prefix}{key}": value for key, value in figures.items() if key not in ("step", "steps")}
            track(told, progress.before + step)
            advance(1, detail(figures), already=0 if last else step)
            last.update(figures)

        outcome = train_round(
            model,
            torch.from_numpy(job.student.stop.astype("int64")).to(model.device),
            job.shards,
            config,
            max(0, job.phase.number),
            progress,
            job.start_from,
            job.phase.states,
            job.identity,
            report,
            workers,
            stop_asked,
            console.say,
        )
    return outcome, last


def recomputes(job: Training, model: Any, parallel: Parallel) -> bool:
    """Whether layers are computed again in backward: as the config has it, or where memory is else too small.

    Told where it is switched on, or where memory doesn't seem enough even so.
    """
    wanted = job.config.train.gradient_checkpointing
    mine = job.shards[rank() :: ranks()]
    longest = int(gather([max((longest_of(rollouts) for rollouts, *_ in mine), default=0)]).max())
    found, why = None, "it failed on another rank"
    try:
        found = needs(model, job.config.train, longest, ranks() if parallel is Parallel.fsdp else 1)
    except (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError) as error:
        # Attention of its own that can't run where the model is yet, a GPU's before the model is spread over GPUs.
        why = one_line(error)
    known = bool(gather([found is not None]).all())
    if found is None or not known:
        if rank() == 0:
            console.say(f"{job.phase.name} train: no estimate of the memory that it takes: {why}")
        return wanted is True
    device = torch.device("cuda") if torch.cuda.is_available() else model.device
    left = free(device) // (1 if device.type == "cuda" else ranks_here())
    takes = {on: found.total(on) for on in (False, True)}
    chosen = wanted if isinstance(wanted, bool) else takes[False] > FREE_SHARE * left and bool(layers(model))
    chosen = bool(gather([chosen]).any())  # ranks may see other figures
    if rank():
        return chosen
    name, free_gb = f"{job.phase.name} train", f"{left / 1e9:.1f} GB are free"
    if takes[chosen] > left:
        console.warn(
            f"{name}: a rank takes about {takes[chosen] / 1e9:.1f} GB beside the weights ({found.optimiser / 1e9:.1f} of them "
            f"the optimiser's), and {free_gb}; lower train.micro_batch_tokens, train adapters (train.lora), or spread the "
            "model over more ranks (--parallel fsdp)"
        )
    elif chosen and not isinstance(wanted, bool):
        console.say(
            f"{name}: layers are computed again in backward: about {takes[True] / 1e9:.1f} GB beside the weights, where "
            f"{takes[False] / 1e9:.1f} would be without and {free_gb}"
        )
    return chosen


def publish_checkpoint(job: Training, outcome: Outcome, card: str, source: str) -> None:
    """Write what training ended with, export what was trained, and write its reference beside it.

    Args:
        card: the folder's README.md.
        source: what the model is called.
    """
    ended = {"decided": job.phase.run.decided, "metrics": file_digest(job.phase.metrics)}
    write_record(job.phase.outcome, outcome.model_copy(update=ended))
    model = trained(job.base.load(device="cpu"), final_state(job.phase.states)[0], job.config.train)
    given = model_config(job.base.ref.path)
    if dtype := given.get("dtype") or given.get("torch_dtype"):
        model = model.to(getattr(torch, dtype))  # as the source has it, whatever it was trained in
    teacher = prepared(job.phase.run, "teacher", weights=False)
    ref = export(model, job.student.tokenizer, job.phase.checkpoint, card, source, teacher.origin)
    run = job.phase.run
    phases = [job.phase] if job.phase.kind == "sft" else run.trained_on(job.phase.number)
    told: dict[str, Any] = {"path": job.phase.checkpoint.name}  # beside its reference, wherever the run lies
    told |= {"decided": run.decided, "trained_on": {phase.name: phase.trained_shards() for phase in phases}}
    write_record(job.phase.checkpoint.with_suffix(".json"), ref.model_copy(update=told))


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """While it is open a SIGTERM, as schedulers send it before they pre-empt, only makes the yielded function say True."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
