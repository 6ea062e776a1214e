"""YAML that comes from outside: PyYAML's safe loader takes some things silently and falls over others."""

import re
from collections.abc import Hashable
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from schemas.errors import OpdError, one_line, shown

LARGEST_FILE = 1 << 18
"""Bytes; a config is a few kB."""
MOST_VALUES, DEEPEST = 10_000, 50
"""Keys and values of a file with its aliases written out, and levels of them in each other."""


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises OpdError, in one line, naming the file and the place in it: it can't be read, is not YAML or too large, has a key
    twice in a mapping, or says by aliases more than it holds.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise OpdError(f"{path}: {error.strerror or error}") from error
    if len(text) > LARGEST_FILE:
        raise OpdError(f"{path}: larger than {LARGEST_FILE:,} bytes, which is no config")
    try:
        return yaml.load(text.decode(), _Loader)  # noqa: S506 - a safe loader
    except RecursionError as error:
        raise OpdError(f"{path}: not YAML: lists and mappings are nested too deep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OpdError(f"{path}: not YAML: {one_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """A safe loader whose mappings have each key once, whose aliases have an end, and whose numbers are what they seem."""

    def get_single_node(self) -> yaml.Node | None:
        """The file's node, once it is known how large it is."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _size(node, {}, ())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; what it merges in by `<<` its own keys may override."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _wrong(f"the key {shown(key.value)} is there twice", key)
                seen.add((key.tag, key.value))
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value, which YAML 1.1 takes in base 60 or 8 where it looks as if it were something else."""
        if node.tag in _NUMBERS and _ODD.fullmatch(node.value):
            raise _wrong(
                f"YAML reads {node.value} in base {60 if ':' in node.value else 8}; write a decimal number", node
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # what its tag calls it, or it looks like, it isn't
            raise _wrong(f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}", node) from error


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_ODD = re.compile(r"[-+]?0[0-7_]+|.*\d:.*")


def _size(node: yaml.Node, known: dict[int, int], above: tuple[yaml.Node, ...]) -> int:
    """Keys and values in a node, each as often as aliases say it."""
    if id(node) in known:
        return known[id(node)]
    if node in above:
        raise _wrong("an alias of what it is itself a part of", node)
    if len(above) > DEEPEST:
        raise _wrong(f"lists and mappings are nested more than {DEEPEST} deep", node)
    inner = () if isinstance(node, yaml.ScalarNode) else node.value
    flat = chain.from_iterable(inner) if isinstance(node, yaml.MappingNode) else inner
    size = 1 + sum(_size(each, known, (*above, node)) for each in flat)
    if size > MOST_VALUES:
        raise _wrong(f"more than {MOST_VALUES:,} keys and values, with those that aliases repeat", node)
    known[id(node)] = size
    return size


def _wrong(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
