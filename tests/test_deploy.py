"""From any folder: what `opd init` writes, what `opd run` calls, what the wheel holds, and whole runs from it and on Slurm."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from distributed import LocalCluster
from typer.testing import CliRunner

from schemas.config import load_config
from schemas.errors import OpdError
from stages import notebook
from stages.run.shipped import shipped
from stages.tools import init
from stages.tools.cli import app
from stages.tools.run import snakemake

ROOT = Path(__file__).parents[1]
CONTAINER = (ROOT / "Containerfile").read_text()
RULES = re.split(r"^rule (\w+):", (ROOT / "Snakefile").read_text(), flags=re.MULTILINE)
MODELS = {name for name, body in zip(RULES[1::2], RULES[2::2], strict=True) if "model=1," in body}
"""Rules that run a model."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["init", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_init_alone_is_the_default_run(here: Path) -> None:
    assert written()[0] == 0
    assert load_config(Path("config/config.yaml")) == load_config(ROOT / "config/config.yaml")
    status, said = written()
    assert status == 2 and "config/config.yaml: exists already" in said


@pytest.mark.parametrize("rows", [30, 1500])
def test_a_fifth_of_a_file_is_held_out(here: Path, rows: int) -> None:
    lines = [json.dumps({"prompt": f"{number}?", "answer": "1"}) for number in range(rows)]
    Path("rows.jsonl").write_text("\n".join([*lines, *lines]))  # each twice: different prompts count
    status, said = written(
        "mine.yaml", "--student", "a/b", "--teacher", "c: d", "--prompts", "rows.jsonl", "--run", "mine"
    )
    assert status == 0 and "then: opd run --config mine.yaml" in said
    config = load_config(Path("mine.yaml"))
    splits = config.prompts.splits
    assert splits.test == min(rows // 5, 200) and splits.train + splits.test == rows and splits.examples == 0
    assert (config.run, config.student.model, config.teacher.model) == ("mine", "a/b", "c: d")
    assert config.rollouts.prompts == min(1000, splits.train) and config.prompts.answer_field == "answer"
    assert config.train.learning_rate == type(config.train)().learning_rate


def test_init_without_answers_and_with_the_default_teacher(here: Path) -> None:
    Path("q.jsonl").write_text("\n".join(json.dumps({"question": f"{n}?"}) for n in range(10)))
    status, said = written("--prompts", "q.jsonl")
    assert status == 2 and "has no field 'prompt'; it has 'question'" in said and not Path("config").exists()
    assert written("--prompts", "q.jsonl", "--prompt-field", "question")[0] == 0
    config = load_config(Path("config/config.yaml"))
    assert (
        config.prompts.answer_field is None and config.prompts.splits.examples == 2
    )  # that the default teacher is shown
    assert config.teacher == load_config(ROOT / "examples/own-prompts.yaml").teacher


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-field", "answer"], "`prompt_field`, `answer_field` and `tools_field` must differ"),
        (["--answer-field", ""], "`prompts.answer_field`: "),
        (["--answer-field", "nope"], "has no field 'nope'; it has 'prompt', 'gold'"),
        (["--prompts", "promtps.jsonl"], "promtps.jsonl: no such file"),
    ],
)
def test_init_refuses_in_one_line_and_leaves_nothing(here: Path, arguments: list[str], message: str) -> None:
    Path("q.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}?", "gold": "1"}) for n in range(10)))
    given = ["--prompts", "q.jsonl", "--copy", "examples"]
    status, said = written(*given, *arguments)
    assert status == 2 and message in said and [path.name for path in here.iterdir()] == ["q.jsonl"], said
    assert written(*given, "--answer-field", "gold")[0] == 0 and Path("examples").is_dir()
    assert load_config(Path("config/config.yaml")).prompts.answer_field == "gold"


def test_init_takes_data_sets_of_the_hub_on_trust(here: Path) -> None:
    assert written("--prompts", "org/data")[0] == 0
    assert load_config(Path("config/config.yaml")).prompts.splits.train == init.TRAIN


