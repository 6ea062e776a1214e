"""Fit: whether every prompt and its response fit into both models, before anything is sampled."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from pipeline.infer.wanted import prompts_of_round
from pipeline.measure.scorers import references_problem
from pipeline.models import embedded, model_config
from pipeline.prepared import PreparedModel, PromptRows, PromptTable
from pipeline.prompts import ROW_GROUP
from pipeline.store.records import write_record
from pipeline.store.shards import open_shard
from schemas.config.options import OWN_CODE
from schemas.errors import OpdError
from schemas.records import Fit
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, open_also, open_prompts, policy, teacher
from stages.run.limits import check_limits
from stages.run.run import BASE, Run, open_run

Role = Literal["student", "teacher"]


def main(config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Render every prompt for each model that will read it, and refuse one that leaves too little room; writes fit.json."""
    run = open_run(config_file, "fit")
    models: dict[Role, PreparedModel] = {"student": policy(run, BASE)}
    if run.needs_teacher:
        models["teacher"] = teacher(run)
    if run.settings.weights.gate.judges or run.settings.weights.reward != "none":
        check_references(run)
    found = {role: fitted(run, role, model) for role, model in models.items()}
    write_record(run.fit, Fit.model_validate({"decided": run.decided, **found}))
    for role, figures in found.items():
        console.say(
            f"fit: {role}: prompts of up to {figures['prompt']} tokens and responses of {figures['response']} in a context of "
            f"{figures['context']}"
        )


def fitted(run: Run, role: Role, model: PreparedModel) -> dict[str, int]:
    """Tokens of a model's context, and of the longest prompt and response of all that it is to read.

    Raises OpdError where one doesn't fit, or holds an id that the model has no embedding of.
    """
    values = model_config(model.ref.path)
    check_limits(run.settings, role, values)
    renderer, ids_end = model.renderer(open_prompts(run)), embedded(values)
    longest = 0
    for rows, new in parts(run, role):
        for row, ids in zip(rows, renderer.ids(rows, model.context - new), strict=True):
            check_embedded(role, model.ref.source, row["prompt_id"], ids, ids_end)
            longest = max(longest, len(ids))
    return {"context": model.context, "prompt": longest, "response": run.settings.rollouts.longest}


def check_references(run: Run) -> None:
    """Raise OpdError where no train prompt has a reference, or the scorer reads none of the first; say how many haven't one.
    Those of runs whose rounds are reused likewise.

    A scorer of one's own may need none.
    """
    config = run.settings
    if OWN_CODE.fullmatch(config.evaluate.scorer):
        return
    for table, source, where in judged_prompts(run):
        train = table.split("train")
        lacking = sum(row["answer"] is None for row in train)
        if lacking == len(train):
            raise OpdError(
                f"`weights.gate` and `weights.reward` take which responses are right, but none of {where} has a reference "
                "answer: see `prompts.answer_field`, or use neither"
            )
        if lacking:
            console.warn(f"fit: {lacking} of {len(train)} of {where} have no reference: not gated, not rewarded")
        first = list(train[:ROW_GROUP])
        if problem := references_problem(config.evaluate, source, first, f"the first of {where}"):
            console.warn(f"fit: {problem}")


def judged_prompts(run: Run) -> Iterator[tuple[PromptTable, str, str]]:
    """The prompts whose responses are judged for training, where they are from, and what they are called: the run's own where
    it samples a round, and those of the runs whose rounds it reuses."""
    if len(run.reused) < run.settings.rollouts.rounds:
        yield open_prompts(run), run.settings.prompts.source, "the prompts of split train"
    for folder in dict.fromkeys(source.run for source in run.reused):
        table = PromptTable(open_shard(folder / "prompts.parquet", "prompts"))
        yield table, table.source, f"the train prompts of {folder}"


def check_embedded(role: Role, name: str, prompt_id: str, ids: np.ndarray, ids_end: int | None) -> None:
    """Raise OpdError when a prompt has an id past the model's embedding, such as an image's placeholder."""
    if ids_end is not None and ids.max() >= ids_end:
        raise OpdError(
            f"prompt {prompt_id}: token {ids.max()} of {role}.model {name} lies past the model's embedding, which has "
            f"{ids_end} rows; take it out of the prompt or the template"
        )


def parts(run: Run, role: Role) -> Iterator[tuple[PromptRows, int]]:
    """What `wanted` gives, as many prompts at a time as may be in memory."""
    for rows, new in wanted(run, role):
        for start in range(0, len(rows), ROW_GROUP):
            yield rows[start : start + ROW_GROUP], new


def wanted(run: Run, role: Role) -> Iterator[tuple[PromptRows, int]]:
    """The prompts that a model is to read, with the tokens that follow them at most: of `sft`, each round, and evaluation.

    Of the teacher's answers those that are too long for the student are left out, so only their prompts must fit.
    """
    config, prompts = run.settings, open_prompts(run)
    asked = prompts.split("train")[: config.sft.prompts]
    yield asked, config.sft.horizon(config.rollouts) if role == "teacher" else 0
    for number in range(len(run.reused), config.rollouts.rounds):
        yield prompts_of_round(config, prompts, number), config.rollouts.horizon(number)
    held_out, new = prompts.split(config.evaluate.split), config.rollouts.longest
    if role == "teacher":
        yield held_out[: run.kl_items], new
    else:
        yield held_out, new
        for name in config.evaluate.also:
            yield open_also(run).split(name), new


if __name__ == "__main__":
    console.run(main)
