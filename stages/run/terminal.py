"""What the terminal shows of a run under Snakemake: a line a stage, one progress for all of it, errors with what to do.

Jobs write to their log files. From these and from the events of Snakemake's own log this process tells how far they are, so
that a job on a cluster is shown as one here is. Snakemake's own log file has everything, and so has the terminal where
`--verbose`, `--printshellcmds`, `--quiet` or a logger plugin asks Snakemake for something else.
"""

import logging
import os
import re
import shlex
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from snakemake.logging import ColorizingTextHandler, logger
from snakemake_interface_logger_plugins.common import LogEvent

from schemas.decides import settings
from schemas.errors import OpdError, excerpt
from stages.run import console
from stages.run.run import Phase, Run

PER_TOKEN = {
    **dict.fromkeys(("rollouts", "answers", "evaluate"), 1.0),
    **dict.fromkeys(("scores", "policy", "reference"), 0.3),
    **dict.fromkeys(("train", "sft"), 4.0),
}
"""What a token of a response costs in a stage, sampling one being 1, roughly: scoring reads all of a response at once, training
also goes back. How long it really takes is learnt from the jobs that have ended."""
START = 400.0
"""What a job costs beside, in the same tokens: imports and models."""
SILENCE = 180.0
"""Seconds without a line, where the output is no terminal, after which one tells how far the run is; later on a tenth of what
has passed."""
EARLY = 0.02
"""Share of the work before which nothing is said of the time left."""
ERROR_LINES = 15
"""Of a failed job's log that are shown, at most."""
TOLD = re.compile(
    r"At least one job did not complete successfully|Exiting because a job execution failed|returned non-zero exit status"
)
"""What Snakemake says of a failed job beside its JOB_ERROR."""
KILLED = "it ended without saying why, as what is killed does: for memory, or by its queue's limit of time"


@dataclass
class Job:
    """A job of the run: what it is called, with the others of its stage, its work in tokens, and what became of it."""

    stage: str
    rule: str
    work: float
    logs: list[Path] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def share(self) -> float:
        """Of its work that is done, as its log tells."""
        if self.ended or not self.began:
            return float(bool(self.ended))
        found = console.REPORT.match(self.said)
        done, total = (float(found[key].replace(",", "")) for key in ("done", "total")) if found else (0.0, 1.0)
        return min(1.0, done / max(total, 1.0))

    @property
    def lines(self) -> list[str]:
        """What it said; of a job that has not begun to speak, or whose log is not here yet, nothing."""
        found: list[str] = []
        for path in self.logs:
            with suppress(OSError):
                found += (line.rstrip() for line in path.read_text(errors="replace").splitlines())
        return found

    @property
    def said(self) -> str:
        """The last of it."""
        return next((line for line in reversed(self.lines) if line), "")


def job_of(run: Run, rule: str, wildcards: dict[str, str]) -> Job:
    """A job that is planned, by its rule and wildcards."""
    phase = wildcards.get("phase") or (
        f"round-{wildcards['round']}" if "round" in wildcards else f"eval-{wildcards.get('checkpoint')}"
    )
    of = run.phase("sft" if rule == "sft" else phase) if rule in PER_TOKEN else None
    placed = {"role", "phase", "round", "checkpoint"} & wildcards.keys()
    called = f"{wildcards['role']} {rule}" if "role" in wildcards else f"{phase} {rule}" if placed else rule
    return Job(called, rule, START + (work(run, rule, of) if of else 0.0))


def work(run: Run, rule: str, phase: Phase) -> float:
    """Of a job of a rule that computes with a model, in tokens as PER_TOKEN counts them, before any is there."""
    config = run.config
    each = settings(config, "rollouts", phase.name).rollouts.longest * PER_TOKEN[rule]
    if rule == "evaluate":
        asked = config.held_out + sum(held_out.count for held_out in config.evaluate.also.values())
        return each * (asked * config.evaluate.samples + run.kl_items * PER_TOKEN["policy"])
    if rule == "train":
        return each * config.train.epochs * sum(part.responses for part in run.trained_on(phase.number))
    if rule == "sft":
        return each * config.sft.epochs * phase.planned
    return each * phase.responses / max(1, len(phase))