def test_shipped_folders_are_copied_to_be_edited(here: Path) -> None:
    assert written("--copy", "profiles/slurm", "--copy", "examples")[0] == 0
    assert Path("profiles/slurm/config.yaml").read_bytes() == (ROOT / "profiles/slurm/config.yaml").read_bytes()
    assert Path("examples/prompts.jsonl").exists()
    for name in ("../profiles", "profiles/none", "stages"):
        status, said = written("other.yaml", "--copy", name)
        assert status == 2 and "expected one of examples, profiles/default, profiles/gpu, profiles/kubernetes" in said


def test_run_calls_snakemake_with_what_ships(here: Path) -> None:
    Path("mine.yaml").write_text("{}")
    command, environment = snakemake(Path("mine.yaml"), ["--dry-run", "--profile", "profiles/slurm"])
    slurm = str(ROOT / "profiles/slurm")
    assert command[:5] == [sys.executable, "-m", "snakemake", "--configfile", "mine.yaml"]
    assert command[5:] == ["--snakefile", str(ROOT / "Snakefile"), "--dry-run", "--profile", slurm]
    # A module `train` in the working directory hides none of ours, and `python` of the jobs is this one.
    assert environment["PYTHONSAFEPATH"] == "1" and environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert snakemake(Path("mine.yaml"))[0][-2:] == ["--cores", "all"]
    by_profile = [[f"--profile={slurm}"], ["--workflow-profile", slurm]]
    for bound in (["--cores=4"], ["-c", "4"], ["--executor", "slurm"], *by_profile):
        assert "all" not in snakemake(Path("mine.yaml"), bound)[0]
    assert snakemake(Path("mine.yaml"), ["--", "--cores"])[0][-4:] == ["--cores", "all", "--", "--cores"]
    Path("profiles/slurm").mkdir(parents=True)  # one's own goes first
    assert snakemake(Path("mine.yaml"), ["--profile=profiles/slurm"])[0][-1] == "--profile=profiles/slurm"
    with pytest.raises(OpdError, match=r"none\.yaml: no such file; `opd init` writes one"):
        snakemake(Path("none.yaml"))
    for text, message in {
        "": "expected a mapping",
        "- a": "expected a mapping",
        "a: [": "not YAML",
        "a: 1\na: 2": "twice",
    }.items():
        Path("bad.yaml").write_text(text)
        with pytest.raises(OpdError, match=rf"bad\.yaml: .*{message}"):
            snakemake(Path("bad.yaml"))


def test_the_wheel_is_told_of_all_that_ships() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    there = {path for name in ("config", "examples", "profiles") for path in (ROOT / name).rglob("*") if path.is_file()}
    laid = {
        path: folder for folder, globs in told.items() for glob in globs for path in ROOT.glob(glob) if path.is_file()
    }
    assert set(laid) == {path for path in there if "__pycache__" not in path.parts} | {ROOT / "Snakefile"}
    assert all(
        str(path.parent.relative_to(ROOT)) == folder[len("share/offline-opd/") :] or "Snakefile" in path.name
        for path, folder in laid.items()
    )
    assert shipped() == ROOT


def test_the_container_installs_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.search(r"pip install .*'\.\[(.*)\]'", CONTAINER)
    assert installed and set(installed[1].split(",")) <= project["optional-dependencies"].keys()
    version = re.search(r"^FROM .*/python:([\d.]+)-slim$", CONTAINER, re.MULTILINE)
    assert version and project["requires-python"] == f">={version[1]}"


@pytest.mark.parametrize("name", ["slurm", "gpu", "kubernetes"])
def test_profiles_are_told_of_every_rule_that_runs_a_model(name: str) -> None:
    profile = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text())
    assert {"rollouts", "train"} < MODELS and set(profile["set-threads"]) == MODELS | {"outcomes"}
    # By the plugins' own resources: Slurm's refuses a job whose `slurm_extra` says what it manages itself, and Kubernetes' sets
    # limits, which GPUs need, with `scale: 0` alone.
    resources = {"slurm": {"slurm_partition": "gpu", "gpu": 1}}
    resources["kubernetes"] = {"gpu": 1, "gpu_manufacturer": "nvidia", "scale": 0}
    if name in resources:
        assert profile["set-resources"] == dict.fromkeys(MODELS, resources[name])


