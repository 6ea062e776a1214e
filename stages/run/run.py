"""A run: its folder and config, and from these its phases, their shards with what they were made from, and its models.

A run has phases: `round-<r>`, whose rollouts are trained on, and `eval-<c>`, whose held-out rollouts measure
checkpoint c. Both sample from checkpoint number <r> or <c>: 0 is the student as given, n what n rounds made of it. With
`rollouts.replay` there is also `round-<r>@<q>`: the rollouts of round q as round r sees them, whose checkpoint weighs them.
With `sft.prompts` there is `sft`, whose rollouts are the teacher's answers: checkpoint 0 is what they make of the student as
given, which is `base` then and is evaluated too.

    run = open_run(config_file, "units", "round-0")
    shard = run.phase("round-0")[3]
    shard.units                     # opened: every byte against its manifest, and made from the rollouts that lie there
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.models import ModelRef
from pipeline.store.cache import entry_name, responses_digest
from pipeline.store.records import Record, read_record
from pipeline.store.shards import Shard, check_place, manifest_path, open_shard, read_manifest, write_text
from pipeline.store.signatures import check_signature
from schemas.config import Config, Rollouts, Sft, load_config
from schemas.config.reuse import sampled_rounds
from schemas.decides import decided, of_phase, settings
from schemas.errors import OpdError, excerpt, shown
from schemas.manifest import PHASE, Manifest, Signed, differences
from schemas.records import Provenance, Sampled, Weighed

KL_ITEMS = 100
"""Prompts that the on-policy reverse KL is measured on, at most, where the config doesn't say."""

BASE = -1
"""Number of the checkpoint before 0, the student as given, where `sft` makes 0 of it; by name it is `base`."""

MADE_FROM = {
    "policy": ("rollouts",),
    "units": ("rollouts", "scores"),
    "reference": ("rollouts",),
    "outcomes": ("rollouts",),
    "weights": ("rollouts", "units"),
}
"""Tables whose digests a table's manifest has among its inputs. Scores name the responses instead, which other runs share."""

IDS = {
    "rollouts": ("prompt_ids", "response_ids", "top_id"),
    "scores": ("token_id", "cand_id"),
    "units": ("cand_id",),
}
"""Columns of token ids: of scores the teacher's, else the student's."""


@dataclass(frozen=True)
class Source:
    """Rollouts of another run, or imported ones, and their scores: its folder, and that of one round in it (the same for a
    plain dataset)."""

    run: Path
    folder: Path

    def shard(self, table: str, shard: int) -> Path:
        """A shard of its `rollouts` or `scores`."""
        return self.folder / table / f"{shard:03}.parquet"

    @cached_property
    def shards(self) -> int:
        """How many shards it has."""
        return len(list((self.folder / "rollouts").glob("*.parquet")))

    @cached_property
    def is_scored(self) -> bool:
        """Whether a teacher has scored them all; else the run that takes them over has its own score them."""
        return all(self.shard("scores", number).exists() for number in range(self.shards))


