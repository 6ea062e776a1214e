"""The trainer's loop and checkpoints; resume to the bit. Its stream: test_stream."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import typer

from pipeline.models import load_model
from schemas.config import Config, parse_config
from schemas.errors import OpdError, Stopped
from stages.run.card import figures
from train.checkpoint import export, final_state, load_state
from train.loop import Progress, train_round, train_step
from train.optimiser import MasterAdamW
from train.policy import unit_logps
from train.recipes import losses
from train.states import state_path, states
from train.stream import batches, count_steps

STOP = torch.from_numpy(tiny.STOP.astype("int64"))


def config(**train: Any) -> Config:
    values = {"batch_size": 6, "micro_batch_tokens": 40, "warmup_steps": 2, "learning_rate": 1e-3, **train}
    return parse_config(
        {"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}, "train": values}, "test"
    )


def start(folder: Path, shards: Any, settings: Config, **changes: Any) -> None:
    """Train a tiny model for one round."""
    steps = count_steps(shards, settings.train.batch_size) * settings.train.epochs
    arguments: dict[str, Any] = {
        "model": None if "model" in changes else tiny.model(),
        "stop": STOP,
        "shards": shards,
        "config": settings,
        "round_index": 0,
        "progress": Progress(0, steps, steps),
        "start_from": None,
        "folder": folder,
        "identity": {"run": 1},
    }
    train_round(**{**arguments, **changes})


def run(folder: Path, shards: Any, settings: Config, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a tiny model for one round; returns the final state."""
    start(folder, shards, settings, **changes)
    return final_state(folder)[0]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of_states(folder: Path) -> list[int]:
    return [load_state(path)[1]["step"] for path in states(folder)]


def stop_after(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: len(metrics(folder)) >= step


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_loss_and_micro_batches_do_not_matter(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path)
    whole = run(tmp_path / "whole", shards, config(micro_batch_tokens=1000, epochs=8))
    cut = run(tmp_path / "cut", shards, config(micro_batch_tokens=1, epochs=8))
    for name, value in whole.items():
        torch.testing.assert_close(value, cut[name], rtol=1e-3, atol=2e-4)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * 8
    assert sum(line["loss"] for line in lines[-7:]) < 0.9 * sum(line["loss"] for line in lines[:7])


@pytest.mark.parametrize("recipe", ["hybrid", "strict_1to1", "simct", "sampled"])
def test_what_the_loss_is_made_of_is_told_apart(recipe: str, tmp_path: Path) -> None:
    """Each part's mean over its own units, unweighted, over several micro-batches; the loss is the weighted sum of both."""
    settings = config().model_copy(update={"objective": tiny.objective(recipe=recipe)})
    shards, model, optimiser = tiny.shards(tmp_path), tiny.model(), MasterAdamW(tiny.model(), settings.train)
    (step,) = batches(shards, 40, 60, 0, range(1))
    step = replace(step, parts=list(step.parts))
    found = train_step(model, STOP, step, optimiser, 0.0, settings)
    every: dict[bool, list[float]] = {True: [], False: []}
    loss = 0.0
    for part in step.parts:
        with torch.no_grad():
            scored = losses(unit_logps(model, part, STOP), part, settings.objective)
        one_to_one = ((part.s_len == 1) & (part.t_len == 1)).tolist()
        for value, used, one, weight in zip(scored.loss.tolist(), scored.used, one_to_one, part.weight, strict=True):
            if used:
                every[{"sampled": False, "simct": True}.get(recipe, one)].append(value)
                loss += float(weight) * value / step.units
    assert step.passes > 3 and found["loss"] == pytest.approx(loss, rel=1e-5)
    for name, values in (("divergence", every[True]), ("surrogate", every[False])):
        assert (name in found) == bool(values)
        assert not values or found[name] == pytest.approx(np.mean(values), rel=1e-5)
    assert all(value > 0 for value in every[True])
    assert found["used_share"] == pytest.approx(sum(map(len, every.values())) / step.units)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    shards, settings = tiny.shards(tmp_path), config(save_every=2, epochs=2)
    straight = run(tmp_path / "straight", shards, settings, workers=2)

    class Interrupted(Exception):
        pass

    for stop_at in (0, 5, 13):  # before any state, after some, at the end; each with another number of workers
        folder = tmp_path / f"at-{stop_at}"

        def interrupt(figures: dict[str, float], last: int = stop_at) -> None:
            if figures["step"] == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            run(folder, shards, settings, report=interrupt, workers=stop_at % 3)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
        assert same(run(folder, shards, settings), straight)
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(14))


