"""Offline on-policy distillation, top to bottom:

prompts, models -> (rollouts -> scores -> units -> weights, coverage -> train) per round -> evaluate before and after -> report

A phase is `round-<r>`, trained on, or `eval-<c>`, held-out rollouts of checkpoint c. Each rule calls one stage; what a
rule depends on beside its files is the digest of the config sections it reads (`params: reads`), so a changed learning
rate retrains but samples and scores nothing anew.
"""

import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from pipeline.store.cache import relink
from pipeline.models import IDENTITY_FILES, TOKENIZER_FILES
from schemas.config import TRAIN_OPERATION, consistency, parse_config
from schemas.errors import OpdError
from schemas.manifest import digest
from stages.run import console, layout, resume
from stages.report.page import print_summary, write_config

if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


try:
    CONFIG = parse_config(config, " ".join(map(str, workflow.configfiles)))
except OpdError as error:
    sys.exit(f"error: {error}")

RUN = layout.run_folder(CONFIG)
try:
    REUSED = layout.reused(CONFIG)
except OpdError as error:
    sys.exit(f"error: {error}")
ROUNDS = range(CONFIG.rollouts.rounds)
CHECKPOINTS = (0, len(ROUNDS))
SETTINGS = f"{RUN}/config.yaml"  # the resolved config; no input, for its time stamp says nothing: see `reads`
LOCK = resume.claim() if workflow.is_main_process else None
if workflow.is_main_process:
    relink(layout.cache_folder(CONFIG), RUN)  # the cache may have been moved since
try:
    CORES = workflow.cores
except WorkflowError:  # a cluster run without --cores: its profile sets the threads of these rules
    CORES = 1
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning idle threads slow contended cores twentyfold


def reads(*sections):
    """Digest of what a rule reads of the config: `section` or `section.key`."""
    beside = {role: {"engine_options", "tuned_on"} for role in ("student", "teacher")} | {"weights": {"scheduler"}}
    values = CONFIG.model_dump(mode="json", exclude=beside)
    for section in sections:
        assert section.split(".")[0] in values, section
    picked = {}
    for section in sections:
        value = values
        for key in section.split("."):
            value = value[key]
        picked[section] = value
    return digest(picked)


def shards(table, phase):
    """All shards of a table of a phase."""
    return [layout.shard_path(CONFIG, phase, table, i) for i in range(layout.shard_count(CONFIG, phase))]


def policy(wildcards):
    """The checkpoint that a phase samples from."""
    return layout.policy_file(CONFIG, layout.parse_phase(wildcards.phase)[1])


def shard_of(table):
    """The two files of a shard: the table and its manifest."""
    return [f"{RUN}/{{phase}}/{table}/{{shard}}.{kind}" for kind in ("parquet", "json")]


