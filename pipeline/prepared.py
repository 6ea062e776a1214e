"""What a run has prepared: a model with its vocabulary, and its prompts. Parts are loaded when first used."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipeline.align.roles import Roles, roles_of
from pipeline.align.tokens import TokenBytes, from_table, text_tokenizer
from pipeline.models import ModelRef, context, is_unchanged, load_model, load_tokenizer, model_config, native_dtype
from pipeline.rendering import Renderer
from pipeline.store.shards import Shard
from schemas.config import Model
from schemas.errors import OpdError
from schemas.tables import arrow_schema


class PromptRows(Sequence[dict[str, Any]]):
    """Some rows of the run's prompts, read when they are asked for, a row group in memory at a time."""

    def __init__(self, shard: Shard, positions: np.ndarray) -> None:
        """`positions`: int64 (n,) of the rows in the shard, in the order wanted."""
        self._shard, self.positions = shard, positions
        self._ends = np.cumsum(shard.row_group_sizes())
        self._group: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        """A row, or by a slice or array of indices some of them, not read yet."""
        if isinstance(index, slice | np.ndarray):
            return PromptRows(self._shard, self.positions[index])
        return self._row(int(self.positions[index]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, self.positions.tolist())

    def _row(self, position: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, position, side="right"))
        if self._group is None or self._group[0] != number:
            self._group = (number, self._shard.row_group(number, arrow_schema("prompts").names))
        table = self._group[1]
        return table.slice(position - (int(self._ends[number]) - len(table)), 1).to_pylist()[0]


@dataclass(frozen=True)
class PromptTable:
    """The run's prompts: a shard of schema `prompts`."""

    shard: Shard

    @property
    def imported(self) -> bool:
        """Whether they are those of imported rollouts."""
        return "imported" in self.shard.manifest.identity

    @property
    def source(self) -> str:
        """`prompts.source` that they come from; of imported ones the first file."""
        told = self.shard.manifest.identity
        return str(told["imported"][0] if self.imported else told["prompts"]["source"])

    def split(self, name: str) -> PromptRows:
        """Rows of one split, in order, read when they are asked for."""
        return PromptRows(self.shard, np.flatnonzero(pc.equal(self._names["split"], name)))

    def take(self, names: Sequence[str]) -> PromptRows:
        """Rows with these prompt_ids. Raises OpdError when there is no such one."""
        places = pc.index_in(pa.array(names, pa.string()), self._names["prompt_id"])
        if places.null_count:
            missing = names[int(np.flatnonzero(places.is_null())[0])]
            raise OpdError(f"{self.shard.path}: holds no prompt {missing!r}")
        return PromptRows(self.shard, places.to_numpy().astype(np.int64))

    @cached_property
    def _names(self) -> pa.Table:
        """Which prompt each row is, and its split."""
        return pa.concat_tables(self.shard.row_groups(["prompt_id", "split"]))


@dataclass(frozen=True)
class PreparedModel:
    """A model that lies in a local folder, how it is run and prompted, and the bytes of its tokens.

    Attributes:
        ref: its files and what identifies them.
        config: the section `student` or `teacher`.
        vocabulary_shard: schema `vocabulary`.
        again: the command that prepares it.
    """

    ref: ModelRef
    config: Model
    vocabulary_shard: Shard
    again: str = "python -m stages.models"

    @cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer."""
        return load_tokenizer(self.ref.source, self.ref.path, self.ref.tokenizer_class)

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """Its copy for responses (see `pipeline.align.tokens.text_tokenizer`); copying a large vocabulary takes seconds."""
        return text_tokenizer(self.tokenizer, self.ref.source)

    @cached_property
    def roles(self) -> Roles:
        """How it says what text can't."""
        return roles_of(self.tokenizer.backend_tokenizer, self.ref.source, self.config.roles)

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
        """Positions the model has, tokens; unlimited when neither its config nor its class says."""
        return context(model_config(self.ref.path)) or sys.maxsize

    def check(self) -> None:
        """Raise OpdError when the model's files are no longer those that were prepared."""
        if not is_unchanged(self.ref):
            raise OpdError(
                f"model {self.ref.source!r}: the files in {self.ref.path} are no longer those that were prepared; run "
                f"`{self.again}` again, or look at what changed them"
            )

    def load(self, layers: bool = True, device: str | None = None) -> Any:
        """The `transformers` model, checked, or what it is without its layers, on the GPU if there is one; each call loads
        another (see `load_model`). Raises OpdError as `check` does, and when it can't be loaded."""
        self.check()
        return load_model(self.ref, self.dtype, layers, device, self.config.attn_implementation)

    @cached_property
    def model(self) -> Any:
        """The whole `transformers` model, loaded once for all who only read it."""
        return self.load()

    def take_model(self) -> Any:
        """`model` for a caller who changes it: what is loaded already, so that memory holds no second one, or loaded now.
        It is no longer ours then."""
        return vars(self).pop("model", None) or self.load()

    def renderer(self, prompts: PromptTable) -> Renderer:
        """Renders prompts for this model, with as many worked examples as the run has."""
        return Renderer(self.config, self.tokenizer, prompts.split("examples"))