def test_the_next_round_goes_on_from_the_optimiser_of_the_last(tmp_path: Path) -> None:
    """Two rounds of one epoch are one round of two epochs when the schedule and the order agree."""
    shards = tiny.shards(tmp_path)
    flat = {"min_lr_ratio": 1.0, "warmup_steps": 0}
    first = tmp_path / "first"
    run(first, shards, config(**flat))
    model = tiny.model()
    second = run(
        tmp_path / "second", shards, config(**flat), model=model, start_from=first, progress=Progress(7, 7, 14)
    )
    tensors, about = load_state(state_path(tmp_path / "second", 7))
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
    path = state_path(tmp_path, 7)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OpdError, match="training state is damaged"):
        run(tmp_path, shards, config())


def test_the_last_states_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "data")
    there: list[list[int]] = []

    def look(_: Any) -> None:
        there.append(steps_of_states(tmp_path))

    run(tmp_path, shards, config(save_every=2, epochs=2, keep_states=3), report=look)
    assert there[2] == [2] and there[3] == [4, 2] and there[7] == [8, 6, 4] and there[9] == [10, 8, 6]
    assert steps_of_states(tmp_path) == [14, 12, 10]
    # Another round in the same folder: its states are not ranked with these.
    names = (".state-00000002.safetensors.elsewhere.1.1.tmp", ".tmpMqnJWX")  # safetensors' own is the latter
    left = [state_path(tmp_path, 2).with_name(name) for name in names]
    for path in left:
        path.touch()
    run(tmp_path, shards, config(save_every=5, keep_states=3), identity={"run": 2})
    assert steps_of_states(tmp_path) == [7, 5] and not any(path.exists() for path in left)


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    shards, settings = tiny.shards(tmp_path / "data"), config(save_every=2)
    straight = run(tmp_path / "straight", shards, settings)
    folder = tmp_path / "damaged"
    with pytest.raises(Stopped, match="step 5 of 7 is saved"):
        run(folder, shards, settings, stop_asked=stop_after(folder, 5))
    assert steps_of_states(folder) == [5, 4]

    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content[: -1 if damage == "cut" else None])

    spoil(state_path(folder, 5))
    said: list[str] = []
    taken: list[float] = []
    assert same(run(folder, shards, settings, say=said.append, report=lambda f: taken.append(f["step"])), straight)
    assert taken == [4, 5, 6] and len(said) == 1
    assert "state-00000005.safetensors: this training state is damaged; going on from state-00000004" in said[0]
    assert [f["step"] for f in metrics(folder)] == list(range(7))
    for step in steps_of_states(folder):
        spoil(state_path(folder, step))
    with pytest.raises(OpdError, match=r"state-00000007.*is damaged; delete it"):
        run(folder, shards, settings)
    with pytest.raises(OpdError, match=r"state-00000007.*is damaged"):
        run(tmp_path / "next", shards, settings, start_from=folder)


def test_a_round_does_not_start_from_an_unfinished_one(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "data")
    with pytest.raises(Stopped):
        run(tmp_path / "first", shards, config(), stop_asked=stop_after(tmp_path / "first", 3))
    with pytest.raises(OpdError, match="step 3 of 7; finish that round"):
        run(tmp_path / "second", shards, config(), start_from=tmp_path / "first")
    with pytest.raises(OpdError, match="nowhere: no training state"):
        run(tmp_path / "second", shards, config(), start_from=tmp_path / "nowhere")


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    shards, settings = tiny.shards(tmp_path / "data"), config(save_every=3)

    def model(seed: int) -> Any:
        made = tiny.model().train()
        for layer in made.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.manual_seed(seed)
        return made

    straight = run(tmp_path / "straight", shards, settings, model=model(1))
    assert not same(run(tmp_path / "other", shards, settings, model=model(2)), straight)
    for last in (2, 4):
        with pytest.raises(Stopped):
            folder = tmp_path / "stopped"
            run(folder, shards, settings, model=model(1 if last == 2 else 7), stop_asked=stop_after(folder, last))
    assert same(run(folder, shards, settings, model=model(8)), straight)


def test_a_diverging_step_is_told_and_not_saved(tmp_path: Path) -> None:
    model = tiny.model()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(OpdError, match="training diverged: the gradient norm is nan"):
        run(tmp_path, tiny.shards(tmp_path), config(), model=model)
    assert not states(tmp_path)


