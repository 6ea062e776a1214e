"""What a source's row asks: one text or a conversation, in the forms that data sets come in, as one form of messages."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import strict_json
from schemas.errors import OpdError, listed, shown

Message = dict[str, Any]

ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "model", "bot", "function_call")},
    **{name: "tool" for name in ("tool", "function", "observation", "tool_response", "function_response", "ipython")},
}
"""What data sets call the four roles; ShareGPT's `function_call` is the assistant's, its text the call as JSON."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What data sets call what the assistant thought before it answered; the first is ours."""


@dataclass(frozen=True)
class Asked:
    """What a row asks.

    Attributes:
        prompt: text of the last user message.
        messages: all of them, where there is more than that one: `role`, `content` (text, or None of an assistant that only
            calls tools) and, where given, `tool_calls`, `tool_call_id`, `name` and `reasoning_content`.
        tools: JSON schemas as `{"type": "function", "function": {"name": ...}}`; None when there are none.
        answer: text of the assistant's message that ended the conversation, and isn't part of it.
    """

    prompt: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None

    @property
    def key(self) -> str:
        """The same for all rows that ask the same."""
        if self.messages is None and self.tools is None:
            return f"text {self.prompt}"
        return f"chat {json.dumps([self.messages or self.prompt, self.tools], ensure_ascii=False)}"


def asked(value: Any, tools: Any, where: str) -> Asked:
    """Read a row's question: text or a list of messages, and JSON schemas of tools.

    Messages are `{"role", "content", ...}` or ShareGPT's `{"from", "value"}`; content is text or a list of text parts. Keys
    whose value is None count as absent, as Arrow fills them in where another row has them. An assistant's message at the end
    is what was answered, not part of the question.

    Args:
        where: names source, row and field for errors.
    Raises:
        OpdError: it is malformed.
    """
    schemas = _tools(tools, where)
    if isinstance(value, str) and value.strip():
        return Asked(value, tools=schemas)
    messages = messages_of(value, where)
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users:
        raise OpdError(f"{where} has no user's message before the assistant's last, so there is nothing to answer")
    if messages[-1]["role"] not in ("user", "tool"):
        raise OpdError(
            f"{where}: the message to answer has the role {messages[-1]['role']!r}; it must be the user's or a tool's, "
            "with at most one assistant's message after it"
        )
    alone = len(messages) == 1 and messages[0].keys() == {"role", "content"}
    return Asked(users[-1], None if alone else messages, schemas, reference(answer, where) if answer else None)


def messages_of(value: Any, where: str) -> list[Message]:
    """Messages in one form, as `asked` reads them. Raises OpdError when one is malformed."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise OpdError(f"{where} must be non-empty text or a list of messages, found {shown(value)}")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def reference(answer: Any, where: str) -> str | None:
    """A reference answer as text: of messages, the last one's content, or its tool calls as JSON where it has none; a number
    without an exponent, and whole ones, which data frames keep as floats, without a point.

    Raises OpdError, beginning with `where`, when a message is malformed.
    """
    if answer is None:
        return None
    if isinstance(answer, float) and math.isfinite(answer):
        return np.format_float_positional(answer, trim="-")
    last = answer[-1] if isinstance(answer, list) and answer else answer
    if isinstance(last, Mapping) and {"from", "value"} <= last.keys():
        last = _message(last, where)
    if not isinstance(last, Mapping) or "role" not in last:
        return str(answer)
    if text := _text(last.get("content"), where):
        return text
    given = last.get("tool_calls") or []
    calls = given if isinstance(given, list | tuple) else [given]
    for call in calls:
        _call(call, where)  # refuses what is none
    calls = [call.get("function", call) for call in calls]
    return json.dumps(calls, ensure_ascii=False) if calls else ""


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise OpdError(f"{where}: expected an object with `role` and `content`, found {shown(given)}")
    fields = _without_null(given)
    named = fields.get("role", fields.get("from"))
    if named is None:
        raise OpdError(f"{where}: no `role` (or `from`); it has {listed(fields) or 'nothing'}")
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise OpdError(f"{where}: unknown role {shown(named)}; known are {', '.join(ROLES)}")
    content = _text(fields.get("content", fields.get("value")), where)
    calls = fields.get("tool_calls")
    if named == "function_call":
        content, calls = None, _json(content or "", where, "a tool call")
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        if calls:
            message["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        if thought := next((fields[name] for name in REASONING if fields.get(name)), None):
            message["reasoning_content"] = _text(thought, where)
        if not content and len(message) == 2:
            raise OpdError(f"{where}: the assistant neither says, thinks nor calls anything")
    elif calls:
        raise OpdError(f"{where}: only the assistant has `tool_calls`, found them with role {shown(named)}")
    elif content is None or (role == "user" and not content.strip()):
        raise OpdError(f"{where}: no text in its `content` (or `value`)")
    return message | {name: str(fields[name]) for name in ("tool_call_id", "name") if name in fields}


def _text(content: Any, where: str) -> str | None:
    """Content as text; parts are put together without anything between them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise OpdError(f"{where}: content must be text or a list of text parts, found {shown(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise OpdError(
                f"{where}: content has a part of type {shown(kind)}; only text can be read, no images or audio"
            )
        texts.append(text)
    return "".join(texts)


def _call(given: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object where they are one."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OpdError(f"{where}: a tool call needs a `name` and `arguments`, found {shown(given)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, where, f"the arguments of {shown(function['name'])}") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise OpdError(
            f"{where}: the arguments of {shown(function['name'])} must be an object, found {shown(arguments)}"
        )
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": str(given["id"])} if "id" in given else {})


def _tools(given: Any, where: str) -> list[dict[str, Any]] | None:
    tools = _json(given, where, "`tools`") if isinstance(given, str) and given.strip() else given
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise OpdError(f"{where}: `tools` must be a list of JSON schemas, found {shown(tools)}")
    out = []
    for tool in tools:
        schema = _without_null(_json(tool, where, "a tool") if isinstance(tool, str) else tool)
        function = schema.get("function", schema) if isinstance(schema, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise OpdError(f"{where}: a tool is a JSON schema with a `name`, found {shown(tool)}")
        out.append({**schema, "type": "function"} if "function" in schema else {"type": "function", "function": schema})
    return out


def _json(text: str, where: str, what: str) -> Any:
    try:
        return strict_json.parse(text)
    except ValueError as error:
        raise OpdError(f"{where}: {what} is not JSON: {error}, found {text[:80]!r}") from error


def _without_null(value: Any) -> Any:
    """The same without keys whose value is None, at every depth."""
    if isinstance(value, Mapping):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_null(inner) for inner in value]
    return value
