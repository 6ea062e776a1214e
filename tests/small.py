"""A small whole run on two tiny models: two rounds of two shards, measured before and after; what fault tests break."""

import json
from pathlib import Path
from typing import Any

import tiny
import whole_run

CONFIG: dict[str, Any] = {
    "run": "a",
    "prompts": {"source": "rows.jsonl", "splits": {"examples": 1, "train": 16, "test": 4}},
    "student": {"model": "student", "dtype": "float32"},
    "teacher": {"model": "teacher", "dtype": "float32"},
    "rollouts": {"rounds": 2, "prompts": 8, "max_new_tokens": 6, "top_k": 4, "shard_size": 4},
    "scores": {"support": "union", "k_max": 8},
    "weights": {"scheme": "iw_opd"},
    "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
    "train": {"batch_size": 4, "warmup_steps": 1, "save_every": 1, "keep_last_state": True},
    "evaluate": {"kl_items": 2},
}


def written(**changes: Any) -> Path:
    """The config in the working directory, `section={key: value}` changed."""
    values = dict(CONFIG)
    for name, value in changes.items():
        values[name] = {**CONFIG.get(name, {}), **value} if isinstance(value, dict) else value
    where = Path("config.yaml")
    where.write_text(json.dumps(values))
    return where


def laid_out() -> None:
    """Models and prompts in the working directory."""
    tiny.saved_pair(Path())
    rows = [{"prompt": f"{a} ab 12?", "answer": str(a)} for a in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made() -> None:
    """All of the run, in the working directory."""
    laid_out()
    whole_run.stages_of(written())
