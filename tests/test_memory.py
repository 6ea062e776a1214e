"""What training and scoring will take is estimated before they begin; layers are recomputed where it is else too much."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from pipeline.infer import memory
from schemas.config import Train
from stages.run import training
from stages.run.training import Parallel, recomputes
from train.memory import Needs, needs
from train.packing import pack

WIDTH, INNER = 8, 24


def test_what_is_kept_is_what_autograd_keeps() -> None:
    """A linear layer keeps its input, SiLU its own, and weights aren't counted: d, f and f numbers a token."""

    class Model(nn.Sequential):
        device = torch.device("cpu")

    model = Model(nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, WIDTH))

    def body(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids[0, :, None] * torch.ones(WIDTH))
        return found

    with torch.inference_mode():  # as the callers may be
        assert memory.kept_per_token(model, body) == 4 * (WIDTH + 2 * INNER)


def test_needs_of_a_small_llama() -> None:
    """float32 numbers of a layer of d 32, f 64, 8 heads' worth of d and 2 of d / 2, as its modules keep them."""
    model = tiny.model(tied=False)
    assert pack(model) is None
    count = sum(p.numel() for p in model.parameters())
    found = needs(model, Train(micro_batch_tokens=1000), longest=100)
    assert found.optimiser == 16 * count
    assert needs(model, Train(ema=0.9), 10).optimiser == 20 * count
    assert needs(model, Train(), 10, parts=4).optimiser == 4 * count
    # Of each of two layers: two norms with what they normalise and its scale, queries, keys, values, what attention says,
    # three numbers of the MLP's width and its product; and what the last norm keeps.
    least = 4 * 1000 * 2 * (2 * 32 + 32 + 16 + 16 + 32 + 4 * 64)
    assert least < found.activations < 2.5 * least
    assert found.recomputed < 0.8 * found.activations
    twice = needs(model, Train(micro_batch_tokens=10), longest=2000)  # one long response
    assert twice.activations == pytest.approx(2 * found.activations, rel=1e-6)
    assert found.total(True) == found.optimiser + found.recomputed + found.head


@pytest.mark.parametrize(
    ("wanted", "free", "expected", "told"),
    [("auto", 10**12, False, ""), ("auto", 0.85, True, "computed again"), (True, 10**12, True, ""),
     (False, 0.5, False, "warning"), ("auto", 0.01, True, "warning")],
)  # fmt: skip
def test_layers_are_recomputed_where_memory_is_short(
    wanted: Any, free: float, expected: bool, told: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`free` as a share of what training takes without."""
    shards = tiny.shards(tmp_path)
    model, train = tiny.model(), Train(gradient_checkpointing=wanted, micro_batch_tokens=100_000, batch_size=100_000)
    takes = needs(model, train, 1).total(False)
    monkeypatch.setattr(training, "free", lambda device: int(free * takes if free < 1 else free))
    job = SimpleNamespace(config=SimpleNamespace(train=train), shards=shards, phase=SimpleNamespace(name="round-0"))
    assert recomputes(job, model, Parallel.ddp) == expected  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert told in said and bool(said) == bool(told)


def test_free_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    of_machine = memory.free(torch.device("cpu"))
    assert of_machine > 10**8
    for name, text in (("max", "5000000\n"), ("current", "4000000\n"), ("stat", "anon 7\ninactive_file 250000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free(torch.device("cpu")) == 1_250_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu")) > 10**8


def test_scoring_grows_with_its_tokens_and_holds_a_chunk_of_logits() -> None:
    config = SimpleNamespace(hidden_size=4096, intermediate_size=12288, vocab_size=151_936)
    short, longer = (memory.scoring(config, 2, tokens, 512 << 20) for tokens in (8192, 32768))
    assert longer - short == 2 * (32768 - 8192) * (5 * 4096 + 3 * 12288)
    assert 3e9 < longer < 6e9
    experts = SimpleNamespace(**vars(config), num_experts_per_tok=8, moe_intermediate_size=1536)
    assert memory.scoring(experts, 2, 32768, 512 << 20) == longer  # 8 of 1,536 are 12,288


def test_needs_are_told_in_whole() -> None:
    assert Needs(1, 20, 3, 400, 5000).total(False) == 5421 and Needs(1, 20, 3, 400, 5000).total(True) == 5404
