"""Credentials: a config holds none, for runs keep and show it. They are in the environment; `${NAME}` in an address is one."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

USER = re.compile(r"(?<=https://)[^/@\s]+(?=@)|(?<=http://)[^/@\s]+(?=@)")
"""User and password of an address of the web; elsewhere what stands there is a container or a bucket."""
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|(?<!/)sk-[A-Za-z0-9_-]{32,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b)"
)
"""What is made to be known as a credential."""
SECRET = re.compile(
    r"(?<=://)[^/@:\s]*:(?!\$\{\w+\}@)[^/@\s]+(?=@)"  # a password in an address
    r"|(?<=[?&])(?i:api_?key|(?:access_?|auth_?)?token|secret|password|sig|signature|x-[a-z]+-(?:credential|signature))"
    r"=(?!\$\{)[^&\s'\"]+"  # a signed address
    rf"|{TOKEN.pattern}"
)
"""What gives access as it stands."""
NAMES = re.compile(
    r"(.*_)?(password|passwd|(api|access|account|secret)_?key|(hf|hub|api|access|auth|session|bearer)_?token|client_?secret)",
    re.IGNORECASE,
)
"""Keys whose values are secret."""
FREE = ("system", "prompt", "prefill", "roles")
"""Keys of texts that models read, where an address is an example."""
REFERENCE = re.compile(r"\$\{(\w+)\}")


def masked(text: str) -> str:
    """A text without credentials, for what is shown or kept."""
    return SECRET.sub("***", USER.sub("***", text))


def secrets(value: Any, key: str = "") -> Iterator[str]:
    """The keys of nested values that hold credentials as they stand."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secrets(inner, key)
    elif isinstance(value, str):
        named = value and NAMES.fullmatch(key.rpartition(".")[2])
        free = set(FREE) & set(key.split("."))
        if TOKEN.search(value) or (not free and (named or SECRET.search(value))):
            yield key


def resolved(address: str) -> str:
    """An address with variables of the environment for its `${NAME}`. Raises KeyError with the name of one that is not set."""
    return REFERENCE.sub(lambda found: os.environ[found[1]], address)
