"""Rendering prompts for a model: its Jinja prompt, its own chat template, BOS exactly once, and rows' text as text."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from pipeline.bounds import bounded
from pipeline.control_tokens import ESCAPED, PRIVATE, ControlTokens
from pipeline.conversations import Message
from pipeline.prompts import variables
from schemas.config import Model
from schemas.errors import OpdError, one_line

OURS = frozenset({"messages", "tools", "add_generation_prompt"})
"""Names that chat templates read and that are ours to give."""
FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, TimeoutError, MemoryError),
)
"""What templates raise on a row that they don't expect (a system message, say, or a call of a tool), or on any."""
SECONDS, MEMORY, CHARACTERS = 10.0, 1 << 30, 1 << 24
"""What a template may take for a prompt: time, bytes, and what it writes; a thousand times what honest ones do."""
GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of `transformers` for masks, which Jinja itself doesn't know."""


class Renderer:
    """Renders prompts for one model."""

    def __init__(self, config: Model, tokenizer: Any, examples: Iterable[Mapping[str, Any]]) -> None:
        """Raises OpdError where the config asks for what the model's chat template doesn't have, or isn't valid Jinja."""
        template = tokenizer.chat_template
        self.chat = bool(template) if config.chat is None else config.chat
        self._config, self._name, self._tokenizer = config, config.model, tokenizer
        self._check_chat(template)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        environment.filters["tojson"] = _tojson
        try:
            for own in (config.prompt, config.prefill or "", config.system or ""):
                _check_powers(own)
            with bounded(SECONDS, MEMORY):  # what is constant in them is computed here
                self._prompt, self._prefill = map(environment.from_string, (config.prompt, config.prefill or ""))
                self._system = environment.from_string(config.system) if config.system is not None else None
        except FAILURES as error:
            raise OpdError(
                f"model {config.model}: `prompt`, `system` or `prefill` is not valid Jinja: {one_line(error)}"
            ) from error
        self._reads = _names(config.prompt) | _names(config.system or "") | _names(config.prefill or "")
        self._examples = [variables(row) for row in examples]
        self._control = ControlTokens(tokenizer, "".join(_texts(template)) if self.chat else "")
        self._hidden_examples = self._control.hide(self._examples)
        self._shows_hidden = "examples" in self._reads and self._hidden_examples != self._examples
        bos, added = tokenizer.bos_token_id, tokenizer("").input_ids
        self._bos = bos if bos is not None and added[:1] == [bos] else None
        self.identity = {
            "prompt": config.prompt,
            "system": config.system,
            "prefill": config.prefill,
            "chat_template": str(template) if self.chat else None,
            "chat_template_kwargs": config.chat_template_kwargs,
            "bos": self._bos,
            "examples": self._examples,
        }
        """What determines every rendering, for manifests."""

    def _check_chat(self, template: Any) -> None:
        config = self._config
        if self.chat and not template:
            raise OpdError(f"model {config.model}: `chat` is true, but its tokenizer has no chat template")
        for key, given in (
            ("system", config.system is not None),
            ("chat_template_kwargs", config.chat_template_kwargs),
        ):
            if given and not self.chat:
                raise OpdError(f"model {config.model}: `{key}` needs a chat template, and its tokenizer has none")
        names: set[str] = set()
        try:
            for text in _texts(template) if self.chat else ():
                _check_powers(text)
                names |= _names(text)
        except FAILURES as error:
            raise OpdError(f"model {config.model}: its chat template is not valid Jinja: {one_line(error)}") from error
        if config.chat_template_kwargs:
            read = names - OURS - self._tokenizer.special_tokens_map.keys()
            if unread := sorted(config.chat_template_kwargs.keys() - read):
                raise OpdError(
                    f"model {config.model}: its chat template reads no {', '.join(map(repr, unread))}, so "
                    f"`chat_template_kwargs` would change nothing; names that it reads: {', '.join(sorted(read)) or 'none'}"
                )

    def text(self, row: Mapping[str, Any]) -> str:
        """The rendered prompt of a `prompts` row. Raises OpdError where the templates can't express it, or not all of it."""
        text, hidden = self._render(row)
        return self._control.show(text) if hidden else text

    def ids(self, rows: Iterable[Mapping[str, Any]], limit: int) -> list[np.ndarray]:
        """Token ids of each row's rendered prompt, BOS included where the tokenizer wants one.

        Args:
            limit: tokens that the prompt may take (the context less the response).
        Raises:
            OpdError: a prompt is longer, or as `text` does.
        """
        rows = list(rows)
        texts = [self._render(row) for row in rows]
        encoded = self._tokenizer([text for text, _ in texts], add_special_tokens=False).input_ids if rows else []
        out = []
        for row, (text, hidden), usual in zip(rows, texts, encoded, strict=True):
            bare = self._control.encode(text, f"prompt {row['prompt_id']} for {self._name}") if hidden else usual
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

    def spans(self, row: Mapping[str, Any], turns: Sequence[Message], stop: np.ndarray) -> list[tuple[list[int], bool]]:
        """What follows a prompt in a longer conversation, as the chat template writes it.

        Args:
            row: of the prompt, schema `prompts`.
            turns: messages after it, the first and the last of which are the assistant's.
            stop: int32 ids that end a turn.
        Returns:
            Token ids of each stretch, and whether the assistant wrote it: its turn with the token that ends it, but nothing
            that the template puts around that.
        Raises:
            OpdError: the model has no chat template, or it leaves out what the assistant thought, opens its turn with what
                isn't there, or writes earlier turns otherwise once later ones follow.
        """
        if not self.chat:
            raise OpdError(
                f"{self._name} has no chat template, so it can't read {row['prompt_id']}, a conversation; give prompts and "
                "responses as text"
            )
        turns = [{**turn, "content": turn["content"] or ""} for turn in turns]
        hide = self._looks_like_control(row) or self._control.are_in(json.dumps(turns, ensure_ascii=False))
        values = variables(row)
        if hide:
            turns, values = self._control.hide(turns), {name: self._control.hide(v) for name, v in values.items()}
        values["examples"] = self._hidden_examples if hide else self._examples
        prompt, prefill, system = self._own(row, values)
        first = self._messages(row, values, prompt, system)
        tools, mine = _tools(row, values), [turn["role"] == "assistant" for turn in turns]
        whole = self._written(row, [*first, *turns], tools, opens=False)
        self._check_thoughts(row, [*first, *turns], turns, tools, whole)
        borders = []
        for number in np.flatnonzero(mine).tolist():
            opened = self._written(row, [*first, *turns[:number]], tools)
            if number == 0:
                opened += prefill
            if not whole.startswith(opened):
                if number == 0:
                    raise self._opens_otherwise(row, opened, whole, len(turns) > 1)
                raise OpdError(
                    f"{row['prompt_id']}: the chat template of {self._name} writes what is before turn {number + 1} otherwise "
                    "once others follow (it leaves out what was thought, say), so that no single sequence is what the model "
                    "has read; import the last answer alone (`--spans last`)"
                )
            borders.append(len(opened))
        where, stretches = f"{row['prompt_id']} for {self._name}", []
        for start, end in pairwise([*borders, len(whole)]):
            text = whole[start:end]
            usual = None if hide else self._tokenizer(text, add_special_tokens=False).input_ids
            ids = self._control.encode(text, where) if usual is None else list(usual)
            stops = np.flatnonzero(np.isin(ids, stop))
            if not len(stops):
                raise OpdError(f"{where}: an assistant's turn has no token that ends it ({text[-40:]!r})")
            stretches += [(ids[: stops[0] + 1], True), (ids[stops[0] + 1 :], False)]
        return stretches[:-1]

    def _check_thoughts(
        self, row: Mapping[str, Any], messages: Sequence[Message], turns: Sequence[Message], tools: Any, whole: str
    ) -> None:
        """Raise OpdError where the rendering of a conversation lacks what the assistant thought in one of the turns."""
        thoughts = [text for turn in turns for text in _thoughts(turn)]
        lost = _lost([*_pieces(messages, tools), *thoughts], whole)
        if not (lost := [text for text in lost if text in thoughts]):
            return
        if len(turns) > 1 and not set(lost) & set(_thoughts(turns[-1])):
            remedy = "such conversations aren't one sequence; import the last answer alone (`--spans last`)"
        else:
            remedy = "put it into `content` as the model writes it, or give `response` as text"
        raise OpdError(
            f"{row['prompt_id']}: the chat template of {self._name} leaves out what the assistant thought "
            f"({self._control.show(lost[0])[:60]!r}): {remedy}"
        )

    def _opens_otherwise(self, row: Mapping[str, Any], opened: str, whole: str, others_follow: bool) -> OpdError:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(opened, whole, strict=False))
        lacking = opened[sum(1 for _ in same) :]
        return OpdError(
            f"{row['prompt_id']}: the chat template of {self._name} (or `prefill`) opens the assistant's turn with "
            f"{self._control.show(lacking)[:60]!r}, which this answer lacks as it writes it; give `response` as text"
            + (", or import the last answer alone (`--spans last`)" if others_follow else "")
        )

    def _looks_like_control(self, row: Mapping[str, Any]) -> bool:
        """Whether the row's text, or that of the examples shown with it, holds a look-alike of a control token."""
        data = [row.get(name) for name in ("prompt", "answer", "messages", "tools", "fields")]
        hide = self._shows_hidden or self._control.are_in(*data)
        if hide and PRIVATE.search("".join(filter(None, data))):
            raise OpdError(
                f"prompt {row['prompt_id']}: holds what looks like a control token of {self._name} beside characters of a "
                "private plane (U+F0000 and up), which take its place; drop it from prompts.source"
            )
        return hide

    def _render(self, row: Mapping[str, Any]) -> tuple[str, bool]:
        """The rendering, and whether look-alikes are hidden in it."""
        hide = self._looks_like_control(row)
        text = self._rendering(row, hide)
        if hide and ESCAPED.search(text):
            raise OpdError(
                f"model {self._name}: prompt {row['prompt_id']}: holds what looks like a control token, in a list or an object "
                "that a template prints as the value of a program; have it print texts, or `tojson`"
            )
        return text, hide and PRIVATE.search(text) is not None

    def _rendering(self, row: Mapping[str, Any], hide: bool) -> str:
        values = variables(row)
        if hide:
            values = {name: self._control.hide(value) for name, value in values.items()}
        values["examples"] = self._hidden_examples if hide else self._examples
        prompt, prefill, system = self._own(row, values)
        if self.chat:
            return self._chat(row, values, prompt, system) + prefill
        self._check_plain(row, values, prompt)
        return prompt + prefill

    def _own(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, str, str | None]:
        """What the config's `prompt`, `prefill` and `system` make of a row."""
        try:
            with bounded(SECONDS, MEMORY):
                prompt, prefill = self._prompt.render(values), self._prefill.render(values)
                system = self._system.render(values) if self._system else None
                _check_length(prompt, prefill, system or "")
        except jinja2.UndefinedError as error:
            known = ", ".join(sorted(values))
            raise OpdError(f"model {self._name}: prompt template: {error}; known names: {known}") from error
        except FAILURES as error:
            raise self._fails(row, error) from error
        return prompt, prefill, system

    def _chat(self, row: Mapping[str, Any], values: Mapping[str, Any], prompt: str, system: str | None) -> str:
        """The conversation as the chat template writes it, in the first spelling that it writes all of."""
        return self._written(row, self._messages(row, values, prompt, system), _tools(row, values))

    def _messages(
        self, row: Mapping[str, Any], values: Mapping[str, Any], prompt: str, system: str | None
    ) -> list[Message]:
        """The row's messages with what the config's `prompt` and `system` make of them."""
        conversation = values["messages"] if row.get("messages") else [{"role": "user"}]
        messages = [dict(message) for message in conversation]
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] = prompt
        messages = [{**message, "content": message["content"] or ""} for message in messages]
        if system is not None:
            others = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": system}, *others]
        return messages

    def _written(self, row: Mapping[str, Any], messages: list[Message], tools: Any, opens: bool = True) -> str:
        """Messages as the chat template writes them, all of them; `opens` the assistant's next turn."""
        pieces = _pieces(messages, tools)
        problem: OpdError | None = None
        # Some templates put the arguments of calls together with other text, others want an object.
        for spelled in (messages, [_arguments_as_json(message) for message in messages]):
            try:
                with bounded(SECONDS, MEMORY):
                    text = self._tokenizer.apply_chat_template(
                        spelled,
                        tools=tools,
                        tokenize=False,
                        add_generation_prompt=opens,
                        **self._config.chat_template_kwargs,
                    )
                    _check_length(text)
            except FAILURES as error:
                problem = problem or self._fails(row, error)
            else:
                if not (lost := _lost(pieces, text)):
                    return text
                problem = problem or self._loses(row, lost, "its chat template")
        assert problem
        raise problem

    def _check_plain(self, row: Mapping[str, Any], values: Mapping[str, Any], prompt: str) -> None:
        """Refuse a plain rendering of a conversation that leaves out some of it."""
        if not (row.get("messages") or row.get("tools")):
            return
        if row.get("messages") and "messages" not in self._reads:
            raise OpdError(
                f"prompt {row['prompt_id']} is a conversation of {len(values['messages'])} messages, but {self._name} has no "
                "chat template, and its `prompt` doesn't read `messages`; spell them out there, such as "
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant:"
            )
        if lost := _lost(_pieces(values["messages"], values["tools"] if row.get("tools") else None), prompt):
            raise self._loses(row, lost, "`prompt`")

    def _fails(self, row: Mapping[str, Any], error: Exception) -> OpdError:
        why = "its template takes too much memory" if isinstance(error, MemoryError) else one_line(error)
        return OpdError(f"model {self._name}: prompt {row['prompt_id']} can't be rendered: {why}")

    def _loses(self, row: Mapping[str, Any], lost: list[str], by: str) -> OpdError:
        shown = "; ".join(f"{self._control.show(text)[:60]!r}" for text in lost[:3])
        return OpdError(
            f"model {self._name}: prompt {row['prompt_id']}: {by} leaves out {len(lost)} of its texts and tool names "
            f"({shown}); use a template that writes them, or drop the row from prompts.source"
        )


