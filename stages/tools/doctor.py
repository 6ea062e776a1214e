"""Doctor: whether a run would get through here, found out before it costs anything."""

import contextlib
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from packaging.requirements import Requirement
from rich.text import Text

from schemas.config import Config, load_config
from schemas.errors import OpdError
from schemas.secrets import masked
from stages.run import console, processors
from stages.run.context import DEFAULT_CONFIG, ThreadsOption
from stages.run.room import room_below
from stages.run.run import Run, cache_root, run_of
from stages.tools.estimates import Sizes, disk_needs, memory_needs, tokens_of, weights_of
from stages.tools.folders import from_anywhere, megabytes

PACKAGE = "offline-opd"
SHOWN = ("torch", "transformers", "tokenizers", "polars", "pyarrow", "snakemake")
"""Packages whose versions are worth a line."""
STYLES = {"ok": "green", "warning": "bold yellow", "error": "bold red"}
TRIED, DRAWN = 16, 8
"""Responses, and tokens of each, that the sampler is timed on."""


@dataclass(frozen=True)
class Check:
    """What was looked at and found; of a warning or an error also what to do."""

    name: str
    status: Literal["ok", "warning", "error"]
    told: str


@dataclass
class Findings:
    """Checks so far, each shown when it is made."""

    show: bool = True
    checks: list[Check] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Headings and texts to show beneath."""

    def add(self, name: str, status: Literal["ok", "warning", "error"], told: str) -> None:
        """Note and show a check."""
        self.checks.append(Check(name, status, told))
        if self.show:
            line = Text.assemble((f"{status:<8}", STYLES[status]), (f"{name}: ", "bold"), told)
            console.out.print(line, soft_wrap=True)

    @contextlib.contextmanager
    def looking(self, name: str) -> Iterator[list[str]]:
        """A check that is an error where OpdError is raised, a warning for each that was printed, else ok with what was said;
        filling the list says something else."""
        told: list[str] = []
        with console.console.capture() as captured:
            try:
                yield told
            except OpdError as error:
                problem: str | None = str(error)
            else:
                problem = None
        lines = captured.get().splitlines()
        warned = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        for warning in warned:
            self.add(name, "warning", warning)
        if problem is not None:
            self.add(name, "error", problem)
        elif told or not warned:
            said = told or [line.removeprefix(f"{name}: ") for line in lines if not line.startswith("warning: ")]
            self.add(name, "ok", "; ".join(said) or "as it should be")

    @property
    def failed(self) -> bool:
        """Whether something would stop the run."""
        return any(check.status == "error" for check in self.checks)


def main(
    config_file: Annotated[
        Path | None, typer.Option("--config", help=f"the run's YAML file; {DEFAULT_CONFIG} where there is one")
    ] = None,
    measure: Annotated[bool, typer.Option(help="load both models, and time a few tokens of each")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Check versions, devices, memory and disk, and whether a config's run would get through: models, tokenizers, prompts,
    scorer, context, time and disk.

    Fetches and prepares models that aren't there yet, as the run would. Exits with 1 where something would stop the run.
    """
    found = Findings(show=not as_json)
    of_machine(found)
    if config_file is not None or DEFAULT_CONFIG.is_file():
        of_config(found, config_file or DEFAULT_CONFIG, measure, threads)
    else:
        found.add("config", "warning", "none given: only the machine was looked at; say --config FILE")
    if as_json:
        rows = {"checks": [vars(check) for check in found.checks], "notes": dict(found.notes)}
        console.out.print(json.dumps(rows, ensure_ascii=False), markup=False, soft_wrap=True)
    else:
        for heading, text in found.notes:
            console.out.print(Text.assemble((f"\n{heading}\n", "bold"), text), soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)


# ---- the machine ----