@dataclass(frozen=True)
class Run:
    """A run's folder and its whole config, which says what lies where; `settings` has what the stage at work may read."""

    root: Path
    config: Config
    settings: Config
    stage: str = ""
    phase_name: str = ""

    @property
    def decided(self) -> dict[str, Any]:
        """What of the config decides the result of the stage at work (`schemas.decides`)."""
        return decided(self.config, self.stage, self.phase_name)

    def check(self, path: Path, made: Signed, stage: str, phase: str = "") -> None:
        """Raise OpdError where a stage made `path` for another config than this one, with the keys that decide it."""
        if made.decided is None:
            return
        if different := list(differences(decided(self.config, stage, phase), made.decided)):
            raise OpdError(
                f"{path}: made for another config: {excerpt('; '.join(different))}; run `{command(stage, phase)}` again"
            )

    def check_trained(self, path: Path, ref: ModelRef, made_by: tuple[str, str]) -> None:
        """Raise OpdError where a checkpoint was trained on other weights than lie here, or they are of another config.

        All shards of a phase are of one config, so one place stands for all; what is gone is not asked for.
        """
        for name, told in ref.trained_on.items():
            phase = self.phase(name)
            place, scored = phase[0], "answers" if phase.kind == "sft" else "scores"
            if manifest_path(place.path("rollouts")).exists():
                place.check("rollouts", read_manifest(place.path("rollouts")))
            if manifest_path(place.path(scored)).exists():
                place.linked(scored)
            found, what = phase.trained_shards(), "rollouts" if phase.kind == "sft" else "weights"
            if found and found != told:
                raise OpdError(
                    f"{path}: not trained on the {what} that lie in {phase.folder}; run `{command(*made_by)}` again"
                )

    @property
    def cache(self) -> Path:
        """The cache that runs share."""
        return cache_root(self.config.cache)

    @property
    def cache_keys(self) -> list[Path]:
        """The keys of which one must have signed what is taken from it; none: whoever wrote it is trusted."""
        return [Path(key).expanduser() for key in self.config.cache_keys]

    @property
    def prompts(self) -> Path:
        """The prompts' shard."""
        return self.root / "prompts.parquet"

    @property
    def also(self) -> Path:
        """The prompts of `evaluate.also`, likewise; there is none without such sets."""
        return self.root / "also.parquet"

    @property
    def fit(self) -> Path:
        """What was found when prompts and responses were fitted into both models."""
        return self.root / "fit.json"

    def model_file(self, role: str) -> Path:
        """A prepared model's reference: role is `student` or `teacher`."""
        return self.root / "models" / f"{role}.json"

    def vocabulary(self, role: str) -> Path:
        """Bytes of every token of the student or teacher, and which of them stop."""
        return self.root / "models" / f"{role}-vocabulary.parquet"

    def checkpoint(self, round_index: int) -> Path:
        """The folder in `save_pretrained` format that a round ends with."""
        return self.phase(f"round-{round_index}").checkpoint

    def policy_file(self, number: int) -> Path:
        """Reference of checkpoint `number` of the student."""
        if number > 0:
            return self.checkpoint(number - 1).with_suffix(".json")
        tuned = number == 0 and self.config.sft.prompts
        return self.phase("sft").checkpoint.with_suffix(".json") if tuned else self.model_file("student")

    def policy_stage(self, number: int) -> tuple[str, str]:
        """The stage that writes it, and of which phase."""
        if self.policy_file(number) == self.model_file("student"):
            return "models student", ""
        return ("train", f"round-{number - 1}") if number else ("sft", "sft")

    def phase(self, name: str) -> "Phase":
        """A phase by name. Raises OpdError for what is no phase's name."""
        return Phase(self, name)

    @cached_property
    def reused(self) -> list[Source]:
        """The rounds that come from other runs, in order; at most as many as the run has.

        A source is a run's folder, one that `opd import` made, or any folder with `rollouts/`, `prompts.parquet` and
        `models/*-vocabulary.parquet`, and `scores/` where there are. Raises OpdError when it has no rollouts.
        """
        sources: list[Source] = []
        for given in self.config.reuse:
            run = Path(given).expanduser()
            if not (rounds := sampled_rounds(run)):
                raise OpdError(f"reuse: {given}: no folder with rollouts (round-<r>/rollouts)")
            sources += [Source(run, folder) for folder in rounds]
        return sources[: self.config.rollouts.rounds]

    @property
    def rounds(self) -> range:
        """Numbers of its rounds."""
        return range(self.config.rollouts.rounds)

    @property
    def checkpoints(self) -> tuple[int | str, ...]:
        """The checkpoints that are evaluated: before, with `sft` after that, and after the last round, or every one."""
        last = self.config.rollouts.rounds
        after = range(1 if self.config.evaluate.every_round else last, last + 1)
        return (*(["base"] if self.config.sft.prompts else []), 0, *after)

    @cached_property
    def phases(self) -> list["Phase"]:
        """The phases that have tables, in the order of the run."""
        evaluated = [self.phase(f"eval-{checkpoint}") for checkpoint in self.checkpoints]
        found = [phase for phase in evaluated if phase.number <= 0]
        for number in self.rounds:
            found += self.trained_on(number)
            found += [phase for phase in evaluated if phase.number == number + 1]
        return [phase for phase in found if len(phase)]

    def trained_on(self, round_index: int) -> list["Phase"]:
        """The phases that a round trains on: its own, and the rounds before it that it replays."""
        first = max(0, round_index - self.config.rollouts.replay)
        names = [f"round-{round_index}", *(f"round-{round_index}@{q}" for q in range(first, round_index))]
        return [self.phase(name) for name in names]

    @property
    def kl_items(self) -> int:
        """Prompts on which the on-policy reverse KL is measured; it takes a teacher, so none by default with `reuse`."""
        if self.config.evaluate.kl_items is not None:
            return self.config.evaluate.kl_items
        return min(KL_ITEMS, self.config.held_out) if self._scores_rounds else 0

    @property
    def _scores_rounds(self) -> bool:
        """Whether a round is left for the teacher to score."""
        return len(self.rounds) > len(self.reused) or not all(source.is_scored for source in self.reused)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is needed; its tokens' bytes suffice when every score is reused."""
        return self.kl_items > 0 or self.config.sft.prompts > 0 or self._scores_rounds


