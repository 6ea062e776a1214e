"""Functions of the user's own that a config names, `module:function`, and the digest of the file that they are in.

What such a function raises is not caught: its traceback is for the person who wrote it.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from schemas.config.options import OWN_CODE
from schemas.errors import OpdError


def load(reference: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names, its module imported from the working directory or the Python path.

    Args:
        reference: what the config says.
        what: the config key that says it, for messages.
    Raises:
        OpdError: as `source_file` says; another module of that name is imported already; the module has no such function,
            or it can't be called.
    """
    try:
        module, name = _parts(reference)
        file = source_file(reference)
        loaded = importlib.import_module(module)
        if Path(loaded.__file__ or "").resolve() != file.resolve():
            raise OpdError(
                f"{reference}: {file} is hidden by {loaded.__file__}, which is imported already; give it another name"
            )
        if not hasattr(loaded, name):
            raise OpdError(f"{reference}: {file} has no function {name!r}")
        function = getattr(loaded, name)
        if not callable(function):
            raise OpdError(f"{reference}: {name} in {file} is no function but {type(function).__name__}")
    except OpdError as error:
        raise OpdError(f"`{what}`: {error}") from error
    return function


def source_digest(reference: str) -> str:
    """sha256 (hex) of the bytes of the file that holds the module of `module:function`; raises as `source_file` does."""
    return hashlib.sha256(source_file(reference).read_bytes()).hexdigest()


def source_file(reference: str) -> Path:
    """The file that holds the module of `module:function`, found without running any of it.

    Raises:
        OpdError: `reference` isn't of that form, or there is no such module, or it has no source file.
    """
    module, _ = _parts(reference)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # where `python -m` looks too, and a console command doesn't
    importlib.invalidate_caches()
    spec, within, parts = None, None, module.split(".")
    for depth in range(len(parts)):
        # importlib.util.find_spec would run the packages around the module.
        spec = _find(".".join(parts[: depth + 1]), within)
        if spec is None or (depth + 1 < len(parts) and spec.submodule_search_locations is None):
            raise OpdError(f"{reference}: no module {module!r} in the working directory or on the Python path")
        within = list(spec.submodule_search_locations or ())
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise OpdError(f"{reference}: module {module!r} has no source file")
    return Path(spec.origin)


def _find(name: str, within: list[str] | None) -> ModuleSpec | None:
    return next(filter(None, (finder.find_spec(name, within) for finder in sys.meta_path)), None)


def _parts(reference: str) -> tuple[str, str]:
    match = OWN_CODE.fullmatch(reference)
    if not match:
        raise OpdError(f"{reference!r} is not of the form module:function, such as my_module:my_function")
    return match[1], match[2]
