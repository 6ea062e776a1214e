"""What several stages take and open in the same way: options, the config, prepared models, prompts."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.models import ModelRef
from pipeline.prepared import PreparedModel, PromptTable
from pipeline.store.shards import open_shard
from schemas.config import Config, load_config
from schemas.errors import OpdError
from stages.run import layout

ConfigOption = Annotated[Path, typer.Option("--config", help="the run's YAML file", show_default=True)]
PhaseOption = Annotated[str, typer.Option(help="round-<r> or eval-<c>")]
ShardOption = Annotated[int, typer.Option(min=0, help="number of the shard")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default")]
DEFAULT_CONFIG = Path("config/config.yaml")


def open_prompts(config: Config) -> PromptTable:
    """The run's prompts, verified."""
    return PromptTable(open_shard(layout.run_folder(config) / "prompts.parquet", "prompts"))


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


def teacher(config: Config) -> PreparedModel:
    """The teacher."""
    ref = read_ref(layout.model_file(config, "teacher"), "models", weights=layout.needs_teacher(config))
    return PreparedModel(ref, config.teacher, open_shard(layout.vocabulary_path(config, "teacher"), "vocabulary"))


def policy(config: Config, number: int) -> PreparedModel:
    """Checkpoint `number` of the student."""
    stage = "models" if number == 0 else "train"
    ref = read_ref(layout.policy_file(config, number), stage)
    return PreparedModel(ref, config.student, open_shard(layout.vocabulary_path(config, "student"), "vocabulary"))


def read_config(path: Path) -> Config:
    """The run's config."""
    return load_config(path)
