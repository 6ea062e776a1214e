"""Weights of all shards of a phase: each shard to its partial sums, their sum, and each shard with it to its weights.

One graph of `dask.delayed` tasks, which runs shard after shard in this process or on a cluster of `dask.distributed`. Sums
are added from the first row group to the last, and so those of shards, wherever they were made, and every task can run twice:
both write the same bytes, even when a worker dies. A task holds a row group at a time. Without estimators that compare
responses there is only the last step.
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
BESIDE = {"policy": "policy_logp", "reference": "reference_logp", "outcomes": "right"}
"""Tables that a part may have, in step with its rollouts, and the column of each that is read."""
CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""
RETRIES = 3
"""How often a task may fail, or take its worker with it, beyond what dask itself forgives."""


@dataclass(frozen=True)
class Part:
    """The tables of one shard of a phase, `policy` where another policy than the one that is trained sampled it, `outcomes`
    where it was judged, `reference` where the loss refers to another policy than that one.

    Absolute paths: whoever runs a task has them from the same file system, but another working directory.
    """

    rollouts: Path
    units: Path
    policy: Path | None
    weights: Path
    outcomes: Path | None = None
    reference: Path | None = None

    @property
    def beside(self) -> dict[str, Path]:
        """Tables with a row a response beside its rollouts, those of BESIDE that there are."""
        return {name: path for name in BESIDE if (path := getattr(self, name))}


def tasks(parts: Sequence[Part], options: Weights, loss: Loss = PLAIN) -> list[Delayed]:
    """What writes the weights of each shard of `parts` and gives its `Summary`.

    Raises OpdError when a shard's manifest is missing; computing them raises it as `open_shard`, `credit.weigh` and
    `credit.check_candidates` do, with the path of the units.
    """
    if not compares_responses(options):
        return [delayed(_write)(part, options, loss, None, None) for part in parts]
    read = [path for part in parts for path in (part.rollouts, part.units, *part.beside.values())]
    phase = digest([read_manifest(path).sha256 for path in read])
    sums = reduce(delayed(add), [delayed(_sums)(part, options, loss) for part in parts])
    return [delayed(_write)(part, options, loss, sums, phase) for part in parts]


def compute(parts: Sequence[Part], options: Weights, loss: Loss = PLAIN) -> Summary:
    """Write the weights of all shards of `parts` for a loss with `options.scheduler`; the summary of them all.

    Raises OpdError as `tasks` says, and when no scheduler answers at that address.
    """
    work = tasks(parts, options, loss)
    if options.scheduler == "local":
        return sum(dask.compute(*work, scheduler=dask.get), Summary())  # by its name dask would import `distributed`
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
    with _naming(part.units):
        of_groups = (partial_sums(group.own, group.rollouts, options, loss) for group in _open(part).groups(options))
        return reduce(add, of_groups)


def _write(part: Part, options: Weights, loss: Loss, sums: Sums | None, phase: str | None) -> Summary:
    """Publish the weights of a shard; `phase` is the digest of all that `sums` were made of."""
    opened, total = _open(part), Summary()
    inputs = opened.inputs | ({"phase": phase} if phase else {})
    with (
        _naming(part.units),
        open_writer(part.weights, "weights", options.identity() | loss.identity(), inputs) as writer,
    ):
        for group in opened.groups(options, check=True):
            own = weigh(group.own, group.rollouts, options, sums, loss)
            told = _with_context(group.every, own).to_arrow()
            writer.write(pa.Table.from_batches(told.to_batches(), told.schema))  # there may be none
            right = group.rollouts["right"] if "right" in group.rollouts.columns else None
            total += summary(own, len(group.rollouts), warped(group.rollouts), right)
    return total


@dataclass(frozen=True)
class _Group:
    """A row group: units as `credit.weigh` takes them, the names of all, which have those that were only read too, and
    rollouts."""

    own: pl.DataFrame
    every: pl.DataFrame
    rollouts: pl.DataFrame


@dataclass(frozen=True)
class _Opened:
    """The shards of a part, and digests of them."""

    rollouts: Shard
    units: Shard
    beside: dict[str, Shard]
    inputs: dict[str, str]

    def groups(self, options: Weights, check: bool = False) -> Iterator[_Group]:
        """Row group by row group, one in memory at a time. Candidates are read to `check` them, and checked where they are
        read; only some estimators compute with them. Raises OpdError when the shards aren't in step."""
        of_units, of_rollouts = columns_read(options)
        check = check or not set(CANDIDATE_COLUMNS).isdisjoint(of_units)
        kept = list(dict.fromkeys([*UNIT_COLUMNS, *of_units]))
        read = [*kept, *(name for name in CANDIDATE_COLUMNS if check and name not in kept)]
        names = ["rollout_id", "behavior_logp", "sampler_logp", *(name for name in of_rollouts if name != "right")]
        tables = [_frames(self.rollouts, names), _frames(self.units, read)]
        tables += [_frames(shard, [BESIDE[name]]) for name, shard in self.beside.items()]
        judged = "outcomes" in self.beside or "right" not in of_rollouts
        unjudged = [] if judged else [pl.lit(None, pl.Boolean).alias("right")]
        for shard in (self.units, *self.beside.values()):
            if shard.manifest.row_groups != self.rollouts.manifest.row_groups:
                raise OpdError(
                    f"it has {shard.manifest.row_groups} row groups, and its rollouts {self.rollouts.manifest.row_groups}; "
                    "run the stage that made it again"
                )
        for sampled, every, *beside in zip(*tables, strict=True):
            if check:
                check_candidates(every)
            own = every.select(kept).filter(pl.col("kind") != KINDS[CONTEXT])
            rollouts = pl.concat([sampled, *beside], how="horizontal").with_columns(unjudged)
            yield _Group(own, every.select("rollout_id", "unit"), rollouts)


def _open(part: Part) -> _Opened:
    rollouts = open_shard(part.rollouts, "rollouts")
    made_from = {"rollouts": rollouts.manifest.sha256}
    units = open_shard(part.units, "units", inputs=made_from)
    beside = {name: open_shard(path, name, inputs=made_from) for name, path in part.beside.items()}
    inputs = made_from | {name: shard.manifest.sha256 for name, shard in ({"units": units} | beside).items()}
    return _Opened(rollouts, units, beside, inputs)


def _with_context(every: pl.DataFrame, own: pl.DataFrame) -> pl.DataFrame:
    """Weights of all units: of those that the student didn't write without advantage, and no step of its decisions."""
    if len(every) == len(own):
        return own
    joined = every.join(own, on=("rollout_id", "unit"), how="left", maintain_order="left")
    none = {"advantage": 0.0, "credit": 0.0, "weight": 1.0, "is_ratio": 1.0}
    return joined.with_columns(pl.col(name).fill_null(value) for name, value in none.items()).select(own.columns)


def _frames(shard: Shard, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    return (pl.DataFrame(pl.from_arrow(group)) for group in shard.row_groups(columns))


@contextmanager
def _naming(units: Path) -> Iterator[None]:
    """Say which shard it was that an OpdError is about."""
    try:
        yield
    except OpdError as error:
        raise OpdError(f"{units}: {error}") from error
