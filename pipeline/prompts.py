"""Prompts: read them from any source, split them without overlap, and render them for a model."""

import importlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import pyarrow as pa
import zstandard

from schemas.config import Model, Prompts
from schemas.errors import OpdError
from schemas.tables import arrow_schema

GENERATED_SEED_SPACING = 1_000_003
"""reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items."""
RESERVED = ("prompt", "answer", "examples")


def collect(config: Prompts, seed: int) -> pa.Table:
    """Read, de-duplicate, shuffle and split prompts.

    Returns:
        A table of schema `prompts`: all of `examples`, then `test`, `dev`, `train`. A larger `train` never changes the
        other splits.
    Raises:
        OpdError: the source is missing, broken, or has too few distinct prompts.
    """
    wanted = config.splits
    need = wanted.examples + wanted.test + wanted.dev + wanted.train
    rows: dict[str, dict[str, Any]] = {}
    for row in _read(config, seed, need):
        item = _item(row, config)
        rows.setdefault(item["prompt"], item)
        if config.source.startswith("reasoning-gym:") and len(rows) == need:
            break
    if not rows:
        raise OpdError(f"prompts: {config.source} holds no prompts")
    if len(rows) < need:
        raise OpdError(
            f"prompts: {config.source} holds {len(rows)} different prompts, but prompts.splits asks for {need} "
            f"(examples {wanted.examples} + train {wanted.train} + dev {wanted.dev} + test {wanted.test})"
        )
    # A generator's items are in random order already, and taking them as they come keeps the splits when `train` grows.
    generated = config.source.startswith("reasoning-gym:")
    order = np.arange(need) if generated else np.random.default_rng(seed).permutation(len(rows))[:need]
    items = list(rows.values())
    names = [
        split
        for split, count in (
            ("examples", wanted.examples),
            ("test", wanted.test),
            ("dev", wanted.dev),
            ("train", wanted.train),
        )
        for _ in range(count)
    ]
    table = [
        {"prompt_id": f"p{i:03}", "split": split, **items[index]}
        for i, (split, index) in enumerate(zip(names, order.tolist(), strict=True))
    ]
    return pa.Table.from_pylist(table, schema=arrow_schema("prompts"))