@dataclass(frozen=True)
class Phase:
    """A phase: a sequence of the places where its shards lie, or will."""

    run: Run
    name: str

    def __post_init__(self) -> None:
        if not PHASE.fullmatch(self.name):
            raise OpdError(
                f"--phase {shown(self.name)}: expected round-<number>, eval-<number>, round-<number>@<earlier round>, or, with "
                "`sft.prompts`, sft or eval-base"
            )

    @property
    def kind(self) -> str:
        """`round`, `eval` or `sft`."""
        return self.name.partition("-")[0]

    @property
    def number(self) -> int:
        """Of the checkpoint that a round or `sft` starts from, or that is measured."""
        found = PHASE.fullmatch(self.name)
        assert found
        number = found["of_eval"] or found["of_round"] or "base"
        return BASE if number == "base" else int(number)

    @property
    def folder(self) -> Path:
        """Where what belongs to this phase alone lies."""
        return self.run.root / self.name

    @property
    def sampled_in(self) -> "Phase":
        """The phase that its rollouts come from: another one where it replays them."""
        found = PHASE.fullmatch(self.name)
        assert found
        return self if found["replayed"] is None else Phase(self.run, f"round-{found['replayed']}")

    @property
    def source(self) -> Source | None:
        """The other run that its rollouts and scores come from; None for a run's own."""
        sampled = self.sampled_in
        if sampled.kind != "round" or sampled.number >= len(self.run.reused):
            return None
        return self.run.reused[sampled.number]

    @property
    def is_foreign(self) -> bool:
        """Whether another policy than the one that the phase trains sampled its rollouts."""
        return self.source is not None or self.sampled_in != self

    @property
    def needs_reference(self) -> bool:
        """Whether its weights take log-probs of the run's first policy, which is not the one that it starts from."""
        objective = self.run.config.objective
        return self.kind == "round" and self.number > 0 and objective.refers and objective.reference == "initial"

    @property
    def beside(self) -> tuple[str, ...]:
        """The tables that its weights are made from beside rollouts and units."""
        wanted = {"policy": self.is_foreign, "reference": self.needs_reference, "outcomes": self.is_judged}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def is_judged(self) -> bool:
        """Whether its weights take which of its responses are right."""
        return self.kind == "round" and self.run.config.weights.judges

    def __len__(self) -> int:
        if self.source:
            return self.source.shards
        return math.ceil(self.planned / of_phase(self.run.config, self.name).rollouts.shard_responses)

    @property
    def planned(self) -> int:
        """Responses that the config has it sample."""
        options: Rollouts | Sft = self.run.config.sft if self.kind == "sft" else self.run.config.rollouts
        return self.run.kl_items if self.kind == "eval" else options.prompts * options.samples

    @property
    def responses(self) -> int:
        """Responses of its shards together: as the config plans them, or as they lie there when reused."""
        source = self.source
        if source is None:
            return self.planned
        return sum(read_manifest(source.shard("rollouts", i)).rows for i in range(len(self)))

    def __getitem__(self, shard: int) -> "Place":
        if not 0 <= shard < len(self):
            raise OpdError(f"--shard {shard}: phase {self.name} has {len(self)} shards, numbered from 0")
        return Place(self, shard)

    def __iter__(self) -> Iterator["Place"]:
        return (Place(self, shard) for shard in range(len(self)))

    def paths(self, table: str) -> list[Path]:
        """All shards of a table."""
        return [place.path(table) for place in self]

    @property
    def coverage(self) -> Path:
        """What the coverage gate measured."""
        return self.folder / "coverage.json"

    @property
    def weights(self) -> Path:
        """What was found when its weights were made; it is there once all of their shards are."""
        return self.folder / "weights.json"

    @property
    def result(self) -> Path:
        """What was measured of its checkpoint, where it is one of evaluation."""
        return self.folder / "result.json"

    @property
    def answers(self) -> Path:
        """The answers that it was measured by, a shard."""
        return self.folder / "answers.parquet"

    @property
    def metrics(self) -> Path:
        """Figures of the steps that its training took, a line each."""
        return self.states / "metrics.jsonl"

    def trained_shards(self) -> dict[str, str]:
        """sha256, by number, of what is trained on: weights, of `sft` rollouts; empty where that is gone.

        Raises OpdError when it is damaged or of another config.
        """
        if self.kind != "sft":
            return self.record(self.weights, Weighed, "weights").shards if self.weights.exists() else {}
        paths = [path for path in self.paths("rollouts") if manifest_path(path).exists()]
        return {path.stem: read_manifest(path).sha256 for path in paths}

    def record(self, path: Path, kind: type[Record], stage: str) -> Record:
        """What a stage left of the phase. Raises OpdError when it is missing, damaged, or of another config."""
        found = read_record(path, kind, command(stage, self.name))
        self.run.check(path, found, stage, self.name)
        return found

    @property
    def diagnostics(self) -> Path:
        """Its figures."""
        return self.folder / "diagnostics.json"

    @property
    def checkpoint(self) -> Path:
        """The folder in `save_pretrained` format that it ends with, where it trains."""
        return self.folder / "checkpoint"

    @property
    def states(self) -> Path:
        """Where its training states, metrics and outcome lie."""
        return self.folder / "train"

    @property
    def outcome(self) -> Path:
        """What its training ended with (`schemas.outcome`)."""
        return self.states / "result.json"