def of_machine(found: Findings) -> None:
    """Python, packages, processor, GPUs."""
    with found.looking("python") as told:
        told.append(f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    with found.looking("packages") as told:
        if wrong := misfits(required()):
            raise OpdError(f"{'; '.join(wrong)}: `pip install {PACKAGE}` anew, or install these")
        told.append(", ".join(f"{name} {version(name)}" for name in SHOWN))
    with found.looking("processor") as told:
        told.append(", ".join([f"{os.cpu_count()} cores", *features()]))
    with found.looking("gpu") as told:
        told.extend(gpus() or ["none: models run on the processor"])


def required() -> list[Requirement]:
    """What the installed package needs, extras left out; nothing where it runs from a folder without being installed."""
    try:
        return [wanted for text in requires(PACKAGE) or () if (wanted := Requirement(text)).marker is None]
    except PackageNotFoundError:
        console.warn(f"{PACKAGE} itself is not installed, so versions can't be checked; `pip install -e .`")
        return []


def misfits(wanted: list[Requirement]) -> list[str]:
    """Which packages are missing or of another version than is wanted."""
    wrong = []
    for one in wanted:
        try:
            if (here := version(one.name)) not in one.specifier:
                wrong.append(f"{one.name} {here} is here, {one} is needed")
        except PackageNotFoundError:
            wrong.append(f"{one} is not here")
    return wrong


def features() -> list[str]:
    """What of the processor decides how fast it computes in bfloat16."""
    import torch  # noqa: PLC0415

    from pipeline.models import native_dtype  # noqa: PLC0415

    here = torch.cpu.get_capabilities()
    named = {"AMX": "amx_bf16", "AVX-512 bf16": "avx512_bf16"}
    has = [name for name, flag in named.items() if here.get(flag)]
    return [*(has or ["neither AMX nor AVX-512 bf16"]), f"`dtype: auto` is {native_dtype()}"]


def gpus() -> list[str]:
    """Names and memory."""
    import torch  # noqa: PLC0415

    about = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{one.name}, {megabytes(one.total_memory)}" for one in about]


# ---- a config ----


def of_config(found: Findings, config_file: Path, measure: bool, threads: int | None) -> None:
    """All of a config that can be told without running it."""
    try:
        config = load_config(config_file)
    except OpdError as error:
        return found.add("config", "error", str(error))
    found.add("config", "ok", f"{config_file}: valid, run {config.run}")
    with found.looking("extras") as told:
        if missing := extras(config):
            raise OpdError("; ".join(missing))
        told.append("nothing that isn't here is asked for")
    with found.looking("own code"):
        own_code(config)
    with found.looking("reuse") as told:
        run = run_of(config)
        told.append(f"{len(run.reused)} of {config.rollouts.rounds} rounds come from other runs")
    if found.checks[-1].status == "error":
        return None
    processors.take(threads)
    with tempfile.TemporaryDirectory(prefix="opd-doctor-") as folder:
        values = from_anywhere(config) | {"run": "doctor"}
        where = Path(folder) / "config.yaml"
        where.write_text(yaml.safe_dump(values, allow_unicode=True))
        with contextlib.chdir(folder):
            there = run_of(load_config(where))
            of_prompts(found, there, where)
            of_models(found, there, where)
            sizes = of_room(found, config, there)
            rates = of_speed(found, there) if measure and sizes and not found.failed else None
    of_cost(found, config, sizes, rates)  # of the folder in which the run would be
    return None


def extras(config: Config) -> list[str]:
    """Packages that a config needs and that aren't here; what scorers, sources and packages of models need they say."""
    wanted: dict[str, tuple[str, str, bool]] = {
        "peft": ("train.lora", "lora", config.train.lora is not None),
        "vllm": ("engine: vllm", "vllm", "vllm" in (config.student.engine, config.teacher.engine)),
        **{name: (f"train.trackers: {name}", "trackers", True) for name in config.train.trackers},
    }
    return [
        f"`{key}` needs {name}: pip install '{PACKAGE}[{extra}]'"
        for name, (key, extra, asked) in wanted.items()
        if asked and importlib.util.find_spec(name) is None
    ]


def own_code(config: Config) -> None:
    """Raise OpdError where a function of the user's own that the config names can't be had."""
    from pipeline import own_code as code  # noqa: PLC0415
    from stages.run.workflow import own_code_in  # noqa: PLC0415

    for reference in own_code_in(config.model_dump(mode="json")):
        code.load(reference, reference)


def of_prompts(found: Findings, run: Run, where: Path) -> None:
    """The prompts of the config and of `evaluate.also`, and whether the scorers read their references."""
    import pyarrow.compute as pc  # noqa: PLC0415

    from pipeline.measure.scorers import references_problem  # noqa: PLC0415
    from pipeline.prompts import collect  # noqa: PLC0415
    from stages import also, prompts  # noqa: PLC0415
    from stages.run.run import open_run  # noqa: PLC0415

    config, table = run.config, None
    with found.looking("prompts") as told:
        table = collect(config.prompts, config.seed)
        prompts.write(open_run(where, "prompts"), table)
        told.append(f"{len(table)} read from {masked(config.prompts.source)}")
    if table is not None:
        with found.looking("scorer") as told:
            split = config.evaluate.split
            rows = table.filter(pc.equal(table["split"], split)).to_pylist()
            if problem := references_problem(config.evaluate, config.prompts.source, rows, f"split {split}"):
                console.warn(problem)
            given = sum(row["answer"] is not None for row in rows)
            told.append(f"{config.evaluate.scorer} reads {given} references of {len(rows)} held-out prompts")
            if not given:
                told[:] = ["no reference answers: accuracy will not be measured"]
    if config.evaluate.also:
        with found.looking("evaluate.also"):
            also.main(where)


def of_models(found: Findings, run: Run, where: Path) -> None:
    """Both models: files, tokenizers, stops, one prompt as each reads it, and room for prompts and responses."""
    from stages import fit, models  # noqa: PLC0415
    from stages.run.context import open_prompts, policy, teacher  # noqa: PLC0415
    from stages.run.run import BASE  # noqa: PLC0415

    opened: dict[str, Any] = {"student": lambda: policy(run, BASE), "teacher": lambda: teacher(run)}
    for role in ("student", "teacher"):
        with found.looking(role) as told:
            models.main(role, where)
            if role == "student" or run.needs_teacher:
                model = opened[role]()
                stops = model.tokenizer.convert_ids_to_tokens(model.stop[:4].tolist())
                more = ", ..." if len(model.stop) > 4 else ""
                told.append(
                    f"{model.ref.source}: exact bytes of {int(model.vocabulary.has_bytes.sum()):,} tokens; stops at "
                    f"{', '.join(map(repr, stops))}{more}; {model.dtype} on {model.config.engine}"
                )
        if (
            found.checks[-1].status == "error"
            or not run.prompts.exists()
            or not (role == "student" or run.needs_teacher)
        ):
            continue
        with found.looking(f"{role}'s prompt") as told:
            row = open_prompts(run).split("train")[0]
            model = opened[role]()
            renderer = model.renderer(open_prompts(run))
            text, (ids,) = renderer.text(row), renderer.ids([row], model.context)
            how = "its chat template" if renderer.chat else "plain text"
            told.append(f"{how}, {len(ids)} tokens")
            found.notes.append((f"{role} reads, of prompt {row['prompt_id']} ({how}, {len(ids)} tokens):", text))
    if run.prompts.exists() and all(run.model_file(role).exists() for role in ("student", "teacher")):
        with found.looking("fit"):
            fit.main(where)


def of_room(found: Findings, config: Config, run: Run) -> dict[str, Sizes] | None:
    """Memory for the stage that takes most; sizes of both models, None where one isn't there."""
    from stages.run.context import policy, teacher  # noqa: PLC0415
    from stages.run.run import BASE  # noqa: PLC0415

    try:
        opened = {"student": policy(run, BASE)} | ({"teacher": teacher(run)} if run.needs_teacher else {})
        sizes = {role: weights_of(Path(model.ref.path)) for role, model in opened.items()}
    except OpdError:  # the line of its model says why
        return None
    each = {role: 4 if model.dtype == "float32" else 2 for role, model in opened.items()}
    vocabulary = {role: len(model.vocabulary) for role, model in opened.items()}
    needs = memory_needs(config, sizes, each, vocabulary)
    stage, most = max(needs.items(), key=lambda need: need[1])
    have, of, free = memory()
    told = f"{stage} takes about {megabytes(most)} of {of}, which has {megabytes(have)}, {megabytes(free)} of it free"
    if most > have:
        less = "a smaller model, `train.lora`, `train.gradient_checkpointing` or smaller `train.micro_batch_tokens`"
        # No error: a profile may spread it over GPUs, or run it elsewhere.
        found.add("memory", "warning", f"{told}: take {less}, or a machine or profile with more")
    elif most > free:
        found.add("memory", "warning", f"{told}: end what else is running")
    else:
        found.add("memory", "ok", told)
    return sizes


def memory() -> tuple[float, str, float]:
    """Bytes of the memory that models are in, where it is, and how much of it is free; within the limit of a container."""
    import torch  # noqa: PLC0415

    from pipeline.infer.memory import free  # noqa: PLC0415

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1]), "the GPU", float(free(torch.device("cuda")))
    from distributed.system import memory_limit  # noqa: PLC0415

    total = memory_limit()
    return float(total), "memory", float(min(total, free(torch.device("cpu"))))


