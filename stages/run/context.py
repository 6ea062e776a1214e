"""What several stages open in the same way: the config, prepared models with their tokenizers, prompts."""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from pipeline.align.tokens import TokenBytes, from_table, text_tokenizer
from pipeline.models import ModelRef, load_model, load_tokenizer, model_config, native_dtype, reference
from pipeline.prompts import Renderer
from pipeline.store.shards import Shard, open_shard
from schemas.config import Config, Model, load_config
from schemas.errors import OpdError
from stages.run import layout

ConfigOption = Annotated[Path, typer.Option("--config", help="the run's YAML file", show_default=True)]
PhaseOption = Annotated[str, typer.Option(help="round-<r> or eval-<c>")]
ShardOption = Annotated[int, typer.Option(min=0, help="number of the shard")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default")]
DEFAULT_CONFIG = Path("config/config.yaml")


@dataclass(frozen=True)
class Speaker:
    """A prepared model and how it is prompted; parts are loaded when first used."""

    ref: ModelRef
    config: Model
    vocabulary_shard: Shard

    @cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer."""
        return load_tokenizer(self.ref.source, self.ref.path, self.ref.tokenizer_class)

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """Its copy for responses (see `pipeline.align.tokens.text_tokenizer`); copying a large vocabulary takes seconds."""
        return text_tokenizer(self.tokenizer, self.ref.source)

    @cached_property
    def _vocabulary(self) -> tuple[TokenBytes, np.ndarray]:
        return from_table(self.vocabulary_shard.read(), self.config.model)

    @property
    def vocabulary(self) -> TokenBytes:
        """Bytes of every id."""
        return self._vocabulary[0]

    @property
    def stop(self) -> np.ndarray:
        """int32 ids that end a response."""
        return self._vocabulary[1]

    @property
    def dtype(self) -> str:
        """Name of the forward pass' dtype on this machine."""
        return native_dtype() if self.config.dtype == "auto" else self.config.dtype

    @property
    def context(self) -> int:
        """Positions the model has; unlimited when its config doesn't say."""
        values = model_config(self.ref.path)
        return values.get("max_position_embeddings") or values.get("text_config", {}).get(
            "max_position_embeddings", sys.maxsize
        )

    def check(self) -> None:
        """Raise OpdError when the model's files are no longer those that were prepared."""
        if reference(self.ref.source, Path(self.ref.path)).identity() != self.ref.identity():
            raise OpdError(
                f"model {self.ref.source!r}: the files in {self.ref.path} changed after they were prepared; run the models "
                "stage again"
            )

    def load(self, layers: bool = True, device: str | None = None) -> Any:
        """The model itself, checked, or what it is without its layers, on the GPU if there is one (see `load_model`)."""
        self.check()
        return load_model(self.ref, self.dtype, layers, device)

    def renderer(self, prompts: "PromptTable") -> Renderer:
        """Renders prompts for this model, with as many worked examples as the run has."""
        return Renderer(self.config, self.tokenizer, prompts.split("examples"))


@dataclass(frozen=True)
class PromptTable:
    """The run's prompts."""

    shard: Shard

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows by prompt_id, in order."""
        return {row["prompt_id"]: row for row in self.shard.read().to_pylist()}

    def split(self, name: str) -> list[dict[str, Any]]:
        """Rows of one split, in order."""
        return [row for row in self.rows.values() if row["split"] == name]


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


def teacher(config: Config) -> Speaker:
    """The teacher."""
    ref = read_ref(layout.model_file(config, "teacher"), "models", weights=layout.needs_teacher(config))
    return Speaker(ref, config.teacher, open_shard(layout.vocabulary_path(config, "teacher"), "vocabulary"))


def policy(config: Config, number: int) -> Speaker:
    """Checkpoint `number` of the student."""
    stage = "models" if number == 0 else "train"
    ref = read_ref(layout.policy_file(config, number), stage)
    return Speaker(ref, config.student, open_shard(layout.vocabulary_path(config, "student"), "vocabulary"))


def read_config(path: Path) -> Config:
    """The run's config."""
    return load_config(path)
