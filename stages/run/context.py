"""What several stages take and open in the same way: options, prepared models, prompts."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.models import ORIGIN, ModelRef
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.records import read_record
from pipeline.store.shards import Shard, open_shard
from schemas.config import Tuning, declared
from schemas.errors import OpdError
from stages.run.run import Phase, Run, command

ConfigOption = Annotated[Path, typer.Option("--config", help="the run's YAML file", show_default=True)]
PhaseOption = Annotated[str, typer.Option(help="round-<r>, eval-<c> or sft")]
ShardOption = Annotated[int, typer.Option(min=0, help="number of the shard")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default")]
DEFAULT_CONFIG = Path("config/config.yaml")


def open_prompts(run: Run) -> PromptTable:
    """The run's prompts, verified."""
    return PromptTable(_opened(run, run.prompts, "prompts"))


def prompts_of(phase: Phase) -> PromptTable:
    """The prompts that a phase's rollouts name: those of the run that they come from."""
    if phase.source is None:
        return open_prompts(phase.run)
    return PromptTable(open_shard(phase.source.run / "prompts.parquet", "prompts"))


def open_also(run: Run) -> PromptTable:
    """The prompts of `evaluate.also`, verified; splits have the sets' names."""
    return PromptTable(_opened(run, run.also, "also"))


def _opened(run: Run, path: Path, stage: str) -> Shard:
    """A shard that a run has one of, made for its config. Raises OpdError when it is not."""
    shard = open_shard(path, "vocabulary" if stage.startswith("models") else "prompts")
    run.check(path, shard.manifest, stage)
    return shard


def read_ref(path: Path, again: str, weights: bool = True) -> ModelRef:
    """A model's reference, with `weights` to a folder that is there. Raises OpdError naming the command that writes it."""
    ref = read_record(path, ModelRef, again)
    if weights and not Path(ref.path).is_dir():
        raise OpdError(f"{path}: its model folder {ref.path} is gone; delete this file and run `{again}` again")
    return ref


def prepared(run: Run, role: str, weights: bool = True) -> ModelRef:
    """The reference of a model that the config names. Raises OpdError as `read_ref`, and where it is of another config."""
    return _of_config(run, run.model_file(role), (f"models {role}", ""), weights)


def teacher(run: Run) -> PreparedModel:
    """The teacher."""
    ref = prepared(run, "teacher", run.needs_teacher)
    return PreparedModel(ref, run.settings.teacher, vocabulary(run, "teacher"), command("models teacher"))


def vocabulary(run: Run, role: str) -> Shard:
    """Bytes of the tokens of the student or teacher, verified."""
    return _opened(run, run.vocabulary(role), f"models {role}")


def tuning(run: Run) -> Tuning | None:
    """Whose samples the student was fine-tuned on: those of the run's own teacher by `sft`, of the teacher that the student's
    folder names, where a run of ours made it, or as the config declares."""
    if run.config.sft.prompts:
        return declared(run.config)
    student = prepared(run, "student", weights=False)
    if student.tuned_on is None:
        return declared(run.config)
    teacher = prepared(run, "teacher", weights=False)
    return Tuning(student.tuned_on.source, student.tuned_on.weights == teacher.weights, f"{student.path}/{ORIGIN}")


def policy_ref(run: Run, number: int, weights: bool = True) -> ModelRef:
    """The reference of checkpoint `number` of the student; BASE is the one as given."""
    return _of_config(run, run.policy_file(number), run.policy_stage(number), weights)


def _of_config(run: Run, path: Path, made_by: tuple[str, str], weights: bool) -> ModelRef:
    ref = read_ref(path, command(*made_by), weights)
    run.check(path, ref, *made_by)
    run.check_trained(path, ref, made_by)
    return ref


def policy(run: Run, number: int) -> PreparedModel:
    """Checkpoint `number` of the student."""
    again = command(*run.policy_stage(number))
    return PreparedModel(policy_ref(run, number), run.settings.student, vocabulary(run, "student"), again)
