"""Audit: score some responses of a run again, one by one in full precision, and compare with what its shards hold."""

from typing import Annotated

import torch
import typer
from rich.table import Table

from pipeline.infer.audit import figures
from pipeline.infer.shard_scores import ShardScores
from pipeline.store.shards import open_shard
from schemas.errors import OpdError
from stages.run import console, layout
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    ThreadsOption,
    open_prompts,
    policy,
    read_config,
    teacher,
)


def main(
    config_file: ConfigOption = DEFAULT_CONFIG,
    responses: Annotated[int, typer.Option(min=1, help="responses per shard")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="another seed looks at others")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Compare stored with recomputed log-probs, shard by shard; fails above the config's `audit` thresholds."""
    config = read_config(config_file)
    console.threads(threads)
    rounds = [f"round-{r}" for r in range(config.rollouts.rounds)]
    phases = [*rounds, *(f"eval-{c}" for c in (0, config.rollouts.rounds))]
    places = [
        (phase, index)
        for phase in phases
        for index in range(layout.shard_count(config, phase))
        if not layout.is_reused(config, phase) and layout.shard_path(config, phase, "scores", index).exists()
    ]
    if not places:
        raise OpdError(f"{layout.run_folder(config)}: no scores of this run's own to audit")
    judge, student, prompts = teacher(config), policy(config, 0), open_prompts(config)
    model = judge.take_model().to(getattr(torch, config.audit.dtype))
    table = Table(
        title=f"{config.run}: stored against recomputed log-probs ({config.audit.dtype})", title_justify="left"
    )
    for heading in ("shard", "responses", "log-probs", "mean difference", "max", "when written"):
        table.add_column(heading, justify="left" if heading == "shard" else "right")
    worst_mean = worst = 0.0
    with console.progress("audit", len(places), "shards") as advance:
        for phase, index in places:
            rollouts = open_shard(layout.shard_path(config, phase, "rollouts", index), "rollouts")
            about = ShardScores(config, rollouts, prompts, judge, student)
            path = layout.shard_path(config, phase, "scores", index)
            scores = open_shard(path, "scores", about.identity, about.inputs)
            result = figures(about.stored_deltas(model, scores, responses, f"{seed:016x}"), config.audit.dtype)
            mean, largest = result["audit_mean_delta"], result["audit_max_delta"]
            worst_mean, worst = max(worst_mean, mean), max(worst, largest)
            then = scores.manifest.figures.get("audit_max_delta")
            counts = (str(result["audit_responses"]), f"{result['audit_logps']:,}")
            table.add_row(
                f"{phase}/{index:03}", *counts, f"{mean:.4f}", f"{largest:.4f}", "" if then is None else f"{then:.4f}"
            )
            advance(1)
    console.out.print(table)
    if worst > config.audit.max_delta or worst_mean > config.audit.max_mean_delta:
        raise OpdError(
            f"differences above the thresholds audit.max_mean_delta {config.audit.max_mean_delta} or audit.max_delta "
            f"{config.audit.max_delta}"
        )


if __name__ == "__main__":
    console.run(main)
