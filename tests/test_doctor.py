"""`opd doctor` on a good config and on bad ones, each of which has a line of its own; what it estimates, by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from schemas.config import parse_config
from stages.run import room
from stages.tools import doctor
from stages.tools.cli import app
from stages.tools.doctor import misfits
from stages.tools.estimates import Sizes, disk_needs, memory_needs, tokens_of, weights_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tiny models and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    for name in tiny.saved_pair(tmp_path):
        changed(name, "config.json", max_position_embeddings=40)
    rows = [{"prompt": f"{i} ab?", "answer": str(i), "word": "blue"} for i in range(30)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def changed(folder: str, file: str, **values: Any) -> None:
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": "r",
        "prompts": {"source": "p.jsonl", "splits": {"examples": 1, "train": 16, "test": 4}},
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "rollouts": {"rounds": 2, "prompts": 8, "max_new_tokens": [8, 16]},
        "train": {"micro_batch_tokens": 64},
        "evaluate": {"kl_items": 2},
    }
    return values | {
        name: values.get(name, {}) | given if isinstance(given, dict) else given for name, given in changes.items()
    }


def examined(*options: str, status: int, **changes: Any) -> dict[str, Any]:
    """What doctor says of a config, as JSON."""
    Path("c.yaml").write_text(json.dumps(config(**changes)))
    result = CliRunner().invoke(app, ["doctor", "--config", "c.yaml", "--json", *options])
    assert result.exit_code == status, result.output
    found: dict[str, Any] = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    return found


def test_a_good_config(place: Path) -> None:
    found = examined(status=0)
    lines = {check["name"]: check for check in found["checks"]}
    assert {check["status"] for check in found["checks"]} == {"ok"}
    order = ["python", "packages", "processor", "gpu", "config", "extras", "own code", "reuse", "prompts", "scorer"]
    order += ["student", "student's prompt", "teacher", "teacher's prompt", "fit", "memory", "speed", "time"]
    assert list(lines) == [*order, "disk, cache", "disk, run"]
    assert "exact bytes of 256 tokens; stops at '<|end|>'; float32" in lines["student"]["told"]
    assert "source reads 4 references of 4 held-out prompts" in lines["scorer"]["told"]
    student, teacher = found["notes"].values()
    assert student == teacher and student.endswith(" ab?")  # neither has a chat template
    rates = {name: float(rate.replace(",", "")) for name, rate in _rates(lines["speed"]["told"])}
    assert rates.keys() == {"rollouts", "train", "scores"} and all(rate > 10 for rate in rates.values())
    assert not Path("runs").exists()


def _rates(told: str) -> list[tuple[str, str]]:
    return [
        (part.split()[0], part.split()[1]) for part in told.split(" (", maxsplit=1)[0].split(", ") if "tokens/s" in part
    ]


def with_lower_case() -> None:
    """A tokenizer that reads other bytes than the text's."""
    changed("teacher", "tokenizer.json", normalizer={"type": "Lowercase"})


def with_nan() -> None:
    path = Path("student/model.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, path, {"format": "pt"})


def with_a_short_context() -> None:
    changed("teacher", "config.json", max_position_embeddings=18)


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("config", None, {"train": {"lr": 1}}, "unknown key `train.lr`"),
    ("extras", None, {"train": {"trackers": ["trackio"]}}, "pip install 'offline-opd[trackers]'"),
    ("own code", None, {"evaluate": {"scorer": "mine:judge"}}, "no module 'mine' in the working directory"),
    ("prompts", None, {"prompts": {"source": "p.jsonl", "prompt_field": "question"}}, "no field 'question'"),
    ("scorer", None, {"prompts": {"source": "p.jsonl", "answer_field": "word"}}, "none of the"),
    ("student", None, {"student": {"model": "./nowhere"}}, "no such folder"),
    ("student", with_nan, {}, "NaN"),
    ("teacher", with_lower_case, {}, "does not spell plain text"),
    ("teacher", None, {"teacher": {"model": "teacher", "stop": ["€€"]}}, "no token of"),
    ("teacher's prompt", None, {"teacher": {"model": "teacher", "prompt": "{{ nothing }}"}}, "'nothing' is undefined"),
    ("fit", with_a_short_context, {}, "leaves room for"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "changes", "message"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)]
)
def test_what_would_stop_a_run_has_a_line(
    place: Path, name: str, damage: Any, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage:
        damage()
    if name == "extras":
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda package: None)
    if "prompts" in changes:
        changes = {"prompts": config()["prompts"] | changes["prompts"]}
    found = examined("--no-measure", status=1, **changes)
    wrong = {check["name"]: check["told"] for check in found["checks"] if check["status"] == "error"}
    assert message in wrong[name], wrong
    # What follows from it may fail too; what comes before does not.
    assert next(iter(wrong)) == name