@dataclass(frozen=True)
class Place:
    """The tables of the same responses. Each is opened once, when it is asked for, and checked against what it was made from.

    A replayed round has its own `policy` and `weights`; all that does not depend on the policy in training is the original's.

    Attributes:
        whole: whether rollouts, units, policy and weights are read to the last byte when they are opened (`open_shard`).
    """

    phase: Phase
    number: int
    whole: bool = True

    def path(self, table: str) -> Path:
        """Where a table's shard lies, whether or not it is there yet."""
        home = self.phase if table in ("policy", "weights") else self.phase.sampled_in
        return home.folder / table / f"{self.number:03}.parquet"

    def inputs(self, table: str) -> dict[str, str]:
        """Digests of the tables that a table is made from, as they lie there; of links whose cache is gone none."""
        made_from = [name for name in MADE_FROM[table] if name != "scores" or manifest_path(self.path(name)).exists()]
        if table == "weights":
            made_from += self.phase.beside
        return {name: read_manifest(self.path(name)).sha256 for name in made_from}

    def check(self, table: str, manifest: Manifest) -> None:
        """Raise OpdError where a table was made for another config, from other prompts or by another policy than lie here."""
        check_place(self.path(table), manifest)
        home = self.phase if table in ("policy", "weights") else self.phase.sampled_in
        stage = table
        if table == "rollouts":
            stage = "reuse" if home.source else {"sft": "retokenise"}.get(home.kind, "rollouts")
        again = f"; run `{command(stage, home.name)} --shard {self.number}` again"
        if table == "rollouts":
            prompts = home.source.run / "prompts.parquet" if home.source else home.run.prompts
            if "prompts" in manifest.inputs and manifest_path(prompts).exists():
                told = manifest.inputs["prompts"]
                self._same(table, told, read_manifest(prompts).sha256, f"prompts than {prompts}", again)
        of_policy = {"rollouts": home.number, "policy": home.number, "reference": 0}.get(stage)
        if of_policy is not None and "policy" in manifest.identity:
            path = home.run.policy_file(of_policy)
            if path.exists():
                found = read_record(path, ModelRef, command(*home.run.policy_stage(of_policy))).identity()
                self._same(table, manifest.identity["policy"], found, f"policy than that of {path}", again)
        home.run.check(self.path(table), manifest, stage, home.name)

    def _same(self, table: str, told: Any, found: Any, of: str, again: str) -> None:
        if told != found:
            raise OpdError(f"{self.path(table)}: made with another {of}{again}")

    @cached_property
    def rollouts(self) -> Shard:
        """The responses; of `sft` in the student's tokens."""
        made_from = {"answers": read_manifest(self.path("answers")).sha256} if self.phase.kind == "sft" else {}
        return self._opened("rollouts", made_from)

    def _opened(self, table: str, inputs: dict[str, str]) -> Shard:
        shard = open_shard(self.path(table), table, inputs=inputs, whole=self.whole)
        self.check(table, shard.manifest)
        return self._bounded(shard, IDS.get(table, ()), "student")

    def _bounded(self, shard: Shard, columns: Sequence[str], role: str) -> Shard:
        """With as many ids as a model's vocabulary has."""
        path = self.phase.run.vocabulary(role)
        if not manifest_path(path).exists():
            return shard
        return replace(shard, ends=dict.fromkeys(columns, read_manifest(path).rows))

    @cached_property
    def answers(self) -> Shard:
        """Of `sft`: the teacher's answers, rollouts in its own tokens."""
        self.linked("answers")
        return self._bounded(open_shard(self.path("answers"), "rollouts"), IDS["rollouts"], "teacher")

    @cached_property
    def scores(self) -> Shard:
        """What the teacher said of these responses."""
        self.linked("scores")
        shard = open_shard(self.path("scores"), "scores", inputs={"responses": responses_digest(self.rollouts)})
        return self._bounded(shard, IDS["scores"], "teacher")

    @cached_property
    def units(self) -> Shard:
        """Their aligned units."""
        return self._opened("units", self.inputs("units"))

    @cached_property
    def reference(self) -> Shard:
        """Log-probs of the run's first policy."""
        return self._opened("reference", self.inputs("reference"))

    @cached_property
    def outcomes(self) -> Shard:
        """Which of its responses are right."""
        return self._opened("outcomes", self.inputs("outcomes"))

    @cached_property
    def policy(self) -> Shard:
        """Log-probs of the phase's policy, where another one sampled."""
        return self._opened("policy", self.inputs("policy"))

    @cached_property
    def weights(self) -> Shard:
        """Weights of their units, as the phase's figures have them on record."""
        path, phase = self.path("weights"), self.phase
        shard = open_shard(path, "weights", inputs=self.inputs("weights"), whole=self.whole)
        told = phase.record(phase.weights, Weighed, "weights").shards.get(path.stem)
        if told != shard.manifest.sha256:
            again = command("weights", phase.name)
            raise OpdError(f"{path}: not the weights that {phase.weights} tells of; run `{again}` again")
        return shard

    def provenance(self, table: str) -> Path:
        """How the run came by what its link to scores or answers points at."""
        return self.path(table).with_suffix(".origin")

    def sampled(self) -> Sampled | None:
        """The note beside its rollouts; None without one, as of what the cache has no part in.

        Raises OpdError when it is damaged, or of another config or shard than lies here.
        """
        home, path = self.phase.sampled_in, self.provenance("rollouts")
        if not path.exists():
            return None
        again = f"{command('rollouts', home.name)} --shard {self.number}"
        found = read_record(path, Sampled, again)
        home.run.check(path, found, "rollouts", home.name)
        here = {"phase": home.name, "shard": self.number, "rollouts": read_manifest(self.path("rollouts")).sha256}
        if different := list(differences(here, found.model_dump(include=set(here)))):
            raise OpdError(f"{path}: not of the rollouts that lie here ({'; '.join(different)}); run `{again}` again")
        return found

    def linked(self, table: str) -> Provenance:
        """That note. Raises OpdError when it is missing or damaged, or of another config, place or entry than lie here."""
        home, path = self.phase.sampled_in, self.provenance(table)
        stage = "reuse" if home.source and home.source.is_scored else table
        again = f"{command(stage, home.name)} --shard {self.number}"
        found = read_record(path, Provenance, again)
        if keys := home.run.cache_keys:
            check_signature(self.path(table), keys)
        home.run.check(path, found, stage, home.name)
        entry = read_manifest(self.path(table))
        here = {"phase": home.name, "shard": self.number, "entry": entry_name(entry.identity, entry.inputs)}
        if different := list(differences(here, found.model_dump(include=set(here)))):
            raise OpdError(f"{path}: not of the {table} that lie here ({'; '.join(different)}); run `{again}` again")
        return found


