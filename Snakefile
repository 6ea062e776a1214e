"""Offline on-policy distillation, top to bottom:

prompts, models -> (answers -> retokenise -> sft) -> (rollouts -> scores -> units -> weights, coverage -> train) per round -> evaluate before and after -> report

A phase is `round-<r>`, trained on, `eval-<c>`, held-out rollouts of checkpoint c, or, with `sft.prompts`, `sft`, the teacher's
answers that the student is fine-tuned on first. Each rule calls one stage; what a
rule depends on beside its files is the digest of the config sections it reads (`params: reads`), so a changed learning
rate retrains but samples and scores nothing anew.
"""

import sys
from dataclasses import replace
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from pipeline.store.cache import relink
from schemas.config import consistency, credit_in_part, declared, overridden, parse_config
from schemas.config.strict_yaml import read_yaml
from schemas.errors import OpdError
from stages.run import console
from stages.run.run import run_of, write_config
from stages.run.storage import copies_of, declare_all
from stages.run.terminal import take_over
from stages.run.workflow import (
    caption,
    hold,
    keep_results,
    local_files,
    policy,
    reads,
    reused_phases,
    sampled_phases,
    scored_phases,
    shard_of,
    shards,
    tables,
    weighed,
)

min_version("9.0")

if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


try:
    # Snakemake has read them already, less strictly: of a key that is there twice the last.
    for given in map(Path, workflow.configfiles):
        if given.suffix != ".json":
            read_yaml(given)
    RUN = run_of(parse_config(config, " ".join(map(str, workflow.configfiles))))
    REUSED, TAKEN = reused_phases(RUN, scored=True), reused_phases(RUN, scored=False)
    SAMPLED, SCORED = sampled_phases(RUN), scored_phases(RUN)
    PROMPTS = local_files(RUN.config.prompts.source)
    ALSO = [path for held_out in RUN.config.evaluate.also.values() for path in local_files(held_out.source)]
    MODELS = {role: local_files(getattr(RUN.config, role).model) for role in ("student", "teacher")}
except OpdError as error:
    sys.exit(f"error: {error}")

CONFIG, FOLDER = RUN.config, RUN.root
COPIES = copies_of(RUN, workflow)  # the same folder, but with a storage plugin
SETTINGS = f"{COPIES}/config.yaml"  # the resolved config; no input, for its time stamp says nothing: see `reads`
if COPIES != FOLDER and CONFIG.reuse:
    sys.exit("error: reuse: jobs don't see another run's folder with a storage plugin; let them share a file system")
if COPIES != FOLDER and CONFIG.cache_keys:
    sys.exit(
        "error: cache_keys: with a storage plugin jobs don't see each other's signatures; let them share a file system"
    )
if workflow.is_main_process:
    relink(RUN.cache, FOLDER)  # the cache may have been moved since
    TERMINAL = take_over(RUN, workflow)
elif COPIES != FOLDER:
    write_config(replace(RUN, root=COPIES))
try:
    CORES = workflow.cores
except WorkflowError:  # a cluster run without --cores: its profile sets the threads of these rules
    CORES = 1


wildcard_constraints:
    phase=r"sft|round-\d+(@\d+)?|eval-(base|\d+)",
    checkpoint=r"base|\d+",
    shard=r"\d\d\d+",
    role="student|teacher",


rule all:
    input:
        FOLDER / "report.html",


rule prompts:
    input:
        PROMPTS,
    output:
        FOLDER / "prompts.parquet",
        FOLDER / "prompts.json",
    log:
        FOLDER / "logs/prompts.log",
    benchmark:
        FOLDER / "timings/prompts.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "prompts"),
    shell:
        "python -m stages.prompts --config {params.config} > {log} 2>&1"


rule also:
    input:
        ALSO,
    output:
        FOLDER / "also.parquet",
        FOLDER / "also.json",
    log:
        FOLDER / "logs/also.log",
    benchmark:
        FOLDER / "timings/also.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "also"),
    shell:
        "python -m stages.also --config {params.config} > {log} 2>&1"


rule models:
    input:
        lambda wildcards: MODELS[wildcards.role],
    output:
        FOLDER / "models/{role}.json",
        FOLDER / "models/{role}-vocabulary.parquet",
        FOLDER / "models/{role}-vocabulary.json",
    log:
        FOLDER / "logs/models-{role}.log",
    benchmark:
        FOLDER / "timings/models-{role}.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "models"),
        prepared=lambda wildcards: wildcards.role == "student" or RUN.needs_teacher,
    shell:
        "python -m stages.models --config {params.config} --role {wildcards.role} > {log} 2>&1"