def test_a_notebook_runs_a_stage_and_opens_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_CACHE", str(here / "cache"))
    small.laid_out()
    config = small.written()
    notebook.run_stage("prompts", config)
    notebook.run_stage("models", str(config), role="student")
    run = notebook.open_run(config)
    assert run.prompts.exists() and run.model_file("student").exists() and len(run.phase("round-0")) == 2
    with pytest.raises(OpdError, match="no stage 'rollout'; there are prompts"):
        notebook.run_stage("rollout", config)


def one_round(where: Path, **changes: Any) -> None:
    """As few jobs as a whole run can have, of what `opd init` wrote."""
    values = yaml.safe_load(where.read_text())
    values["rollouts"] |= {"rounds": 1, "max_new_tokens": 4}
    values |= {
        "evaluate": {"kl_items": 0},
        "coverage": dict.fromkeys(("min_compared", "min_one_to_one", "min_shared_mass"), 0),
    }
    where.write_text(yaml.safe_dump(values | changes))


@pytest.fixture
def opd(tmp_path: Path) -> Path:
    """The command in an environment of its own, from a wheel of the container's sources; what it depends on is lent."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    for name in (name for line in re.findall(r"^COPY (.*) \./", CONTAINER, re.MULTILINE) for name in line.split()):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    lent = sysconfig.get_path("purelib", vars={"base": environment})
    Path(lent, "lent.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    return environment / "bin/opd"


@pytest.mark.slow
def test_from_an_empty_folder_with_the_wheel_alone(opd: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside modules of one's own that are called as ours are; two dask workers compute the weights."""
    place = here / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    small.laid_out()
    for name in ("train", "stages", "pipeline", "schemas"):
        Path(f"{name}.py").write_text("raise SystemExit('the wrong one')")
    environment = {**os.environ, "OPD_CACHE": str(here / "cache")}
    environment.pop("PYTHONPATH", None)
    given = ["--student", "student", "--teacher", "teacher", "--prompts", "rows.jsonl"]
    subprocess.run([opd, "init", *given], env=environment, check=True)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        before = cluster.scheduler.transition_counter
        one_round(Path("config/config.yaml"), weights={"scheduler": cluster.scheduler_address})
        done = subprocess.run([opd, "run"], env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert cluster.scheduler.transition_counter > before
    assert Path("runs/default/report.html").exists() and "report.html" in done.stderr + done.stdout


@pytest.mark.slurm
@pytest.mark.skipif("OPD_SLURM" not in os.environ, reason="no cluster: .ci/slurm starts one")
def test_on_slurm_by_the_shipped_profile(here: Path) -> None:
    """Rules that run a model get what it asks for, a job each; of what is quick, several rules share a job."""
    small.laid_out()
    assert written("mine.yaml", "--student", "student", "--teacher", "teacher", "--prompts", "rows.jsonl")[0] == 0
    one_round(Path("mine.yaml"))
    soon = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
    without_accounts = ["--slurm-no-account", "--slurm-status-command", "squeue"]
    together = {"before": ("prompts", "models", "fit"), "tables": ("units", "weights", "coverage")}
    together["after"] = ("diagnostics", "report")
    groups = ["--groups", *(f"{rule}={group}" for group, rules in together.items() for rule in rules)]
    options = ["--profile", "profiles/slurm", *soon, *without_accounts, *groups]
    command, environment = snakemake(Path("mine.yaml"), options)
    environment["OPD_CACHE"] = str(here / "cache")
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("runs/default/report.html").exists()
    columns = "--Format=Comment:80,Partition:20,NumCPUs:10,tres-per-job:30,State:20"
    listed = subprocess.run(
        ["squeue", "--states=all", "--noheader", columns], text=True, capture_output=True, check=True
    )
    jobs = [line.split() for line in listed.stdout.splitlines() if line.strip()]
    given = {comment.removeprefix("rule_").partition("_")[0]: rest for comment, *rest in jobs}
    models = {rule: ["gpu", "8", "gres:gpu:1", "COMPLETED"] for rule in ("rollouts", "scores", "train", "evaluate")}
    assert len(jobs) == 8 and {rule: given.get(rule) for rule in models} == models, listed.stdout
    others = [rest for rule, rest in given.items() if rule not in models]
    assert all(rest[0] == "cpu" and rest[2:] == ["N/A", "COMPLETED"] for rest in others) and len(others) == 3
