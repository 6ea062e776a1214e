"""Hard, mixed texts and a teacher that scores them, for the other benchmarks; and a Markdown table."""

import importlib.metadata
import os
import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import polars as pl
import torch
from hard_texts import HARD_TEXTS

from pipeline.infer.forward import head
from pipeline.models import load_model, load_tokenizer, prepare
from schemas.config import Config
from stages.run.run import cache_root

PIECES, LENGTH = 128, 160  # pieces of text, tokens of each: 20,480 teacher tokens


def texts(seed: int = 0) -> Iterator[str]:
    """Pieces of code, documentation, package descriptions, licences and texts that break tokenizers, for ever."""
    rng = random.Random(seed)
    code = sorted(Path(os.__file__).parent.glob("*.py")) + sorted(Path(os.__file__).parent.glob("*/*.py"))
    code = [path for path in code if "site-packages" not in path.parts]
    packages = sorted(importlib.metadata.distributions(), key=lambda package: package.metadata["Name"])
    about = [text for package in packages if len(text := package.read_text("METADATA") or "") > 6000]
    files = [file for package in packages for file in package.files or [] if "LICEN" in file.name.upper()]
    licences = [path for file in files if (path := Path(str(file.locate()))).suffix != ".py" and path.is_file()]
    pages = sorted(topics.values())
    hard = "\n".join(rng.sample(HARD_TEXTS, len(HARD_TEXTS)))
    makers: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(code).read_text(errors="ignore"),
        lambda: rng.choice(pages),
        lambda: rng.choice(code).read_text(errors="ignore"),
        lambda: rng.choice(about),
        lambda: rng.choice(licences).read_text(errors="ignore"),
        lambda: hard,
    )
    while True:
        for make in makers:
            if len(text := make()) > 1500:
                start = rng.randrange(len(text) - 1200)
                yield text[start : start + 1200]


class Teacher:
    """A model and the pieces of text it scores."""

    def __init__(self, source: str) -> None:
        ref = prepare(source, cache_root(Config.model_fields["cache"].default), say=print)
        self.model, self.tokenizer = load_model(ref, "bfloat16"), load_tokenizer(ref.source, ref.path)
        self.vocab = self.model.get_output_embeddings().weight.shape[0]
        self.stop = self.tokenizer.eos_token_id
        rows = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts())
        self.pieces = torch.tensor(list(islice((row[:LENGTH] for row in rows if len(row) >= LENGTH), PIECES)))

    def logp(self, pieces: torch.Tensor, start: int = 0) -> torch.Tensor:
        """float32 (tokens - start, vocab) log-softmax of one piece's tokens, seen from `start` on only."""
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.stop
        ids = torch.cat([torch.tensor([first]), pieces[start:-1]])[None].to(self.model.device)
        hidden = self.model.base_model(input_ids=ids).last_hidden_state[0]
        return head(self.model, hidden).float().log_softmax(-1)


def markdown(frame: pl.DataFrame) -> str:
    """A Markdown table; numbers with the digits that mean something."""

    def cell(value: Any) -> str:
        if isinstance(value, str) or value is None:
            return value or ""
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"

    rows = [frame.columns, ["---"] * frame.width, *([cell(v) for v in row] for row in frame.iter_rows())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
