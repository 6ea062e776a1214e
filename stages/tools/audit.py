"""Audit: score some responses of a run again, one by one in full precision, and compare with what its shards hold."""

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from pipeline.infer.audit import figures, in_precision, unaudited
from pipeline.infer.shard_scores import ShardScores
from pipeline.store.cache import audit_note
from pipeline.store.records import write_record
from pipeline.store.shards import open_shard
from schemas.errors import OpdError
from schemas.records import Audited
from stages.run import console, processors
from stages.run.context import (
    DEFAULT_CONFIG,
    ConfigOption,
    ThreadsOption,
    open_prompts,
    policy,
    prompts_of,
    teacher,
)
from stages.run.run import BASE, open_run


def main(
    config_file: ConfigOption = DEFAULT_CONFIG,
    responses: Annotated[int, typer.Option(min=1, help="responses per shard")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="another seed looks at others")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Compare stored with recomputed log-probs, shard by shard; fails above the config's `audit` thresholds.

    Scores that could not be audited when they were made are then, and may be trained on.
    """
    run = open_run(config_file)
    config = run.config
    processors.take(threads)
    own = [phase for phase in run.phases if phase.sampled_in == phase and not (phase.source and phase.source.is_scored)]
    places = [place for phase in own for place in phase if place.path("scores").exists()]
    if not places:
        raise OpdError(f"{run.root}: no scores of this run's own to audit")
    judge, student, prompts = teacher(run), policy(run, BASE), open_prompts(run)
    limits = config.audit
    model, dtype = in_precision(judge.take_model(), limits.dtype, judge.dtype)
    table = Table(title=f"{config.run}: stored against recomputed log-probs ({dtype})", title_justify="left")
    for heading in ("shard", "responses", "log-probs", "mean difference", "max", "when written"):
        table.add_column(heading, justify="left" if heading == "shard" else "right")
    worst_mean = worst = 0.0
    with console.progress("audit", len(places), "shards") as advance:
        for place in places:
            about = ShardScores(config, place.rollouts, prompts, judge, student, prompts_of(place.phase))
            scores = open_shard(place.path("scores"), "scores", about.identity, about.inputs)
            result = figures(about.stored_deltas(model, scores, responses, f"{seed:016x}"), dtype)
            mean, largest = result["audit_mean_delta"], result["audit_max_delta"]
            worst_mean, worst = np.maximum(worst_mean, mean), np.maximum(worst, largest)  # one that is no number stays
            then = scores.manifest.figures.get("audit_max_delta")
            before = "" if then is None else f"{then:.4f}"
            if mean <= limits.max_mean_delta and largest <= limits.max_delta and unaudited(scores.path):
                write_record(audit_note(scores.path), Audited(scores=scores.manifest.sha256, figures=result))
                before = "not audited"
            counts = (str(result["audit_responses"]), f"{result['audit_logps']:,}")
            table.add_row(
                f"{place.phase.name}/{place.number:03}",
                *counts,
                f"{mean:.4f}",
                f"{largest:.4f}",
                before,
            )
            advance(1)
    console.out.print(table)
    if not (worst <= limits.max_delta and worst_mean <= limits.max_mean_delta):
        raise OpdError(
            f"differences above the thresholds audit.max_mean_delta {limits.max_mean_delta} or audit.max_delta "
            f"{limits.max_delta}"
        )


if __name__ == "__main__":
    console.run(main)
