"""The trainer's stream and loop: every response once, in an order that only the seed decides; resume to the bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from schemas.config import Config, parse_config
from schemas.errors import OpdError
from train.checkpoint import export, load_state
from train.loop import Progress, train_round
from train.stream import batches, count_batches

STOP = torch.from_numpy(tiny.STOP.astype("int64"))


def config(**train: Any) -> Config:
    values = {"batch_size": 6, "micro_batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-3, **train}
    return parse_config(
        {"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}, "train": values}, "test"
    )


def start(folder: Path, shards: Any, settings: Config, **changes: Any) -> None:
    """Train a tiny model for one round."""
    steps = count_batches(shards, settings.train.batch_size) * settings.train.epochs
    arguments: dict[str, Any] = {
        "model": tiny.model(),
        "stop": STOP,
        "shards": shards,
        "config": settings,
        "round_index": 0,
        "progress": Progress(0, steps),
        "start_from": None,
        "state_path": folder / "state.safetensors",
        "metrics_path": folder / "metrics.jsonl",
        "identity": {"run": 1},
    }
    train_round(**{**arguments, **changes})


def run(folder: Path, shards: Any, settings: Config, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a tiny model for one round; returns the final state."""
    start(folder, shards, settings, **changes)
    return load_file(folder / "state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(stream: Any) -> list[str]:
    return [name for parts in stream for part in parts for name in part.responses]


def test_every_response_comes_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path)
    first = names(batches(shards, 6, 4, seed=1, epoch=0))
    assert sorted(first) == sorted(f"s{s}-r{r}" for s in range(2) for r in range(20))
    assert first == names(batches(shards, 6, 4, seed=1, epoch=0))
    assert first != names(batches(shards, 6, 4, seed=1, epoch=1)) != names(batches(shards, 6, 4, seed=2, epoch=0))
    sizes = [sum(len(part.responses) for part in parts) for parts in batches(shards, 6, 4, 1, 0)]
    assert sizes == [6] * 6 + [4] and len(sizes) == count_batches(shards, 6)
    assert max(len(part.responses) for parts in batches(shards, 6, 4, 1, 0) for part in parts) == 4


def test_tables_that_are_not_in_step_are_refused(tmp_path: Path) -> None:
    (a, b) = tiny.shards(tmp_path)
    with pytest.raises(OpdError, match="run the weights stage again"):
        names(batches([(a[0], a[1], b[2])], 6, 6, 1, 0))
    with pytest.raises(OpdError, match="run the units stage again"):
        names(batches([(a[0], b[1], b[2])], 6, 6, 1, 0))


def test_training_lowers_the_loss_and_micro_batches_do_not_matter(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path)
    whole = run(tmp_path / "whole", shards, config(micro_batch_size=6, epochs=8))
    cut = run(tmp_path / "cut", shards, config(micro_batch_size=1, epochs=8))
    for name, value in whole.items():
        torch.testing.assert_close(value, cut[name], rtol=1e-3, atol=2e-4)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * 8
    assert sum(line["loss"] for line in lines[-7:]) < 0.9 * sum(line["loss"] for line in lines[:7])


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    shards, settings = tiny.shards(tmp_path), config(save_every=2, epochs=2)
    straight = run(tmp_path / "straight", shards, settings)

    class Interrupted(Exception):
        pass

    for stop_at in (0, 1, 2, 5, 9, 13):
        folder = tmp_path / f"at-{stop_at}"

        def interrupt(figures: dict[str, float], last: int = stop_at) -> None:
            if figures["step"] == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(folder, shards, settings, report=interrupt)
        assert same(run(folder, shards, settings), straight)
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(14))


def test_the_next_round_goes_on_from_the_optimiser_of_the_last(tmp_path: Path) -> None:
    """Two rounds of one epoch are one round of two epochs when the schedule and the order agree."""
    shards = tiny.shards(tmp_path)
    flat = {"min_lr_ratio": 1.0, "warmup_steps": 0}
    first = tmp_path / "first" / "state.safetensors"
    run(tmp_path / "first", shards, config(**flat))
    model = tiny.model()
    second = run(tmp_path / "second", shards, config(**flat), model=model, start_from=first, progress=Progress(7, 14))
    tensors, about = load_state(tmp_path / "second" / "state.safetensors")
    assert about["step"] == 7 and same(tensors, second)
    assert all(float(v) == 14 for k, v in second.items() if k.startswith("step/"))
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(parameter.detach(), second[f"master/{name}"])


def test_a_changed_round_starts_anew_and_a_damaged_state_is_refused(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path)
    first = run(tmp_path, shards, config())
    again = run(tmp_path, shards, config(learning_rate=2e-3), identity={"run": 2})
    fresh = run(tmp_path / "fresh", shards, config(learning_rate=2e-3), identity={"run": 2})
    assert same(again, fresh) and not same(again, first)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OpdError, match="training state is damaged"):
        run(tmp_path, shards, config())


def test_a_diverging_step_is_told_and_not_saved(tmp_path: Path) -> None:
    model = tiny.model()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(OpdError, match="training diverged: the gradient norm is nan"):
        run(tmp_path, tiny.shards(tmp_path), config(), model=model)
    assert not (tmp_path / "state.safetensors").exists()


def test_the_export_loads_and_says_the_same(tmp_path: Path, smollm2: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny.model()
    ref = export(model, smollm2.tokenizer, tmp_path / "checkpoint", "# card\n", "test")
    loaded = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(ref.path)("hello").input_ids == smollm2.tokenizer("hello").input_ids
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "# card\n"
    again = export(model, smollm2.tokenizer, tmp_path / "checkpoint", "# card\n", "test")
    assert again == ref and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_killed_at_any_step_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL of the training process at several moments, then once more to the end."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_train as t, tiny\n"
        "folder = Path(sys.argv[2]); shards = tiny.shards(folder / 'data')\n"
        "def report(f): print(f['step'], flush=True); time.sleep(.02)\n"
        "t.run(folder, shards, t.config(save_every=1, epochs=6), report=report)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True)
    kills = 0
    for step in (0, 3, 4, 11, 20, 33):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for line in process.stdout:
            if int(line) >= step:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert kills == 6
    straight, killed = (load_file(tmp_path / name / "state.safetensors") for name in ("straight", "killed"))
    assert same(straight, killed)