class Terminal(MemoryHandler):
    """A handler of Snakemake's log in the place of its own.

    Until a run begins, records wait: what else Snakemake was called for shows them in its own words, at its end or with the
    first warning.
    """

    def __init__(self, run: Run, jobs: Callable[[], Iterable[Any]], snakemakes: logging.Handler) -> None:
        """`jobs` gives Snakemake's jobs that are to be run, once it has planned them."""
        super().__init__(sys.maxsize, logging.WARNING, snakemakes)
        self.run, self.planned = run, jobs
        self.jobs: dict[int, Job] = {}
        self.failed: dict[int, Job] = {}
        self.warned: set[str] = set()
        self.began = self.spoke = 0.0
        self.over = threading.Event()
        self.bars: Progress | None = None
        self.bar = TaskID(0)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, or keep it."""
        try:
            event = getattr(record, "event", None)
            if event == LogEvent.RUN_INFO and not self.began:
                self.begin()
            elif event != LogEvent.WORKFLOW_STARTED and not self.began:
                super().emit(record)
            elif self.began:
                self.heard(event, record)
        except Exception:  # a run goes on whatever becomes of its display
            self.handleError(record)

    def begin(self) -> None:
        """The jobs are known and the first one is about to start."""
        self.buffer.clear()
        made = [job for job in self.planned() if job.output]  # `all` makes nothing
        self.jobs = {job.jobid: job_of(self.run, job.rule.name, job.wildcards_dict) for job in made}
        self.began = self.spoke = time.monotonic()
        count = "1 job" if len(self.jobs) == 1 else f"{len(self.jobs)} jobs"
        console.say(f"{self.run.config.run}: {count}; logs are in {self.run.root / 'logs'}")
        if console.console.is_terminal:
            status = TextColumn(
                "{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            )
            columns = (TextColumn("{task.percentage:3.0f} %"), BarColumn(20), TextColumn("{task.fields[left]}"), status)
            self.bars = Progress(*columns, console=console.console, transient=True, expand=True, redirect_stdout=False)
            self.bar = self.bars.add_task("", total=1.0, status="", left="")
            self.bars.start()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Tell how far the run is, now and then, until it is over."""
        while not self.over.wait(1.0):
            self.tick()

    def tick(self) -> None:
        """Tell how far the run is: in the bar, or, where there is none, in a line after a silence."""
        if self.bars is not None:
            self.bars.update(self.bar, completed=self.share, left=self.left, status=self.status)
        elif (now := time.monotonic()) - self.spoke > max(SILENCE, (now - self.began) / 10):
            self.say(self.status)

    def heard(self, event: LogEvent | None, record: logging.LogRecord) -> None:
        """An event of a run, or a message of Snakemake's."""
        about = vars(record)
        match event:
            case LogEvent.JOB_INFO:
                if job := self.jobs.get(about["jobid"]):
                    job.logs, job.began = [Path(log) for log in about["log"]], time.monotonic()
            case LogEvent.JOB_FINISHED:
                if job := self.jobs.get(about["job_id"]):
                    self.failed.pop(about["job_id"], None)
                    self.finished(job)
            case LogEvent.JOB_ERROR:
                self.broke(about)
            case LogEvent.GROUP_ERROR:
                for each in about["job_error_info"]:
                    self.broke(each)
            case _ if record.levelno >= logging.ERROR and not TOLD.search(record.getMessage()):
                console.fail(OpdError(record.getMessage()))
            case _ if record.levelno == logging.WARNING:
                console.warn(record.getMessage())

    def finished(self, job: Job) -> None:
        """A job has ended well; the last of its stage gives the stage's line."""
        job.ended = time.monotonic()
        lines = job.lines
        for line in lines:
            if line.startswith(console.WARNING) and line not in self.warned:
                self.warned.add(line)
                console.warn(line.removeprefix(console.WARNING))
        stage = [other for other in self.jobs.values() if other.stage == job.stage]
        if all(other.ended for other in stage) and (told := result(lines) if len(stage) == 1 else results(stage)):
            self.say(told)

    def broke(self, about: dict[str, Any]) -> None:
        """A job has failed: the end of what it said, where the rest is. Snakemake tells it twice."""
        if about["jobid"] in self.failed:
            return
        job = self.failed[about["jobid"]] = self.jobs.get(about["jobid"]) or Job(about["rule_name"], "", 0)
        logs = [Path(log) for log in about["log"]]
        console.fail(OpdError(f"{job.stage} failed; its log: {', '.join(map(str, logs))}"))
        words = last_words(Job("", "", 0, logs).lines)
        for line in words if any("rror" in line for line in words) else [*words, KILLED]:
            console.say(f"  {line}")

    def say(self, text: str) -> None:
        """A line that begins with how far the run is."""
        self.spoke = time.monotonic()
        console.say(f"{100 * self.share:3.0f} %{self.left and f', {self.left}'}  {text}")

    @property
    def share(self) -> float:
        """Of the run's work that is done."""
        every = list(self.jobs.values())
        return sum(job.work * job.share for job in every) / max(1.0, sum(job.work for job in every))

    @property
    def left(self) -> str:
        """The time left: by the seconds that the work of each rule has taken, and by how many jobs there were at once."""
        if self.share < EARLY or self.share == 1:
            return ""
        done, took, now = defaultdict[str, float](float), defaultdict[str, float](float), time.monotonic()
        every = [(job, (job.ended or now) - job.began if job.began else 0.0) for job in list(self.jobs.values())]
        for job, seconds in every:
            if job.share:
                for rule in (job.rule, ""):
                    done[rule] += job.work * job.share
                    took[rule] += seconds
        pace = {rule: took[rule] / done[rule] for rule in done}
        ahead = 0.0
        for job, seconds in every:
            whole = job.work * pace.get(job.rule, pace[""])
            ahead += whole * (1 - job.share) if job.share else max(0.0, whole - seconds)
        at_once = sum(seconds for _, seconds in every) / max(now - self.began, 1e-9)
        return f"{timedelta(seconds=round(ahead / max(at_once, 1e-9)))} left"

    @property
    def status(self) -> str:
        """What the longest of the jobs at work said last, and how many there are beside it."""
        running = [job for job in list(self.jobs.values()) if job.began and not job.ended]
        if not running:
            return ""
        longest = max(running, key=lambda job: job.work)
        others = f"; and {len(running) - 1} more" if len(running) > 1 else ""
        return (longest.said if console.REPORT.match(longest.said) else longest.stage) + others

    def close(self) -> None:
        """Take the progress off the terminal, and say how a run that failed is gone on with."""
        self.stop()
        if self.began and self.failed:
            again = os.environ.get(console.AGAIN) or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            console.say(
                f"{len(self.failed)} of {len(self.jobs)} jobs failed; what is done is kept. Then go on with: {again}"
            )
            self.failed.clear()
        super().close()

    def stop(self) -> None:
        """Take the progress off the terminal, for what comes last."""
        self.over.set()
        if self.bars is not None:
            self.bars.stop()