# A gate before anything is sampled.
rule fit:
    input:
        FOLDER / "prompts.parquet",
        [FOLDER / "also.parquet"] if CONFIG.evaluate.also else [],
        [FOLDER / f"models/{role}.json" for role in ("student", "teacher")],
        [FOLDER / f"models/{role}-vocabulary.parquet" for role in ("student", "teacher")],
    output:
        FOLDER / "fit.json",
    log:
        FOLDER / "logs/fit.log",
    benchmark:
        FOLDER / "timings/fit.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "fit"),
    shell:
        "python -m stages.fit --config {params.config} > {log} 2>&1"


# The teacher's answers, told in the student's tokens, and the student that they make: with `sft.prompts`, before round 0.
rule answers:
    input:
        FOLDER / "prompts.parquet",
        FOLDER / "models/teacher.json",
        FOLDER / "models/teacher-vocabulary.parquet",
        ancient(FOLDER / "fit.json"),  # a gate: that it was passed matters, not when
    output:
        shard_of(RUN, "answers"),
    log:
        FOLDER / "logs/{phase}-answers-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-answers-{shard}.tsv"
    wildcard_constraints:
        phase="sft",
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "answers"),
    shell:
        "python -m stages.answers --config {params.config} --shard {wildcards.shard} --threads {threads} > {log} 2>&1"


rule retokenise:
    input:
        shard_of(RUN, "answers"),
        FOLDER / "prompts.parquet",
        FOLDER / "models/student.json",
        FOLDER / "models/student-vocabulary.parquet",
        FOLDER / "models/teacher-vocabulary.parquet",
    output:
        shard_of(RUN, "rollouts"),
    log:
        FOLDER / "logs/{phase}-retokenise-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-retokenise-{shard}.tsv"
    wildcard_constraints:
        phase="sft",
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "retokenise"),
    shell:
        "python -m stages.retokenise --config {params.config} --shard {wildcards.shard} > {log} 2>&1"


rule sft:
    input:
        lambda wildcards: shards(RUN, "sft", "rollouts"),
        FOLDER / "models/student.json",
        FOLDER / "models/student-vocabulary.parquet",
    output:
        FOLDER / "sft/checkpoint.json",
        FOLDER / "sft/train/result.json",
        FOLDER / "sft/checkpoint/config.json",
    log:
        FOLDER / "logs/sft-train.log",
    benchmark:
        FOLDER / "timings/sft-train.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
        torchrun="",  # as of `train`
        parallel="ddp",
    params:
        config=SETTINGS,
        reads=reads(RUN, "sft"),
    shell:
        "launcher='{resources.torchrun}'; python -m ${{launcher:+torch.distributed.run $launcher -m}} stages.sft"
        " --config {params.config} --threads {threads} --parallel {resources.parallel} > {log} 2>&1"


rule reuse:
    input:
        lambda wildcards: [
            RUN.phase(wildcards.phase).source.shard(table, int(wildcards.shard)) for table in ("rollouts", "scores")
        ],
        FOLDER / "prompts.parquet",
        FOLDER / "models/student-vocabulary.parquet",
    output:
        shard_of(RUN, "rollouts"),
        shard_of(RUN, "scores"),
    log:
        FOLDER / "logs/{phase}-reuse-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-reuse-{shard}.tsv"
    wildcard_constraints:
        phase=REUSED,
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "reuse"),
    shell:
        "python -m stages.reuse --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard} > {log} 2>&1"


# Rollouts that come without scores, from `opd import` or a run that wasn't scored.
rule take:
    input:
        lambda wildcards: RUN.phase(wildcards.phase).source.shard("rollouts", int(wildcards.shard)),
        FOLDER / "prompts.parquet",
        FOLDER / "models/student-vocabulary.parquet",
    output:
        shard_of(RUN, "rollouts"),
    log:
        FOLDER / "logs/{phase}-reuse-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-reuse-{shard}.tsv"
    wildcard_constraints:
        phase=TAKEN,
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "reuse"),
    shell:
        "python -m stages.reuse --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard} > {log} 2>&1"


