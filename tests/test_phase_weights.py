"""Weights of a phase computed by one process and on a dask cluster: the same bytes, also when a worker is killed on the way."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from distributed import LocalCluster

from pipeline.store.shards import open_writer
from pipeline.weights.phase import Part, compute
from schemas.config import Weights
from schemas.errors import OpdError

COMPARED = [
    Weights(scheme="ideal", credit="baseline"),
    Weights(scheme="signed", credit="gae"),
    Weights(scheme="uniform", credit="residual"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """Six shards of 20 responses."""
    folder = tmp_path_factory.mktemp("phase")
    found = []
    for rollouts, units, weights in tiny.shards(folder, count=6):
        groups = list(units.row_groups())
        with open_writer(units.path, "units", {}, {"rollouts": rollouts.manifest.sha256}) as writer:
            for group in groups:
                writer.write(group)
        found.append(Part(rollouts.path, units.path, None, weights.path))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two worker processes of a thread each."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def written(parts: list[Part], options: Weights, folder: Path) -> list[bytes]:
    """Bytes of the weights and their manifests."""
    moved = [replace(part, weights=folder / part.weights.name) for part in parts]
    figures = compute(moved, options)
    assert figures.responses == 120 and figures.units > 240
    return [path.read_bytes() for part in moved for path in (part.weights, part.weights.with_suffix(".json"))]


@pytest.mark.parametrize("options", COMPARED, ids=lambda options: options.credit)
def test_a_cluster_writes_the_bytes_of_one_process(
    parts: list[Part], cluster: LocalCluster, options: Weights, tmp_path: Path
) -> None:
    alone = written(parts, options, tmp_path / "alone")
    assert len(set(alone)) == 12
    scheduler = cluster.scheduler_address
    assert written(parts, options.model_copy(update={"scheduler": scheduler}), tmp_path / "cluster") == alone


def test_shards_are_weighed_as_one(parts: list[Part], tmp_path: Path) -> None:
    """What the phase's other shards hold counts: one of six weighed alone comes out otherwise, unless nothing is compared."""
    for options in (*COMPARED, Weights()):
        whole, alone = tmp_path / options.credit / "whole", tmp_path / options.credit / "alone"
        written(parts, options, whole)
        compute([replace(parts[0], weights=alone / "000.parquet")], options)
        same = (whole / "000.parquet").read_bytes() == (alone / "000.parquet").read_bytes()
        assert same == (options.credit == "immediate")


@pytest.mark.slow
def test_a_killed_worker_costs_time_only(parts: list[Part], tmp_path: Path) -> None:
    """SIGKILL as soon as the first shard lies there; dask's nanny starts another worker."""
    many = [replace(part, weights=Path(f"{i}-{part.weights.name}")) for i in range(6) for part in parts]

    def paths(folder: Path) -> list[Part]:
        return [replace(part, weights=folder / part.weights) for part in many]

    options = COMPARED[1]
    compute(paths(tmp_path / "alone"), options)
    killed = []
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:

        def kill() -> None:
            while not (finished := list((tmp_path / "cluster").glob("*.parquet"))):
                time.sleep(0.001)
            os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
            killed.append(len(finished))

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        compute(paths(tmp_path / "cluster"), options.model_copy(update={"scheduler": cluster.scheduler_address}))
        finished = len(list((tmp_path / "cluster").glob("*.parquet")))
    assert killed[0] < finished == len(many)
    for part in many:
        name = str(part.weights)
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "cluster" / name).read_bytes()
    assert not list((tmp_path / "cluster").glob(".*"))


def test_no_scheduler_is_an_error_for_people(
    parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.weights.phase.CONNECT_SECONDS", 0.5)
    options = Weights(scheduler="tcp://127.0.0.1:1")
    with pytest.raises(OpdError, match=r"no dask scheduler answers at tcp://127.0.0.1:1 .*start one"):
        compute([replace(parts[0], weights=tmp_path / "000.parquet")], options)
    with pytest.raises(ValueError, match="address of a dask scheduler"):
        Weights(scheduler="127.0.0.1:8786")
