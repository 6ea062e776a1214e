"""Fine-tuning on the teacher's answers before the first round: its loss, its data, its place in a run, whom a student is of."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
import whole_run
from test_train import run as trained
from test_train import same, stop_after
from typer.testing import CliRunner

from pipeline.align.tokens import from_table
from pipeline.infer.sample import Response
from pipeline.prepared import PreparedModel
from pipeline.store.cache import relink
from pipeline.store.shards import open_shard, open_writer, read_manifest
from schemas.config import Config, CrossEntropy, Train, load_config, parse_config
from schemas.errors import OpdError, Stopped
from stages import answers, models, prompts, retokenise, rollouts, sft
from stages.run import training
from stages.run.context import tuning
from stages.run.run import Run, run_of
from stages.tools.cache import app
from train.loop import train_step
from train.stream import Tables, batches

STOP = torch.from_numpy(tiny.STOP.astype("int64"))
TRAIN: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 2, "batch_size": 6, "micro_batch_tokens": 40}


def settings(**train: Any) -> Config:
    config = parse_config(
        {"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}, "train": {**TRAIN, **train}},
        "",
    )
    return config.model_copy(update={"objective": CrossEntropy()})


def alone(folder: Path) -> list[Tables]:
    """Shards of rollouts without units and weights."""
    return [(rollouts,) for rollouts, *_ in tiny.shards(folder)]


# ---- the loss ----


def reference(model: Any, shards: Sequence[Tables]) -> torch.Tensor:
    """Mean over all tokens of -log p, response by response, without padding; stopping is the sum over the stop set."""
    losses = []
    for (table,) in shards:
        for row in table.read().to_pylist():
            prompt, response = row["prompt_ids"], row["response_ids"]
            logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
            p = torch.softmax(logits, -1)
            for at, token in enumerate(response):
                stops = row["finish_reason"] == "stop" and at == len(response) - 1
                of = p[len(prompt) + at - 1]
                losses.append(-torch.log(sum(of[i] for i in tiny.STOP.tolist()) if stops else of[token]))
    return torch.stack(losses).mean()


class Gradients:
    """In the place of the optimiser: keeps what it is given."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def step(self, _: float) -> float:
        self.found = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.model.zero_grad()
        return 1.0


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_the_loss_is_the_mean_over_tokens_and_padding_changes_nothing(tokens: int, tmp_path: Path) -> None:
    shards, model = alone(tmp_path), tiny.model()
    rows = [row for (table,) in shards for row in table.read().to_pylist()]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    loss = reference(model, shards)
    loss.backward()
    expected = loss.item()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (step,) = batches(shards, len(rows), tokens, 0, range(1))
    parts = step.passes
    assert parts == len(rows) if tokens == 1 else parts == 1 if tokens > 1000 else 3 < parts < len(rows)
    kept = Gradients(model)
    found = train_step(model, STOP, step, kept, 0.0, settings())  # type: ignore[arg-type]
    assert found["loss"] == pytest.approx(expected, rel=1e-5) == found["divergence"]
    assert found["units"] == sum(len(row["response_ids"]) for row in rows) and "ess" not in found
    for name, gradient in wanted.items():
        torch.testing.assert_close(kept.found[name], gradient, rtol=1e-4, atol=1e-6)
    teacher = np.concatenate([row["behavior_logp"] for row in rows]).mean()
    assert found["sampled_kl"] == pytest.approx(-expected - teacher, rel=1e-4)


def test_row_groups_of_which_nothing_was_kept_are_passed_over(tmp_path: Path) -> None:
    (full,), _ = alone(tmp_path / "data")
    path = tmp_path / "kept.parquet"
    with open_writer(path, "rollouts", {}, {}) as writer:
        for group in full.row_groups():
            writer.write(group.slice(0, 0))
            writer.write(group)
            writer.write(group.slice(0, 0))
    kept = open_shard(path, "rollouts")
    taken = [name for step in batches([(kept,)], 6, 40, 0, range(4)) for part in step.parts for name in part.responses]
    assert sorted(taken) == sorted(full.read()["rollout_id"].to_pylist()) and kept.manifest.row_groups == 9


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    shards, config = alone(tmp_path / "data"), settings(save_every=2, epochs=2)
    straight = trained(tmp_path / "straight", shards, config, workers=2)
    for stop_at in (1, 3, 9):
        folder = tmp_path / f"at-{stop_at}"
        with pytest.raises(Stopped):
            trained(folder, shards, config, stop_asked=stop_after(folder, stop_at))
        assert same(trained(folder, shards, config), straight)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(14)) and lines[-1]["loss"] < lines[0]["loss"]