def test_without_a_config_the_machine_is_looked_at(place: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "ok      python: 3." in result.output
    assert "warning config: none given" in result.output and "processor: " in result.output


def test_a_disk_that_is_full_or_not_ours(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(Path(folder).resolve())
        return SimpleNamespace(free=10)

    monkeypatch.setattr(room.shutil, "disk_usage", usage)
    source = Path("runs/other/round-0/rollouts")  # without scores, so that the teacher is needed
    source.mkdir(parents=True)
    (source / "000.parquet").touch()
    found = examined("--no-measure", status=1, reuse=["runs/other"], evaluate={"kl_items": None})
    assert asked[-2:] == [place, place / "runs"]  # the cache isn't there yet
    told = {check["name"]: check["told"] for check in found["checks"] if check["status"] == "error"}
    assert told.keys() == {"disk, cache", "disk, run"} and "where 0.00 MB are free: make room" in told["disk, run"]
    monkeypatch.setattr(doctor, "os", SimpleNamespace(access=lambda *_: False, W_OK=2, cpu_count=lambda: 2))
    assert "can't be written; set OPD_CACHE" in str(examined("--no-measure", status=1))


def test_models_that_are_too_large_for_this_machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (1000.0, "memory", 1000.0))
    (line,) = (check for check in examined("--no-measure", status=0)["checks"] if check["name"] == "memory")
    assert line["status"] == "warning" and "take a smaller model" in line["told"]


def test_packages_of_another_version() -> None:
    assert misfits([Requirement("numpy>=1"), Requirement("pip")]) == []
    assert misfits([Requirement("numpy>=99")])[0].endswith("is here, numpy>=99 is needed")
    assert misfits([Requirement("no-such-package>=1")]) == ["no-such-package>=1 is not here"]


def test_estimates_by_hand(place: Path) -> None:
    rollouts, train = {"samples": 3, "replay": 1, "top_k": 5}, {"epochs": 2, "keep_states": 2}
    chosen = parse_config(config(rollouts=rollouts, train=train), "here")
    tokens = tokens_of(chosen, kl_items=2, checkpoints=2)
    rounds = 8 * 3 * (8 + 16)
    assert tokens == {"rollouts": rounds + 2 * 16 * (4 + 2), "scores": rounds + 2 * 16 * 2, "train": 2 * rounds * 2}
    student = load_file("student/model.safetensors")
    sizes = {"student": weights_of(Path("student")), "teacher": Sizes(1000, 4000)}
    parameters = sum(tensor.numel() for tensor in student.values())
    assert sizes["student"] == Sizes(parameters, Path("student/model.safetensors").stat().st_size)
    needs = memory_needs(chosen, sizes, {"student": 2, "teacher": 4}, {"student": 257, "teacher": 260})
    assert needs["training"] == parameters * (2 + 16) + 3 * 4 * 64 * 257
    assert needs["scoring"] == 4000 + 4 * 1024 * 260
    disk = disk_needs(chosen, tokens, sizes)
    assert disk["cache"] == pytest.approx(tokens["scores"] * (12 + 2.2 * 128) + (40 + 2 * 5) * tokens["rollouts"])
    states = 3 * parameters * 12 + 2 * sizes["student"].bytes
    assert disk["run"] == pytest.approx(disk["cache"] + states)
