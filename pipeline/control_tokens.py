"""A row's text stays text: what looks like a control token of a model in it is encoded as the letters that it is.

A tokenizer takes `<|im_end|>` for the control token wherever it stands, so a question or a tool's result could end its own
turn and open another. Only the chat template and the config may write control tokens. A rendering is told apart in two
steps: before it, look-alikes in the row's text are replaced by characters of a private plane, one each; after it, what
control tokens are left are the template's. A copy of the tokenizer whose control tokens are spelled as characters of another
private plane then reads both at once, so nothing of how it splits, normalises or joins text differs.
"""

import json
import re
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from schemas.errors import OpdError

HIDDEN, CONTROL = 0xF0000, 0x100000
"""First characters of the two private planes: for look-alikes in a row's text, and for control tokens."""
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
ESCAPED = re.compile(r"\\U000f[0-9a-f]{4}|\\udb[89ab][0-9a-f]\\ud[c-f][0-9a-f]{2}")
"""A character of the first as Python and JSON may spell it."""


class ControlTokens:
    """The control tokens of one model: its special tokens, and other added tokens that its chat template writes out.

    Those others (`<think>`, `<tool_call>`, DeepSeek's `<｜User｜>`) the assistant itself may write, so in its own messages they
    stay tokens.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = [token.content for token in added.values() if token.special]
        structure = [
            t.content for t in added.values() if not t.special and t.content in template and len(t.content) > 1
        ]
        self._names = [*special, *structure]
        self._hidden = {name: chr(HIDDEN + i) for i, name in enumerate(self._names)}
        self._control = {name: chr(CONTROL + i) for i, name in enumerate(self._names)}
        self._shown = str.maketrans({hidden: name for name, hidden in self._hidden.items()})
        self._special, self._any = _any_of(*special), _any_of(*self._names)
        in_json = [json.dumps(name, ensure_ascii=False)[1:-1] for name in self._names]
        self._spelled = _any_of(*dict.fromkeys([*self._names, *in_json]))

    def are_in(self, *texts: str | None) -> bool:
        """Whether a look-alike is in one of the texts, or in a string of one that is JSON."""
        return any(text is not None and self._spelled.search(text) for text in texts)

    def hide(self, value: Any) -> Any:
        """A JSON-able value with all look-alikes in its strings, keys included, replaced by private characters.

        In what an assistant's message has, only special tokens are.
        """
        return self._replaced(value, self._any)

    def _replaced(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, Mapping):
            within = self._special if value.get("role") == "assistant" else pattern
            return {self._replaced(k, within): self._replaced(inner, within) for k, inner in value.items()}
        return [self._replaced(inner, pattern) for inner in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """A rendering as one reads it: look-alikes and control tokens alike."""
        return text.translate(self._shown)

    def encode(self, rendering: str, where: str) -> list[int]:
        """Ids of a rendering whose look-alikes are hidden: of their letters for them, of control tokens for the rest.

        Args:
            where: names the prompt and the model for errors.
        Raises:
            OpdError: the copy with other spellings doesn't read the rest of the text as the tokenizer does.
        """
        spelled = self._any.sub(lambda match: self._control[match[0]], rendering)
        ids = self._encode(self.show(spelled))
        usual = self._tokenizer(rendering, add_special_tokens=False).input_ids
        found = np.isin(ids, self._ids)
        if self._encode(spelled) != usual or found.sum() != np.isin(usual, self._ids).sum():
            alike = ", ".join(sorted(set(PRIVATE.findall(rendering))))
            raise OpdError(
                f"{where}: its text holds what looks like a control token ({self.show(alike)}), and this tokenizer can't be "
                "made to read that as text; take it out of the row"
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._respelled.encode(text, add_special_tokens=False).ids

    @cached_property
    def _ids(self) -> list[int]:
        return self._tokenizer.convert_tokens_to_ids(self._names)

    @cached_property
    def _respelled(self) -> Tokenizer:
        """The tokenizer with its control tokens spelled as private characters; copying a large vocabulary takes seconds."""
        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in spec["added_tokens"]:
            token["content"] = self._control.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._control.get(token, token): index for token, index in model["vocab"].items()}
        else:  # Unigram: a list of (token, score)
            model["vocab"] = [(self._control.get(token, token), score) for token, score in model["vocab"]]
        if model.get("unk_token") in self._control:
            model["unk_token"] = self._control[model["unk_token"]]
        spec["post_processor"] = None  # it adds special tokens, which templates have written already
        copy = Tokenizer.from_str(json.dumps(spec))
        copy.no_padding()
        copy.no_truncation()
        return copy


@cache
def _any_of(*names: str) -> re.Pattern[str]:
    """Matches the longest of the names at a place; nothing where there are none. Thousands take half a second to compile."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
