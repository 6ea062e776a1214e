"""What several stages take and open in the same way: options, prepared models, prompts."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.models import ORIGIN, ModelRef, prepare
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.records import read_record
from pipeline.store.shards import Shard, open_shard
from schemas.config import Tuning, declared
from schemas.errors import OpdError, excerpt
from schemas.manifest import differences
from stages.run import console
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


def prepared(run: Run, role: str, weights: bool = True) -> ModelRef:
    """The reference of a model that the config names, with `weights` to a folder that is there: on another machine than it was
    prepared on the model is fetched again. Raises OpdError where that is another one, or the reference of another config."""
    made_by = (f"models {role}", "")
    ref = _of_config(run, run.model_file(role), made_by)
    if not weights or Path(ref.path).is_dir():
        return ref
    wanted = run.config.student if role == "student" else run.config.teacher
    found = prepare(wanted.model, run.cache, wanted.revision, console.say)
    if different := list(differences(ref.identity(), found.identity())):
        raise OpdError(
            f"{run.model_file(role)}: {wanted.model} is another model here than where it was prepared "
            f"({excerpt('; '.join(different))}); name its `revision`, or delete this file and run `{command(*made_by)}` again"
        )
    return ref.model_copy(update={"path": found.path})


def teacher(run: Run, weights: bool = True) -> PreparedModel:
    """The teacher, `weights` as of `prepared`."""
    ref = prepared(run, "teacher", weights and run.needs_teacher)
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
    path, made_by = run.policy_file(number), run.policy_stage(number)
    if path == run.model_file("student"):
        return prepared(run, "student", weights)
    ref = located(path, _of_config(run, path, made_by))
    if weights and not Path(ref.path).is_dir():
        raise OpdError(
            f"{path}: its model folder {ref.path} is gone; delete this file and run `{command(*made_by)}` again"
        )
    return ref


def located(path: Path, ref: ModelRef) -> ModelRef:
    """The reference in a file, of a checkpoint to the folder beside it, wherever the run lies by now."""
    folder = path.with_suffix("")
    return ref.model_copy(update={"path": str(folder)}) if folder.is_dir() else ref


def _of_config(run: Run, path: Path, made_by: tuple[str, str]) -> ModelRef:
    ref = read_record(path, ModelRef, command(*made_by))
    run.check(path, ref, *made_by)
    run.check_trained(path, ref, made_by)
    return ref


def policy(run: Run, number: int, weights: bool = True) -> PreparedModel:
    """Checkpoint `number` of the student, `weights` as of `policy_ref`."""
    again = command(*run.policy_stage(number))
    return PreparedModel(policy_ref(run, number, weights), run.settings.student, vocabulary(run, "student"), again)
