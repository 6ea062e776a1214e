"""With a storage plugin of Snakemake's: each job sees what its rule declares, and nothing else of the run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import whole_run

from pipeline.store.records import write_record
from schemas.config import load_config
from schemas.errors import OpdError
from stages import models
from stages.notebook import run_stage
from stages.run import context
from stages.run.run import open_run, run_of, write_config

ROOT = Path(__file__).parents[1]
FS = pytest.mark.skipif(
    importlib.util.find_spec("snakemake_storage_plugin_fs") is None, reason="no snakemake-storage-plugin-fs"
)
OPTIONS = {
    "--phase": "phase",
    "--role": "role",
    "--checkpoint": "checkpoint",
    "--shard": "shard",
    "--round": "round_index",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def planned(where: Path, prefix: str) -> list[dict[str, Any]]:
    """The jobs of a run with the storage plugin `fs`, in an order in which they can run, as Snakemake plans them."""
    from snakemake.api import SnakemakeApi
    from snakemake.settings import types

    quiet = types.OutputSettings(quiet={types.Quietness.ALL})
    stored = types.StorageSettings(default_storage_provider="fs", default_storage_prefix=prefix)
    with SnakemakeApi(quiet) as api:
        workflow = api.workflow(
            types.ResourceSettings(cores=1),
            types.ConfigSettings(configfiles=[where]),
            stored,
            snakefile=ROOT / "Snakefile",
        )
        workflow.dag().execute_workflow(executor="dryrun")
        jobs = [job for level in workflow._workflow.dag.toposorted() for job in level if job.output]
        return [{"command": job.shellcmd, "input": list(job.input), "output": list(job.output)} for job in jobs]


def called(command: str) -> tuple[str, dict[str, Any]]:
    """A job's stage and options."""
    given = {OPTIONS[name]: value for name, value in pairwise(command.split()) if name in OPTIONS}
    numbers = {name: int(given[name]) for name in ("shard", "round_index") if name in given}
    return re.findall(r"stages\.(\w+)", command)[0], given | numbers


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}.{key}")
    elif one != other:
        yield path


