"""Functions of one's own, by `module:function`: found, digested without running them, and told when they aren't there."""

import hashlib
import sys
from pathlib import Path

import pytest

from pipeline.own_code import load, source_digest
from schemas.errors import OpdError


def test_a_function_of_the_working_directory(folder: Path) -> None:
    (folder / "mine.py").write_text("import beside\ndef double(x): return beside.FACTOR * x\n")
    (folder / "beside.py").write_text("FACTOR = 2\n")
    assert load("mine:double", "here")(21) == 42


def test_the_digest_is_of_the_bytes_and_runs_nothing(folder: Path) -> None:
    (folder / "package").mkdir()
    for name in ("__init__.py", "inner.py"):
        (folder / "package" / name).write_text("raise SystemExit\n")
    assert source_digest("package.inner:f") == hashlib.sha256(b"raise SystemExit\n").hexdigest()
    (folder / "package" / "inner.py").write_text("def f(): ...\n")
    assert source_digest("package.inner:f") == hashlib.sha256(b"def f(): ...\n").hexdigest()
    assert not any(name.startswith("package") for name in sys.modules)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine", r"`key`: 'mine' is not of the form module:function"),
        ("mine.py:f", r"no module 'mine\.py' in the working directory"),
        ("no-module:f", "not of the form"),
        ("nowhere:f", "nowhere:f: no module 'nowhere' in the working directory or on the Python path"),
        ("nowhere.inner:f", "no module 'nowhere.inner'"),
        ("mine:g", r"mine:g: .*mine\.py has no function 'g'"),
        ("mine:number", r"number in .*mine\.py is no function but int"),
        ("sys:exit", "module 'sys' has no source file"),
        ("spaces:f", "module 'spaces' has no source file"),
        ("json:f", r".*json\.py is hidden by .*json/__init__\.py, which is imported already; give it another name"),
    ],
)
def test_what_is_not_there_is_told(folder: Path, reference: str, message: str) -> None:
    (folder / "mine.py").write_text("number = 1\ndef f(): ...\n")
    (folder / "json.py").write_text("def f(): ...\n")
    (folder / "spaces").mkdir()
    with pytest.raises(OpdError, match=message) as caught:
        load(reference, "key")
    assert "\n" not in str(caught.value)
