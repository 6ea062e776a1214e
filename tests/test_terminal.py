"""The terminal of a run: fed the events that Snakemake sends and the logs that stages leave, with a clock of the test's own."""

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from snakemake_interface_logger_plugins.common import LogEvent

from schemas.config import parse_config
from stages.run import console, terminal
from stages.run.run import Run, run_of
from stages.run.terminal import START, Job, Terminal, last_words, result, work
from stages.tools.run import snakemake

ROOT = Path(__file__).parents[1]
SAYS = {
    "prompts": "prompts: 300 test, 480 train from reasoning-gym:chain_sum",
    "models": "student: pypi:x, 49,135 tokens with bytes, 1 that stop, in /cache/x",
    "rollouts": "{0} rollouts: 160 responses in 46.9 s (3.4/s)",
    "scores": "{0} scores: 1,220 teacher tokens in 9.9 s (123.2/s)\naudit: 92 log-probs in float32: mean difference 0.025 nats",
    "train": "{0} train: 1/30, 0.040 steps/s, sampled KL 1.954, 0:00:25 left\n{0} train: 30 steps in 240.3 s (0.1/s)\n"
    "{0} train: sampled KL 0.552, in runs/default/{0}/checkpoint",
    "evaluate": "warning: a library was odd\n{0} answers: 300 responses in 22.1 s (13.6/s)\n{0}: 9/300 right (3.0 %)",
    "coverage": "┏━━━┓\n┃ a ┃\n└───┘\n{0} coverage: 96.0 % of the student's tokens carry loss",
    "diagnostics": "",
    "fit": "fit: teacher: prompts of up to 69 tokens",
    "report": "report: all is well",
}
"""What stages leave in their logs, by rule; the phase comes in."""


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Also a working directory, and nothing that watches in the background."""
    clock = Clock()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "time", clock)
    monkeypatch.setattr(terminal.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    return clock


def default(**changes: Any) -> Run:
    """The default run."""
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    return run_of(parse_config(values | changes, "config.yaml"))


def planned(run: Run) -> list[Any]:
    """Its jobs as Snakemake has them, in an order in which they could run."""
    jobs: list[tuple[str, dict[str, str]]] = [
        ("prompts", {}),
        *(("models", {"role": r}) for r in ("student", "teacher")),
    ]
    jobs.append(("fit", {}))
    for phase in run.phases:
        shards = [{"phase": phase.name, "shard": f"{place.number:03}"} for place in phase]
        jobs += [(rule, shard) for rule in ("rollouts", "scores", "units") for shard in shards]
        of = {"phase": phase.name}
        jobs += [("weights", of)]
        if phase.kind == "round":
            jobs += [("coverage", of), ("train", {"round": str(phase.number)})]
        else:
            jobs += [("evaluate", {"checkpoint": str(phase.number)})]
        jobs += [("diagnostics", of)]
    jobs += [("report", {}), ("all", {})]
    return [
        one_job(number, rule, ["made"] if rule != "all" else [], **wildcards)
        for number, (rule, wildcards) in enumerate(jobs)
    ]


def one_job(number: int, rule: str, output: Sequence[str] = ("made",), **wildcards: str) -> Any:
    """One as Snakemake has it."""
    return SimpleNamespace(jobid=number, rule=SimpleNamespace(name=rule), output=output, wildcards_dict=wildcards)


def event(kind: LogEvent | None, message: str = "", level: int = logging.INFO, **about: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"event": kind, "msg": message, "levelno": level, **about})


def begun(run: Run, jobs: list[Any]) -> Terminal:
    """A run whose first job is about to start."""
    shown = Terminal(run, lambda: jobs, logging.NullHandler())
    shown.emit(event(LogEvent.WORKFLOW_STARTED, "SNAKEMAKE"))
    shown.emit(event(None, "Building DAG of jobs..."))
    shown.emit(event(LogEvent.RUN_INFO, "Job stats"))
    return shown


def start(shown: Terminal, job: Any, text: str = "") -> Path:
    """A job starts, and says something."""
    log = Path(f"{job.jobid}.log")
    log.write_text(text)
    rule = job.rule.name
    shown.emit(event(LogEvent.JOB_INFO, f"Rule: {rule}", jobid=job.jobid, rule_name=rule, log=[str(log)]))
    return log


def phase_of(job: Any) -> str:
    wildcards = job.wildcards_dict
    return wildcards.get("phase") or ("round" in wildcards and f"round-{wildcards['round']}") or "eval-0"


def whole(shown: Terminal, jobs: list[Any], clock: Clock, seconds: Callable[[Any], float]) -> None:
    """All of the jobs, one after another."""
    for job in jobs:
        says = SAYS.get(job.rule.name, f"{{0}} {job.rule.name}: all is well")
        start(shown, job, says.format(phase_of(job)))
        for _ in range(int(seconds(job))):
            clock.now += 1
            shown.tick()
        clock.now += seconds(job) % 1
        shown.emit(event(LogEvent.JOB_FINISHED, job_id=job.jobid))
        shown.emit(event(LogEvent.PROGRESS, done=1, total=38))


def test_the_default_run_is_a_line_a_stage(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """With the profile's line and the summary's 18, under 60 also where it takes an hour."""
    run = default()
    jobs = planned(run)
    assert len(jobs) == 39
    shown = begun(run, jobs)
    of = {number: job.work for number, job in shown.jobs.items()}
    pace = 3600 / sum(of.values())
    whole(shown, jobs, clock, lambda job: of.get(job.jobid, 0.0) * pace)
    shown.close()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert lines[0] == "default: 38 jobs; logs are in runs/default/logs" and len(lines) + 1 + 18 <= 60
    assert "\x1b" not in said and "\r" not in said and "┏" not in said and "Building DAG" not in said
    told = [line for line in lines[1:] if not line.startswith("warning")]
    shares = [int(line[:3]) for line in told]
    assert shares == sorted(shares) and told[-1] == "100 %  report: all is well"
    assert lines.count("warning: a library was odd") == 1
    trained = "round-1 train: 30 steps in 240.3 s (0.1/s); sampled KL 0.552, in runs/default/round-1/checkpoint"
    assert sum(line.endswith(trained) for line in lines) == 1
    assert sum("scores: 1,220 teacher tokens in 9.9 s (123.2/s); audit: " in line for line in lines) == 5


def test_the_time_left_is_what_it_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every rule has a pace of its own, once each has been met; and where two jobs run at once, in half the time."""
    run = default(evaluate={"kl_items": 40})
    *jobs, _ = planned(run)
    shown = begun(run, jobs)
    pace = {rule: 0.001 * (1 + number % 5) for number, rule in enumerate(sorted({job.rule.name for job in jobs}))}
    seconds = {job.jobid: shown.jobs[job.jobid].work * pace[job.rule.name] for job in jobs}
    ends, checked = sum(seconds.values()) + clock.now, 0
    for job in jobs:
        start(shown, job)
        clock.now += seconds[job.jobid]
        shown.emit(event(LogEvent.JOB_FINISHED, job_id=job.jobid))
        if job.wildcards_dict.get("phase") == "round-1":  # all rules but the last have been met
            hours, minutes, left = shown.left.removesuffix(" left").split(":")
            told = 3600 * int(hours) + 60 * int(minutes) + int(left)
            assert abs(told - (ends - clock.now)) < 1 + START * max(pace.values()), job
            checked += 1
    assert checked == 6 and shown.left == ""
    pair = [one_job(i, "weights", phase=f"round-{i}") for i in range(4)]
    shown = begun(run, pair)
    for job in pair[:2]:
        start(shown, job)
    clock.now += 100
    for job in pair[:2]:
        shown.emit(event(LogEvent.JOB_FINISHED, job_id=job.jobid))
    assert shown.left == "0:01:40 left"


