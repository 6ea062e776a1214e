"""A teacher of another kind, by one class and one line, through what the stages call."""

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.align.tokens import TokenBytes, vocabulary_table
from pipeline.infer import engines
from pipeline.infer.policy_logps import longest, policy_table
from pipeline.infer.score import Scores
from pipeline.models import ModelRef
from pipeline.prepared import PreparedModel
from pipeline.store.shards import open_shard, open_writer
from schemas.config import Model
from schemas.errors import OpdError
from schemas.tables import arrow_schema

VOCAB, STOP = 8, 7


class Toy(AbstractContextManager["Toy"]):
    """Its log-prob of a token is -(prompt length) - token id / 8, of stopping -100."""

    opened: Any = None

    def __init__(self, opening: engines.Opening) -> None:
        Toy.opened = opening

    def __exit__(self, *_: object) -> None:
        Toy.opened = None

    def score(self, prompts: Any, responses: Any, candidates: Any, advance: Any = lambda _: None) -> Scores:
        assert candidates.mass == candidates.k_max == 0 and candidates.requested is None
        logp = [np.append(-len(p) - r / 8, -100) for p, r in zip(prompts, responses, strict=True)]
        flat = np.concatenate(logp).astype(np.float32)
        none = np.zeros(0)
        return Scores(flat, flat, flat, flat, flat, none, none, np.zeros(len(flat), np.int64))


def prepared(engine: str) -> PreparedModel:
    flags = np.zeros(VOCAB, bool)
    tokens = TokenBytes("toy", pa.array([bytes([97 + i]) for i in range(VOCAB)], pa.binary()), flags, ~flags)
    table = vocabulary_table(tokens, np.array([STOP]))
    config = Model(model="toy").model_copy(update={"engine": engine})
    ref = ModelRef(source="toy", path="/none", weights="w", tokenizer="t")
    return PreparedModel(ref, config, SimpleNamespace(read=lambda: table))  # type: ignore[arg-type]


def test_another_teacher_is_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "TEACHERS", {**engines.TEACHERS, "toy": Toy})
    rows: list[dict[str, Any]] = [
        {"rollout_id": "a", "prompt_ids": [1, 2, 3], "response_ids": [4, 5, STOP], "finish_reason": "stop"},
        {"rollout_id": "b", "prompt_ids": [1, 2], "response_ids": [6], "finish_reason": "length"},
    ]
    rest = {"prompt_id": "p", "sample": 0, "round": 0, "response": "", "sampler_logp": None, "top_id": None}
    rows = [row | rest | {"behavior_logp": [0.0] * len(row["response_ids"]), "answer": None} for row in rows]
    with open_writer(tmp_path / "r.parquet", "rollouts", {}, {}) as writer:
        writer.write(pa.Table.from_pylist(rows, schema=arrow_schema("rollouts")))
    shard, student = open_shard(tmp_path / "r.parquet", "rollouts"), prepared("toy")
    with engines.open_teacher(student, longest(shard), 99) as policy:
        assert (Toy.opened.model, Toy.opened.longest, Toy.opened.size) == (student, 6, 99)
        found = policy_table(policy, student, shard.read())
    assert Toy.opened is None
    # The end of a response that stopped, none of one that was cut.
    assert found["policy_logp"].to_pylist() == [[-3.5, -3.625, -100], [-2.75]]


def test_what_an_engine_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "TEACHERS", {**engines.TEACHERS, "toy": Toy})
    with pytest.raises(OpdError, match=r"model toy: `engine: toy` can't sample responses.*transformers, vllm"):
        engines.open_sampler(prepared("toy"), 6, 1)


def test_every_engine_of_the_config_can_do_something() -> None:
    assert {*engines.TEACHERS, *engines.SAMPLERS} == set(Model.model_fields["engine"].annotation.__args__)  # type: ignore[union-attr]
