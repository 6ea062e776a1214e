"""A teacher of another kind, by one class and one line, through what the stages call."""

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from pipeline.align.tokens import TokenBytes, vocabulary_table
from pipeline.infer import engines, vllm
from pipeline.infer.policy_logps import longest, policy_table
from pipeline.infer.score import Candidates, Scores
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
    config = Model(model="toy", dtype="float16").model_copy(update={"engine": engine})
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


SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def with_model(model: Any) -> PreparedModel:
    """Run by `transformers`."""
    made = prepared("transformers")
    vars(made)["model"] = model.eval()  # as if it had been loaded
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_that_are_no_numbers_are_refused(temperature: float) -> None:
    """Float16 ends at 65,504."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    prompts, response = [np.array([1, 2])], np.array([3, 4, 5])
    made = with_model(model.half())
    with engines.open_teacher(made, 9, 99) as teacher, engines.open_sampler(made, 9, 1) as sampler:
        assert np.isfinite(teacher.score(prompts, [response], Candidates(0.9, 3)).logp).all()
        (drawn,) = sampler.sample(prompts, [1], 3, temperature)
        assert np.isfinite(drawn.behavior_logp).all()
        for token, big in ((4, 6e4), (1, 6e4)):  # within a response; everywhere
            with torch.no_grad():
                model.model.embed_tokens.weight[token] = big
                model.model.layers[0].self_attn.v_proj.weight[:] = big
            with pytest.raises(
                OpdError, match=r"model toy in float16 gives log-probs that are not numbers; take bfloat16"
            ):
                teacher.score(prompts, [response], Candidates(0.9, 3))
        with pytest.raises(OpdError, match="not numbers"):
            sampler.sample(prompts, [1], 3, temperature)


def test_positions_that_depend_on_a_batchs_longest_row_are_refused_beyond_what_is_the_same_for_all() -> None:
    rope = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_type": "longrope", "rope_theta": 1e4}
    model = Phi3ForCausalLM(Phi3Config(**SHAPE, original_max_position_embeddings=16, rope_parameters=rope))
    for open_one in (engines.open_teacher, engines.open_sampler):
        with open_one(with_model(model), 16, 99):
            pass
        with pytest.raises(OpdError, match=r"model toy.*`longrope`.*longer than 16 tokens.* up to 17;.*engine: vllm"):
            open_one(with_model(model), 17, 99).__enter__()
    # By kind of layer; a dynamic one is the same up to the length that it was trained with; others always are.
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for rope in (dynamic, {"sliding_attention": {"rope_type": "default"}, "full_attention": dynamic}):
        config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)
        engines.check_rope(config, "toy", 64)
        with pytest.raises(OpdError, match="`dynamic`"):
            engines.check_rope(config, "toy", 65)
    engines.check_rope(LlamaConfig(**SHAPE), "toy", 65)


def test_vllm_is_not_to_cut_responses() -> None:
    with (
        pytest.raises(OpdError, match=r"`engine_options: max_model_len: 32` is less than .* 50 tokens"),
        vllm.open_engine("/none", "float32", 50, False, {"max_model_len": 32}),
    ):
        pass
