"""Commands that are given the folders of runs, on small runs that differ in recipe and in seed."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import polars as pl
import pytest
import small
import whole_run
from typer.testing import CliRunner

from pipeline.measure.accuracy import gain
from pipeline.store import cache as store
from schemas.config import load_config, parse_config
from stages.run.results import read_evaluation
from stages.run.run import run_of, write_config
from stages.tools.cli import app
from stages.tools.compare import judged_otherwise, kl_of
from stages.tools.folders import open_folder
from stages.tools.inspect import style

pytestmark = pytest.mark.slow
ROUND = {"rounds": 1, "prompts": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with runs a, `recipe` and `seed`, which each differ from a in one key."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.laid_out()
        changes: dict[str, dict[str, Any]] = {
            "a": {},
            "recipe": {"objective": {"recipe": "sampled"}, "weights": {"scheme": "uniform"}},
            "seed": {"seed": 2, "evaluate": {"kl_items": 0}},
        }
        for name, changed in changes.items():
            where = small.written(run=name, rollouts=ROUND, **changed)
            write_config(run_of(load_config(where)))
            whole_run.stages_of(where)
        timings = Path("runs/a/timings")
        timings.mkdir()
        jobs = {"round-0-scores-000": 5, "round-0-scores-001": 7, "eval-0-answers": 2, "fit": 1, "round-0-other-000": 3}
        for job, seconds in jobs.items():
            (timings / f"{job}.tsv").write_text(f"s\th:m:s\n{seconds}\t0\n")
        yield folder


def told(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    return result.output


def test_runs_are_compared(runs: Path) -> None:
    found = json.loads(told("compare", "a", "runs/recipe", "seed", "--json"))
    assert found["config"]["objective.recipe"] == ["hybrid", "sampled", "hybrid"]
    assert found["config"]["seed"] == [1, 1, 2] and "train.learning_rate" not in found["config"]
    a, recipe, seed = found["runs"]
    assert list(a["evaluations"]) == ["0", "1"]
    # What is no stage of this version comes last.
    assert list(a["seconds"].items()) == [("fit", 1), ("scores", 12), ("evaluate", 2), ("other", 3)]
    assert a["teacher_tokens"]["scored"] > 0 and a["disk"]["own"] > a["disk"]["cache"] > 0
    assert recipe["teacher_tokens"]["cache"] > 0 and seed["evaluations"]["1"]["reverse_kl"] is None
    by = {(test["second"], test["of"]): test for test in found["tests"]}
    answers = [read_evaluation(open_folder(Path(name)).phase("eval-1"))[1] for name in ("a", "recipe")]
    expected = gain(*answers, 1)
    same = by["recipe", "accuracy"]
    assert expected and same["paired"] and (same["accuracy"], same["p"]) == (expected["accuracy"], expected["p"])
    assert by["recipe", "sampled_kl"]["paired"] and by["recipe", "sampled_kl"]["items"] == [2, 2]
    # Another seed has other held-out prompts, under the same ids.
    other = by["seed", "accuracy"]
    assert other["items"] == [4, 4] and other["common"] < 2 and not other["paired"]
    assert by["seed", "sampled_kl"]["problem"] == "not measured in both"


def test_a_comparison_in_words(runs: Path) -> None:
    output = " ".join(told("compare", "a", "recipe", "seed").split())
    assert "recipe against a, accuracy on test: " in output and "4 items of both, " in output
    assert "recipe against a, on-policy KL as sampled: " in output and "(2 items of both)" in output
    assert "seed against a, accuracy on test: " in output and "other items, 4 and 4" in output
    assert "on-policy KL as sampled: not compared: not measured in both" in output
    assert "give two or more" in told("compare", "a", status=2)
    assert "no run here (it has no config.yaml)" in told("compare", "a", "nothing", status=2)


def test_the_kl_that_is_compared_is_the_evaluations(runs: Path) -> None:
    for number in (0, 1):
        phase = open_folder(Path("a")).phase(f"eval-{number}")
        found, answers = read_evaluation(phase)
        nats = kl_of(phase, answers)
        assert found.sampled_kl == pytest.approx(nats["nats"].sum() / nats["tokens"].sum(), abs=1e-5)
        assert nats["tokens"].sum() == found.kl_tokens


def test_what_is_judged_otherwise_or_unfinished_is_not_compared(runs: Path) -> None:
    (found, _), (other, _) = (read_evaluation(open_folder(Path(name)).phase("eval-1")) for name in ("a", "recipe"))
    assert judged_otherwise(found, other, "test") is None
    sampled = other.model_copy(update={"samples": 4, "temperature": 1.0})
    assert judged_otherwise(found, sampled, "test") == ("judged otherwise: temperature: first 0.0, second 1.0")
    exact = other.model_copy(update={"scorer": "exact"})
    assert "scorer: first 'source', second 'exact'" in str(judged_otherwise(found, exact, "test"))
    write_config(run_of(load_config(small.written(run="unfinished"))))
    assert "nothing evaluated yet" in told("compare", "a", "unfinished", status=2)


# ---- inspect ----


def test_every_kind_of_file_is_inspected(runs: Path) -> None:
    run = Path("runs/a")
    for kind, place in {
        "prompts": "prompts.parquet",
        "vocabulary": "models/student-vocabulary.parquet",
        "answers": "eval-1/answers.parquet",
        **{kind: f"round-0/{kind}/000.parquet" for kind in ("rollouts", "scores", "units", "weights")},
    }.items():
        found = json.loads(told("inspect", str(run / place), "--json"))
        table = pl.read_parquet(run / place)
        assert (found["kind"], found["rows"], len(found["first"])) == (kind, len(table), min(5, len(table)))
        by_name = {column["name"]: column for column in found["columns"]}
        assert list(by_name) == table.columns and all(column["doc"] for column in by_name.values())
        if kind == "weights":
            assert by_name["advantage"]["mean"] == pytest.approx(table["advantage"].mean(), rel=1e-6)
            assert by_name["student_logp"]["nulls"] == pytest.approx(table["student_logp"].is_null().mean())
        if kind == "rollouts":
            assert by_name["response_ids"]["high"] == table["response_ids"].explode().max()
            assert found["tokens"] == table["response_ids"].list.len().sum()
        if kind == "scores":
            finite = table["tail_logp"].filter(table["tail_logp"].is_finite())
            assert by_name["tail_logp"]["low"] == pytest.approx(finite.min()) and found["links"].startswith(str(runs))
            assert found["tokens"] == len(table) - 4 and by_name["cand_id"]["each"] > 1
            entry = " ".join(told("inspect", found["links"]).split())  # the entry of the cache itself
            assert "what the teacher said of responses" in entry and "identity.teacher.weights" in entry
    units = " ".join(told("inspect", "runs/a/round-0/units").split())
    assert "responses in units that both models have" in units and "every byte is as it was written" in units
    assert "coverage" not in units and "decided" in " ".join(told("inspect", "runs/a/models/student.json").split())


def test_a_run_and_its_phases_are_inspected(runs: Path) -> None:
    found = json.loads(told("inspect", "a", "--json"))
    states = {phase["phase"]: phase["state"] for phase in found["phases"]}
    assert states == {"eval-0": "done", "round-0": "done", "eval-1": "done"}
    assert list(states) == ["eval-0", "round-0", "eval-1"] and found["lies"]["checkpoint"].endswith(
        "round-0/checkpoint"
    )
    evaluation = read_evaluation(open_folder(Path("a")).phase("eval-1"))[0]
    output = " ".join(told("inspect", "runs/a").split())
    assert f"{evaluation.reverse_kl:.3f} nats" in output and "report: runs/a/report.html" in output
    phase = json.loads(told("inspect", "runs/a/round-0", "--json"))
    assert {name: table["rows"] for name, table in phase["tables"].items()}["rollouts"] == 4
    write_config(run_of(load_config(small.written(run="begun"))))
    begun = json.loads(told("inspect", "begun", "--json"))
    assert {phase["state"] for phase in begun["phases"]} == {"not begun"} and len(begun["phases"]) == 4
    assert "no run here" in told("inspect", "nothing", status=2)
    Path("other.txt").write_text("x")
    assert "neither a shard nor an intact record" in " ".join(told("inspect", "other.txt", status=2).split())


def test_a_damaged_shard_is_not_described(runs: Path) -> None:
    target = runs / "damaged.parquet"
    shutil.copy("runs/a/prompts.parquet", target)
    shutil.copy("runs/a/prompts.json", target.with_suffix(".json"))
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    assert "damaged" in told("inspect", str(target), status=2)


def test_a_response_is_shown_unit_by_unit(runs: Path) -> None:
    rollouts, units, weights = (
        pl.read_parquet(f"runs/a/round-0/{table}/000.parquet") for table in ("rollouts", "units", "weights")
    )
    name = rollouts["rollout_id"][1]
    found = json.loads(told("inspect", "a", "--response", name, "--json"))
    own = units.filter(rollout_id=name)
    assert found["phase"] == "round-0" and len(found["units"]) == len(own)
    advantages = weights.filter(rollout_id=name)["advantage"].to_list()
    assert [unit["advantage"] for unit in found["units"]] == pytest.approx(advantages)
    assert [len(unit["teacher_candidates"] or []) for unit in found["units"]] == own["cand_id"].list.len().to_list()
    for by in ("gap", "advantage"):
        output = told("inspect", "runs/a/round-0", "--response", name, "--by", by)
        assert f"coloured by {by}" in output and name in output and output.count("1:1") >= 1
    wrong = " ".join(told("inspect", "a", "--response", "r9", status=2).split())
    assert "a has none of that name; there are 8, such as 'e0-" in wrong


def test_a_units_colour_is_the_stronger_the_further_the_models_are_apart() -> None:
    assert (
        style({"gap": -9.0}, "gap") == "black on rgb(255,0,0)"
        and style({"gap": 2.0}, "gap") == "black on rgb(118,118,255)"
    )
    assert style({"gap": 0.1}, "gap") == "" and style({"gap": None, "advantage": 0.0}, "advantage") == "dim"


# ---- push ----


def test_a_checkpoint_is_sent_without_its_training_states(runs: Path, tmp_path: Path) -> None:
    output = " ".join(told("push", "runs/a/round-0/checkpoint", f"file://{tmp_path}/model").split())
    sent = {
        path.relative_to(tmp_path / "model").as_posix(): path
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "teacher.json"} <= set(sent)
    assert not any("state" in name or name.startswith(".") for name in sent)
    for name, path in sent.items():
        assert path.read_bytes() == Path("runs/a/round-0/checkpoint", name).read_bytes()
    assert f"{len(sent)} files, " in output and "a model" in output
    copy = tmp_path / "damaged"
    shutil.copytree("runs/a/round-0/checkpoint", copy / "checkpoint")
    shutil.copy("runs/a/round-0/checkpoint.json", copy)
    (copy / "checkpoint/state-00000001.safetensors").write_bytes(b"")
    (copy / "checkpoint/optimizer.pt").write_bytes(b"x")
    with (copy / "checkpoint/config.json").open("a") as file:
        file.write(" ")
    wrong = " ".join(told("push", str(copy / "checkpoint"), f"file://{tmp_path}/no", status=2).split())
    assert "its files are not those that" in wrong
    assert not (tmp_path / "no").exists()


def test_a_cache_that_was_sent_is_found_by_its_next_user(runs: Path, tmp_path: Path) -> None:
    told("push", "cache", "memory://shared")
    fs = fsspec.filesystem("memory")
    names = {path.removeprefix("/shared/") for path in fs.find("/shared")}
    entries = {
        path.relative_to("cache").as_posix()
        for kind in store.KINDS
        for path in Path("cache", kind).glob("*.*")
        if path.suffix != ".lock"
    }
    assert entries <= names and "README.md" in names and not any(".part" in name for name in names)
    again = told("push", "cache", "memory://shared")
    assert "1 files, " in again and f"{len(entries)} were there already" in again
    entry = next(Path("cache/scores").glob("*.parquet"))
    empty = tmp_path / "scores" / entry.name
    empty.parent.mkdir()
    assert store.download(empty, "memory://shared") and empty.read_bytes() == entry.read_bytes()


def test_a_run_is_sent_as_a_data_set(runs: Path, tmp_path: Path) -> None:
    told("push", "a", str(tmp_path / "data"))
    card = (tmp_path / "data/README.md").read_text()
    front = json.loads(card.split("---")[1])
    configs = {one["config_name"]: one["data_files"] for one in front["configs"]}
    assert configs["scores"] == "round-*/scores/*.parquet" and set(configs) == {
        "rollouts",
        "scores",
        "units",
        "weights",
    }
    for pattern in configs.values():
        assert len(pl.read_parquet(tmp_path / "data" / pattern)) > 0
    names = {
        path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*") if path.is_file()
    }
    assert not any("checkpoint" in name or "train/" in name for name in names) and "eval-1/answers.parquet" in names
    assert not (tmp_path / "data/round-0/scores/000.parquet").is_symlink()
    values = small.CONFIG | {"run": "fourth", "reuse": [str(tmp_path / "data")]}
    assert run_of(parse_config(values, "here")).reused[0].is_scored


@pytest.mark.parametrize(
    ("path", "destination", "message"),
    [
        ("a", "nowhere", "expected hf://user/name or user/name on the hub"),
        ("a", "hf://name", "expected hf://user/name"),
        ("nothing", "u/n", "nothing to push: expected a checkpoint's folder"),
        ("a", "ftp-nothing://x/y", "cannot write"),
    ],
)
def test_what_cant_be_sent(runs: Path, path: str, destination: str, message: str) -> None:
    assert message in " ".join(told("push", path, destination, status=2).split())
    assert "is no repository of the hub" in " ".join(told("push", "a", "file:///x", "--private", status=2).split())


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a commit of small files asks for."""

    seen: ClassVar[list[tuple[str, Any]]] = []
    public: ClassVar[bool] = False

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = [json.loads(line) for line in text.splitlines()] if "commit" in self.path else json.loads(text)
        type(self).seen.append((self.path, body))
        found: dict[str, Any] = {"errors": [], "warnings": []}
        if self.path == "/api/repos/create":
            found = {"url": f"http://{self.headers['Host']}/user/name", "name": "user/name"}
        elif "preupload" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in body["files"]]
            found = {"files": files}
        elif "commit" in self.path:
            found = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"http://{self.headers['Host']}/user/name/commit/0",
            }
        self._answer(found)

    def do_GET(self) -> None:
        self._answer({"id": "user/name", "private": not type(self).public, "siblings": []})

    def _answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.seen, Hub.public = [], False
    yield Hub
    server.shutdown()
    server.server_close()


def test_what_the_hub_is_asked(runs: Path, hub: type[Hub]) -> None:
    """Against a server of a few lines that takes small files as they are; large ones, which go elsewhere, it doesn't know."""
    told("push", "runs/a/round-0/checkpoint", "hf://user/name", "--private")
    asked = dict(hub.seen)
    made = asked["/api/repos/create"]
    assert (made["name"], made["organization"]) == ("name", "user")
    assert made.get("private") or made["visibility"] == "private"
    header, *files = asked["/api/models/user/name/commit/main"]
    sent = {
        file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files if file["key"] == "file"
    }
    here = Path("runs/a/round-0/checkpoint")
    assert header["key"] == "header" and sent["config.json"] == (here / "config.json").read_bytes()
    assert {path.name for path in here.iterdir()} == set(sent)
    hub.seen.clear()
    told("push", "a", "user/name")
    paths = [path for path, _ in hub.seen]
    assert "/api/datasets/user/name/commit/main" in paths
    hub.public = True
    hub.seen.clear()
    assert "already and public; nothing was sent" in " ".join(
        told("push", "a", "user/name", "--private", status=2).split()
    )
    assert not any("commit" in path for path, _ in hub.seen)