def of_speed(found: Findings, run: Run) -> dict[str, float] | None:
    """Tokens per second of sampling, scoring and training, from a short forward pass of each model."""
    from pipeline.infer.engines import open_sampler  # noqa: PLC0415
    from stages.run.context import open_prompts, policy, teacher  # noqa: PLC0415
    from stages.run.run import BASE  # noqa: PLC0415

    config = run.config
    if "vllm" in (config.student.engine, config.teacher.engine):
        found.add("speed", "warning", "not measured with `engine: vllm`, which takes minutes to open; `opd plan` does")
        return None
    rates: dict[str, float] = {}
    with found.looking("speed") as told:
        student, rows = policy(run, BASE), open_prompts(run).split("train")[:TRIED]
        prompts = student.renderer(open_prompts(run)).ids(rows, student.context)
        with open_sampler(student, max(map(len, prompts)) + DRAWN, len(prompts)) as sampler:
            sampler.sample(prompts[:1], [0], 1)  # warms up
            began = time.perf_counter()
            drawn = sampler.sample(prompts, list(range(len(prompts))), DRAWN)
            rates["rollouts"] = sum(len(one.ids) for one in drawn) / (time.perf_counter() - began)
        rates["train"] = _forward(student.model, prompts) / 3
        if run.needs_teacher:
            judge = teacher(run)
            read = judge.renderer(open_prompts(run)).ids(rows, judge.context)
            rates["scores"] = _forward(judge.model, read)
        told.append(
            ", ".join(f"{stage} {rate:,.0f} tokens/s" for stage, rate in rates.items())
            + f" ({len(prompts)} responses of {DRAWN} tokens at once; one forward pass over their prompts, a third of its rate "
            "for training, whose backward pass costs two more)"
        )
    return rates or None