def test_the_export_loads_and_says_the_same(tmp_path: Path, smollm2: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny.model()
    run(tmp_path / "train", tiny.shards(tmp_path / "data"), config(epochs=2), model=model)
    ref = export(model, smollm2.tokenizer, tmp_path / "out" / "checkpoint", "# card\n", "test")
    loaded = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    greedy = [m.generate(ids, max_new_tokens=20, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*greedy) and greedy[0].shape == (1, 30)
    assert AutoTokenizer.from_pretrained(ref.path)("hello").input_ids == smollm2.tokenizer("hello").input_ids
    assert (tmp_path / "out" / "checkpoint" / "README.md").read_text() == "# card\n"
    assert (tmp_path / "out" / "checkpoint" / "generation_config.json").is_file()
    again = export(model, smollm2.tokenizer, tmp_path / "out" / "checkpoint", "# card\n", "test")
    assert again == ref and [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_the_exported_student_writes_what_the_trainers_own_writes(tmp_path: Path, smollm2: Any) -> None:
    """The real student in float32, two steps on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, settings = load_model(smollm2.ref, "float32"), config(batch_size=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "layers.0." in name}
    optimiser = MasterAdamW(model, settings.train)
    stop = torch.from_numpy(smollm2.stop().astype("int64"))
    for step in batches(tiny.shards(tmp_path, responses=4), 4, 1000, 0, range(2)):
        train_step(model, stop, step, optimiser, 1e-5, settings)
    del optimiser
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    ref = export(model, smollm2.tokenizer, tmp_path / "checkpoint", "# card\n", "test")
    tokenizer = AutoTokenizer.from_pretrained(ref.path)
    loaded = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    for question in ("What is 17 + 25?", "Name three colours."):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        texts = [m.generate(**ids, max_new_tokens=32, do_sample=False) for m in (model, loaded)]
        assert torch.equal(*texts) and texts[0].shape[1] > ids["input_ids"].shape[1]


@pytest.mark.slow
def test_sigkill_and_sigterm_at_random_steps_leave_the_same_run(tmp_path: Path) -> None:
    """20 SIGKILLs and 5 SIGTERMs of real processes, then one to the end: weights to the bit, and the same metrics."""
    # Processes forked from one that has imported everything and computed nothing: imports would take most of the time.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.models.llama.modeling_llama", "train.loop", "stages.run.training"])
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    shards = tmp_path / "data"
    tiny.shards(shards)

    def start(into: Path) -> tuple[Any, Any]:
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=_train_slowly, args=(shards, into, sender))
        process.start()
        sender.close()
        return process, receiver

    process, receiver = start(straight)
    while (step := _step(receiver)) is not None:
        pass
    process.join()
    assert process.exitcode == 0
    steps = len(metrics(straight))
    rng = np.random.default_rng(0)
    signals = rng.permutation([signal.SIGKILL] * 20 + [signal.SIGTERM] * 5)
    moments = np.sort(rng.choice(np.arange(1, steps - 2), len(signals), replace=False))
    first_steps = []
    for how, moment in zip(signals.tolist(), moments.tolist(), strict=True):
        process, receiver = start(folder)
        first_steps.append(step := _step(receiver))
        while step is not None and step < moment:
            step = _step(receiver)
        assert step is not None, "it ended before it could be killed"
        time.sleep(rng.uniform(0, 0.02))  # anywhere in the step, or in saving a state
        os.kill(process.pid, how)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if how == signal.SIGKILL else Stopped.status)
        if how == signal.SIGTERM:
            assert steps_of_states(folder)[0] == len(metrics(folder)), "the step under way is saved"
    process, receiver = start(folder)
    first_steps.append(_step(receiver))
    while _step(receiver) is not None:
        pass
    process.join()
    assert process.exitcode == 0 and len(first_steps) == 26 and sum(step > 0 for step in first_steps) > 0
    assert same(final_state(folder)[0], final_state(straight)[0])
    timing = {"seconds", "data_wait", "tokens_per_second"}
    streams = [[{k: v for k, v in f.items() if k not in timing} for f in metrics(each)] for each in (straight, folder)]
    assert streams[0] == streams[1] and len(streams[0]) == steps == 63


def _step(receiver: Any) -> int | None:
    """The next step that a training process reports; None when it has ended."""
    try:
        return int(receiver.recv())
    except EOFError:
        return None


def _train_slowly(data: Path, folder: Path, sender: Any) -> None:
    """A training process with the stage's own way to leave."""
    from stages.run.console import errors_for_people
    from stages.run.training import stop_on_sigterm

    def report(figures: dict[str, float]) -> None:
        sender.send(figures["step"])
        time.sleep(0.02)

    torch.set_num_threads(1)
    try:
        with errors_for_people(), stop_on_sigterm() as stop_asked:
            run(folder, tiny.open_shards(data), config(save_every=3, epochs=9), report=report, stop_asked=stop_asked)
    except typer.Exit as left:  # what typer makes an exit status of
        sys.exit(left.exit_code)


def test_the_card_tells_the_ends_of_what_only_some_steps_have(tmp_path: Path) -> None:
    """Steps without an n:m unit have no surrogate; a round may begin, end or be without any."""
    path = tmp_path / "metrics.jsonl"
    always = {"sampled_kl": 1.0, "seconds": 2.0, "tokens": 3, "units": 4}
    steps = [{}, {"surrogate": -5.0}, {"surrogate": -6.0}, {}]
    path.write_text("".join(json.dumps(always | step) + "\n" for step in steps))
    found = figures(path)
    assert found and (found["steps"], found["tokens"]) == (4, 12)
    assert [(end["first"], end["last"]) for end in found["ends"]] == [(1.0, 1.0), (-5.0, -6.0)]
    path.write_text(json.dumps(always) + "\n")
    assert len((figures(path) or {})["ends"]) == 1
