"""The command that the docs print for benchmarks, once, on a checkpoint of the same files and classes as a run's."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("lm_eval"), reason="lm-eval isn't installed: pip install 'offline-opd[lm-eval]'")
def test_the_printed_command_evaluates_a_checkpoint_without_a_network(tmp_path: Path) -> None:
    printed = re.search(
        r"<!-- lm-eval command -->\n```bash\n(.*?)\n```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL
    )
    assert printed
    tiny.saved(tmp_path / "checkpoint", [])
    command = printed[1].replace("runs/default/round-2/checkpoint", str(tmp_path / "checkpoint"))
    command = command.replace("runs/default/lm-eval", str(tmp_path / "out"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        shlex.split(command), cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    rows = len((ROOT / "examples/lm-eval/sums.jsonl").read_text().splitlines())
    assert found["n-samples"]["sums"] == {"original": rows, "effective": rows}
    # Random weights hardly get a sum right.
    assert 0 <= found["results"]["sums"]["exact_match,last-number"] < 0.5
    assert found["config"]["model_args"]["pretrained"] == str(tmp_path / "checkpoint")