def _forward(model: Any, prompts: list[Any]) -> float:
    """Tokens per second of a forward pass."""
    import torch  # noqa: PLC0415

    from pipeline.infer.forward import check_head, pad  # noqa: PLC0415

    check_head(model, type(model).__name__)  # and warms up
    ids, mask = (tensor.to(model.device) for tensor in pad(prompts))
    began = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask).logits.sum().item()
    return float(mask.sum()) / (time.perf_counter() - began)


def of_cost(found: Findings, config: Config, sizes: dict[str, Sizes] | None, rates: dict[str, float] | None) -> None:
    """Hours of responses that are as long as they may be, and bytes of the run at most."""
    tokens = tokens_of(config, run_of(config).kl_items, len(run_of(config).checkpoints))
    if rates:
        hours = {stage: tokens[stage] / rates[stage] / 3600 for stage in rates}
        parts = ", ".join(f"{stage} {of:,.2f}" for stage, of in hours.items())
        told = f"{sum(hours.values()):,.2f} h for responses as long as they may be ({parts}), without prompts and `sft`"
        found.add("time", "ok", f"{told}; `opd plan` measures it closer")
    disk = disk_needs(config, tokens, sizes)
    for name, place, need in (
        ("disk, cache", cache_root(config.cache), disk["cache"]),
        ("disk, run", Path("runs").absolute(), disk["run"]),
    ):
        there, free = room_below(place)
        told = f"{megabytes(need)} at most in {place}, where {megabytes(free)} are free"
        if not os.access(there, os.W_OK):
            found.add(name, "error", f"{place}: can't be written; set OPD_CACHE or work elsewhere")
        elif need > free:
            found.add(name, "error", f"{told}: make room, or keep less (`scores.k_max`, `train.keep_states`)")
        else:
            found.add(name, "ok", told)


if __name__ == "__main__":
    console.run(main)
