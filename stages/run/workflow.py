"""What the Snakefile asks: parameters and inputs of its rules, and that a run has one live process at a time."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from snakemake.io import local

from pipeline import own_code
from pipeline.models import IDENTITY_FILES, TOKENIZER_FILES
from pipeline.sources import SAVED_FILES
from schemas.config.options import OWN_CODE
from schemas.decides import decided
from schemas.errors import OpdError, excerpt
from schemas.manifest import differences, digest, stated
from stages.run.run import Run

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning idle threads slow contended cores twentyfold

OWN_CODE_KEYS = (("prompts", "source"), ("evaluate", "scorer"), ("objective", "recipe"))
"""Keys that take `module:function`, by section; sets of `evaluate.also` have two more."""


def reads(run: Run, stage: str) -> Callable[[Any], str]:
    """A rule's parameter: the digest of what of the config decides the stage's result, by the rule's wildcards.

    Functions of the user's own that it names count by their source. The thousands of shards of a phase have the same.
    """

    @cache
    def told(named: str, phase: str) -> str:
        values = decided(run.config, named, phase)
        return digest([values, {code: own_code.source_digest(code) for code in own_code_in(values)}])

    def of(wildcards: Any) -> str:
        named = f"{stage} {wildcards.role}" if stage == "models" else stage
        checkpoint = getattr(wildcards, "checkpoint", None)
        return told(named, getattr(wildcards, "phase", "") if checkpoint is None else f"eval-{checkpoint}")

    return of


def own_code_in(values: dict[str, Any]) -> list[str]:
    """The functions of the user's own, `module:function`, among the values of a config."""
    also = values.get("evaluate", {}).get("also", {}).values()
    places = [(values.get(section, {}), key) for section, key in OWN_CODE_KEYS]
    places += [(held_out, key) for held_out in also for key in ("source", "scorer")]
    return list(dict.fromkeys(name for held, key in places if OWN_CODE.fullmatch(name := held.get(key, ""))))


def shard_of(run: Run, table: str) -> list[str]:
    """The two files of a shard: the table and its manifest, by the wildcards `phase` and `shard`."""
    return [f"{run.root}/{{phase}}/{table}/{{shard}}.{kind}" for kind in ("parquet", "json")]


def tables(run: Run, *names: str) -> Callable[[Any], list[Path]]:
    """A rule's input: all shards of some tables of its phase; of `weights` the file that tells of them all."""

    def of(wildcards: Any) -> list[Path]:
        return shards(run, wildcards.phase, *names)

    return of


def shards(run: Run, phase: str, *names: str) -> list[Path]:
    """All shards of some tables of a phase, likewise."""
    part = run.phase(phase)
    weighed = [part.weights] if len(part) else []  # a phase that is only answered has no tables
    return [path for name in names for path in (weighed if name == "weights" else part.paths(name))]


def weighed(run: Run) -> Callable[[Any], list[Path]]:
    """What the weights of a phase are made from."""

    def of(wildcards: Any) -> list[Path]:
        return shards(run, wildcards.phase, "rollouts", "units", *run.phase(wildcards.phase).beside)

    return of


def policy(run: Run) -> Callable[[Any], Path]:
    """The checkpoint that a phase samples from."""
    return lambda wildcards: run.policy_file(run.phase(wildcards.phase).number)


def local_files(source: str) -> list[str]:
    """The user's own files that a model's or the prompts' source names, so that an edit is seen; none of packages and the hub.

    Of a folder that is what identifies a model, and what `datasets.save_to_disk` wrote. No storage has them: jobs that read
    them run where Snakemake does. Raises OpdError where Snakemake would take a part of a name for a wildcard.
    """
    path = Path(source).expanduser()
    patterns = {*IDENTITY_FILES, *TOKENIZER_FILES, *SAVED_FILES} if path.is_dir() else ()
    found = sorted({file for pattern in patterns for file in path.glob(pattern)}) or [path] * path.is_file()
    for file in found:
        if "{" in str(file):
            raise OpdError(f"{file}: Snakemake takes braces in a file's name for a wildcard; give it another name")
    return [local(str(file)) for file in found]


def reused_phases(run: Run, scored: bool) -> str:
    """Pattern of the phases whose rollouts come from another run (`reuse`): those with their scores, or those without."""
    return "|".join(f"round-{r}" for r, source in enumerate(run.reused) if source.is_scored == scored) or "none"


def sampled_phases(run: Run) -> str:
    """Pattern of the phases that are sampled."""
    return rf"(?!({reused_phases(run, True)}|{reused_phases(run, False)})\b)(round-\d+|eval-(base|\d+))"


def scored_phases(run: Run) -> str:
    """Pattern of the phases that the teacher scores."""
    return rf"(?!({reused_phases(run, True)})\b)(round-\d+|eval-(base|\d+))"


def caption(name: str) -> str:
    """The file that says in Snakemake's own report (`snakemake --report`) what an output is."""
    return str(Path(__file__).parents[1] / "report" / f"{name}.rst")


def hold(run: Run) -> FileLock:
    """Take the run for this process, for as long as the returned lock lives. Raises OpdError when another live one has it."""
    lock = FileLock(run.root / ".snakemake.lock")
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OpdError(
            f"{run.root}: another snakemake is at work on this run; wait for it, or give `run` another name"
        ) from error
    except OSError as error:
        raise OpdError(f"{run.root}: cannot write here: {error.strerror}") from error
    return lock


def keep_results(run: Run) -> str | None:
    """Keep the figures of a finished run that is about to be made anew for another config: summary and report get the digest
    of what decided them in their names. What changed and what is kept, for people; None where nothing did.

    Snakemake removes what it makes anew before a stage can see it, so this comes before the first job.
    """
    summary = run.root / "summary.json"
    if not summary.exists():
        return None
    try:
        told = stated(summary.read_text()).get("decided")
    except (OSError, ValueError):
        told = None  # damaged: of no config that is known
    different = list(differences(decided(run.config, "report"), told or {}))
    if not different:
        return None
    mark, kept = digest(told)[:8], []
    for path in (summary, run.root / "report.html"):
        if path.exists():
            kept.append(path.with_stem(f"{path.stem}-{mark}"))
            shutil.copy2(path, kept[-1])
    return (
        f"{run.root} holds results of another config: {excerpt('; '.join(different))}; what depends on that is made anew in "
        f"their place. The figures are kept: {', '.join(map(str, kept))}. To keep all, give `run` another name"
    )
