"""Prompts: de-duplicate and split what a source gives, without overlap, and render it for a model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import pyarrow as pa

from pipeline.sources import kind_of
from schemas.config import HeldOut, Model, Prompts, PromptSource, Splits
from schemas.errors import OpdError
from schemas.tables import arrow_schema

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
    kind = kind_of(config.source)
    rows: dict[str, dict[str, Any]] = {}
    for row in kind.rows(config.source, config.options, seed, need):
        item = _item(row, config)
        rows.setdefault(item["prompt"], item)
        if kind.shuffled and len(rows) == need:
            break
    if not rows:
        raise OpdError(f"prompts: {config.source} holds no prompts")
    if len(rows) < need:
        raise OpdError(
            f"prompts: {config.source} holds {len(rows)} different prompts, but prompts.splits asks for {need} "
            f"(examples {wanted.examples} + train {wanted.train} + dev {wanted.dev} + test {wanted.test})"
        )
    # Taking what is in random order already as it comes keeps the splits when `train` grows.
    order = np.arange(need) if kind.shuffled else np.random.default_rng(seed).permutation(len(rows))[:need]
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


def collect_also(sets: Mapping[str, HeldOut], seed: int) -> pa.Table:
    """Draw the prompts of `evaluate.also`, each set as `collect` draws a `train` split.

    Returns:
        A table of schema `prompts`, with the sets' names as splits.
    Raises:
        OpdError: as `collect` does, naming the set.
    """
    tables = [arrow_schema("prompts").empty_table()]
    for name, wanted in sets.items():
        source = {key: getattr(wanted, key) for key in PromptSource.model_fields}
        splits = Splits(examples=0, train=wanted.count, dev=0, test=0)
        try:
            table = collect(Prompts(**source, splits=splits), seed)
        except OpdError as error:
            raise OpdError(f"evaluate.also.{name}, with its count of {wanted.count} as `train`: {error}") from error
        ids, of = [f"{name}-{i:03}" for i in range(len(table))], [name] * len(table)
        tables.append(table.set_column(0, "prompt_id", pa.array(ids)).set_column(1, "split", pa.array(of)))
    return pa.concat_tables(table.cast(arrow_schema("prompts")) for table in tables)


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
        self._examples = [variables(row) for row in examples]
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
        values = {**variables(row), "examples": self._examples}
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


def variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What templates know of a `prompts` row: its prompt, its answer, and the source's other fields."""
    fields = {k: v for k, v in json.loads(row["fields"]).items() if k not in RESERVED}
    return {**fields, "prompt": row["prompt"], "answer": row["answer"]}
