"""What several stages take and open in the same way: options, prepared models, prompts."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.models import ORIGIN, ModelRef
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.shards import open_shard
from schemas.config import Tuning, declared
from schemas.errors import OpdError
from stages.run.run import Phase, Run

ConfigOption = Annotated[Path, typer.Option("--config", help="the run's YAML file", show_default=True)]
PhaseOption = Annotated[str, typer.Option(help="round-<r>, eval-<c> or sft")]
ShardOption = Annotated[int, typer.Option(min=0, help="number of the shard")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default")]
DEFAULT_CONFIG = Path("config/config.yaml")


def open_prompts(run: Run) -> PromptTable:
    """The run's prompts, verified."""
    return PromptTable(open_shard(run.prompts, "prompts"))


def prompts_of(phase: Phase) -> PromptTable:
    """The prompts that a phase's rollouts name: those of the run that they come from."""
    if phase.source is None:
        return open_prompts(phase.run)
    return PromptTable(open_shard(phase.source.run / "prompts.parquet", "prompts"))


def open_also(run: Run) -> PromptTable:
    """The prompts of `evaluate.also`, verified; splits have the sets' names."""
    return PromptTable(open_shard(run.also, "prompts"))


def read_ref(path: Path, stage: str, weights: bool = True) -> ModelRef:
    """A model's reference, with `weights` to a folder that is there. Raises OpdError naming the stage that writes it."""
    try:
        ref = ModelRef.model_validate_json(path.read_text())
    except FileNotFoundError as error:
        raise OpdError(f"{path}: missing; run `python -m stages.{stage}` first") from error
    except ValueError as error:
        raise OpdError(f"{path}: damaged; delete it and run `python -m stages.{stage}` again") from error
    if weights and not Path(ref.path).is_dir():
        raise OpdError(f"{path}: its model folder {ref.path} is gone; delete this file and run again")
    return ref


def teacher(run: Run) -> PreparedModel:
    """The teacher."""
    ref = read_ref(run.model_file("teacher"), "models", weights=run.needs_teacher)
    return PreparedModel(ref, run.settings.teacher, open_shard(run.vocabulary("teacher"), "vocabulary"))


def tuning(run: Run) -> Tuning | None:
    """Whose samples the student was fine-tuned on: those of the run's own teacher by `sft`, of the teacher that the student's
    folder names, where a run of ours made it, or as the config declares."""
    if run.config.sft.prompts:
        return declared(run.config)
    student = read_ref(run.model_file("student"), "models", weights=False)
    if student.tuned_on is None:
        return declared(run.config)
    teacher = read_ref(run.model_file("teacher"), "models", weights=False)
    return Tuning(student.tuned_on.source, student.tuned_on.weights == teacher.weights, f"{student.path}/{ORIGIN}")


def policy(run: Run, number: int) -> PreparedModel:
    """Checkpoint `number` of the student; BASE is the one as given."""
    ref = read_ref(run.policy_file(number), run.policy_stage(number))
    return PreparedModel(ref, run.settings.student, open_shard(run.vocabulary("student"), "vocabulary"))