def test_fine_tuning_has_its_own_rate_and_size_and_the_rest_of_train() -> None:
    values = {"prompts": {"source": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}}
    train = {"learning_rate": 1.0, "epochs": 3, "min_ess": 0.5, "weight_decay": 0.5, "lora": {"rank": 2}}
    config = parse_config(values | {"train": train, "sft": {"prompts": 4, "learning_rate": 0.5, "batch_size": 3}}, "")
    expected = Train.model_validate(train | {"learning_rate": 0.5, "epochs": 1, "batch_size": 3, "min_ess": None})
    assert config.sft.optimiser(config.train) == expected
    with pytest.raises(OpdError, match=r"`sft.prompts: 4` is more than `prompts.splits.train` holds, which is 3"):
        few = {"prompts": {"source": "x", "splits": {"train": 3}}, "rollouts": {"prompts": 3}}
        parse_config(values | few | {"sft": {"prompts": 4}}, "")
    with pytest.raises(OpdError, match="gives the same answer `samples: 2` times"):
        parse_config(values | {"sft": {"prompts": 4, "samples": 2, "temperature": 0}}, "")


# ---- in a run ----


class Scripted:
    """Samples what is written: the right answer to even numbers, another one to odd ones; every fifth is cut short."""

    calls = 0

    def __init__(self, model: PreparedModel) -> None:
        self.model = model

    def sample(self, ids: Any, seeds: Any, longest: int, *_: Any, advance: Any) -> list[Response]:
        type(self).calls += 1
        found = []
        for prompt in ids:
            number = int(self.model.tokenizer.decode(prompt).rpartition("\n")[2].split()[0])
            text = f" ab ab {number} 12" + (f" is {number}" if number % 2 == 0 else " ä漢 12 0")
            cut = number % 5 == 0
            own = self.model.tokenizer(text).input_ids + ([] if cut else [int(self.model.stop[0])])
            logps = -np.random.default_rng(number).random(len(own)).astype(np.float32)
            found.append(Response(np.array(own, np.int32), logps, logps, np.zeros((len(own), 0), np.int32), not cut))
        return found


@contextmanager
def scripted(model: PreparedModel, *_: Any) -> Iterator[Scripted]:
    yield Scripted(model)


