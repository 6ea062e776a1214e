"""Diagnostics: sums over row groups against plain loops over all responses, and the file of a phase from its shards."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from pipeline.measure import diagnostics as figures
from pipeline.models import ModelRef
from pipeline.store.cache import entry_name, responses_digest
from pipeline.store.shards import Shard, open_shard, open_writer
from schemas.config import Config, consistency, credit_in_part, declared
from schemas.diagnostics import Diagnostics, markdown
from schemas.errors import OpdError
from schemas.manifest import digest
from schemas.outcome import Outcome
from schemas.records import Gate, Provenance, Weighed
from schemas.tables import arrow_schema
from stages import diagnostics
from stages.report import checklist
from stages.run.results import read_diagnostics
from stages.run.run import run_of

CLIP = 1.5
PROMPT = {"prompt": "{{ prompt }}", "chat_template": None}
KEPT = {"support": "teacher", "min_p": 0.001, "mass": 1.0, "k_max": 64}
SETTINGS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "top_k": 0}


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([7, 7, 7], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([7] * 13, 0.9),  # ten 4-grams, one distinct
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),
    ],
)
def test_seq_rep_by_hand(ids: list[int], expected: float) -> None:
    """Also between two other responses, whose tokens must not run into its own."""
    column = pl.Series([[7] * 5, ids, [7] * 5], dtype=pl.List(pl.Int32))
    assert figures.seq_rep(column).to_list() == pytest.approx([0.5, expected, 0.5])


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6))
def test_seq_rep_is_that_of_each_response(responses: list[list[int]]) -> None:
    def brute(ids: list[int]) -> float:
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    found = figures.seq_rep(pl.Series(responses, dtype=pl.List(pl.Int32)))
    assert found.to_list() == pytest.approx([brute(ids) for ids in responses])


def _phase(folder: Path, shards: int = 2) -> list[tuple[Shard, ...]]:
    """Shards of a phase as the stages leave them: random figures, row groups in step, manifests that name their inputs."""
    rng = np.random.default_rng(5)
    made = []
    for index, (rollouts, units, weights) in enumerate(tiny.shards(folder, count=shards)):
        policy = {"policy": {"weights": "0" * 64, "tokenizer": "1" * 64}, "prompt": PROMPT, "phase": folder.name}
        identity = policy | {"sampling": SETTINGS, "engine": "transformers", "dtype": "float32", "seed": 3}
        first = _again(rollouts, rollouts.row_groups(), identity, {}, {"student": "a"})
        scores = folder / "scores" / f"{index:03}.parquet"
        scorer = {"teacher": {"weights": "2" * 64, "tokenizer": "3" * 64}, "prompt": PROMPT, "scores": KEPT}
        about = scorer | {"reads": "text", "engine": "transformers", "dtype": "float32"}
        responses = {"responses": responses_digest(first)}
        with open_writer(scores, "scores", about, responses, {"teacher": "b@main"}) as writer:
            for group in first.row_groups():
                writer.write(_scores(rng, group))
        given_scores = open_shard(scores, "scores")
        note = {"phase": folder.name, "shard": index, "entry": entry_name(about, responses), "rows": 1, "bytes": 1}
        scores.with_suffix(".origin").write_text(Provenance(**note, origin="cache", teacher_tokens=10 + index).dump())
        inputs = {"rollouts": first.manifest.sha256, "scores": given_scores.manifest.sha256}
        second = _again(units, units.row_groups(), {}, inputs)
        inputs = {"rollouts": first.manifest.sha256, "units": second.manifest.sha256}
        pairs = zip(weights.row_groups(), second.row_groups(), strict=True)
        third = _again(weights, (_weights(rng, table, group["kind"]) for table, group in pairs), {}, inputs)
        made.append((first, given_scores, second, third))
    sums = dict.fromkeys(("responses", "incomparable", "units", "advantage", "weight", "weight_squared", "warped"), 0)
    digests = {each[3].path.stem: each[3].manifest.sha256 for each in made}
    (folder / "weights.json").write_text(Weighed(**sums, shards=digests).dump())
    return made


def _again(
    shard: Shard, groups: Iterable[pa.Table], identity: dict[str, Any], inputs: dict[str, str], origin: Any = None
) -> Shard:
    """Replace a shard."""
    kind, tables = shard.manifest.kind, list(groups)
    with open_writer(shard.path, kind, identity, inputs, origin) as writer:
        for table in tables:
            writer.write(table)
    return open_shard(shard.path, kind)


def _scores(rng: np.random.Generator, rollouts: pa.Table) -> pa.Table:
    rows = []
    for name in rollouts["rollout_id"].to_pylist():
        tokens = int(rng.integers(1, 9))
        for pos in range(tokens + 1):
            end = pos == tokens
            row = {"rollout_id": name, "pos": pos, "byte_start": pos, "byte_end": pos + (not end)}
            row |= {"token_id": -1 if end else 5, "logp": -1.0, "entropy": float(rng.random() * 3), "stop_logp": -5.0}
            rows.append(row | {"tail_logp": -3.0, "cand_id": [5], "cand_logp": [-0.5]})
    return pa.Table.from_pylist(rows, schema=arrow_schema("scores"))


def _weights(rng: np.random.Generator, table: pa.Table, kinds: pa.ChunkedArray) -> pa.Table:
    masked = np.array(kinds.to_pylist()) == "masked"
    advantage = np.where(masked, 0.0, rng.normal(size=len(table)) * 2)
    columns = {
        "advantage": advantage,
        "credit": advantage + rng.normal(size=len(table)),
        "is_ratio": np.where(masked, 1.0, np.exp(rng.normal(size=len(table)) / 2)),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.float32()))
    return table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Shard, ...]]:
    return _phase(tmp_path_factory.mktemp("phase") / "round-0")


def _groups(made: list[tuple[Shard, ...]]) -> Any:
    for shards in made:
        for tables in zip(*(shard.row_groups() for shard in shards), strict=True):
            yield tuple(pl.DataFrame(table) for table in tables)


def test_sums_over_row_groups_are_those_of_plain_loops(made: list[tuple[Shard, ...]]) -> None:
    total = figures.measure(_groups(made), CLIP)
    rollouts, scores, units, weights = (
        pl.concat([pl.DataFrame(shards[i].read()) for shards in made]).to_dicts() for i in range(4)
    )
    stopped = {row["rollout_id"]: row["finish_reason"] == "stop" for row in rollouts}
    of_response = Counter(row["rollout_id"] for row in units)
    tenths, clipped = [0.0] * 10, Counter({kind: 0 for kind in figures.KINDS})
    ratio, logs, weight, advantage = [], defaultdict[str, list[float]](list), [], []
    for unit, row in zip(units, weights, strict=True):
        tenths[row["unit"] * 10 // of_response[row["rollout_id"]]] += abs(row["advantage"])
        clipped[unit["kind"]] += abs(row["advantage"]) > CLIP
        if unit["kind"] != "masked":
            ratio.append(row["is_ratio"])
            weight.append(row["weight"])
            advantage.append(row["advantage"])
            logs[row["rollout_id"]].append(math.log(row["is_ratio"]))
    per_unit = [math.fsum(of_units) / len(of_units) for of_units in logs.values()]
    entropies = [row["entropy"] for row in scores if row["token_id"] >= 0 or stopped[row["rollout_id"]]]
    assert len(entropies) < len(scores)
    expected = {
        "responses": 40,
        "student_tokens": sum(len(row["response_ids"]) for row in rollouts),
        "truncated": sum(not at_end for at_end in stopped.values()),
        "warped": 0,
        "behavior_logp": sum(sum(row["behavior_logp"]) for row in rollouts),
        "teacher_positions": len(entropies),
        "teacher_entropy": sum(entropies),
        **{f"tokens_{k}": sum(u["s_len"] for u in units if u["kind"] == k) for k in figures.KINDS},
        **{f"units_{k}": sum(u["kind"] == k for u in units) for k in figures.KINDS},
        "dropped_mass": 0,
        "advantage": sum(advantage),
        **{f"advantage_in_tenth_{n}": size for n, size in enumerate(tenths)},
        **{f"clipped_{k}": count for k, count in clipped.items()},
        "ratio": sum(ratio),
        "ratio_squared": sum(r * r for r in ratio),
        "weight": sum(weight),
        "weight_squared": sum(w * w for w in weight),
        "weighed_responses": len(per_unit),
        "log_ratio": sum(per_unit),
        "log_ratio_squared": sum(value * value for value in per_unit),
    }
    assert total.keys() - expected.keys() == {"bytes", "seq_rep", "repetitive"}
    assert {name: total[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert all(value > 0 for value in (clipped["1:1"], clipped["n:m"], total["units_masked"]))


def test_ratios_by_hand() -> None:
    """r = 1, 1, 2: (1 + 1 + 2)^2 / (3 * 6) = 8/9, chi^2 = 1/8."""
    names = [f"units_{kind}" for kind in figures.KINDS]
    total = dict.fromkeys(names, 0.0) | {"units_1:1": 3, "units_masked": 5, "ratio": 4, "ratio_squared": 6}
    found = figures.ratios(total)
    assert (found.ess, found.chi2) == pytest.approx((8 / 9, 1 / 8))


def test_distance_by_hand() -> None:
    """Responses at -.2 and -.4 nats per unit, and one whose units are all masked, which has none."""
    names = ["a", "a", "b", "c"]
    rows = {"rollout_id": names, "unit": [0, 1, 0, 0], "advantage": 0.0, "credit": 0.0, "weight": 1.0}
    weights = pl.DataFrame(rows).with_columns(is_ratio=pl.Series([math.exp(-0.3), math.exp(-0.1), math.exp(-0.4), 1.0]))
    total = figures._of_weights(weights, pl.Series("kind", ["1:1", "n:m", "stop", "masked"]), CLIP)
    found = figures.distance(total)
    assert (found.log_ratio, found.log_ratio_sd) == pytest.approx((-0.3, 0.1))
    nothing = figures.distance(dict.fromkeys(total, 0.0))
    assert nothing.log_ratio is None and nothing.log_ratio_sd is None


@pytest.mark.parametrize(("own", "warped", "known"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_students_entropy_only_of_its_own_untempered_samples(own: bool, warped: int, known: bool) -> None:
    total = {"warped": warped, "behavior_logp": -6.0, "student_tokens": 4, "bytes": 12}
    found = figures.entropy(total | {"teacher_entropy": 5.0, "teacher_positions": 2}, own)
    assert (found.teacher, found.teacher_per_byte) == pytest.approx((2.5, 5 / 12))
    assert (found.student, found.student_per_byte) == ((1.5, 0.5) if known else (None, None))


MODELS: dict[str, Any] = {"prompts": {"source": "p.jsonl"}, "student": {"model": "a"}, "teacher": {"model": "b"}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished round without its models."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "default"
    _phase(folder / "round-0")
    (folder / "models").mkdir()
    student = ModelRef(source="a", path="gone", weights="0" * 64, tokenizer="1" * 64)
    (folder / "models/student.json").write_text(student.dump())
    gate = {"phase": "round-0", "compared": 0.9, "one_to_one": 0.7, "shared_mass": 0.99, "by_class": [], "n_to_m": []}
    (folder / "round-0/coverage.json").write_text(Gate(**gate).dump())
    (folder / "round-0/train").mkdir()
    fresh, moved = (
        {"ess": x, "chi2": 1 / x - 1, "drift_ess": x, "drift_chi2": 1 / x - 1}
        | {"response_log_ratio": (x - 1) / 10, "response_log_ratio_sd": (1 - x) / 5}
        for x in (1.0, 0.75)
    )
    # The last batch has no unit with candidates.
    steps = [
        {"step": 0, "steps": 9, "sampled_kl": 1.5, "divergence": 0.5, **fresh},
        {"step": 1, "steps": 9, "sampled_kl": 1.0, "surrogate": -0.5, **moved},
    ]
    (folder / "round-0/train/metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    outcome = Outcome(budget=9, steps=2, ended="min_ess", ess=0.75)
    (folder / "round-0/train/result.json").write_text(outcome.dump())
    (folder / "timings").mkdir()
    for job, seconds in (
        ("round-0-scores-000", 2.5),
        ("round-0-scores-001", 3.5),
        ("round-0-train", 7),
        ("round-1-x", 9),
    ):
        (folder / "timings" / f"{job}.tsv").write_text(f"s\th:m:s\n{seconds}\t0:00:00\n")
    return folder


def _config(**changes: Any) -> Config:
    values = {**MODELS, "rollouts": {"rounds": 1, "prompts": 40, "shard_size": 20}, "evaluate": {"kl_items": 0}}
    return Config.model_validate({**values, **changes})


def _write(config: Config) -> Diagnostics:
    Path("c.yaml").write_text(config.model_dump_json())
    diagnostics.main("round-0", Path("c.yaml"))
    return read_diagnostics(run_of(config).phase("round-0"))


def test_the_file_of_a_round(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(student={"model": "a", "tuned_on": "c"}, objective={"recipe": "hybrid", "clip": CLIP})
    found = _write(config)
    assert " ".join(capsys.readouterr().err.split()).startswith("warning: the student was fine-tuned on samples of c")
    assert found.texts.responses == 40 and found.coverage.compared == 0.9
    assert (found.loss.direction, found.loss.estimator) == ("reverse", "candidates and sampled path")
    assert found.support.k_max == 64
    assert found.sampling.checkpoint == 0 and found.sampling.temperature == 1 and found.sampling.seed == 3
    assert found.sampling.sampler_logp == 0 and found.sampling.warning is None
    assert found.teacher.source == "b@main" and found.teacher.template == digest(PROMPT)
    assert found.teacher.tokens == {"cache": 21} and found.teacher.warning == consistency(config, declared(config))
    assert found.staleness.rounds_behind == 0 and found.staleness.same_weights
    assert found.training and (found.training.first.units.ess, found.training.last.units.chi2) == (1.0, 1 / 0.75 - 1)
    assert (found.training.divergence_first, found.training.divergence_last) == (0.5, None)
    assert (found.training.steps, found.training.budget, found.training.ended) == (2, 9, "min_ess")
    assert found.seconds == {"scores": 6.0, "train": 7.0}
    assert sum(found.coverage.kinds.values()) == pytest.approx(1)
    assert sum(found.credit.advantage_share.values()) == pytest.approx(1)
    # Hybrid clips longer units only.
    units, weights = (pl.read_parquet(run / "round-0" / name / "*.parquet") for name in ("units", "weights"))

    def of_kind(*kinds: str) -> pl.Series:
        return weights.filter(units["kind"].cast(pl.String).is_in(kinds))["advantage"].abs()

    assert found.credit.clipped == pytest.approx((of_kind("n:m") > CLIP).mean())
    clipped = _write(_config(objective={"recipe": "sampled", "clip": CLIP})).credit.clipped
    every = (of_kind("1:1", "n:m", "stop") > CLIP).mean()
    assert clipped == pytest.approx(every)
    # Credit that sums over all units clips all of them.
    summed = _config(objective={"recipe": "hybrid", "clip": CLIP}, weights={"credit": "return_to_go"})
    assert _write(summed).credit.clipped == pytest.approx(every)
    assert _write(_config(objective={"recipe": "vopd", "clip": CLIP})).credit.clipped is None
    for recipe in ("dpca", "dpca_additive"):
        found_share = _write(_config(objective={"recipe": recipe, "clip": 0.2})).credit.clipped
        assert found_share == pytest.approx(token_clip_share(run, recipe, 0.2)) and 0 < found_share < 1
    assert _write(_config(objective={"recipe": "strict_1to1"})).credit.clipped is None

    table = checklist.rows([found, found])
    within = "in training, first and last step: effective sample size, units"
    assert table["Staleness"][within] == ["100.0 %, 75.0 %"] * 2
    assert table["Staleness"]["likewise: log-ratio of responses"] == ["0.000 (± 0.000), -0.025 (± 0.050)"] * 2
    assert table["Staleness"]["steps taken, budget"] == ["2, 9 (stale)"] * 2
    assert table["Models"]["student fine-tuned on samples of"] == ["c", "c"]


def token_clip_share(run: Path, recipe: str, clip: float) -> float:
    """A loop over tokens: a unit's advantage spread evenly, or as each token's surprisal has it."""
    units, rollouts = (pl.read_parquet(run / "round-0" / name / "*.parquet") for name in ("units", "rollouts"))
    said = {row["rollout_id"]: row["behavior_logp"] for row in rollouts.to_dicts()}
    beyond = []
    for unit in units.filter(units["kind"] != "masked").to_dicts():
        tokens = said[unit["rollout_id"]][unit["s_start"] : unit["s_start"] + unit["s_len"]]
        student, teacher = sum(tokens), unit["teacher_logp"]
        for token in tokens:
            even = (teacher - student) / len(tokens)
            beyond.append(abs(even if recipe == "dpca_additive" else (teacher / student - 1) * token) > clip)
    return sum(beyond) / len(beyond)


def test_what_is_missing_damaged_or_foreign_is_named(run: Path) -> None:
    config = _config()
    with pytest.raises(
        OpdError, match=r"diagnostics.json: missing; run `python -m stages.diagnostics --phase round-0`"
    ):
        read_diagnostics(run_of(config).phase("round-0"))
    (run / "round-0/diagnostics.json").write_text('{"phase": "round-0"')
    with pytest.raises(OpdError, match=r"diagnostics.json: damaged"):
        read_diagnostics(run_of(config).phase("round-0"))
    units = open_shard(run / "round-0/units/000.parquet", "units")
    _again(units, units.row_groups(), {"other": 1}, units.manifest.inputs)
    with pytest.raises(OpdError, match=r"weights/000.parquet: this shard does not fit .* inputs.units: expected"):
        diagnostics.diagnose(run_of(config).phase("round-0"))


def test_a_phase_without_gate_training_or_timings(run: Path) -> None:
    for name in (
        "round-0/coverage.json",
        "round-0/train/metrics.jsonl",
        *(f"timings/{p.name}" for p in run.glob("timings/*")),
    ):
        (run / name).unlink()
    found = diagnostics.diagnose(run_of(_config()).phase("round-0"))
    assert found.coverage.compared is None and found.training is None and found.seconds == {}
    assert checklist.rows([found])["Cost"]["seconds"] == ["-"]


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.000"), (0.00004, "4.0e-05"), (-1.23456, "-1.235")])
def test_small_numbers_do_not_look_like_nothing(value: float | None, text: str) -> None:
    assert checklist.number(value) == text


@pytest.mark.parametrize(
    ("tuned_on", "recipe", "credit", "says"),
    [
        (None, "sampled", "immediate", None),
        ("b", "sampled", "immediate", None),
        ("c", "sampled", "immediate", "the remedy is `weights.credit: residual`"),
        ("c", "sampled", "residual", "which is in use here"),
        ("c", "hybrid", "residual", "the remedy is `weights.credit: residual`"),
    ],
)
def test_consistency(tuned_on: str | None, recipe: str, credit: str, says: str | None) -> None:
    config = _config(
        student={"model": "a", "tuned_on": tuned_on}, objective={"recipe": recipe}, weights={"credit": credit}
    )
    assert (credit_in_part(config) is not None) == (recipe == "hybrid")
    found = consistency(config, declared(config))
    if says is None:
        assert found is None
    else:
        assert found and says in found
        assert all(part in found for part in ("samples of c", "teacher is b", "2604.13010", "2607.28449"))


def test_the_docs_list_every_field() -> None:
    assert markdown() in Path(__file__).parents[1].joinpath("docs/diagnostics.md").read_text(), (
        "put the output of schemas.diagnostics.markdown() there"
    )
