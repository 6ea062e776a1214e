"""Evaluate: accuracy of a checkpoint's answers on held-out prompts, and its on-policy reverse KL to the teacher."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import polars as pl
import typer

from pipeline.infer.engines import open_sampler, read_model
from pipeline.measure.accuracy import accuracy
from pipeline.measure.held_out_answers import held_out_answers
from pipeline.measure.scorers import identity, scorer
from pipeline.prepared import PreparedModel
from pipeline.prompts import ROW_GROUP
from pipeline.store.records import write_record
from pipeline.store.shards import open_writer, read_manifest
from schemas.config import Judged
from schemas.records import Evaluation
from stages.run import console, processors
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ThreadsOption, open_also, open_prompts, policy
from stages.run.rounds import open_shards
from stages.run.run import BASE, Phase, open_run
from train.on_policy_kl import FIGURES, on_policy_kl

NO_REFERENCE = "accuracy not measured (no reference answers)"
NO_KL: dict[str, Any] = {**dict.fromkeys(FIGURES), "kl_responses": 0, "kl_tokens": 0}
"""In place of `on_policy_kl` where the teacher isn't at hand."""


def main(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="0 is what the rounds start from, n what n rounds made of it; base: the student before `sft`"
        ),
    ],
    config_file: ConfigOption = DEFAULT_CONFIG,
    threads: ThreadsOption = None,
) -> None:
    """Measure a checkpoint on the held-out prompts; writes result.json and the answers beside it."""
    run = open_run(config_file, "evaluate", f"eval-{checkpoint}")
    processors.take(threads, run.config.student)
    config, phase = run.settings, run.phase(f"eval-{checkpoint}")
    options = config.evaluate
    student = policy(run, phase.number)
    answers = answered(student, phase, threads)
    about = {"policy": student.ref.identity(), "checkpoint": phase.name}
    inputs = {"prompts": open_prompts(run).shard.manifest.sha256}
    with open_writer(phase.answers, "answers", about, inputs, {"student": student.ref.source}, run.decided) as writer:
        for part in answers.iter_slices(ROW_GROUP):
            writer.write(part.to_arrow())
    kl = NO_KL
    if run.kl_items:
        # Candidates and units are the trainer's, so it is its own forward pass, whatever the engine.
        kl = on_policy_kl(read_model(student), student.stop, open_shards(phase), config)
    figures = {name: accuracy(answers.filter(set=name)) for name in (options.split, *options.also)}
    result: dict[str, Any] = {
        "answers": read_manifest(phase.answers).sha256,
        "checkpoint": "base" if phase.number == BASE else phase.number,
        "split": options.split,
        "samples": options.samples,
        "temperature": options.temperature if options.samples > 1 else 0.0,
        "top_p": options.top_p if options.samples > 1 else 1.0,
        **identity(options),
        **figures[options.split],
        **kl,
        "also": {name: identity(held_out) | figures[name] for name, held_out in options.also.items()},
    }
    write_record(phase.result, Evaluation(decided=run.decided, **result))
    nats = result["reverse_kl"]
    measured = "not measured" if nats is None else f"{nats:.3f} nats per token"
    others = "".join(f"; {name}: {in_words(figures[name])}" for name in options.also)
    console.say(f"{phase.name}: {in_words(result)}, on-policy reverse KL {measured}{others}")


def in_words(figures: dict[str, Any]) -> str:
    """Accuracy for people."""
    if not figures["judged"]:
        return NO_REFERENCE
    share = f"({100 * figures['accuracy']:.1f} %)"
    if not figures["pass_at_k"]:
        return f"{figures['right']}/{figures['judged']} right {share}"
    samples, best = list(figures["pass_at_k"].items())[-1]
    return f"avg@{samples} {share[1:-1]}, pass@{samples} {100 * best['share']:.1f} % of {figures['judged']} prompts"


def answered(student: PreparedModel, phase: Phase, threads: int | None) -> pl.DataFrame:
    """The student's answers to every held-out prompt, by `set`; its engine is closed when they are there."""
    config = phase.run.settings
    new = config.rollouts.longest
    prompts = open_prompts(phase.run)
    renderer = student.renderer(prompts)
    sets = [
        (name, rows, renderer.ids(rows, student.context - new), scorer(judged, source, threads))
        for name, rows, judged, source in held_out(phase)
    ]
    longest = max((len(ids) for _, _, texts, _ in sets for ids in texts), default=0) + new
    total = sum(len(rows) for _, rows, _, _ in sets) * config.evaluate.samples
    with (
        open_sampler(student, longest, config.rollouts.batch_size, console.say) as sampler,
        console.progress(f"{phase.name} answers", total, "responses") as advance,
    ):
        return pl.concat(
            held_out_answers(sampler, student, rows, ids, judge, config, advance).select(
                pl.lit(name).alias("set"), pl.all()
            )
            for name, rows, ids, judge in sets
        )


def held_out(phase: Phase) -> Iterator[tuple[str, Sequence[dict[str, Any]], Judged, str]]:
    """Each held-out set: its name, its rows, what says which answers are right, and where the rows are from."""
    config = phase.run.settings
    options = config.evaluate
    yield options.split, open_prompts(phase.run).split(options.split), options, config.prompts.source
    if options.also:
        others = open_also(phase.run)
        yield from ((name, others.split(name), one, one.source) for name, one in options.also.items())


if __name__ == "__main__":
    console.run(main)