rule rollouts:
    input:
        FOLDER / "prompts.parquet",
        FOLDER / "models/student-vocabulary.parquet",
        policy(RUN),
        ancient(FOLDER / "fit.json"),  # a gate: that it was passed matters, not when
    output:
        shard_of(RUN, "rollouts"),
    log:
        FOLDER / "logs/{phase}-rollouts-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-rollouts-{shard}.tsv"
    wildcard_constraints:
        phase=SAMPLED,
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "rollouts"),
    shell:
        "python -m stages.rollouts --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} > {log} 2>&1"


rule scores:
    input:
        shard_of(RUN, "rollouts"),
        FOLDER / "prompts.parquet",
        FOLDER / "models/teacher.json",
        FOLDER / "models/teacher-vocabulary.parquet",
        FOLDER / "models/student-vocabulary.parquet",
    output:
        shard_of(RUN, "scores"),
    log:
        FOLDER / "logs/{phase}-scores-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-scores-{shard}.tsv"
    wildcard_constraints:
        phase=SCORED,
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "scores"),
    shell:
        "python -m stages.scores --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} > {log} 2>&1"


rule units:
    input:
        shard_of(RUN, "rollouts"),
        shard_of(RUN, "scores"),
        FOLDER / "models/student-vocabulary.parquet",
        FOLDER / "models/teacher-vocabulary.parquet",
    output:
        shard_of(RUN, "units"),
    log:
        FOLDER / "logs/{phase}-units-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-units-{shard}.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "units"),
    shell:
        "python -m stages.units --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard} > {log} 2>&1"


rule policy:
    input:
        lambda wildcards: RUN.phase(wildcards.phase)[int(wildcards.shard)].path("rollouts"),
        policy(RUN),
    output:
        shard_of(RUN, "policy"),
    log:
        FOLDER / "logs/{phase}-policy-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-policy-{shard}.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "policy"),
    shell:
        "python -m stages.policy --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} > {log} 2>&1"


# For a loss that refers to the policy that the first round started from.
rule reference:
    input:
        lambda wildcards: RUN.phase(wildcards.phase)[int(wildcards.shard)].path("rollouts"),
        RUN.policy_file(0),
    output:
        shard_of(RUN, "reference"),
    log:
        FOLDER / "logs/{phase}-reference-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-reference-{shard}.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "reference"),
    shell:
        "python -m stages.reference --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} > {log} 2>&1"


rule outcomes:
    input:
        lambda wildcards: RUN.phase(wildcards.phase)[int(wildcards.shard)].path("rollouts"),
        FOLDER / "prompts.parquet",
    output:
        shard_of(RUN, "outcomes"),
    log:
        FOLDER / "logs/{phase}-outcomes-{shard}.log",
    benchmark:
        FOLDER / "timings/{phase}-outcomes-{shard}.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES  # responses are judged side by side where programs are run
    params:
        config=SETTINGS,
        reads=reads(RUN, "outcomes"),
    shell:
        "python -m stages.outcomes --config {params.config} --phase {wildcards.phase} --shard {wildcards.shard}"
        " --threads {threads} > {log} 2>&1"


# One job a phase: estimators may compare all of its responses.
rule weights:
    input:
        weighed(RUN),
    output:
        FOLDER / "{phase}/weights.json",
    log:
        FOLDER / "logs/{phase}-weights.log",
    benchmark:
        FOLDER / "timings/{phase}-weights.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "weights"),
    shell:
        "python -m stages.weights --config {params.config} --phase {wildcards.phase} > {log} 2>&1"


rule coverage:
    input:
        tables(RUN, "rollouts", "units"),
        FOLDER / "models/student-vocabulary.parquet",
    output:
        FOLDER / "{phase}/coverage.json",
    log:
        FOLDER / "logs/{phase}-coverage.log",
    benchmark:
        FOLDER / "timings/{phase}-coverage.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "coverage"),
    shell:
        "python -m stages.coverage --config {params.config} --phase {wildcards.phase} > {log} 2>&1"


