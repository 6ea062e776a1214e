"""Compare: runs beside each other."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import polars as pl
import typer
from rich.markup import escape
from rich.table import Table

from pipeline.measure.comparison import compared_answers, compared_kl, differing, items, sampled_kl
from pipeline.store.records import read_record
from pipeline.store.shards import read_manifest
from schemas.errors import OpdError, excerpt
from schemas.manifest import differences
from schemas.records import Evaluation, Measured, Provenance
from stages.run import console
from stages.run.results import read_evaluation, stage_seconds
from stages.run.run import Phase, Run, command
from stages.tools.cli import STAGES
from stages.tools.folders import RunsArgument, files_of, megabytes, open_folder, opened, places

NAMES = ("run", "cache", "cache_remote", "cache_keys")
"""Keys that say where things lie, not what they are."""
JUDGED_BY = {"temperature", "top_p"}
"""Fields of an evaluation that two must share beside the scorer's own, so that their accuracies mean the same."""


@dataclass(frozen=True)
class Side:
    """A run as it is compared."""

    name: str
    run: Run

    @cached_property
    def evaluations(self) -> dict[int | str, tuple[Evaluation, pl.DataFrame]]:
        """What was measured of each checkpoint that has been evaluated, and the answers, in the run's order."""
        phases = {number: self.run.phase(f"eval-{number}") for number in ("base", *range(len(self.run.rounds) + 1))}
        return {number: read_evaluation(phase) for number, phase in phases.items() if phase.result.exists()}

    @property
    def last(self) -> tuple[Phase, Evaluation, pl.DataFrame]:
        """The last evaluated checkpoint."""
        if not self.evaluations:
            raise OpdError(
                f"{self.run.root}: nothing evaluated yet; let the run go on, or `{command('evaluate', 'eval-0')}`"
            )
        number, (found, answers) = list(self.evaluations.items())[-1]
        return self.run.phase(f"eval-{number}"), found, answers

    @cached_property
    def teacher_tokens(self) -> dict[str, int]:
        """Teacher tokens of its scores and answers by how it came by them: `scored`, `cache`, ..."""
        found: Counter[str] = Counter()
        for path in sorted(path for of in ("scores", "answers") for path in self.run.root.glob(f"*/{of}/*.origin")):
            note = read_record(path, Provenance, "snakemake")
            found[note.origin] += note.teacher_tokens
        return dict(found)

    @cached_property
    def disk(self) -> dict[str, int]:
        """Bytes of its own files, and of those in the cache that it links."""
        files = files_of(self.run.root)
        own = sum(path.lstat().st_size for path in files if not path.is_symlink())
        linked = {path.resolve() for path in files if path.is_symlink() and path.exists()}
        return {"own": own, "cache": sum(path.stat().st_size for path in linked)}

    def figures(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "run": self.name,
            "folder": str(self.run.root),
            "evaluations": {
                str(number): found.model_dump(mode="json", exclude={"decided"})
                for number, (found, _) in self.evaluations.items()
            },
            "seconds": dict(sorted(stage_seconds(self.run).items(), key=lambda spent: _place(spent[0]))),
            "teacher_tokens": self.teacher_tokens,
            "disk": self.disk,
        }