def test_a_long_job_is_told_of_by_its_log(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = default()
    train = one_job(1, "train", round="0")
    shown = begun(run, [train])
    log = start(shown, train, "round-0 train: 10/40, 0.100 steps/s, sampled KL 1.9, 0:05:00 left\n")
    clock.now += 100
    shown.tick()
    assert "train" not in capsys.readouterr().err
    clock.now += 100
    shown.tick()
    shown.tick()
    line = " 25 %, 0:10:00 left  round-0 train: 10/40, 0.100 steps/s, sampled KL 1.9, 0:05:00 left\n"
    assert capsys.readouterr().err == line
    log.unlink()  # as on a cluster whose files come late
    shown.emit(event(LogEvent.JOB_FINISHED, job_id=1))
    assert capsys.readouterr().err == "" and shown.share == 1


def test_shards_are_summed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = default(rollouts={"rounds": 1, "prompts": 160, "shard_size": 40})
    jobs = [job for job in planned(run) if job.rule.name in ("rollouts", "units") and phase_of(job) == "round-0"]
    shown = begun(run, jobs)
    for job in jobs:
        start(shown, job, "round-0 rollouts: 40 responses in 9.0 s (4.4/s)" if job.rule.name == "rollouts" else "")
        clock.now += 10
        shown.emit(event(LogEvent.JOB_FINISHED, job_id=job.jobid))
    said = [line.partition("  ")[2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert said == ["round-0 rollouts: 4 shards, 160 responses in 40.0 s (4.0/s)", "round-0 units: 4 shards in 40.0 s"]


def test_work_is_responses_times_tokens(clock: Clock) -> None:
    run = default(
        rollouts={"rounds": 2, "prompts": 100, "samples": 2, "shard_size": 50, "max_new_tokens": [16, 64], "replay": 1}
    )
    first, second = run.phase("round-0"), run.phase("round-1")
    assert work(run, "rollouts", first) == 50 * 16 and work(run, "rollouts", second) == 50 * 64
    assert work(run, "train", second) / work(run, "train", first) == 2 * 64 / 16
    assert work(run, "scores", second) < work(run, "rollouts", second) < work(run, "train", second)
    held_out = work(run, "evaluate", run.phase("eval-0"))
    assert 300 * 64 < held_out < 400 * 64
    more = default(evaluate={"samples": 8, "kl_items": 0})
    assert work(more, "evaluate", more.phase("eval-0")) == 8 * 300 * 16


def test_a_failed_job_is_told_once_with_its_error_its_log_and_how_to_go_on(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/snakemake", "--cores", "2", "--config", "run=my run"])
    run = default()
    jobs = planned(run)
    shown = begun(run, jobs)
    train = next(job for job in jobs if job.rule.name == "train")
    log = start(
        shown, train, "round-0 train: 1/30, 0.1 steps/s, 0:01:00 left\nerror: x.parquet: damaged; run it again\n"
    )
    message = "CalledProcessError in file \"Snakefile\", line 5:\nCommand '...' returned non-zero exit status 2."
    shown.emit(event(LogEvent.ERROR, message, logging.ERROR, exception="RuleException"))
    for _ in range(2):
        error = {"jobid": train.jobid, "rule_name": "train", "log": [str(log)]}
        shown.emit(event(LogEvent.JOB_ERROR, "Error in rule train", logging.ERROR, **error))
    shown.emit(event(None, "Exiting because a job execution failed. Look above for error messages", logging.ERROR))
    shown.emit(event(LogEvent.ERROR, "WorkflowError:\nAt least one job did not complete successfully.", logging.ERROR))
    shown.close()
    lines = capsys.readouterr().err.splitlines()[1:]
    assert lines == [
        f"error: round-0 train failed; its log: {log}",
        "  error: x.parquet: damaged; run it again",
        "1 of 38 jobs failed; what is done is kept. Then go on with: snakemake --cores 2 --config 'run=my run'",
    ]


def test_a_failed_run_of_opd_run_goes_on_with_opd_run(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my run.yaml").write_text("{}")
    command, environment = snakemake(Path("my run.yaml"), ["--cores", "2"])
    monkeypatch.setattr(sys, "argv", ["/site-packages/snakemake/__main__.py", *command[3:]])
    monkeypatch.setattr(terminal.os, "environ", environment)
    run = default()
    jobs = planned(run)
    shown = begun(run, jobs)
    error = {"jobid": jobs[0].jobid, "rule_name": "prompts", "log": ["none.log"]}
    shown.emit(event(LogEvent.JOB_ERROR, "Error in rule prompts", logging.ERROR, **error))
    shown.close()
    assert capsys.readouterr().err.endswith("Then go on with: opd run --config 'my run.yaml' --cores 2\n")


def test_last_words_of_a_traceback_of_a_table_and_of_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    long = [f"  File {number}" for number in range(40)]
    assert last_words(["x train: 1/30, 0.1 steps/s, 0:01:00 left", *long, "TypeError: no"])[-3:] == [
        *long[-2:],
        "TypeError: no",
    ]
    assert len(last_words(long)) == terminal.ERROR_LINES
    table = ["round-0: student tokens", "┏━┓", "└─┘", "error: round-0: too little"]
    assert last_words(["round-0 units: 3 units in 1.0 s (3.0/s)", *table]) == table
    run = default()
    job = one_job(1, "train", round="0")
    shown = begun(run, [job])
    log = start(shown, job, "round-0 train: micro-batches are padded\n")
    shown.emit(event(LogEvent.JOB_ERROR, "", logging.ERROR, jobid=1, rule_name="train", log=[str(log)]))
    assert terminal.KILLED in capsys.readouterr().err


def test_what_is_no_run_is_shown_in_snakemakes_own_words(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """At its end, or with the first warning."""
    stream = io.StringIO()
    shown = Terminal(default(), list, logging.StreamHandler(stream))
    shown.emit(event(LogEvent.WORKFLOW_STARTED, "SNAKEMAKE\n====="))
    shown.emit(event(None, "Building DAG of jobs..."))
    assert stream.getvalue() == ""
    shown.emit(event(None, "a file is missing", logging.ERROR))
    assert stream.getvalue() == "Building DAG of jobs...\na file is missing\n"
    shown.emit(event(None, "Nothing to be done"))
    shown.close()
    assert stream.getvalue().endswith("missing\nNothing to be done\n") and capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_is_gone_in_the_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=stream, force_terminal=True, width=80, highlight=False))
    run = default()
    jobs = planned(run)
    shown = begun(run, jobs)
    start(shown, jobs[0], SAYS["prompts"])
    clock.now += 5
    shown.tick()
    assert shown.bars is not None
    shown.bars.refresh()
    assert "prompts" in stream.getvalue() and "0 %" in stream.getvalue()
    shown.emit(event(LogEvent.JOB_FINISHED, job_id=jobs[0].jobid))
    shown.stop()
    assert "prompts: 300 test" in stream.getvalue() and stream.getvalue().endswith("\x1b[2K")


def test_the_logs_lines_are_those_that_stages_print(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patterns against the real thing, numbers above a thousand included."""
    monkeypatch.setattr(console, "MAX_REPORT_EVERY", 0.0)
    with console.progress("round-0@1 train", 4000, "steps") as advance:
        for _ in range(2):
            advance(1500, "sampled KL 0.5: a detail, of it")
        advance(1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    job = Job("round-0@1 train", "train", START, began=1.0)
    Path("x.log").write_text("\n".join(lines[:2]))
    job.logs = [Path("x.log")]
    assert job.share == 0.75
    found = console.RATE.match(lines[2])
    assert found and found["amount"] == "4,000" and found["unit"] == "steps"
    assert result([*lines, "round-0@1 train: done"]) == f"{lines[2]}; done"