rule train:
    input:
        ancient(FOLDER / "round-{round}/coverage.json"),  # a gate: that it was passed matters, not when
        lambda wildcards: [
            path
            for phase in RUN.trained_on(int(wildcards.round))
            for path in shards(RUN, phase.name, "rollouts", "units", "weights")
        ],
        lambda wildcards: RUN.policy_file(int(wildcards.round)),
        # What earlier rounds left of their steps is this one's.
        lambda wildcards: [RUN.phase(f"round-{r}").outcome for r in range(int(wildcards.round))],
    output:
        FOLDER / "round-{round}/checkpoint.json",
        FOLDER / "round-{round}/train/result.json",
        FOLDER / "round-{round}/checkpoint/config.json",
    log:
        FOLDER / "logs/round-{round}-train.log",
    benchmark:
        FOLDER / "timings/round-{round}-train.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
        torchrun="",  # options of torchrun, for several processes; a profile sets both
        parallel="ddp",
    params:
        config=SETTINGS,
        reads=reads(RUN, "train"),
    shell:
        "launcher='{resources.torchrun}'; python -m ${{launcher:+torch.distributed.run $launcher -m}} stages.train"
        " --config {params.config} --round {wildcards.round} --threads {threads} --parallel {resources.parallel}"
        " > {log} 2>&1"


rule diagnostics:
    input:
        tables(RUN, "rollouts", "scores", "units", "weights"),
        policy(RUN),
        # A round's figures tell of its gate and its training too.
        lambda wildcards: (
            [
                FOLDER / wildcards.phase / "coverage.json",
                RUN.policy_file(RUN.phase(wildcards.phase).number + 1),
            ]
            if wildcards.phase.startswith("round") and "@" not in wildcards.phase
            else []
        ),
    output:
        FOLDER / "{phase}/diagnostics.json",
    log:
        FOLDER / "logs/{phase}-diagnostics.log",
    benchmark:
        FOLDER / "timings/{phase}-diagnostics.tsv"
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "diagnostics"),
    shell:
        "python -m stages.diagnostics --config {params.config} --phase {wildcards.phase} > {log} 2>&1"


rule evaluate:
    input:
        # Of the weights it reads what no loss decides, but were they ancient, a run killed after its units would go on without it.
        lambda wildcards: shards(RUN, f"eval-{wildcards.checkpoint}", "rollouts", "units", "weights"),
        lambda wildcards: RUN.policy_file(RUN.phase(f"eval-{wildcards.checkpoint}").number),
        FOLDER / "prompts.parquet",
        [FOLDER / "also.parquet"] if CONFIG.evaluate.also else [],
        ancient(FOLDER / "fit.json"),
    output:
        FOLDER / "eval-{checkpoint}/result.json",
        FOLDER / "eval-{checkpoint}/answers.parquet",
        FOLDER / "eval-{checkpoint}/answers.json",
    log:
        FOLDER / "logs/eval-{checkpoint}.log",
    benchmark:
        FOLDER / "timings/eval-{checkpoint}-answers.tsv"
    conda:
        "config/environment.yaml"
    threads: CORES
    resources:
        model=1,
    params:
        config=SETTINGS,
        reads=reads(RUN, "evaluate"),
    shell:
        "python -m stages.evaluate --config {params.config} --checkpoint {wildcards.checkpoint} --threads {threads}"
        " > {log} 2>&1"


rule report:
    input:
        [FOLDER / f"eval-{c}/result.json" for c in RUN.checkpoints],
        [RUN.policy_file(r + 1) for r in RUN.rounds],
        [phase.diagnostics for phase in RUN.phases],
    output:
        report(FOLDER / "report.html", caption=caption("report"), category="Report"),
        report(FOLDER / "summary.json", caption=caption("summary"), category="Report"),
    log:
        FOLDER / "logs/report.log",
    conda:
        "config/environment.yaml"
    params:
        config=SETTINGS,
        reads=reads(RUN, "report"),
    shell:
        "python -m stages.report --config {params.config} > {log} 2>&1"


if COPIES != FOLDER:
    declare_all(RUN, workflow)


onstart:
    global held
    try:
        held = hold(RUN)
        if replaced := keep_results(RUN):
            console.warn(replaced)
        write_config(replace(RUN, root=COPIES))
    except OpdError as error:
        sys.exit(f"error: {error}")
    for warning in filter(None, (consistency(CONFIG, declared(CONFIG)), credit_in_part(CONFIG))):
        console.warn(warning)
    for otherwise in overridden(CONFIG):
        console.say(f"{RUN.config.run}: {otherwise}")


onsuccess:
    from stages.report.page import print_summary

    if TERMINAL:
        TERMINAL.stop()
    if (FOLDER / "summary.json").exists():
        try:
            print_summary(RUN)
        except OpdError as error:  # what was asked for is a part of the run, whose summary is of an earlier config
            console.warn(str(error))
