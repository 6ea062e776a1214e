"""What a stage reads is what belongs there: of this phase and shard, and made for the config as it is now."""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import tiny
import whole_run
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from pipeline.models import load_model
from pipeline.store import shards
from pipeline.store.shards import HOST, METADATA_KEY, file_digest, manifest_path, open_shard, open_writer, read_manifest
from schemas.errors import OpdError
from schemas.manifest import Manifest, place_of
from schemas.records import RunSummary, Weighed
from schemas.tables import TABLES, arrow_schema
from stages import coverage, diagnostics, evaluate, models, policy, prompts, rollouts, scores, train, units, weights
from stages.report import page as report
from stages.run import room, rounds
from stages.run.context import policy_ref
from stages.run.room import shard_bytes, training_bytes
from stages.run.rounds import open_shards
from stages.run.run import open_run
from stages.run.workflow import keep_results
from stages.tools.cache import app, damage, held
from train.states import states


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that tests copy."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        small.made()
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in the working directory."""
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_CACHE", str(made / "cache"))
    return tmp_path


def test_a_place_is_of_tables_that_belong_to_a_run() -> None:
    assert place_of(Path("runs/a/round-1@0/weights/012.parquet"), "weights") == {"phase": "round-1@0", "shard": 12}
    assert place_of(Path("imported/rollouts/000.parquet"), "rollouts") == {"shard": 0}
    for path, kind in (("a/sft/answers/000.parquet", "rollouts"), (f"c/rollouts/{'0' * 64}.parquet", "rollouts")):
        assert place_of(Path(path), kind) is None
    assert place_of(Path("a/round-0/scores/000.parquet"), "scores") is None  # found by content, in whatever run


def moved(source: str, target: str) -> None:
    """A shard with its manifest, and the note of a link, over another."""
    for suffix in (".parquet", ".json", ".origin"):
        there, here = (Path("runs/a", name).with_suffix(suffix) for name in (source, target))
        if there.exists() or there.is_symlink():
            here.unlink()
            shutil.copy(there, here, follow_symlinks=False)


@pytest.mark.parametrize(
    ("source", "target", "read"),
    [
        ("round-0/rollouts/001.parquet", "round-0/rollouts/000.parquet", lambda c: units.main("round-0", 0, c)),
        ("round-1/rollouts/000.parquet", "round-0/rollouts/000.parquet", lambda c: scores.main("round-0", 0, c)),
        ("round-0/rollouts/001.parquet", "round-0/rollouts/000.parquet", lambda c: policy.main("round-0", 0, c)),
        ("eval-0/rollouts/000.parquet", "round-0/rollouts/000.parquet", lambda c: weights.main("round-0", c)),
        ("round-0/units/001.parquet", "round-0/units/000.parquet", lambda c: coverage.main("round-0", c)),
        ("round-0/weights/001.parquet", "round-0/weights/000.parquet", lambda c: train.main(0, c)),
    ],
)
def test_a_shard_of_another_place_is_refused_by_name(
    place: Path, source: str, target: str, read: Callable[[Path], None]
) -> None:
    """With its own valid manifest, and with all that was made from it."""
    tables = ("rollouts", "scores", "units", "weights")
    table = source.split("/")[1]
    for name in tables[tables.index(table) :]:
        moved(source.replace(table, name), target.replace(table, name))
    with pytest.raises(OpdError, match=r"belongs to another place \((phase|shard): expected .*, found "):
        read(small.written())


def test_a_link_to_another_shards_scores_is_refused(place: Path) -> None:
    moved("round-0/scores/001.parquet", "round-0/scores/000.parquet")
    with pytest.raises(OpdError, match=r"000\.origin: not of the scores that lie here \(shard: expected 0, found 1\)"):
        units.main("round-0", 0, small.written())


def test_each_table_is_read_to_the_last_byte_by_one_rank_of_a_machine(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, read = open_run(Path("config.yaml")).phase("round-0"), list[Path]()

    def digest_of(path: Path) -> str:
        read.append(path)
        return file_digest(path)

    monkeypatch.setattr(shards, "file_digest", digest_of)
    monkeypatch.setattr(rounds, "ranks_here", lambda: 2)
    tables = [path for table in ("rollouts", "units", "weights") for path in phase.paths(table)]
    damaged = phase.paths("units")[1]
    for rank in range(2):
        monkeypatch.setattr(rounds, "local_rank", lambda rank=rank: rank)
        assert [len(triple) for triple in open_shards(phase)] == [3] * len(phase)
        good = damaged.read_bytes()
        damaged.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
        with pytest.raises(OpdError, match="damaged") if rank == 1 else nullcontext():
            open_shards(phase)
        damaged.write_bytes(good[:-1])
        with pytest.raises(OpdError, match="damaged, its bytes differ from its manifest"):
            open_shards(phase)
        damaged.write_bytes(good)
    assert len(phase) > 1 and {path for path in read if path in tables} == set(tables)
    read.clear()
    for rank in range(2):
        monkeypatch.setattr(rounds, "local_rank", lambda rank=rank: rank)
        open_shards(phase)
    assert sorted(read) == sorted([*tables, phase.run.prompts])


def test_manifests_without_a_place_or_a_config_are_read(place: Path) -> None:
    """As they were written before they told of either."""
    path = Path("runs/a/round-0/units/000.parquet")
    manifest = read_manifest(path)
    assert manifest.place == {"phase": "round-0", "shard": 0} and manifest.decided is not None
    old = Manifest(**manifest.model_dump(exclude={"place", "decided"}))
    assert "place" not in old.dump() and "decided" not in old.dump()
    table = open_shard(path, "units").read()
    about = json.loads(pq.read_metadata(path).metadata[METADATA_KEY])
    kept = {name: value for name, value in about.items() if name not in ("place", "decided")}
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(kept).encode()}), path)
    facts = {"bytes": path.stat().st_size, "sha256": file_digest(path), "row_groups": 1}
    # Keys were sorted then.
    body = json.loads(old.model_copy(update=facts).dump())
    manifest_path(path).write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert open_shard(path, "units").read().equals(table)


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "3", '"x"', "null", "{}", "[" * 100_000, "\x00", "{", '{"self": 1}'])
def test_a_manifest_that_is_none_is_one_line(place: Path, text: str) -> None:
    path = Path("runs/a/round-0/units/000.parquet")
    manifest_path(path).write_text(text)
    with pytest.raises(OpdError, match=r"units/000\.json: this manifest is damaged or was edited") as caught:
        open_shard(path, "units")
    assert "\n" not in str(caught.value)


NO_KL = {"evaluate": {"kl_items": 0}}
"""Evaluation reads the checkpoint alone."""
STALE: list[tuple[dict[str, Any], Callable[[Path], None], str]] = [
    ({"rollouts": {"temperature": 0.5}}, lambda c: scores.main("round-0", 0, c), "rollouts.temperature: expected 0.5"),
    ({"rollouts": {"temperature": 0.5}}, lambda c: units.main("round-0", 0, c), "rollouts.temperature: expected 0.5"),
    ({"rollouts": {"max_new_tokens": 5}}, lambda c: weights.main("round-0", c), "rollouts.max_new_tokens: expected 5"),
    ({"scores": {"k_max": 4}}, lambda c: units.main("round-0", 0, c), "scores.k_max: expected 4, found 8"),
    ({"seed": 9}, lambda c: rollouts.main("round-0", 0, c), "seed: expected 9, found 1"),
    ({"prompts": {"splits": {"train": 12}}}, lambda c: scores.main("round-0", 0, c), "prompts.splits"),
    ({"student": {"dtype": "bfloat16"}}, lambda c: units.main("round-0", 0, c), "student.dtype: expected 'bfloat16'"),
    ({"student": {"model": "teacher"}}, lambda c: rollouts.main("round-0", 0, c), "student.model: expected 'teacher'"),
    ({"teacher": {"model": "student"}}, lambda c: scores.main("round-0", 0, c), "teacher.model: expected 'student'"),
    ({"teacher": {"stop": ["12"]}}, lambda c: units.main("round-0", 0, c), "teacher.stop"),
    ({"train": {"learning_rate": 0.5}}, lambda c: evaluate.main("2", c), "train.learning_rate: expected 0.5"),
    ({"weights": {"scheme": "signed"}}, lambda c: train.main(0, c), "weights.scheme: expected 'signed'"),
    (NO_KL | {"weights": {"scheme": "signed"}}, lambda c: evaluate.main("2", c), "weights.scheme: expected 'signed'"),
    (NO_KL | {"scores": {"k_max": 4}}, lambda c: evaluate.main("2", c), "scores.k_max: expected 4, found 8"),
    (NO_KL | {"rollouts": {"temperature": 0.5}}, lambda c: evaluate.main("2", c), "rollouts.temperature: expected 0.5"),
    ({"coverage": {"min_compared": 0.1}}, lambda c: diagnostics.main("round-0", c), "coverage.min_compared"),
    ({"evaluate": {"samples": 4}}, report.main, "evaluate.samples: expected 4"),
    ({"train": {"learning_rate": 0.5}}, lambda c: train.main(1, c), "train.learning_rate: expected 0.5"),
]


@pytest.mark.parametrize(("changes", "read", "named"), STALE)
def test_a_stage_called_by_hand_after_a_change_of_the_config_refuses_what_is_stale(
    place: Path, changes: dict[str, Any], read: Callable[[Path], None], named: str
) -> None:
    where = small.written(**changes)
    with pytest.raises(OpdError, match=r"made for another config: .*; run `python -m stages\.\w+.*` again") as caught:
        read(where)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_other_weights_than_lie_there_is_refused(place: Path) -> None:
    """Weighed anew for another config, and the round not trained again."""
    where = small.written(weights={"scheme": "signed"}, **NO_KL)
    for phase in ("round-0", "round-1"):
        weights.main(phase, where)
    with pytest.raises(
        OpdError, match=r"checkpoint\.json: not trained on the weights that lie in runs/a/round-1; run `"
    ) as caught:
        evaluate.main("2", where)
    assert "python -m stages.train --round 1" in str(caught.value)


def test_prompts_and_policies_that_were_made_anew_make_their_rollouts_stale(place: Path, made: Path) -> None:
    where = small.written()
    run = open_run(where)
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("12?", "13?"))
    prompts.main(where)
    with pytest.raises(OpdError, match=r"000\.parquet: made with another prompts than"):
        _ = run.phase("round-0")[0].rollouts
    for name in ("prompts.parquet", "prompts.json"):
        shutil.copy(made / "runs/a" / name, "runs/a")
    tiny.saved(Path("student"), [("1", "2")])
    models.main("student", where)
    with pytest.raises(OpdError, match=r"000\.parquet: made with another policy than that of .*models/student\.json"):
        _ = run.phase("round-0")[0].rollouts


RECORDS = (
    "fit.json",
    "summary.json",
    "models/student.json",
    "round-0/coverage.json",
    "round-0/weights.json",
    "round-0/diagnostics.json",
    "round-0/checkpoint.json",
    "round-0/scores/000.origin",
    "round-0/train/result.json",
    "round-0/train/metrics.jsonl",
    "round-1/train/states/state-00000002.safetensors",
    "round-0/checkpoint/model.safetensors",
    "round-0/checkpoint/teacher.json",
    "eval-2/result.json",
    "eval-2/answers.parquet",
    "eval-2/answers.json",
    "round-1/units/001.parquet",
)


def test_verify_reads_all_that_a_run_holds(place: Path) -> None:
    """A flip in any of its files is found, and the file is named."""
    said = CliRunner().invoke(app, ["verify", "runs/a"])
    assert said.exit_code == 0 and "every byte is as it was written" in said.output, said.output
    for number, name in enumerate(RECORDS):
        path = Path("runs/a", name)
        good = path.read_bytes()
        at = (number + 1) * len(good) // (len(RECORDS) + 2)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        problem = [found for file in held(Path("runs/a")) if (found := damage(file))]
        assert len(problem) == 1 and "round-0/checkpoint" in problem[0] if "checkpoint/" in name else problem, name
        path.write_bytes(good)


def test_every_round_is_measured_where_asked_and_its_card_tells(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the hub's own reader of cards; what a checkpoint is identified by stays."""
    where = small.written(evaluate={"every_round": True})
    run = open_run(where)
    assert run.checkpoints == (0, 1, 2)
    assert [phase.name for phase in run.phases] == ["eval-0", "round-0", "eval-1", "round-1", "eval-2"]
    first = Path("runs/a/round-0/checkpoint/README.md")
    assert "not evaluated" in first.read_text() and "model-index" not in first.read_text()
    Path("student/README.md").write_text("---\nlicense: apache-2.0\n---\n# A student\n")
    whole_run.measured(run, {1}, where)
    diagnostics.main("eval-1", where)
    report.main(where)
    found = [json.loads(Path(f"runs/a/eval-{checkpoint}/result.json").read_text()) for checkpoint in run.checkpoints]
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert [each["reverse_kl"] for each in summary["measured"]] == [each["reverse_kl"] for each in found]
    for number, result in enumerate(found[1:]):
        folder = run.checkpoint(number)
        card = ModelCard.load(folder / "README.md")
        told = {one.metric_type: one for one in card.data.eval_results}
        for metric in ("accuracy", "reverse_kl"):
            assert told[metric].metric_value == result[metric] and told[metric].dataset_split == "test"
            assert told[metric].metric_args["interval_95"] == result[f"{metric}_95"]
        about = card.data.to_dict()
        assert about["license"] == "apache-2.0" and "base_model" not in about and about["model-index"][0]["name"] == "a"
        kl, (low, high) = result["reverse_kl"], result["reverse_kl_95"]
        assert f"{kl:.3f} ({low:.3f} to {high:.3f})" in card.text and '{"role": "user"' not in card.text
        assert "In each of 2 rounds the student answered 8 prompts" in card.text and "Undefined" not in card.text
        assert damage(folder.with_suffix(".json")) is None
    capsys.readouterr()
    report.print_summary(run)
    curve = ", ".join(f"{checkpoint}: {result['reverse_kl']:.3f}" for checkpoint, result in enumerate(found))
    assert f"reverse KL, nats, by checkpoint: {curve}" in capsys.readouterr().err


