"""Inspect: what a shard, a phase or a run holds, and how both models saw a response."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.align.tokens import from_table
from pipeline.measure.columns import summaries
from pipeline.measure.token_view import response_tables, token_view
from pipeline.store.shards import open_shard, read_manifest
from schemas.errors import OpdError, excerpt, listed, one_line, shown
from schemas.manifest import PHASE, stated
from schemas.tables import TABLES
from stages.run import console
from stages.run.results import read_evaluation
from stages.run.run import Phase, Place, Run
from stages.tools.folders import megabytes, open_folder, opened, places

MEANING = {
    "prompts": "prompts, a row each",
    "vocabulary": "the tokens of a model, a row an id",
    "rollouts": "responses, a row each",
    "scores": "what the teacher said of responses, a row a teacher token or an end",
    "units": "responses in units that both models have, a row a unit",
    "policy": "log-probs of responses under another policy than sampled them, a row a response",
    "reference": "log-probs of responses under the run's first policy, a row a response",
    "outcomes": "which responses are right, a row a response",
    "weights": "advantages and weights, a row a unit",
    "answers": "judged answers, a row each",
}
TOKENS = {"rollouts": "response_ids", "policy": "policy_logp", "reference": "reference_logp"}
"""Columns of which each element is a token."""
STEPS = ("answers", "rollouts", "scores", "units", "policy", "reference", "outcomes", "weights")
"""Tables of a phase as they are made."""
FULL = 4.0
"""Nats at which a unit's colour is full."""
CANDIDATES = 4
WIDE = 110
"""Columns of a terminal from which on all figures of a unit have room."""