@FS
@pytest.mark.slow
def test_stages_read_what_their_rules_declare_and_nothing_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds with a replayed one after fine-tuning, each job in a folder with its inputs alone: the figures are those of
    the run in one."""
    small.laid_out()
    loss = {"objective": {"reference_kl": 0.1, "reference": "initial"}, "weights": {"gate": {"wrong": 0.5}}}
    trained = {"sft": {"prompts": 6}, "train": {"lora": {"rank": 2, "alpha": 4}}}
    where = small.written(rollouts={"replay": 1}, **loss, **trained)
    prefix = here / "bucket"
    local = Path(".snakemake/storage/fs") / prefix.relative_to("/")
    run = run_of(load_config(where))
    for number, job in enumerate(planned(where, str(prefix))):
        alone = here / f"node-{number}"
        for path in map(Path, job["input"]):
            if path.is_relative_to(local):  # else it is the user's own
                copied(prefix / path.relative_to(local), alone / path.relative_to(local))
        write_config(replace(run, root=alone / run.root))
        stage, options = called(job["command"])
        run_stage(stage, alone / run.root / "config.yaml", **options)
        for path in (Path(each).relative_to(local) for each in job["output"]):
            copied(alone / path, prefix / path)
        shutil.rmtree(alone)
    assert str(here) not in (prefix / run.root / "round-0/checkpoint.json").read_text()
    monkeypatch.setenv("OPD_CACHE", str(here / "another"))  # else nothing is scored
    whole_run.stages_of(where)
    stored, shared = (json.loads((folder / run.root / "summary.json").read_text()) for folder in (prefix, here))
    assert not list(differing(stored, shared))


@FS
def test_a_plan_with_storage_refuses_what_lies_in_another_run(here: Path) -> None:
    small.laid_out()
    where = small.written()
    (here / "runs/other/round-0/rollouts").mkdir(parents=True)
    (here / "runs/other/round-0/rollouts/000.parquet").touch()
    values = json.loads(where.read_text()) | {"reuse": ["runs/other"]}
    where.write_text(json.dumps(values))
    with pytest.raises(SystemExit, match="reuse: jobs don't see another run's folder with a storage plugin"):
        planned(where, str(here / "bucket"))


def test_a_model_is_fetched_where_it_is_not_at_hand_and_must_be_the_same(here: Path) -> None:
    small.laid_out()
    where = small.written()
    models.main("student", where)
    run = open_run(where)
    found = context.prepared(run, "student")
    write_record(run.model_file("student"), found.model_copy(update={"path": "/another/machine/student"}))
    assert context.prepared(run, "student", weights=False).path == "/another/machine/student"
    assert context.prepared(run, "student") == found and context.policy(run, 0).load()
    tiny.saved(Path("student"), [("1", "2")])
    with pytest.raises(
        OpdError, match=r"models/student\.json: student is another model here than where it was prepared"
    ):
        context.prepared(run, "student")


SUBMIT = """#!/bin/bash
node=$(mktemp -d {nodes}/XXXXXX)
cp "$1" "$node/job" && cd "$node" || exit 1
OPD_CACHE="$node/cache" HOME="$node" bash job >log 2>&1
echo $? >status
echo "$node"
"""
"""Each job in a folder of its own, with a cache of its own, is done when it is submitted."""
STATUS = """#!/bin/bash
[ "$(cat "$1/status")" = 0 ] && echo success || echo failed
"""


@FS
@pytest.mark.storage
@pytest.mark.skipif(
    shutil.which("rsync") is None or importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None,
    reason="needs rsync and snakemake-executor-plugin-cluster-generic",
)
def test_jobs_that_share_nothing_but_the_storage(here: Path) -> None:
    """The tiny run from prompts to report, by the plugin `fs`; it goes on from what the storage has."""
    small.laid_out()
    places = {
        "student": {"model": str(here / "student")},
        "teacher": {"model": str(here / "teacher")},
    }  # as in an image
    of_one_round = {"rollouts": {"rounds": 1, "prompts": 4, "max_new_tokens": 4}, "evaluate": {"kl_items": 0}}
    where = small.written(**places, **of_one_round)
    shutil.copy(ROOT / "Snakefile", here)  # sources are sent from the working directory
    copied(ROOT / "config/environment.yaml", here / "config/environment.yaml")
    nodes = here / "nodes"
    nodes.mkdir()
    for name, text in {"submit": SUBMIT.format(nodes=nodes), "status": STATUS}.items():
        Path(name).write_text(text)
        Path(name).chmod(0o755)
    together = {"sampled": ("fit", "rollouts", "scores", "units", "weights", "coverage"), "trained": ("train",)}
    together["told"] = ("evaluate", "diagnostics", "report")
    groups = [f"{rule}={group}" for group, rules in together.items() for rule in rules]
    command = [sys.executable, "-m", "snakemake", "--configfile", where, "--jobs", "1", "--local-cores", "1"]
    command += ["--executor", "cluster-generic", "--cluster-generic-submit-cmd", here / "submit"]
    command += ["--cluster-generic-status-cmd", here / "status", "--seconds-between-status-checks", "1"]
    command += ["--default-storage-provider", "fs", "--default-storage-prefix", here / "bucket"]
    command += ["--shared-fs-usage", "none", "--job-deploy-sources", "--groups", *groups]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*until: str) -> None:
        done = subprocess.run([*command, *until], env=environment, text=True, capture_output=True, check=False)
        logs = "".join(log.read_text() for log in nodes.glob("*/log"))
        assert done.returncode == 0, f"{done.stderr}\n{logs}"

    stored = here / "bucket/runs/a"
    run("--until", "train")
    assert len(list(nodes.glob("*"))) == 2 and (stored / "round-0/checkpoint/model.safetensors").exists()
    shutil.rmtree(here / ".snakemake/storage")
    run()
    assert len(list(nodes.glob("*"))) == 3 and (stored / "report.html").exists()
    assert not list((here / "runs").rglob("*.parquet"))