def test_results_of_another_config_are_kept_and_told_of(place: Path) -> None:
    """Before a job replaces them; and not where nothing changed, or only where the cache lies."""
    summary, page = Path("runs/a/summary.json"), Path("runs/a/report.html")
    before = summary.read_text(), page.read_text()
    for same in ({}, {"cache": "elsewhere"}):
        assert keep_results(open_run(small.written(**same))) is None
    run = open_run(small.written(train={"learning_rate": 0.5}))
    for _ in range(2):
        told = keep_results(run) or ""
        assert "runs/a holds results of another config: train.learning_rate: expected 0.5, found" in told
        assert "give `run` another name" in told
    (kept,), (kept_page,) = Path("runs/a").glob("summary-*.json"), Path("runs/a").glob("report-*.html")
    assert (kept.read_text(), kept_page.read_text()) == before and str(kept) in told and damage(kept) is None
    assert RunSummary.parse(kept.read_text()).after == RunSummary.parse(before[0]).after
    summary.write_text("{}")
    assert "another config" in (keep_results(run) or "") and len(list(Path("runs/a").glob("summary-*.json"))) == 2


def test_answers_of_another_checkpoint_are_not_reported(place: Path) -> None:
    for name in ("answers.parquet", "answers.json"):
        shutil.copy(Path("runs/a/eval-0", name), Path("runs/a/eval-2", name))
    with pytest.raises(OpdError, match=r"eval-2/result\.json: not of the answers that lie beside it"):
        report.main(small.written())
    shutil.copy("runs/a/eval-0/result.json", "runs/a/eval-2/result.json")
    with pytest.raises(OpdError, match=r"eval-2/result\.json: not of the answers that lie beside it"):
        report.main(small.written())