def main(
    path: Annotated[
        Path,
        typer.Argument(help="a shard, an entry of the cache, a record, the folder of a phase, or a run's or its name"),
    ],
    response: Annotated[str | None, typer.Option(help="a response's rollout_id: show it unit by unit")] = None,
    by: Annotated[Literal["gap", "advantage"], typer.Option(help="what colours the units of a response")] = "gap",
    rows: Annotated[int, typer.Option(min=0, help="first rows of a shard to show")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what a shard, a phase or a run is and holds; with --response how both models saw a response, unit by unit."""
    if response is not None:
        found, show = response_view(path, response), lambda view: _print_response(view, by)
    else:
        found, show = looked_at(path, rows)
    if as_json:
        console.out.print(json.dumps(found, ensure_ascii=False, default=str), markup=False, soft_wrap=True)
    else:
        show(found)


def looked_at(path: Path, rows: int) -> tuple[dict[str, Any], Any]:
    """What lies at a path, and what prints it. Raises OpdError where that is nothing of ours."""
    if path.suffix == ".json" and path.with_suffix(".parquet").exists():
        path = path.with_suffix(".parquet")  # whose manifest it is
    if path.suffix == ".parquet":
        return shard_figures(path, rows), _print_shard
    if path.is_file():
        return record_figures(path), _print_record
    if shards := sorted(path.glob("*.parquet")) if not (path / "config.yaml").exists() else []:
        return shard_figures(shards[0], rows) | {"of": len(shards)}, _print_shard
    if phase := phase_at(path):
        return phase_figures(phase), _print_phase
    return run_figures(open_folder(path)), _print_run


def phase_at(path: Path) -> Phase | None:
    """The phase of a run whose folder it is."""
    folder = path.absolute()
    if PHASE.fullmatch(folder.name) and (folder.parent / "config.yaml").is_file():
        return open_folder(folder.parent).phase(folder.name)
    return None


# ---- shards and records ----


def shard_figures(path: Path, rows: int) -> dict[str, Any]:
    """A shard, every byte of it checked: what it is, its manifest, its columns and its first rows."""
    manifest = read_manifest(path)
    shard = open_shard(path, manifest.kind)
    columns = TABLES.get(manifest.kind, ())
    table = pl.scan_parquet(path)
    tokens = table.select(pl.col(TOKENS[manifest.kind]).list.len().sum()) if manifest.kind in TOKENS else None
    if manifest.kind == "units":
        tokens = table.select(pl.col("s_len").sum())
    elif manifest.kind == "scores":
        tokens = table.select((pl.col("token_id") >= 0).sum())
    return {
        "path": str(path),
        "links": str(path.resolve()) if path.is_symlink() else None,
        "kind": manifest.kind,
        "is": MEANING.get(manifest.kind, manifest.kind),
        "rows": shard.rows,
        "row_groups": manifest.row_groups,
        "tokens": None if tokens is None else int(tokens.collect().item() or 0),
        "bytes": manifest.bytes,
        "manifest": manifest.model_dump(mode="json"),
        "columns": summaries(table, columns),
        "first": table.head(rows).collect().to_dicts(),
    }


def record_figures(path: Path) -> dict[str, Any]:
    """A file that proves itself."""
    try:
        return {"path": str(path), "record": stated(path.read_text())}
    except (ValueError, OSError) as error:
        raise OpdError(
            f"{path}: neither a shard nor an intact record of a run: {one_line(error)}; `opd inspect` takes those, and folders "
            "of runs and their phases"
        ) from error


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted name; lists as they are."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, values


# ---- phases and runs ----


def phase_figures(phase: Phase) -> dict[str, Any]:
    """What of a phase is there: shards and rows of each table, what it ended with, and how far it is."""
    tables = {}
    for table in STEPS:
        manifests = [read_manifest(place.path(table)) for place in places(phase, table)]
        if manifests:
            tables[table] = {
                "shards": len(manifests),
                "rows": sum(one.rows for one in manifests),
                "bytes": sum(one.bytes for one in manifests),
            }
    files = (phase.coverage, phase.weights, phase.diagnostics, phase.result, phase.answers, phase.metrics)
    result, problem = None, None
    if phase.result.exists():
        try:
            result = read_evaluation(phase)[0].model_dump(mode="json", exclude={"decided"})
        except OpdError as error:
            problem = str(error)
    return {
        "phase": phase.name,
        "folder": str(phase.folder),
        "state": state_of(phase),
        "tables": tables,
        "files": [str(file) for file in files if file.exists()],
        "checkpoint": str(phase.checkpoint) if phase.checkpoint.with_suffix(".json").exists() else None,
        "result": result,
        "problem": problem,
    }


def state_of(phase: Phase) -> str:
    """`done`, `not begun`, or what was last made of it."""
    if phase.kind == "eval" and phase.result.exists():
        return "done"
    if phase.kind != "eval" and phase.checkpoint.with_suffix(".json").exists():
        return "done"
    if phase.metrics.exists():
        return "training"
    try:
        planned: int | None = len(phase)
    except OpdError:  # the run that it reuses is gone
        planned = None
    made = [(table, len(places(phase, table))) for table in STEPS if places(phase, table)]
    if not made:
        return "not begun"
    table, count = made[-1]
    return f"{table}, {count} of {planned or '?'} shards"


def run_figures(run: Run) -> dict[str, Any]:
    """A run: its models and recipe, its phases and their state, its results and where things lie."""
    config = run.config
    rounds = [f"round-{number}" for number in run.rounds]
    evaluated = {f"eval-{checkpoint}" for checkpoint in run.checkpoints}
    found = {path.name for path in run.root.iterdir() if PHASE.fullmatch(path.name)}
    order = sorted({*rounds, *evaluated, *found, *(["sft"] if config.sft.prompts else [])}, key=_place_in_run)
    lies = {"report": "report.html", "summary": "summary.json", "config": "config.yaml", "logs": "logs"}
    figures = [phase_figures(run.phase(name)) for name in order]
    checkpoints = [one["checkpoint"] for one in figures if one["checkpoint"]]
    return {
        "run": config.run,
        "folder": str(run.root),
        "student": config.student.model,
        "teacher": config.teacher.model,
        "recipe": config.objective.recipe,
        "rounds": len(run.rounds),
        "phases": figures,
        "lies": {name: str(run.root / file) for name, file in lies.items() if (run.root / file).exists()}
        | ({"checkpoint": checkpoints[-1]} if checkpoints else {}),
    }


def _place_in_run(name: str) -> tuple[int, int, str]:
    """Evaluation of the base, sft, then each checkpoint's evaluation and the round that starts from it."""
    found = PHASE.fullmatch(name)
    assert found
    if name in ("eval-base", "sft"):
        return -1, name == "sft", name
    return int(found["of_eval"] or found["of_round"]), found["of_round"] is not None, name


# ---- a response ----


def response_view(path: Path, name: str) -> dict[str, Any]:
    """A response of a run or a phase as both models saw it. Raises OpdError where there is none of that name, or no units."""
    phase = phase_at(path)
    run = phase.run if phase else open_folder(path)
    parts = [phase] if phase else [run.phase(one) for one in _with_rollouts(run)]
    known: list[str] = []
    for place in (place for part in parts for place in places(part, "rollouts")):
        names = [
            name
            for group in opened(place, "rollouts").row_groups(["rollout_id"])
            for name in group["rollout_id"].to_pylist()
        ]
        if name in names:
            return _viewed(place, name)
        known += names
    some = f"; there are {len(known)}, such as {listed(known[:3])}" if known else ": it has no rollouts yet"
    raise OpdError(f"--response {shown(name)}: {path} has none of that name{some}")


def _with_rollouts(run: Run) -> list[str]:
    names = {folder.parent.name for folder in run.root.glob("*/rollouts") if PHASE.fullmatch(folder.parent.name)}
    return sorted(names, key=_place_in_run)


def _viewed(place: Place, name: str) -> dict[str, Any]:
    run = place.phase.run
    if not place.path("units").exists():
        raise OpdError(
            f"{place.path('units')}: missing: the teacher's view of {name} isn't made yet; let the run go on"
        )
    weights = opened(place, "weights") if place.path("weights").exists() and place.phase.weights.exists() else None
    tables = response_tables(name, opened(place, "rollouts"), opened(place, "units"), weights)
    assert tables  # its name is among the rollouts
    rollouts, units, weighed = tables
    tokens = from_table(open_shard(run.vocabulary("student"), "vocabulary").read(), run.config.student.model)[0]
    about = rollouts.select("rollout_id", "prompt_id", "finish_reason", "answer", "response").row(0, named=True)
    return {"phase": place.phase.name, **about, "units": token_view(rollouts, units, tokens, weighed).to_dicts()}


# ---- for people ----


def _print_shard(found: dict[str, Any]) -> None:
    many = f", the first of {found['of']}" if found.get("of", 1) > 1 else ""
    tokens = "" if found["tokens"] is None else f", {found['tokens']:,} tokens"
    console.out.print(Text.assemble((found["path"], "bold"), f"{many}: {found['kind']}: {found['is']}"), soft_wrap=True)
    if found["links"]:
        console.out.print(f"a link to {found['links']}", markup=False, soft_wrap=True)
    console.out.print(
        f"{found['rows']:,} rows{tokens} in {found['row_groups']} row groups, {megabytes(found['bytes'])}; every byte is as "
        "it was written\n"
    )
    manifest = found["manifest"]
    table = Table(title="manifest", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in ("place", "origin", "identity", "inputs", "figures", "decided", "versions"):
        for key, value in leaves(manifest[section]) if manifest[section] else ():
            table.add_row(f"{section}.{key}", escape(_digest(value)))
    table.add_row("sha256", manifest["sha256"])
    console.out.print(table)
    table = Table(title="columns", title_justify="left")
    for heading in ("column", "low", "mean", "high", "null", "meaning"):
        table.add_column(heading, justify="left" if heading in ("column", "meaning") else "right")
    for column in found["columns"]:
        table.add_row(column["name"], *_cells(column), escape(excerpt(column["doc"], 120)))
    console.out.print(table)
    if found["first"]:
        with pl.Config(tbl_width_chars=max(100, console.out.width), tbl_cols=30, fmt_str_lengths=24, tbl_rows=100):
            console.out.print(str(pl.DataFrame(found["first"])), markup=False)


def _digest(value: Any) -> str:
    """A value on one line."""
    return excerpt(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 160)


def _cells(column: dict[str, Any]) -> Iterator[str]:
    for name in ("low", "mean", "high"):
        value = column[name]
        if value is None and name == "low" and column["distinct"] is not None:
            yield f"{column['distinct']:,} kinds"
        elif value is None and name == "mean" and column["first"] is not None:
            yield escape(excerpt(column["first"], 16))
        else:
            yield "" if value is None else f"{value:.4g}"
    yield f"{column['nulls']:.0%}" if column["nulls"] else ""


def _print_record(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['path']}: as it was written", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in leaves(found["record"]):
        table.add_row(key, escape(_digest(value)))
    console.out.print(table)


def _print_phase(found: dict[str, Any]) -> None:
    console.out.print(Text.assemble((found["folder"], "bold"), f": {found['phase']}, {found['state']}"), soft_wrap=True)
    table = Table()
    for heading in ("table", "shards", "rows", "size"):
        table.add_column(heading, justify="left" if heading == "table" else "right")
    for name, of in found["tables"].items():
        table.add_row(name, str(of["shards"]), f"{of['rows']:,}", megabytes(of["bytes"]))
    console.out.print(table)
    if told := _result(found):
        console.out.print(told, markup=False, soft_wrap=True)
    for file in (*found["files"], *filter(None, [found["checkpoint"]])):
        console.out.print(file, markup=False, soft_wrap=True)


def _result(found: dict[str, Any]) -> str:
    """Accuracy and KL of an evaluated phase, or why they can't be told."""
    if found["problem"]:
        return str(found["problem"])
    result = found["result"]
    if not result:
        return ""
    told = []
    for name, of in {result["split"]: result, **result["also"]}.items():
        if of["accuracy"] is not None:
            low, high = of["accuracy_95"]
            told.append(f"{100 * of['accuracy']:.1f} % of {name} ({100 * low:.1f} to {100 * high:.1f})")
    if result["reverse_kl"] is not None:
        told.append(f"reverse KL {result['reverse_kl']:.3f} nats per token")
    return ", ".join(told) or "not measured"


def _print_run(found: dict[str, Any]) -> None:
    about = (
        f": run {found['run']}, {found['student']} from {found['teacher']}, {found['recipe']}, {found['rounds']} rounds"
    )
    console.out.print(Text.assemble((found["folder"], "bold"), about), soft_wrap=True)
    table = Table()
    for heading in ("phase", "state", "responses", "size", "result"):
        table.add_column(heading, justify="right" if heading in ("responses", "size") else "left")
    for phase in found["phases"]:
        size = sum(of["bytes"] for of in phase["tables"].values())
        responses = phase["tables"].get("rollouts", {}).get("rows")
        counts = ("" if responses is None else f"{responses:,}", megabytes(size) if size else "")
        table.add_row(phase["phase"], phase["state"], *counts, escape(_result(phase)))
    console.out.print(table)
    for name, place in found["lies"].items():
        console.out.print(f"{name + ':':12}{place}", markup=False, soft_wrap=True)


def _print_response(found: dict[str, Any], by: str) -> None:
    units: Sequence[dict[str, Any]] = found["units"]
    if by == "advantage" and "advantage" not in units[0]:
        raise OpdError(f"--by advantage: {found['phase']} has no weights yet; use --by gap")
    reference = "" if found["answer"] is None else f", reference {excerpt(found['answer'], 60)!r}"
    head = f"{found['rollout_id']}, {found['phase']}, prompt {found['prompt_id']}, {found['finish_reason']}{reference}"
    console.out.print(Text(head, "bold"), soft_wrap=True)
    colours = (
        f"coloured by {by}: red where the teacher finds it unlikelier than the student, blue where likelier; full at "
    )
    console.out.print(f"{colours}{FULL:g} nats, grey what isn't compared\n", soft_wrap=True)
    console.out.print(Text.assemble(*((unit["text"], style(unit, by)) for unit in units)), soft_wrap=True)
    told = (
        _NUMBERS
        if console.out.width >= WIDE
        else {name: _NUMBERS[name] for name in ("student_logp", "teacher_logp", by)}
    )
    recorded = any(unit["student_candidates"] for unit in units)
    table = Table()
    for heading in ("unit", "kind", "text", *told.values(), "teacher says", *(["student says"] if recorded else [])):
        table.add_column(heading, justify="right" if heading in ("unit", *told.values()) else "left", overflow="fold")
    for unit in units:
        numbers = ("" if unit.get(name) is None else f"{unit[name]:.2f}" for name in told)
        theirs = (unit["teacher_candidates"] or ())[:CANDIDATES]
        said = Text(", ".join(f"{_visible(one['text'])} {100 * math.exp(one['logp']):.0f} %" for one in theirs))
        own = Text(", ".join(_visible(one["text"]) for one in (unit["student_candidates"] or ())[:CANDIDATES]))
        text = Text(_visible(unit["text"]), style(unit, by))
        table.add_row(str(unit["unit"]), unit["kind"], text, *numbers, said, *([own] if recorded else []))
    console.out.print(table)


_NUMBERS = {
    "student_logp": "student",
    "teacher_logp": "teacher",
    "gap": "gap",
    "advantage": "advantage",
    "weight": "weight",
}
"""Columns of a unit that are numbers, and what the table calls them."""


def style(unit: dict[str, Any], by: str) -> str:
    """A unit's background: the stronger, the further the models are apart."""
    value = unit[by] if unit["gap"] is not None else None
    if value is None:
        return "dim"
    share = min(1.0, abs(value) / FULL)
    if share < 1 / FULL / 4:
        return ""
    rest = round(235 * (1 - share))
    return f"black on rgb(255,{rest},{rest})" if value < 0 else f"black on rgb({rest},{rest},255)"


def _visible(text: str) -> str:
    """A unit's text with its spaces and line ends in sight."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") if text.strip() != text else text


if __name__ == "__main__":
    console.run(main)