def _check_length(*texts: str) -> None:
    if (length := sum(map(len, texts))) > CHARACTERS:
        raise ValueError(f"its template writes {length:,} characters, more than {CHARACTERS:,}")


def _tools(row: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    return values["tools"] if row.get("tools") else None


def _texts(template: str | dict[str, str]) -> list[str]:
    """A chat template, or all of a model that has several by name."""
    return list(template.values()) if isinstance(template, dict) else [template]


def _parsed(template: str) -> jinja2.nodes.Template:
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])  # noqa: S701 - it only parses
    return environment.parse(GENERATION_TAG.sub("", template))


def _names(template: str) -> set[str]:
    """Names that a Jinja template reads from outside."""
    return jinja2.meta.find_undeclared_variables(_parsed(template))


def _check_powers(template: str) -> None:
    """Refuse the one operation that neither a signal nor a bound on memory ends: 9 ** (9 ** 9)."""
    if _parsed(template).find(jinja2.nodes.Pow):
        raise ValueError("it raises to a power (`**`), which may never end; multiply instead")


def _tojson(value: Any, indent: int | None = None) -> str:
    """As chat templates have it: Jinja's own filter is for HTML and spells `<` as an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _arguments_as_json(message: Message) -> Message:
    """A message whose tool calls have their arguments as text."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    spelled = [{**function, "arguments": _tojson(function["arguments"])} for function in functions]
    calls = [{**call, "function": new} for call, new in zip(message["tool_calls"], spelled, strict=True)]
    return {**message, "tool_calls": calls}


