"""One table says what of the config decides each stage's result; a whole tiny run shows that it is what stages read."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import tiny
import whole_run

from pipeline.store.shards import read_manifest
from schemas import decides
from schemas.config import Config, Judged, Rollouts, Section, parse_config
from stages import models, prompts, reuse
from stages.run import run as runs
from stages.run import workflow
from stages.tools.cli import STAGES

ROOT = Path(__file__).parents[1]
Reads = dict[str, set[str]]

OTHERWISE_READ = {
    "fit": {
        "reuse",
        "evaluate.kl_items",
        "weights.reward",
        *(f"evaluate.{key}" for key in Judged.model_fields),
    },  # of other scorers
    "outcomes": {f"evaluate.{key}" for key in Judged.model_fields},  # likewise
    "models teacher": {"reuse"},
    "reuse": {"reuse"},
    "answers": {"rollouts.shard_size", "rollouts.shard_tokens"},
    "retokenise": {"prompts.source", *(f"evaluate.{key}" for key in Judged.model_fields)},  # of `sft.right_only`
    "rollouts": {
        "rollouts.shard_size",
        "rollouts.shard_tokens",
        "evaluate.split",
        "evaluate.kl_items",
    },  # of a phase without a shard, and of the other kind of phase
    "weights": {"objective.recipe", "weights.alpha", "weights.prefix_share", "weights.discount", "weights.gae_lambda"},
    "diagnostics": {"teacher.model", "student.tuned_on"},
    "evaluate": {"evaluate.kl_items", *(f"evaluate.{key}" for key in Judged.model_fields)},  # of other scorers
    "train": {"train.ema", "train.lora", "rollouts.prompts", "rollouts.samples", "rollouts.rounds", "rollouts.replay"},
}
"""Keys that only other settings of the same stage read, or that are read where the run is laid out."""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reads]:
    """The config keys that each stage read in a run of two rounds and in one that reuses it."""
    folder = tmp_path_factory.mktemp("decides")
    found: Reads = defaultdict(set)
    places: dict[int, tuple[str, str, Section]] = {}  # keeps the sections, so that no id is given twice
    given, plain = runs.settings, Section.__getattribute__

    def settings(config: Config, stage: str, phase: str = "") -> Config:
        view = given(config, stage, phase)
        places[id(view)] = (stage, "", view)
        for name, value in vars(view).items():
            if isinstance(value, Section):
                copy = value.model_copy()  # sections may be shared with the whole config
                view.__dict__[name] = copy
                places[id(copy)] = (stage, f"{name}.", copy)
        return view

    def spy(self: Section, name: str) -> Any:
        if id(self) in places and name in type(self).model_fields:
            stage, prefix, _ = places[id(self)]
            found[stage].add(prefix + name)
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPD_CACHE", str(folder / "cache"))
        patch.setattr(runs, "settings", settings)
        patch.setattr(Section, "__getattribute__", spy)
        config = first_run(folder)
        another_student(config)
        yield found


def first_run(folder: Path) -> dict[str, Any]:
    """Every stage, in order, on two tiny models with different tokenizers."""
    tiny.saved_pair(folder)
    rows = [{"prompt": f"{a} ab 12?", "answer": str(a)} for a in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": "a",
        "prompts": {"source": "rows.jsonl", "splits": {"examples": 1, "train": 16, "test": 4}},
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "sft": {"prompts": 4, "batch_size": 2},
        "rollouts": {"rounds": 2, "prompts": 8, "max_new_tokens": [3, 6], "top_k": 4, "replay": 1},
        "scores": {"support": "union", "k_max": 8},
        "weights": {"scheme": "iw_opd", "gate": {"wrong": 0.5}},
        "objective": {"reference_kl": 0.1, "reference": "initial"},
        "coverage": {"min_compared": 0, "min_one_to_one": 0, "min_shared_mass": 0},
        "train": {"batch_size": 4, "warmup_steps": 1},
        "evaluate": {"kl_items": 2, "samples": 8, "also": {"more": {"source": "rows.jsonl", "count": 3}}},
    }
    whole_run.stages_of(written(config))
    return config


def another_student(config: dict[str, Any]) -> None:
    """The stages that only a reusing run has."""
    where = written(config | {"run": "b", "reuse": ["runs/a"], "evaluate": {"kl_items": 0}, "sft": {}})
    prompts.main(where)
    models.main("student", where)
    models.main("teacher", where)
    reuse.main("round-0", 0, where)


def written(config: dict[str, Any]) -> Path:
    where = Path(f"{config['run']}.yaml")
    where.write_text(json.dumps(config))
    return where


def test_every_key_that_a_stage_reads_is_declared_and_every_declared_key_is_read(read: Reads) -> None:
    assert set(read) == set(decides.STAGES) - {"report"}  # which takes the whole config as it is
    for stage, keys in read.items():
        declared = set(declaration(stage))
        sections = {key.partition(".")[0] for key in declared}
        undeclared = {key for key in keys if key not in declared | sections and key.partition(".")[0] not in declared}
        assert not undeclared, f"{stage} reads what it doesn't declare: {undeclared}"
        dumped = {"prompts": "prompts", "train": "objective train", "sft": "sft train"}.get(
            stage, ""
        ).split()  # whole sections
        unread = {
            key
            for key in declared - keys - OTHERWISE_READ.get(stage, set())
            if key.partition(".")[0] not in dumped
            and not key.endswith(".engine_options")  # read by vLLM
            and not any(inner.startswith(f"{key}.") for inner in keys)
        }
        assert not unread, f"{stage} declares what it never reads: {unread}"


def declaration(stage: str) -> tuple[str, ...]:
    both = [decides.keys(stage, phase) for phase in ("round-0", "eval-0")]
    return tuple(key for keys in both for key in (*keys.decide, *keys.operate))


def test_dropping_any_key_that_was_read_stops_the_stage(read: Reads) -> None:
    """So neither the rule's parameter nor the stage's identity can lack it unseen: `settings` doesn't hold it then."""
    config = parse_config(json.loads(Path("a.yaml").read_text()), "a.yaml")
    dropped = 0
    for stage, keys in read.items():
        for key in keys & set(declaration(stage)):
            special = {"rollouts": "eval-0" if key.startswith("evaluate") else "round-0"}.get(stage, "")
            full = decides.keys(stage, special)
            lacking = decides.Keys(
                *(tuple(name for name in names if name != key) for names in (full.decide, full.operate))
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decides, "keys", lambda *_, lacking=lacking: lacking)
                view: Any = decides.settings(config, stage)
                decided = decides.decided(config, stage)
            section, _, name = key.partition(".")
            with pytest.raises(AttributeError, match=f"'({name or section}|{section})'"):
                getattr(getattr(view, section), name) if name else getattr(view, section)
            assert name not in decided.get(section, {}) if name else section not in decided
            dropped += 1
    assert dropped > 80