def resigned(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A shard written again with its first row changed, all of its manifest else as it was."""
    shard = open_shard(path, path.parent.name)
    about = shard.manifest
    tables = list(shard.row_groups())
    with open_writer(path, about.kind, about.identity, about.inputs, about.origin, about.decided) as writer:
        for number, table in enumerate(tables):
            rows = table.to_pylist()
            if not number:
                change(rows[0])
            writer.write(pa.Table.from_pylist(rows, schema=arrow_schema(about.kind)))


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("weights", "weight", float("nan")),
        ("weights", "weight", 1e30),
        ("weights", "is_ratio", float("inf")),
        ("weights", "credit", float("nan")),
        ("rollouts", "response_ids", [10_000]),
        ("rollouts", "prompt_ids", [-5]),
        ("rollouts", "prompt_id", "p999"),
        ("units", "cand_id", [10_000]),
        ("units", "s_start", 3),
        ("units", "s_len", 9),
    ],
)
def test_values_that_no_writer_makes_are_refused_by_column(place: Path, table: str, column: str, value: Any) -> None:
    """In shards that were signed anew, with all that names them."""
    run = open_run(small.written())

    def change(row: dict[str, Any]) -> None:
        row[column] = value * max(1, len(row[column])) if isinstance(value, list) else value

    where = run.phase("round-0")[0]
    resigned(where.path(table), change)
    for name in ("units", "weights"):  # what was made from it, as if it had been from this
        about = read_manifest(where.path(name))
        shard = open_shard(where.path(name), name)
        tables = list(shard.row_groups()) if name != table else None
        if tables is not None:
            inputs = about.inputs | {
                one: read_manifest(where.path(one)).sha256 for one in about.inputs if one in TABLES
            }
            with open_writer(where.path(name), name, about.identity, inputs, about.origin, about.decided) as writer:
                for each in tables:
                    writer.write(each)
    told = Weighed.parse(run.phase("round-0").weights.read_text())
    told.shards["000"] = read_manifest(where.path("weights")).sha256
    run.phase("round-0").weights.write_text(told.dump())
    with pytest.raises(OpdError, match=rf"{table}/000\.parquet: columns? `{column}`") as caught:
        train.main(0, small.written(train={"save_every": 2}))
    assert "\n" not in str(caught.value)


def test_finished_rounds_keep_no_state_and_a_stale_round_is_trained_again_to_the_same_bytes(place: Path) -> None:
    assert not list(Path("runs/a/round-0/train").rglob("state-*"))
    round_1 = Path("runs/a/round-1")
    weights_file = round_1 / "checkpoint/model.safetensors"
    before = weights_file.read_bytes()
    shutil.rmtree(round_1 / "train")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = round_1 / f".checkpoint.{HOST}.{dead.pid}.1.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(before)
    outcome, metrics = (Path("runs/a/round-0/train", name) for name in ("result.json", "metrics.jsonl"))
    left_of_round_0 = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (outcome, metrics)}
    metrics.rename(
        metrics.with_name(".metrics.kept.jsonl")
    )  # as one leaves it that is killed while it trains round 0 again
    metrics.write_text("")
    train.main(1, small.written())
    assert left_of_round_0 == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (outcome, metrics)}
    assert weights_file.read_bytes() == before and not list(round_1.glob(".checkpoint*"))
    assert not list(Path("runs/a/round-0/train").rglob("state-*")) and list(round_1.glob("train/states/state-*"))
    report.main(small.written(train={"keep_last_state": False}))
    assert not list(Path("runs/a").rglob("state-*"))


def test_a_stage_says_what_it_will_write_and_stops_where_the_disk_has_less(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Forecasts are those of what is there; nothing is written where they don't fit."""
    where = small.written()
    run = open_run(where)
    phase = run.phase("round-1")
    model = load_model(policy_ref(run, 2), "float32")
    written = sum(path.stat().st_size for path in (*states(phase.states), phase.checkpoint / "model.safetensors"))
    nothing = tmp_path_factory.mktemp("nothing")
    assert training_bytes(model, run.config.train, 2, nothing) == pytest.approx(written, rel=0.15)
    assert training_bytes(model, run.config.train, 9, nothing) == pytest.approx(
        written * 1.45, rel=0.15
    )  # one state more
    for table in ("rollouts", "scores"):
        assert 0.5 < shard_bytes(phase[1], table, 4) / phase[1].path(table).stat().st_size < 2
        assert shard_bytes(phase[1], table, 400) == 100 * shard_bytes(phase[1], table, 4)
    for path in states(phase.states):
        path.unlink()
    monkeypatch.setattr(room, "SAID", 0)
    monkeypatch.setenv("OPD_CACHE", str(nothing))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    before = {path: path.lstat().st_mtime_ns for path in run.root.rglob("*") if path.is_file()}
    for stage in (
        lambda: rollouts.main("round-1", 0, where),
        lambda: scores.main("round-1", 0, where),
        lambda: train.main(1, where),
    ):
        with pytest.raises(
            OpdError, match=r"round-[01] \w+ takes about [\d.]+ MB, and the disk has 0\.0 MB left; make room"
        ):
            stage()
    assert before == {path: path.lstat().st_mtime_ns for path in before} and not list(nothing.glob("scores/*.parquet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    rollouts.main("round-1", 0, where)
    assert "round-1 rollouts: will write about 0.0 MB" in capsys.readouterr().err
