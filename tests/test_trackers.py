"""Trackers: what was logged is there, and a run that was killed goes on in the same log."""

import sqlite3
import sys
from pathlib import Path

import pytest

from schemas.errors import OpdError
from train.trackers import PROJECT, trackers

ABOUT = {"seed": 1, "train": {"betas": [0.9, 0.95]}}


def log_twice(name: str, folder: Path) -> None:
    """Steps 0 to 4, then 3 to 7, as a run does that was killed after step 4 and had saved step 3."""
    for steps in (range(5), range(3, 8)):
        with trackers([name], folder, "default", ABOUT) as log:
            for step in steps:
                log({"loss": step / 2, "sampled_kl": 1.0}, step)


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_twice("tensorboard", tmp_path)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss", "sampled_kl"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(step, step / 2) for step in range(8)]


def test_fine_tuning_has_a_log_of_its_own(tmp_path: Path) -> None:
    """Its steps count from 0, as the rounds' do: in one log these would stand in their place."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for part, steps in (("sft", range(4)), ("", range(2))):
        with trackers(["tensorboard"], tmp_path, "default", ABOUT, part) as log:
            for step in steps:
                log({"loss": step / 2}, step)
    for folder, steps in (("tensorboard", range(2)), ("tensorboard/sft", range(4))):
        found = events.EventAccumulator(str(tmp_path / folder))
        found.Reload()
        assert [event.step for event in found.Scalars("loss")] == list(steps)


def test_trackio_goes_on_in_the_same_run(tmp_path: Path) -> None:
    trackio_utils = pytest.importorskip("trackio.utils")
    log_twice("trackio", tmp_path)
    with sqlite3.connect(trackio_utils.TRACKIO_DIR / f"{PROJECT}.db") as database:
        rows = database.execute("select distinct run_name, step from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1 and [step for _, step in rows] == list(range(8))


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_twice("wandb", tmp_path)
    with trackers(["wandb"], tmp_path, "default", ABOUT, "sft") as log:
        log({"loss": 1.0}, 0)
    files = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(files) == 3 and len(set(files)) == 2, "the file is named by the run's id"
    assert sum(name.startswith("run-default-sft-") for name in files) == 1


def test_a_missing_package_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(OpdError, match=r"wandb needs a package.*offline-opd\[trackers\]"),
        trackers(["wandb"], tmp_path, "r", {}),
    ):
        raise AssertionError("it opened")


def test_nothing_asked_for_nothing_written(tmp_path: Path) -> None:
    with trackers([], tmp_path, "default", ABOUT) as log:
        log({"loss": 1.0}, 0)
    assert not list(tmp_path.iterdir())