def test_rules_and_stages_ask_for_the_same_entries() -> None:
    parts = re.split(r"^rule (\w+):", (ROOT / "Snakefile").read_text(), flags=re.MULTILINE)[1:]
    found = {
        name: re.findall(r'reads=reads\(RUN, "(\w+)"\)', text)
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }
    rules = {name: asked[0] for name, asked in found.items() if name != "all"}
    stages = {name: "reuse" if name == "take" else name for name in rules}  # with scores, and without
    assert rules == stages
    of = r"(?:\{phase\}-|eval-\{checkpoint\}-|round-\{round\}-|sft-)?"
    jobs = re.findall(rf'FOLDER / "timings/{of}(\w+)', "".join(parts))  # by which their seconds are summed
    assert len(jobs) == len(rules) - 1 and set(jobs) <= set(STAGES)  # the report's isn't timed
    assert set(stages.values()) == {stage.partition(" ")[0] for stage in decides.STAGES}
    for stage in stages.values():
        source = (ROOT / "stages" / ("report/page.py" if stage == "report" else f"{stage}.py")).read_text()
        assert re.search(rf'open_run\(config_file, f?"{stage}', source), stage


@pytest.mark.parametrize(
    ("section", "key", "value", "changed"),
    [
        ("scores", "log_z", True, {"scores"}),
        ("scores", "batch_tokens", 9, set()),
        ("rollouts", "temperature", 0.5, {"rollouts"}),
        ("rollouts", "batch_size", 3, set()),
        ("weights", "scheme", "signed", {"weights", "diagnostics"}),
        ("train", "learning_rate", 1.0, {"train"}),
        ("train", "save_every", 3, set()),
        ("train", "weight_decay", 1.0, {"sft", "train"}),
        ("teacher", "dtype", "bfloat16", {"answers", "scores"}),
        ("evaluate", "extract", "whole", {"fit", "retokenise", "outcomes", "evaluate"}),
        ("weights", "gate", {"wrong": 0.0}, {"fit", "weights", "diagnostics"}),
        ("evaluate", "every_round", True, set()),
        ("sft", "temperature", 0.5, {"answers"}),
        ("sft", "right_only", True, {"retokenise"}),
        ("sft", "learning_rate", 1.0, {"sft"}),
    ],
)
def test_what_a_change_makes_anew(section: str, key: str, value: Any, changed: set[str]) -> None:
    """Beside what follows from changed inputs; the report tells of the whole config."""
    values = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a"}, "teacher": {"model": "b"}}
    before = parse_config(values, "before")
    after = parse_config({**values, section: {**values.get(section, {}), key: value}}, "after")
    found = {
        stage
        for stage in decides.STAGES
        if stage != "report" and decides.decided(before, stage, "round-0") != decides.decided(after, stage, "round-0")
    }
    assert found == changed