def result(lines: list[str]) -> str:
    """The line of a stage that had one job: its rate, where it has one, and what it said last."""
    told = [line for line in lines if line and not line.startswith(console.WARNING) and not console.REPORT.match(line)]
    if not told:
        return ""
    rates = [line for line in told[:-1] if console.RATE.match(line)]
    if not rates:
        return excerpt(told[-1])
    return excerpt(f"{rates[-1]}; {told[-1].removeprefix(rates[-1].partition(': ')[0] + ': ')}")


def results(stage: list[Job]) -> str:
    """The line of a stage that had several: their sum, from the first one's start to the last one's end."""
    seconds = max(job.ended for job in stage) - min(job.began or job.ended for job in stage)
    rates = [found for job in stage for line in job.lines if (found := console.RATE.match(line))]
    head = f"{stage[0].stage}: {len(stage)} shards"
    if not rates:
        return f"{head} in {seconds:.1f} s"
    amount = sum(int(found["amount"].replace(",", "")) for found in rates)
    return f"{head}, {amount:,} {rates[0]['unit']} in {seconds:.1f} s ({amount / max(seconds, 1e-9):,.1f}/s)"


def last_words(lines: list[str]) -> list[str]:
    """Of a failed job: what it said after its last progress, at most ERROR_LINES of it."""
    told = [number for number, line in enumerate(lines) if console.REPORT.match(line) or console.RATE.match(line)]
    return lines[max(told[-1] + 1 if told else 0, len(lines) - ERROR_LINES) :]


def take_over(run: Run, workflow: Any) -> Terminal | None:
    """Put a Terminal in the place of Snakemake's own handler; not for a dry run, nor where it is asked for other output."""
    asked = workflow.output_settings
    others = (
        asked.dryrun,
        asked.quiet,
        asked.verbose,
        asked.printshellcmds,
        asked.debug_dag,
        asked.log_handler_settings,
    )
    own = [handler for handler in logger.handlers if isinstance(handler, ColorizingTextHandler)]
    if any(others) or not own:
        return None
    terminal = Terminal(
        run,
        lambda: workflow.dag.needrun_jobs(),  # noqa: PLW0108 - there is no plan yet
        own[0],
    )
    logger.removeHandler(own[0])
    logger.addHandler(terminal)
    return terminal