def _pieces(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """All texts that a rendering must have: contents, names of tools, names and texts of calls' arguments.

    What the assistant says before `</think>` isn't asked for: templates leave out what was thought in earlier turns.
    """
    found = [tool["function"]["name"] for tool in tools or ()]
    for message in messages:
        content = message["content"] or ""
        found.append(content.rpartition("</think>")[2] if message["role"] == "assistant" else content)
        for call in message.get("tool_calls", ()):
            found += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    return [text.strip() for text in found if text.strip()]


def _thoughts(message: Message) -> list[str]:
    """What an assistant's message has of its thinking, as a field of its own and in its content."""
    before = (message["content"] or "").rpartition("</think>")[0].strip()
    found = [message.get("reasoning_content") or "", before.removeprefix("<think>")]
    return [text.strip() for text in found if text.strip()]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for name, inner in value.items() for text in (name, *_leaves(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in _leaves(inner)]
    return [value] if isinstance(value, str) else []


def _lost(pieces: Sequence[str], text: str) -> list[str]:
    """The pieces that a text has less often than they occur in all pieces, each spelled as it is or as in JSON."""

    def times(piece: str, within: str) -> int:
        escaped = _tojson(piece)[1:-1]
        return within.count(piece) + (within.count(escaped) if escaped != piece else 0)

    return [
        piece for piece in dict.fromkeys(pieces) if times(piece, text) < sum(other.count(piece) for other in pieces)
    ]