def _place(stage: str) -> int:
    """Where a stage comes; one of another version's last."""
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def main(runs: RunsArgument, as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Compare runs: what differs in their configs, figures with intervals and cost side by side, and each against the first,
    tested on the same held-out items.
    """
    if len(runs) < 2:
        raise OpdError(f"{runs[0]}: one run; give two or more to compare")
    given = [open_folder(path) for path in runs]
    names = [run.config.run for run in given]
    sides = [
        Side(name if names.count(name) == 1 else str(run.root), run) for name, run in zip(names, given, strict=True)
    ]
    config = differing([side.run.config.model_dump(mode="json", exclude=set(NAMES)) for side in sides])
    figures = [side.figures() for side in sides]
    tests = [test for other in sides[1:] for test in tested(sides[0], other)]
    if as_json:
        found = {"config": config, "runs": figures, "tests": tests}
        console.out.print(json.dumps(found, ensure_ascii=False), markup=False, soft_wrap=True)
        return
    _print_config([side.name for side in sides], config)
    _print_figures(figures)
    for test in tests:
        console.out.print(in_words(test), markup=False, soft_wrap=True)


def tested(first: Side, second: Side) -> list[dict[str, Any]]:
    """The last checkpoints of two runs, tested set by set and on their KL; `problem` says why one can't be."""
    (here, one, answers), (there, other, others) = first.last, second.last
    who = {"first": first.name, "second": second.name}
    about = {"checkpoints": [one.checkpoint, other.checkpoint]}
    sets = dict.fromkeys((one.split, other.split, *one.also, *other.also))
    found = []
    for name in sets:
        missing = [run.name for run, table in ((first, answers), (second, others)) if table.filter(set=name).is_empty()]
        problem = f"{' and '.join(missing)} has no set {name}" if missing else judged_otherwise(one, other, name)
        result = (
            {"problem": problem}
            if problem
            else compared_answers(
                items(answers.filter(set=name)), items(others.filter(set=name)), first.run.config.seed
            )
        )
        found.append({**who, **about, "of": "accuracy", "set": name, "samples": [one.samples, other.samples], **result})
    kl: dict[str, Any]
    try:
        problem = measured_otherwise(here, there)
        tables = [] if problem else [kl_of(here, answers), kl_of(there, others)]
        kl = {"problem": problem} if problem else compared_kl(tables[0], tables[1], first.run.config.seed)
    except OpdError as error:
        kl = {"problem": str(error)}
    return [*found, {**who, **about, "of": "sampled_kl", **kl}]


def judged_otherwise(first: Evaluation, second: Evaluation, name: str) -> str | None:
    """Why accuracies on a set don't mean the same; None: they do."""

    def how(found: Evaluation) -> dict[str, Any]:
        figures = {"items", "judged", "right", "accuracy", "accuracy_95", "pass_at_k", "stopped"}
        scorer: Measured = found.also.get(name, found)
        return found.model_dump(include=JUDGED_BY) | scorer.model_dump(include=Measured.model_fields.keys() - figures)

    told = [
        text.replace("expected", "first").replace("found", "second") for text in differences(how(first), how(second))
    ]
    return f"judged otherwise: {'; '.join(told)}" if told else None


def measured_otherwise(first: Phase, second: Phase) -> str | None:
    """Why KLs don't mean the same; None: they do."""
    if not (places(first, "weights") and places(second, "weights")):
        return "not measured in both"
    scores, rollouts = (
        [read_manifest(places(phase, "weights")[0].path(table)).identity for phase in (first, second)]
        for table in ("scores", "rollouts")
    )
    if any(scores[0][key] != scores[1][key] for key in ("teacher", "prompt")):
        return "to another teacher, or to one that is prompted otherwise"
    if rollouts[0]["policy"]["tokenizer"] != rollouts[1]["policy"]["tokenizer"]:
        return "in nats per token of another tokenizer"
    return None


def kl_of(phase: Phase, answers: pl.DataFrame) -> pl.DataFrame:
    """`sampled_kl` of a phase by prompt, prompts named as by `items`."""
    found = pl.concat(
        sampled_kl(
            *(
                pl.DataFrame(shard.read())
                for shard in (opened(place, table) for table in ("rollouts", "units", "weights"))
            )
        )
        for place in places(phase, "weights")
    )
    own = answers.filter(pl.col("set") == answers["set"][0])
    named = items(own.with_columns(own=pl.col("prompt_id"))).unique("own", keep="first").select("own", item="prompt_id")
    joined = found.join(named, left_on="prompt_id", right_on="own", how="left", maintain_order="left")
    return joined.select(pl.col("item").fill_null(pl.col("prompt_id")).alias("prompt_id"), "nats", "tokens")


# ---- for people ----


def _print_config(names: Sequence[str], config: dict[str, list[Any]]) -> None:
    if not config:
        console.out.print("the configs are the same\n")
        return
    table = Table(title="config", title_justify="left")
    for heading in ("key", *names):
        table.add_column(heading, overflow="fold")
    for key, values in config.items():
        table.add_row(key, *("" if value is None else escape(excerpt(_value(value), 60)) for value in values))
    console.out.print(table)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_figures(runs: Sequence[dict[str, Any]]) -> None:
    table = Table(title="figures (95 % intervals)", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run["run"], justify="right")
    for when, at in (("first", 0), ("last", -1)):
        ends = [list(run["evaluations"].items())[at] if run["evaluations"] else None for run in runs]
        table.add_row(f"{when} checkpoint", *("" if end is None else str(end[0]) for end in ends))
        results = [end[1] if end else None for end in ends]
        named = dict.fromkeys(name for one in results if one for name in (one["split"], *one["also"]))
        for name in named:
            table.add_row(f"  accuracy, {name}", *(_accuracy(one, name) for one in results))
        table.add_row("  reverse KL, nats per token", *(_nats(one) for one in results))
        table.add_row("  answers that stop", *(f"{one['stopped']:.0%}" if one else "" for one in results))
    table.add_section()
    for stage in dict.fromkeys(stage for run in runs for stage in run["seconds"]):
        spent = [run["seconds"].get(stage) for run in runs]
        table.add_row(f"{stage}, s", *("" if seconds is None else f"{seconds:,.0f}" for seconds in spent))
    totals = (f"{sum(run['seconds'].values()):,.0f}" if run["seconds"] else "not measured" for run in runs)
    table.add_row("all stages, s", *totals)
    for origin in dict.fromkeys(origin for run in runs for origin in run["teacher_tokens"]):
        counts = (run["teacher_tokens"].get(origin) for run in runs)
        table.add_row(f"teacher tokens, {origin}", *("" if count is None else f"{count:,}" for count in counts))
    table.add_row("disk, the run's own", *(megabytes(run["disk"]["own"]) for run in runs))
    table.add_row("disk, of the cache", *(megabytes(run["disk"]["cache"]) for run in runs))
    console.out.print(table)


def _accuracy(found: dict[str, Any] | None, name: str) -> str:
    of = found and (found if name == found["split"] else found["also"].get(name))
    if not of or of["accuracy"] is None:
        return "not measured"
    low, high = of["accuracy_95"]
    return f"{100 * of['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _nats(found: dict[str, Any] | None) -> str:
    if not found or found["reverse_kl"] is None:
        return "not measured"
    low, high = found["reverse_kl_95"]
    return f"{found['reverse_kl']:.3f} ({low:.3f} to {high:.3f})"


def in_words(test: dict[str, Any]) -> str:
    """What a test found, in one line."""
    of = f"{test['second']} against {test['first']}, "
    of += f"accuracy on {test['set']}" if test["of"] == "accuracy" else "on-policy KL as sampled"
    if test.get("problem"):
        return f"{of}: not compared: {test['problem']}"
    here, there = test["items"]
    same = f"{test['common']} items of both" if test["paired"] else f"other items, {here} and {there}"
    if test["paired"] and test["common"] < max(here, there):
        same += f", which have {here} and {there}"
    elif not test["paired"] and test["common"]:
        same += f", of which {test['common']} are the same"
    if test["of"] == "sampled_kl":
        low, high = test["difference_95"]
        found = f"{test['difference']:+.3f} nats per token ({low:+.3f} to {high:+.3f})"
        return f"{of}: {found}, p {test['p']:.2g} ({same})"
    if test["accuracy"] is None:
        return f"{of}: not measured ({same})"
    low, high = test["accuracy_95"]
    line = (
        f"{of}: {100 * test['accuracy']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), p {test['p']:.2g} ({same}"
    )
    if test["gained"] is not None:
        only = f"{test['gained']} right only in {test['second']}, {test['lost']} only in {test['first']}"
        return f"{line}, {only}; McNemar, exact)"
    one, other = test["samples"]
    alike = f"signs flipped by item, {one} answers each"
    how = (
        (alike if one == other else f"items swapped, {other} and {one} answers each")
        if test["paired"]
        else "relabelled"
    )
    return f"{line}; {how})"


if __name__ == "__main__":
    console.run(main)
