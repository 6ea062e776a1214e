"""Weights of all shards of a phase: each shard to its partial sums, their sum, and each shard with it to its weights.

One graph of `dask.delayed` tasks, which runs shard after shard in this process or on a cluster of `dask.distributed`. Sums
are added from the first shard to the last wherever they were made, and every task can run twice, so both write the same
bytes, even when a worker dies. Without estimators that compare responses there is only the last step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import dask
import polars as pl
import pyarrow as pa
from dask.delayed import Delayed, delayed

from pipeline.align.units import CONTEXT, KINDS
from pipeline.store.shards import Shard, open_shard, open_writer, read_manifest
from pipeline.weights.credit import (
    Summary,
    check_candidates,
    columns_read,
    compares_responses,
    partial_sums,
    summary,
    warped,
    weigh,
)
from pipeline.weights.cross_fitting import Sums, add
from pipeline.weights.estimator import PLAIN, Loss
from schemas.config import Weights
from schemas.errors import OpdError
from schemas.manifest import digest

UNIT_COLUMNS = ("rollout_id", "unit", "kind", "s_start", "s_len", "t_len", "teacher_logp")
CANDIDATE_COLUMNS = ("cand_logp", "tail_logp", "dropped_logp")
CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
RETRIES = 3
"""How often a task may fail, or take its worker with it, beyond what dask itself forgives."""


@dataclass(frozen=True)
class Part:
    """The tables of one shard of a phase, `policy` where another policy than the one that is trained sampled it.

    Absolute paths: whoever runs a task has them from the same file system, but another working directory.
    """

    rollouts: Path
    units: Path
    policy: Path | None
    weights: Path


def tasks(parts: Sequence[Part], options: Weights, loss: Loss = PLAIN) -> list[Delayed]:
    """What writes the weights of each shard of `parts` and gives its `Summary`.

    Raises OpdError when a shard's manifest is missing; computing them raises it as `open_shard`, `credit.weigh` and
    `credit.check_candidates` do, with the path of the units.
    """
    if not compares_responses(options):
        return [delayed(_write)(part, options, loss, None, None) for part in parts]
    read = [path for part in parts for path in (part.rollouts, part.units, part.policy) if path]
    phase = digest([read_manifest(path).sha256 for path in read])
    sums = reduce(delayed(add), [delayed(_sums)(part, options, loss) for part in parts])
    return [delayed(_write)(part, options, loss, sums, phase) for part in parts]


def compute(parts: Sequence[Part], options: Weights, loss: Loss = PLAIN) -> Summary:
    """Write the weights of all shards of `parts` for a loss with `options.scheduler`; the summary of them all.

    Raises OpdError as `tasks` says, and when no scheduler answers at that address.
    """
    work = tasks(parts, options, loss)
    if options.scheduler == "local":
        return sum(dask.compute(*work, scheduler="synchronous"), Summary())
    from distributed import Client  # noqa: PLC0415 - it takes a second

    try:
        client = Client(options.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except OSError as error:
        raise OpdError(
            f"`weights.scheduler`: no dask scheduler answers at {options.scheduler} within {CONNECT_SECONDS} s; start one "
            "with `dask scheduler` and workers with `dask worker`, or set it to `local`"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise OpdError(
                f"`weights.scheduler`: the dask scheduler at {options.scheduler} has no worker; start some, "
                f"`dask worker {options.scheduler}`, where this package is installed and the run's folder is to be seen"
            ) from error
        return sum(client.gather(client.compute(work, retries=RETRIES)), Summary())


def _sums(part: Part, options: Weights, loss: Loss) -> Sums:
    read = _read(part, options)
    with _naming(part.units):
        return partial_sums(read.units, read.rollouts, options, loss)


def _write(part: Part, options: Weights, loss: Loss, sums: Sums | None, phase: str | None) -> Summary:
    """Publish the weights of a shard; `phase` is the digest of all that `sums` were made of."""
    read = _read(part, options, check=True)
    with _naming(part.units):
        own = weigh(read.units, read.rollouts, options, sums, loss)
    table = _with_context(read.every, own)
    inputs = read.inputs | ({"phase": phase} if phase else {})
    with open_writer(part.weights, "weights", options.identity() | loss.identity(), inputs) as writer:
        at = 0
        for size in read.sizes:
            writer.write(pa.Table.from_batches(table.slice(at, size).to_arrow().to_batches()))
            at += size
    return summary(own, len(read.rollouts), warped(read.rollouts))


@dataclass(frozen=True)
class _Read:
    """Tables as `credit.weigh` takes them, the names of all units, which have those that were only read too, how many each row
    group has, and digests of the shards."""

    units: pl.DataFrame
    every: pl.DataFrame
    rollouts: pl.DataFrame
    sizes: list[int]
    inputs: dict[str, str]


def _read(part: Part, options: Weights, check: bool = False) -> _Read:
    """Open and read a shard. Candidates are read to `check` them, and checked where they are read; only some estimators
    compute with them."""
    of_units, of_rollouts = columns_read(options)
    check = check or not set(CANDIDATE_COLUMNS).isdisjoint(of_units)
    kept = list(dict.fromkeys([*UNIT_COLUMNS, *of_units]))
    read = [*kept, *(name for name in CANDIDATE_COLUMNS if check and name not in kept)]
    rollouts = open_shard(part.rollouts, "rollouts")
    made_from = {"rollouts": rollouts.manifest.sha256}
    units = open_shard(part.units, "units", inputs=made_from)
    groups = []
    for group in _groups(units, read):
        if check:
            with _naming(part.units):
                check_candidates(group)
        groups.append(group.select(kept))
    sampled = pl.concat(_groups(rollouts, ["rollout_id", "behavior_logp", "sampler_logp", *of_rollouts]))
    inputs = made_from | {"units": units.manifest.sha256}
    if part.policy:
        policy = open_shard(part.policy, "policy", inputs=made_from)
        sampled = sampled.with_columns(pl.concat(_groups(policy, ["policy_logp"])))
        inputs["policy"] = policy.manifest.sha256
    every = pl.concat(groups)
    own = every.filter(pl.col("kind") != KINDS[CONTEXT])
    return _Read(own, every.select("rollout_id", "unit"), sampled, [len(group) for group in groups], inputs)


def _with_context(every: pl.DataFrame, own: pl.DataFrame) -> pl.DataFrame:
    """Weights of all units: of those that the student didn't write without advantage, and no step of its decisions."""
    if len(every) == len(own):
        return own
    joined = every.join(own, on=("rollout_id", "unit"), how="left", maintain_order="left")
    none = {"advantage": 0.0, "credit": 0.0, "weight": 1.0, "is_ratio": 1.0}
    return joined.with_columns(pl.col(name).fill_null(value) for name, value in none.items()).select(own.columns)


def _groups(shard: Shard, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    return (pl.DataFrame(pl.from_arrow(group)) for group in shard.row_groups(columns))


@contextmanager
def _naming(units: Path) -> Iterator[None]:
    """Say which shard it was that an OpdError is about."""
    try:
        yield
    except OpdError as error:
        raise OpdError(f"{units}: {error}") from error