def written(folder: Path, name: str, **changes: Any) -> Path:
    config: dict[str, Any] = {
        "run": name,
        "prompts": {"source": "rows.jsonl", "splits": {"examples": 0, "train": 20, "test": 4}},
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "sft": {"prompts": 16, "epochs": 3, "batch_size": 3, "learning_rate": 1e-2, "right_only": True},
        "rollouts": {"rounds": 1, "prompts": 4, "max_new_tokens": 8, "shard_size": 10},
        "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
        "train": {"batch_size": 4, "warmup_steps": 1, "save_every": 2},
        "evaluate": {"kl_items": 2},
    }
    where = folder / f"{name}.yaml"
    where.write_text(json.dumps(config | changes))
    return where


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A whole run of two tiny models with different tokenizers, whose teacher's answers are written down."""
    folder = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        patch.setattr(answers, "open_sampler", scripted)
        for name, merges in (
            ("student", [("1", "2"), ("a", "b")]),
            ("teacher", [("Ġ", "a"), ("2", "Ġ"), ("i", "s")]),
            ("other", [("b", "Ġ")]),
        ):
            tiny.saved(folder / name, merges)
        rows = [{"prompt": f"{a} ab 12?", "answer": str(a)} for a in range(24)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole_run.stages_of(written(folder, "a"))
        yield run_of(load_config("a.yaml"))


def table(run: Run, name: str) -> pl.DataFrame:
    return pl.read_parquet(run.root / name / "*.parquet")


def test_the_answers_are_kept_in_the_teachers_tokens_and_told_in_the_students(run: Run) -> None:
    given, told = table(run, "sft/answers"), table(run, "sft/rollouts")
    assert len(given) == 16 and given["rollout_id"].str.starts_with("t-").all() and set(given["round"]) == {-1}
    right = given.filter(pl.col("response").str.contains(" is "))
    assert 0 < len(right) < 16 and told["rollout_id"].equals(right["rollout_id"])
    assert told["response"].equals(right["response"]) and not told["response_ids"].equals(right["response_ids"])
    for name, side in (("teacher", right), ("student", told)):
        tokens, stop = from_table(open_shard(run.vocabulary(name), "vocabulary").read(), name)
        for row in side.iter_rows(named=True):
            stops = row["finish_reason"] == "stop"
            ids = row["response_ids"][: len(row["response_ids"]) - stops]
            assert b"".join(tokens.bytes[i].as_py() for i in ids).decode() == row["response"]
            assert not stops or row["response_ids"][-1] in stop
    assert told["finish_reason"].equals(right["finish_reason"]) and told["finish_reason"].n_unique() == 2
    sums = [side["behavior_logp"].list.sum().to_numpy() for side in (right, told)]
    np.testing.assert_allclose(*sums, rtol=1e-5)
    figures = [read_manifest(path).figures for path in run.phase("sft").paths("rollouts")]
    assert len(figures) == 2  # shards
    assert sum(each["answers"] for each in figures) == 16
    assert sum(each["right"] for each in figures) == sum(each["kept"] for each in figures) == len(right)
    assert sum(each["tokens"] for each in figures) == told["response_ids"].list.len().sum()


def test_it_is_measured_before_and_after_and_the_rounds_start_from_it(run: Run) -> None:
    assert run.checkpoints == ("base", 0, 1)
    student, tuned = (json.loads(run.policy_file(number).read_text()) for number in (-1, 0))
    assert run.policy_file(0) == run.root / "sft/checkpoint.json" and student["weights"] != tuned["weights"]
    sampled = {
        name: read_manifest(run.phase(name)[0].path("rollouts")).identity["policy"]["weights"]
        for name in ("eval-base", "eval-0", "round-0")
    }
    assert sampled == {"eval-base": student["weights"], "eval-0": tuned["weights"], "round-0": tuned["weights"]}
    summary = json.loads((run.root / "summary.json").read_text())
    ends = [summary["before"], summary["sft"]["after"], summary["after"]]
    assert [end["checkpoint"] for end in ends] == ["base", 0, 1]
    losses = summary["sft"]["cross_entropy"]
    assert len(losses) == 3 and losses[2] < losses[0] and summary["sft"]["steps"] == 3 * -(-summary["sft"]["kept"] // 3)
    page = (run.root / "report.html").read_text()
    assert "The teacher's answers" in page and "<th>after sft</th>" in page and f"{losses[2]:.3f}" in page
    # The page's figures by other queries.
    given, told = table(run, "sft/answers"), table(run, "sft/rollouts")
    right = given["response"].str.contains(" is ").sum()
    steps = pl.read_ndjson(run.phase("sft").metrics)
    per_epoch = len(steps) // 3
    epochs = [steps.slice(per_epoch * n, per_epoch) for n in range(3)]
    assert per_epoch == -(-len(told) // 3) and all(
        epoch["units"].sum() == told["response_ids"].list.len().sum() for epoch in epochs
    )
    means = [np.average(epoch["loss"], weights=epoch["units"]) for epoch in epochs]
    stopped = (told["finish_reason"] == "stop").sum()
    said = (
        f"fine-tuned on {len(told)} of {len(given)} answers of the teacher ({right} right; only these were kept), "
        f"{told['response_ids'].list.len().sum()} tokens of the student, {stopped} answers that stop. {len(steps)} steps; "
        f"cross-entropy by epoch {', '.join(f'{mean:.3f}' for mean in means)} nats per token."
    )
    assert said in " ".join(page.split())
    card = (run.root / "sft/checkpoint/README.md").read_text()
    assert f"{summary['sft']['kept']} answers" in card and "only these were kept" in card
    diagnostics = json.loads((run.root / "eval-base/diagnostics.json").read_text())
    assert diagnostics["sampling"]["checkpoint"] == -1 and diagnostics["staleness"]["rounds_behind"] == 0
    assert diagnostics["teacher"]["student_tuned_on"] == run.config.teacher.model


def test_a_stopped_stage_goes_on_to_the_same_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    where, file = Path("a.yaml"), run.root / "sft/checkpoint/model.safetensors"
    before, folder = file.read_bytes(), run.phase("sft").states
    shutil.rmtree(folder)
    shutil.rmtree(file.parent)
    loop, parts = training.train_round, list[str]()

    @contextmanager
    def tracked(*arguments: Any) -> Iterator[Any]:
        parts.append(arguments[-1])
        yield lambda figures, _: parts.extend({name.partition("/")[0] for name in figures})

    def stopping(*arguments: Any) -> Any:
        return loop(*arguments[:-2], stop_after(folder, 5), arguments[-1])

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_round", stopping)
        patch.setattr(training, "trackers", tracked)
        with pytest.raises(Stopped, match="step 5 of"):
            sft.main(where, None)
    assert parts == ["sft"] * 6, "the log, and what figures of 5 steps are called"
    assert not file.exists()
    sft.main(where, None)
    assert file.read_bytes() == before
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps))) and len(steps) > 5
    stamp = (folder / "result.json").read_text()
    sft.main(where, None)  # finished: nothing is trained again
    assert file.read_bytes() == before and (folder / "result.json").read_text() == stamp