def command(stage: str, phase: str = "") -> str:
    """How a stage is run by hand, of a phase."""
    name, _, role = stage.partition(" ")
    of = {"train": "--round", "sft": "", "evaluate": "--checkpoint", "retokenise": "", "answers": ""}.get(
        name, "--phase"
    )
    told = phase.partition("-")[2] if of in ("--round", "--checkpoint") else phase
    options = f" --role {role}" if role else f" {of} {told}" if phase and of else ""
    return f"python -m stages.{name}{options}"


def run_of(config: Config, stage: str = "", phase: str = "") -> Run:
    """The run of a config, below the working directory, as a stage sees it; without one as all that there is."""
    view = settings(config, stage, phase) if stage else config
    return Run(Path("runs") / config.run, config, view, stage, phase)


def open_run(config_file: Path, stage: str = "", phase: str = "") -> Run:
    """The run of a YAML file, below the working directory; of the resolved config that lies in a run's folder, that one, which
    may be a copy elsewhere. Raises OpdError when it can't be read."""
    run, folder = run_of(load_config(config_file), stage, phase), config_file.parent
    return replace(run, root=folder) if folder.parts[-2:] == run.root.parts else run


def cache_root(configured: str) -> Path:
    """The configured cache, unless OPD_CACHE says otherwise; empty it says nothing."""
    return Path(os.environ.get("OPD_CACHE") or configured).expanduser().absolute()


def config_text(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_config(run: Run) -> None:
    """Put the resolved config into the run's folder, where its stages read it."""
    write_text(run.root / "config.yaml", config_text(run.config))
