"""Outcomes: which responses are right, by the run's scorer; for weights that are gated or rewarded by it."""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.measure.scorers import Scorer, identity, scorer
from pipeline.prepared import PromptTable
from pipeline.store.shards import open_writer
from schemas.tables import arrow_schema
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption, ShardOption, ThreadsOption, prompts_of
from stages.run.run import open_run


def main(
    phase: PhaseOption,
    shard: ShardOption = 0,
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Judge a shard of responses, each once; needs no model. What has no reference, or can't be judged, has no outcome."""
    run = open_run(config_file, "outcomes", phase)
    place = run.phase(phase)[shard]
    prompts = prompts_of(place.phase)
    source = prompts.source if place.phase.source else run.settings.prompts.source
    judge = scorer(run.settings.evaluate, source, threads)
    counts = {True: 0, False: 0, None: 0}
    path, about = place.path("outcomes"), identity(run.settings.evaluate)
    with (
        console.progress(f"{phase} outcomes", place.rollouts.rows, "responses") as advance,
        open_writer(path, "outcomes", about, place.inputs("outcomes"), decided=run.decided) as writer,
    ):
        for table in judged(place.rollouts.row_groups(["rollout_id", "prompt_id", "response"]), judge, prompts):
            writer.write(table)
            advance(len(table))
            for right in table["right"].to_pylist():
                counts[right] += 1
        writer.figures |= {"right": counts[True], "wrong": counts[False], "unknown": counts[None]}
    console.say(
        f"{phase} outcomes: {counts[True]:,} right, {counts[False]:,} wrong, {counts[None]:,} that can't be judged"
    )


def judged(groups: Iterator[pa.Table], judge: Scorer, prompts: PromptTable) -> Iterator[pa.Table]:
    """Rows of schema `outcomes` of each row group of rollouts."""
    schema = arrow_schema("outcomes")
    for group in groups:
        found = judge.all(group["response"].to_pylist(), prompts.take(group["prompt_id"].to_pylist()))
        columns = {"judged": [answer for answer, _ in found], "right": [right for _, right in found]}
        yield pa.table({"rollout_id": group["rollout_id"], **columns}, schema=schema)


if __name__ == "__main__":
    console.run(main)