def test_another_student_finds_the_answers_in_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = Path.cwd(), Scripted.calls
    student = {"model": str(folder / "other"), "dtype": "float32"}
    where = written(folder, "b", student=student, sft={"prompts": 16})
    for stage in (prompts.main, partial(models.main, "student"), partial(models.main, "teacher")):
        stage(where)
    other = run_of(load_config(where))
    for place in other.phase("sft"):
        answers.main(place.number, where, None)
        retokenise.main(place.number, where)
    assert Scripted.calls == calls and table(other, "sft/answers").equals(table(run, "sft/answers"))
    assert len(table(other, "sft/rollouts")) == 16  # `right_only` decides nothing of the answers
    output = CliRunner().invoke(app, ["ls", "--json", "--cache", str(folder / "cache")]).output
    listed = [json.loads(line) for line in output.splitlines()]
    entries = [row for row in listed if row["kind"] == "answers"]
    assert len(entries) == 2 and all(len(row["runs"]) == 2 for row in entries)
    assert sum(row["tokens"] for row in entries) == table(run, "sft/answers")["response_ids"].list.len().sum()
    assert "every byte" in CliRunner().invoke(app, ["verify", "--cache", str(folder / "cache")]).output
    # A cache that was moved is found again; other settings of the teacher are other answers.
    moved = (folder / "cache").rename(folder / "moved")
    try:
        assert not other.phase("sft")[0].path("answers").exists()
        relink(moved, other.root)
        assert other.phase("sft")[0].answers.rows == 10
    finally:
        moved.rename(folder / "cache")
        relink(folder / "cache", other.root)
    warmer = written(folder, "b", student=student, sft={"prompts": 16, "temperature": 0.5})
    answers.main(0, warmer, None)
    assert Scripted.calls == calls + 1


def test_when_nothing_is_right_there_is_nothing_to_train_on(run: Run) -> None:
    folder = Path.cwd()
    Path("never.py").write_text("def right(response, reference, row):\n    return None\n")
    where = written(folder, "c", evaluate={"kl_items": 2, "scorer": "never:right"})
    for stage in (prompts.main, partial(models.main, "student"), partial(models.main, "teacher")):
        stage(where)
    for shard in range(2):
        answers.main(shard, where, None)
        retokenise.main(shard, where)
    with pytest.raises(OpdError, match="none of the teacher's answers is left to train on"):
        sft.main(where, None)


def test_whose_samples_a_student_was_tuned_on_is_known_by_digest(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path.cwd()
    shutil.copytree(folder / "teacher", folder / "same-teacher", dirs_exist_ok=True)
    for checkpoint in (run.root / "sft/checkpoint", run.root / "round-0/checkpoint"):
        student = {"model": str(checkpoint), "dtype": "float32", "tuned_on": "nonsense, which the file knows better"}
        for teacher, consistent in (("teacher", True), ("same-teacher", True), ("other", False)):
            shutil.rmtree("runs/d", ignore_errors=True)
            where = written(
                folder, "d", student=student, sft={}, teacher={"model": str(folder / teacher), "dtype": "float32"}
            )
            prompts.main(where)
            capsys.readouterr()
            models.main("teacher", where)
            models.main("student", where)
            found, said = tuning(run_of(load_config(where))), " ".join(capsys.readouterr().err.split())
            assert found and found.same == consistent and found.source == str(folder / "teacher")
            assert ("leaves a persistent bias" in said) != consistent
            models.main("teacher", where)
            assert ("leaves a persistent bias" in " ".join(capsys.readouterr().err.split())) != consistent
    # Fine-tuned anew on the other teacher's answers it is that one's.
    again = run_of(load_config(written(folder, "d", student=student, teacher={"model": str(folder / "other")})))
    assert (found := tuning(again)) and found.same and found.told_by == "sft"
    damaged = folder / "damaged"
    shutil.copytree(run.root / "sft/checkpoint", damaged)
    (damaged / "teacher.json").write_text("{}")
    with pytest.raises(OpdError, match=r"damaged/teacher.json doesn't say which teacher it learned from"):
        models.main("student", written(folder, "e", student={"model": str(damaged)}))


def test_a_run_from_its_checkpoint_samples_what_its_first_round_sampled(run: Run) -> None:
    """So fine-tuning in a run is the same as fine-tuning elsewhere."""
    folder = Path.cwd()
    where = written(folder, "f", student={"model": str(run.root / "sft/checkpoint"), "dtype": "float32"}, sft={})
    prompts.main(where)
    models.main("student", where)
    rollouts.main("round-0", 0, where, None)
    other = run_of(load_config(where))
    assert other.checkpoints == (0, 1)
    assert table(other, "round-0/rollouts").equals(table(run, "round-0/rollouts"))