def test_what_is_decided_is_in_the_manifests(read: Reads) -> None:
    """The identity of what a stage writes holds the values of the table, models as what they resolved to."""
    config = parse_config(json.loads(Path("a.yaml").read_text()), "a.yaml")
    made = read_manifest(Path("runs/a/round-0/rollouts/000.parquet")).identity
    decided = decides.decided(config, "rollouts", "round-0")
    assert made["sampling"] == decided["rollouts"] and made["seed"] == decided["seed"]
    assert read_manifest(Path("runs/a/prompts.parquet")).identity == decides.decided(config, "prompts")
    scored = read_manifest(Path("runs/a/round-0/scores/000.parquet")).identity
    assert scored["scores"] == decides.decided(config, "scores")["scores"]


def with_horizons(*horizons: int) -> Config:
    values = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a"}, "teacher": {"model": "b"}}
    return parse_config({**values, "rollouts": {"rounds": 4, "max_new_tokens": list(horizons)}}, "here")


def test_a_phase_has_its_own_horizon_and_evaluation_the_longest() -> None:
    config = with_horizons(16, 64, 32)
    expected = {"round-0": 16, "round-1": 64, "round-2": 32, "round-3": 32, "round-3@1": 64, "eval-0": 64, "eval-4": 64}
    expected |= {"eval-base": 64, "sft": 64}
    for stage in ("rollouts", "evaluate"):
        found = {phase: decides.settings(config, stage, phase).rollouts.longest for phase in expected}
        assert found == expected, stage
    plain = decides.settings(with_horizons(16), "rollouts", "round-2").rollouts
    assert plain.longest == 16 and Rollouts(max_new_tokens=16).horizons == (16,)


def test_another_horizon_makes_only_its_own_rounds_anew() -> None:
    """By the rules' parameters and by what the stages' identities hold: those are the same."""

    def anew(before: Config, after: Config) -> set[str]:
        """The jobs of a run whose rule has another parameter."""
        wildcards = [
            SimpleNamespace(phase=name) for name in ("eval-0", "round-0", "round-1", "round-2", "round-3", "eval-4")
        ]
        jobs = [(stage, place) for stage in ("rollouts", "scores", "units", "weights") for place in wildcards]
        jobs += [("train", SimpleNamespace(round=number)) for number in range(4)]
        jobs += [("evaluate", SimpleNamespace(checkpoint=number)) for number in (0, 4)]
        ids = [
            {(stage, *vars(place).values()): workflow.reads(runs.run_of(config), stage)(place) for stage, place in jobs}
            for config in (before, after)
        ]
        return {" ".join(map(str, job)) for job in ids[0] if ids[0][job] != ids[1][job]}

    before = with_horizons(16, 32, 64)
    assert anew(before, with_horizons(16, 24, 64)) == {"rollouts round-1"}
    assert anew(before, with_horizons(16, 32, 64, 64)) == set()
    assert anew(before, with_horizons(64, 32, 16)) == {f"rollouts round-{number}" for number in (0, 2, 3)}
    # The teacher's answers are as long as any round's, unless they have a length of their own.
    changed = [
        workflow.reads(runs.run_of(config), "answers")(SimpleNamespace(phase="sft"))
        for config in (before, with_horizons(64, 32, 16))
    ]
    assert changed[0] == changed[1]
    longer = {"rollouts round-2", "rollouts round-3", "rollouts eval-0", "rollouts eval-4", "evaluate 0", "evaluate 4"}
    assert anew(before, with_horizons(16, 32, 128)) == longer
    report = [decides.decided(config, "report") for config in (before, with_horizons(16, 24, 64))]
    assert report[0] != report[1]  # which prints the whole config


