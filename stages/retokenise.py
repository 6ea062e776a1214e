"""Retokenise: the teacher's answers as if the student had written them, and only the right ones where the config wants that."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.align.retokenise import positions, retokenise
from pipeline.align.tokens import from_table
from pipeline.measure.scorers import identity as scorer_identity
from pipeline.measure.scorers import scorer
from pipeline.prepared import PromptTable
from pipeline.store.shards import open_writer
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, ShardOption, open_prompts, policy, vocabulary
from stages.run.run import BASE, Run, open_run


def main(shard: ShardOption = 0, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Tell a shard of the teacher's answers in the student's tokens, behind its own prompts; needs no model.

    The manifest's figures count what was left out: answers that are not right, with `sft.right_only`, and those that are
    longer than the student's context.
    """
    run = open_run(config_file, "retokenise", "sft")
    place, prompts, student = run.phase("sft")[shard], open_prompts(run), policy(run, BASE)
    answers, renderer = place.answers, student.renderer(prompts)
    told = vocabulary(run, "teacher").read()
    behavior = from_table(told, run.settings.teacher.model)
    right_only = run.settings.sft.right_only
    identity = {"student": student.ref.tokenizer, "prompt": renderer.identity, "stop_ids": student.stop.tolist()}
    identity |= {name: answers.manifest.identity[name] for name in ("policy", "sampling")}
    identity["kept"] = scorer_identity(run.settings.evaluate) if right_only else "all"
    inputs = {"answers": answers.manifest.sha256, "prompts": prompts.shard.manifest.sha256}
    figures = dict.fromkeys(("right", "too_long", "kept", "tokens", "stopped"), 0)
    path, origin = place.path("rollouts"), answers.manifest.origin
    with open_writer(path, "rollouts", identity, inputs, origin, run.decided) as writer:
        for group in answers.row_groups():
            if right_only:
                group = group.filter(are_right(run, prompts, group))  # noqa: PLW2901
            figures["right"] += len(group)
            ids = renderer.ids(prompts.take(group["prompt_id"].to_pylist()), student.context)
            tokens = (student.vocabulary, student.stop)
            table = retokenise(group, behavior, tokens, student.text_tokenizer, student.roles, ids)
            fits = pc.less_equal(positions(table), student.context)
            figures["too_long"] += pc.sum(pc.invert(fits)).as_py() or 0
            table = table.filter(fits)
            writer.write(table)
            figures["kept"] += len(table)
            figures["tokens"] += pc.sum(pc.list_value_length(table["response_ids"])).as_py() or 0
            figures["stopped"] += pc.sum(pc.equal(table["finish_reason"], "stop")).as_py() or 0
        writer.figures |= {"answers": answers.rows, **figures, "right": figures["right"] if right_only else None}
    console.say(
        f"sft: {figures['kept']:,} of {answers.rows:,} answers kept, {figures['tokens']:,} tokens of the student"
    )


def are_right(run: Run, prompts: PromptTable, answers: pa.Table) -> pa.Array:
    """bool, of each answer; one that can't be judged is not right."""
    judge = scorer(run.settings.evaluate, run.settings.prompts.source)
    judged = judge.all(answers["response"].to_pylist(), prompts.take(answers["prompt_id"].to_pylist()))
    return pa.array([bool(right) for _, right in judged], pa.bool_())


if __name__ == "__main__":
    console.run(main)