def _item(row: Mapping[str, Any], config: Prompts) -> dict[str, Any]:
    for field in filter(None, (config.prompt_field, config.answer_field)):
        if field not in row:
            raise OpdError(
                f"prompts: {config.source} has no field {field!r}; it has {', '.join(map(repr, row))} "
                "(set prompts.prompt_field and prompts.answer_field)"
            )
    prompt = row[config.prompt_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise OpdError(
            f"prompts: {config.source}: field {config.prompt_field!r} must be non-empty text, found {prompt!r}"
        )
    answer = row[config.answer_field] if config.answer_field else None
    rest = {k: v for k, v in row.items() if k not in (config.prompt_field, config.answer_field)}
    return {
        "prompt": prompt,
        "answer": None if answer is None else str(answer),
        "fields": json.dumps(rest, ensure_ascii=False, default=str),
    }


def _read(config: Prompts, seed: int, need: int) -> Iterator[Mapping[str, Any]]:
    source, path = config.source, Path(config.source).expanduser()
    if source.startswith("reasoning-gym:"):
        yield from _generate(source.partition(":")[2], config.options, seed, need)
    elif path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
        if not path.is_file():
            raise OpdError(f"prompts: {source}: no such file")
        if config.options:
            raise OpdError(f"prompts: {source} is a file, which takes no prompts.options, found {config.options}")
        yield from _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    else:
        yield from _hub(source, config.options)


def _generate(name: str, options: dict[str, Any], seed: int, need: int) -> Iterator[dict[str, Any]]:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise OpdError(f"prompts: reasoning-gym:{name} needs a package: pip install 'offline-opd[demo]'") from error
    try:
        # Duplicates are dropped later, so draw a few times more than needed.
        dataset = gym.create_dataset(name, seed=(seed + 1) * GENERATED_SEED_SPACING, size=4 * need, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise OpdError(f"prompts: reasoning-gym:{name} with options {options}: {error}") from error
    for item in dataset:
        nested = item["metadata"]
        yield {"prompt": item["question"], "answer": item["answer"], **nested, "metadata": nested}


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as raw:
        stream: Any = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise OpdError(f"prompts: {path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise OpdError(f"prompts: {path}, line {number}: expected an object, found {type(row).__name__}")
                yield row
        except UnicodeDecodeError as error:
            raise OpdError(f"prompts: {path}: not UTF-8: {error}") from error
        except zstandard.ZstdError as error:
            raise OpdError(f"prompts: {path}: not zstandard data: {error}") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise OpdError(f"prompts: {path}: not readable as Parquet: {error}") from error


def _hub(source: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets  # noqa: PLC0415

    try:
        yield from datasets.load_dataset(source, **{"split": "train", **options})
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise OpdError(
            f"prompts: {source!r} is neither a .jsonl, .jsonl.zst or .parquet file nor a dataset the hub gives us: {text}"
        ) from error


class Renderer:
    """Renders prompts for one model: its Jinja prompt, its own chat template, and BOS exactly once."""

    def __init__(self, config: Model, tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> None:
        template = tokenizer.chat_template
        self.chat = bool(template) if config.chat is None else config.chat
        if self.chat and not template:
            raise OpdError(f"model {config.model}: `chat` is true, but its tokenizer has no chat template")
        if config.system is not None and not self.chat:
            raise OpdError(f"model {config.model}: `system` needs a chat template, and its tokenizer has none")
        self._name = config.model
        self._tokenizer = tokenizer
        self._examples = [_variables(row) for row in examples]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        try:
            self._prompt = environment.from_string(config.prompt)
            self._system = environment.from_string(config.system) if config.system is not None else None
        except jinja2.TemplateSyntaxError as error:
            raise OpdError(f"model {config.model}: `prompt` or `system` is not valid Jinja: {error}") from error
        bos, added = tokenizer.bos_token_id, tokenizer("").input_ids
        self._bos = bos if bos is not None and added[:1] == [bos] else None
        self.identity = {
            "prompt": config.prompt,
            "system": config.system,
            "chat_template": str(template) if self.chat else None,
            "bos": self._bos,
            "examples": self._examples,
        }
        """What determines every rendering, for manifests."""

    def text(self, row: Mapping[str, Any]) -> str:
        """The rendered prompt of a `prompts` row."""
        values = {**_variables(row), "examples": self._examples}
        try:
            prompt = self._prompt.render(values)
            system = self._system.render(values) if self._system else None
            if not self.chat:
                return prompt
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.UndefinedError as error:
            known = ", ".join(sorted(values))
            raise OpdError(f"model {self._name}: prompt template: {error}; known names: {known}") from error
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a chat template without a system role, say
            raise OpdError(f"model {self._name}: prompt {row['prompt_id']} can't be rendered: {error}") from error

    def ids(self, rows: Iterable[Mapping[str, Any]], limit: int) -> list[np.ndarray]:
        """Token ids of each row's rendered prompt, BOS included where the tokenizer wants one.

        Args:
            limit: tokens that the prompt may take (the context less the response).
        Raises:
            OpdError: a prompt is longer.
        """
        rows = list(rows)
        encoded = self._tokenizer([self.text(row) for row in rows], add_special_tokens=False).input_ids if rows else []
        out = []
        for row, bare in zip(rows, encoded, strict=True):
            ids = [self._bos, *bare] if self._bos is not None and bare[:1] != [self._bos] else bare
            if not ids:
                raise OpdError(f"prompt {row['prompt_id']}: renders to no tokens for {self._name}")
            if len(ids) > limit:
                raise OpdError(
                    f"prompt {row['prompt_id']}: {len(ids)} tokens for {self._name}, but its context leaves room for {limit}; "
                    "drop it from prompts.source or lower rollouts.max_new_tokens"
                )
            out.append(np.asarray(ids, np.int32))
        return out


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in json.loads(row["fields"]).items() if k not in RESERVED}
    return {**fields, "prompt": row["prompt"], "answer": row["answer"]}