def test_a_run_samples_each_round_to_its_horizon_and_evaluates_to_the_longest(read: Reads) -> None:
    def lengths(phase: str) -> list[int]:
        return pl.read_parquet(f"runs/a/{phase}/rollouts/000.parquet")["response_ids"].list.len().to_list()

    def made_with(phase: str) -> int:
        return int(read_manifest(Path(f"runs/a/{phase}/rollouts/000.parquet")).identity["sampling"]["max_new_tokens"])

    phases = ("eval-0", "round-0", "round-1", "eval-2")
    assert [made_with(phase) for phase in phases] == [6, 3, 6, 6]
    assert [max(lengths(phase)) for phase in phases] == [6, 3, 6, 6]
    # A cut response has every token in a unit, and no stop.
    units = pl.read_parquet("runs/a/round-0/units/000.parquet")
    rollouts = pl.read_parquet("runs/a/round-0/rollouts/000.parquet")
    assert units["s_len"].sum() == rollouts["response_ids"].list.len().sum()
    stopped = (rollouts["finish_reason"] == "stop").sum()
    assert (units["kind"] == "stop").sum() == stopped < len(rollouts)


def test_a_run_tells_of_every_held_out_set_before_and_after(read: Reads) -> None:
    """Eight responses to each prompt, the same streams at both checkpoints; the report and the summary have a line a set."""
    before, after = (pl.read_parquet(f"runs/a/eval-{checkpoint}/answers.parquet") for checkpoint in (0, 2))
    for answers in (before, after):
        assert answers["set"].to_list() == ["test"] * 32 + ["more"] * 24
        assert answers["sample"].to_list() == list(range(8)) * 7
        assert answers.group_by("prompt_id").agg(pl.col("response").n_unique())["response"].min() > 1
    held_out = pl.read_parquet("runs/a/also.parquet")
    assert held_out["split"].to_list() == ["more"] * 3 and held_out["prompt"].n_unique() == 3
    assert before["prompt"].unique().sort().equals(after["prompt"].unique().sort())
    # Hardly trained, the checkpoint mostly says from the same uniforms what the student said.
    assert (before["response"] == after["response"]).mean() > 0.5
    summary = json.loads(Path("runs/a/summary.json").read_text())
    for figures in (summary["after"], summary["after"]["also"]["more"]):
        assert list(figures["pass_at_k"]) == ["1", "2", "4", "8"]
        assert figures["pass_at_k"]["1"]["share"] == pytest.approx(figures["accuracy"])
        assert figures["accuracy_95"][0] <= figures["accuracy"] <= figures["accuracy_95"][1]
    assert summary["fixed"] is None and set(summary["gain"]) == {"test", "more"}
    page = Path("runs/a/report.html").read_text()
    for label in ("held-out accuracy (4 items of test, avg@8)", "pass@8 of test", "(3 items of more, avg@8)"):
        assert label in page


def test_rules_ask_for_what_a_phase_has(read: Reads) -> None:
    """With `reuse` no KL is measured unless asked for, so the phases that are evaluated have answers and no tables."""
    values = json.loads(Path("b.yaml").read_text())
    run = runs.run_of(parse_config(values, "b.yaml"))
    assert workflow.shards(run, "eval-0", "rollouts", "units", "weights") == []
    found = workflow.shards(run, "round-0", "rollouts", "weights")
    assert found == [run.root / "round-0/rollouts/000.parquet", run.root / "round-0/weights.json"]
    assert re.fullmatch(workflow.reused_phases(run, scored=True), "round-1")
    assert re.fullmatch(workflow.scored_phases(run), "eval-0") and not re.fullmatch(
        workflow.sampled_phases(run), "round-1"
    )