def local_files(source):
    """The user's own files that a source names, so that an edit of them is seen; none for packages and the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(file for pattern in (*IDENTITY_FILES, *TOKENIZER_FILES) for file in path.glob(pattern))
    return [path] if path.is_file() else []


REUSED_PHASES = "|".join(f"round-{r}" for r in range(len(REUSED))) or "none"
"""Phases whose rollouts and scores come from another run (`reuse`)."""
FRESH_PHASES = rf"(?!({REUSED_PHASES})\b)(round|eval)-\d+"


wildcard_constraints:
    phase=r"(round|eval)-\d+(@\d+)?",
    shard=r"\d{3}",
    role="student|teacher",


rule all:
    input:
        RUN / "report.html",


rule prompts:
    input:
        local_files(CONFIG.prompts.source),
    output:
        RUN / "prompts.parquet",
        RUN / "prompts.json",
    log:
        RUN / "logs/prompts.log",
    benchmark:
        RUN / "timings/prompts.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads("prompts", "seed"),
    shell:
        "python -m stages.prompts --config {params.config} 2>&1 | tee {log}"


rule models:
    input:
        lambda wildcards: local_files(getattr(CONFIG, wildcards.role).model),
    output:
        RUN / "models/{role}.json",
        RUN / "models/{role}-vocabulary.parquet",
        RUN / "models/{role}-vocabulary.json",
    log:
        RUN / "logs/models-{role}.log",
    benchmark:
        RUN / "timings/models-{role}.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=lambda wildcards: reads(
            *(f"{wildcards.role}.{key}" for key in ("model", "revision", "stop")),
            *(("reuse",) if wildcards.role == "teacher" else ()),
        ),
    shell:
        "python -m stages.models --config {params.config} --role {wildcards.role} 2>&1 | tee {log}"


rule reuse:
    input:
        lambda wildcards: [
            REUSED[layout.parse_phase(wildcards.phase)[1]].shard(table, int(wildcards.shard))
            for table in ("rollouts", "scores")
        ],
        RUN / "prompts.parquet",
        RUN / "models/student-vocabulary.parquet",
    output:
        shard_of("rollouts"),
        shard_of("scores"),
    log:
        RUN / "logs/{phase}-reuse-{shard}.log",
    benchmark:
        RUN / "timings/{phase}-reuse-{shard}.tsv"
    wildcard_constraints:
        phase=REUSED_PHASES,
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads("student", "reuse", "rollouts.max_new_tokens"),
    shell:
        "python -m stages.reuse --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard} 2>&1 | tee {log}"


rule rollouts:
    input:
        RUN / "prompts.parquet",
        RUN / "models/student-vocabulary.parquet",
        policy,
    output:
        shard_of("rollouts"),
    log:
        RUN / "logs/{phase}-rollouts-{shard}.log",
    benchmark:
        RUN / "timings/{phase}-rollouts-{shard}.tsv"
    wildcard_constraints:
        phase=FRESH_PHASES,
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=lambda wildcards: reads(
            "student",
            "seed",
            *(
                f"rollouts.{key}"
                for key in (
                    "max_new_tokens",
                    "temperature",
                    "top_p",
                    "batch_size",
                    "top_k",
                    "shard_size",
                )
            ),
            *(
                ("rollouts.prompts", "rollouts.samples")
                if wildcards.phase.startswith("round")
                else ("evaluate.split", "evaluate.kl_items")
            ),
        ),
    shell:
        "python -m stages.rollouts --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} 2>&1 | tee {log}"


rule scores:
    input:
        shard_of("rollouts"),
        RUN / "prompts.parquet",
        RUN / "models/teacher.json",
        RUN / "models/teacher-vocabulary.parquet",
        RUN / "models/student-vocabulary.parquet",
    output:
        shard_of("scores"),
    log:
        RUN / "logs/{phase}-scores-{shard}.log",
    benchmark:
        RUN / "timings/{phase}-scores-{shard}.tsv"
    wildcard_constraints:
        phase=FRESH_PHASES,
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(
            "teacher", "scores.support", "scores.min_p", "scores.mass", "scores.k_max", "rollouts.max_new_tokens"
        ),
    shell:
        "python -m stages.scores --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} 2>&1 | tee {log}"


rule units:
    input:
        shard_of("rollouts"),
        shard_of("scores"),
        RUN / "models/student-vocabulary.parquet",
        RUN / "models/teacher-vocabulary.parquet",
    output:
        shard_of("units"),
    log:
        RUN / "logs/{phase}-units-{shard}.log",
    benchmark:
        RUN / "timings/{phase}-units-{shard}.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
    shell:
        "python -m stages.units --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard} 2>&1 | tee {log}"


rule policy:
    input:
        lambda wildcards: shards("rollouts", wildcards.phase)[int(wildcards.shard)],
        policy,
    output:
        shard_of("policy"),
    log:
        RUN / "logs/{phase}-policy-{shard}.log",
    benchmark:
        RUN / "timings/{phase}-policy-{shard}.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads("student"),
    shell:
        "python -m stages.policy --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} 2>&1 | tee {log}"


# A rule for each phase, since phases differ in how many shards they have: estimators may compare all responses of a phase.
for PHASE in layout.phases(CONFIG):

    rule:
        name:
            f"weights_{PHASE.replace('-', '_').replace('@', '_of_')}"
        input:
            shards("rollouts", PHASE),
            shards("units", PHASE),
            # Rollouts of another policy need the log-probs of the one that is trained.
            shards("policy", PHASE) if layout.is_foreign(CONFIG, PHASE) else [],
        output:
            shards("weights", PHASE),
            [path.with_suffix(".json") for path in shards("weights", PHASE)],
        log:
            RUN / f"logs/{PHASE}-weights.log",
        benchmark:
            RUN / f"timings/{PHASE}-weights.tsv"
        conda:
            "config/environment.yaml"
        params:
            config=SETTINGS,
            phase=PHASE,
            reads=reads("weights"),
        shell:
            "python -m stages.weights --config {params.config} --phase {params.phase} 2>&1 | tee {log}"


rule coverage:
    input:
        lambda wildcards: [path for table in ("rollouts", "units") for path in shards(table, wildcards.phase)],
        RUN / "models/student-vocabulary.parquet",
    output:
        RUN / "{phase}/coverage.json",
    log:
        RUN / "logs/{phase}-coverage.log",
    benchmark:
        RUN / "timings/{phase}-coverage.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads("coverage"),
    shell:
        "python -m stages.coverage --config {params.config} --phase {wildcards.phase} 2>&1 | tee {log}"


rule train:
    input:
        ancient(RUN / "round-{round}/coverage.json"),  # a gate: that it was passed matters, not when
        lambda wildcards: [
            path
            for phase in layout.trained_on(CONFIG, int(wildcards.round))
            for table in ("rollouts", "units", "weights")
            for path in shards(table, phase)
        ],
        lambda wildcards: layout.policy_file(CONFIG, int(wildcards.round)),
        # What earlier rounds left of their steps is this one's.
        lambda wildcards: [layout.outcome_path(CONFIG, r) for r in range(int(wildcards.round))],
    output:
        RUN / "round-{round}/checkpoint.json",
        RUN / "round-{round}/train/result.json",
        RUN / "round-{round}/checkpoint/config.json",
    log:
        RUN / "logs/round-{round}-train.log",
    benchmark:
        RUN / "timings/round-{round}-train.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
        torchrun="",  # options of torchrun, for several processes; a profile sets both
        parallel="ddp",
    params:
        config=SETTINGS,
        reads=reads(
            "objective",
            *(f"train.{key}" for key in type(CONFIG.train).model_fields if key not in TRAIN_OPERATION),
            "seed",
            "rollouts.rounds",
            "rollouts.replay",
        ),
    shell:
        "launcher='{resources.torchrun}'; python -m ${{launcher:+torch.distributed.run $launcher -m}} stages.train"
        " --config {params.config} --round {wildcards.round} --threads {threads} --parallel {resources.parallel}"
        " 2>&1 | tee {log}"


rule diagnostics:
    input:
        lambda wildcards: [
            path for table in ("rollouts", "scores", "units", "weights") for path in shards(table, wildcards.phase)
        ],
        policy,
        # A round's figures tell of its gate and its training too.
        lambda wildcards: (
            [
                RUN / wildcards.phase / "coverage.json",
                layout.policy_file(CONFIG, layout.parse_phase(wildcards.phase)[1] + 1),
            ]
            if wildcards.phase.startswith("round") and "@" not in wildcards.phase
            else []
        ),
    output:
        RUN / "{phase}/diagnostics.json",
    log:
        RUN / "logs/{phase}-diagnostics.log",
    benchmark:
        RUN / "timings/{phase}-diagnostics.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads("objective", "weights", "teacher.model"),
        tuned_on=CONFIG.student.tuned_on,
    shell:
        "python -m stages.diagnostics --config {params.config} --phase {wildcards.phase} 2>&1 | tee {log}"


rule evaluate:
    input:
        lambda wildcards: [
            path
            for table in ("rollouts", "units", "weights")
            for path in shards(table, f"eval-{wildcards.checkpoint}")
        ],
        lambda wildcards: layout.policy_file(CONFIG, int(wildcards.checkpoint)),
        RUN / "prompts.parquet",
    output:
        RUN / "eval-{checkpoint}/result.json",
        RUN / "eval-{checkpoint}/answers.parquet",
    log:
        RUN / "logs/eval-{checkpoint}.log",
    benchmark:
        RUN / "timings/eval-{checkpoint}-answers.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads("evaluate", "student", "rollouts.max_new_tokens"),
    shell:
        "python -m stages.evaluate --config {params.config} --checkpoint {wildcards.checkpoint} --threads {threads}"
        " 2>&1 | tee {log}"


rule report:
    input:
        [RUN / f"eval-{c}/result.json" for c in CHECKPOINTS],
        [layout.policy_file(CONFIG, r + 1) for r in ROUNDS],
        [layout.diagnostics_path(CONFIG, phase) for phase in layout.phases(CONFIG)],
    output:
        RUN / "report.html",
        RUN / "summary.json",
    log:
        RUN / "logs/report.log",
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(*(name for name in type(CONFIG).model_fields if name != "cache")),
        tuned_on=CONFIG.student.tuned_on,
    shell:
        "python -m stages.report --config {params.config} 2>&1 | tee {log}"


onstart:
    write_config(CONFIG)
    if warning := consistency(CONFIG):
        console.warn(warning)


onsuccess:
    if (RUN / "summary.json").exists():
        print_summary(CONFIG)
