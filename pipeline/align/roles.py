"""Roles: how a model says what a text can't, such as where thinking ends and whose turn it is (families in roles.yaml)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from schemas.errors import OpdError

SINGLE_TOKEN = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""What must be a token of its own in a spelling."""
OPENED_BY = {
    "begin_assistant": ("begin_user",),
    "next_tool_result": ("begin_tool_result", "next_tool_result"),
    "end_tool_result": ("begin_tool_result", "next_tool_result"),
}
"""Roles that close what another one has opened, where tokens alone don't tell which of several roles they are."""


@dataclass(frozen=True)
class Roles:
    """The roles of one tokenizer.

    Attributes:
        spellings: for each role its spellings in token ids, int32 arrays; the first is how the model says it.
        names: of tokens that are special by themselves, by id: their content.
    """

    spellings: Mapping[str, Sequence[np.ndarray]]
    names: Mapping[int, str]

    def said(self, role: str) -> np.ndarray | None:
        """int32 ids of a role, of several one after the other, or of a special token by its content; None: no counterpart."""
        if found := self.spellings.get(role):
            return found[0]
        if (index := self._by_name.get(role)) is not None:
            return np.array([index], np.int32)
        parts = [self.said(part) for part in role.split(" ")] if " " in role else [None]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {name: index for index, name in self.names.items()}

    @property
    def single(self) -> dict[int, str]:
        """Tokens that are a role by themselves, and special ones of none, by id: a name that is the same in another model."""
        roles = {int(ids[0]): role for role, spelled in self.spellings.items() for ids in spelled[:1] if len(ids) == 1}
        return {**self.names, **roles}

    @property
    def identity(self) -> dict[str, list[list[int]]]:
        """What determines which tokens are a role, for manifests."""
        return {role: [ids.tolist() for ids in spelled] for role, spelled in self.spellings.items()}


@cache
def families() -> dict[str, Any]:
    """The content of roles.yaml."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("roles.yaml").read_text(encoding="utf-8"))
    return found


def roles_of(tokenizer: Tokenizer, name: str, own: Mapping[str, Sequence[str]]) -> Roles:
    """The roles of a tokenizer: its family's, and the user's `own` spellings before them.

    Args:
        tokenizer: as its file has it, so that special tokens in a text are read as such.
        name: what to call it in errors.
        own: by role, spellings that take the place of the family's; none at all takes the role away.
    Raises:
        OpdError: an own spelling has something in <...> or [...] that is no token of its own.
    """
    added = {token.content: (index, token.special) for index, token in tokenizer.get_added_tokens_decoder().items()}
    known: dict[str, list[str]] = next(
        (f["roles"] for f in families().values() if all(t in added for t in f["recognised_by"])), {}
    )
    for role, spelled in own.items():
        for text in spelled:
            if missing := [part for part in SINGLE_TOKEN.findall(text) if part not in added]:
                raise OpdError(
                    f"model {name}: `roles.{role}: {text!r}`: {', '.join(missing)} is no token of its tokenizer; its own are "
                    f"{', '.join(sorted(added)[:40])}"
                )
    spellings = {}
    for role, spelled in {**known, **own}.items():
        texts = [text for text in spelled if all(part in added for part in SINGLE_TOKEN.findall(text))]
        if texts:
            spellings[role] = [
                np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in texts
            ]
    return Roles(spellings, {index: content for content, (index, special) in added.items() if special})


@dataclass(frozen=True)
class Found:
    """Where role tokens stand among the ids of many responses. All arrays are (found,), in order.

    Attributes:
        start: int64, index of the first token in the flat ids.
        size: int64, number of tokens.
        role: names; a token that is neither text nor of a role that is known has its own content or number as its name.
    """

    start: np.ndarray
    size: np.ndarray
    role: list[str]


def find_roles(ids: np.ndarray, offsets: np.ndarray, has_bytes: np.ndarray, roles: Roles) -> Found:
    """The roles that ids say, the longest spelling first at each place.

    Args:
        ids: int32 (tokens,) of all responses one after another.
        offsets: int64 (responses + 1,), where each response's ids start.
        has_bytes: bool (vocabulary,), ids that are text where they are no role.
        roles: the tokenizer's.
    """
    from pipeline.align.walks import find_spellings  # noqa: PLC0415

    by_ids: dict[tuple[int, ...], list[str]] = {}
    for role, spelled in roles.spellings.items():
        for one in spelled:
            by_ids.setdefault(tuple(one.tolist()), []).append(role)
    ordered = sorted(by_ids, key=len, reverse=True)
    head, chain = np.full(len(has_bytes), -1, np.int64), np.full(len(ordered), -1, np.int64)
    for index in reversed(range(len(ordered))):  # so that a chain goes from long to short
        first = ordered[index][0]
        head[first], chain[index] = index, head[first]
    at = np.cumsum([0, *map(len, ordered)])
    flat = np.array([i for spelled in ordered for i in spelled], np.int32)
    out = np.empty((3, len(ids)), np.int64)
    count = find_spellings(ids, offsets, has_bytes, head, chain, flat, at, out)
    start, size, which = out[:, :count]
    names: list[str] = []
    row = np.searchsorted(offsets, start, "right")
    opened = ""
    for i, spelling in enumerate(which.tolist()):
        if i and row[i] != row[i - 1]:
            opened = ""
        if spelling < 0:
            index = int(ids[start[i]])
            names.append(roles.names.get(index, f"token {index}"))
            continue
        chosen = _one_of(by_ids[ordered[spelling]], opened)
        if "begin_" in chosen or "next_" in chosen:
            opened = chosen.split(" ")[-1]
        names.append(chosen)
    return Found(start, size, names)


def _one_of(candidates: list[str], opened: str) -> str:
    """The role that fits what was opened last, or one that needs nothing opened."""
    needs = [OPENED_BY.get(role.split(" ")[0]) for role in candidates]
    fitting = [role for role, need in zip(candidates, needs, strict=True) if need and opened in need]
    free = [role for role, need in zip(candidates, needs, strict=True) if not need]
    return [*fitting, *free, *candidates][0]


def say(names: Sequence[str | None], roles: Roles) -> list[np.ndarray | None]:
    """Ids of each name in a row of them, None where it is None (text) or has no counterpart.

    Of two neighbours that have a spelling of their own together, which ends as the second does alone, the first says the rest.
    """
    said = [None if name is None else roles.said(name) for name in names]
    for i, (a, b) in enumerate(pairwise(names)):
        together, own = roles.spellings.get(f"{a} {b}"), said[i + 1]
        if together and own is not None and np.array_equal(together[0][len(together[0]) - len(own) :], own):
            said[i] = together[0][: len(together[0]) - len(own)]
    return said
