"""Row groups and shards are cut by tokens; what later stages hold at once doesn't depend on how long responses are."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.align.segments import LARGEST_OFFSET, list_offsets
from pipeline.infer import rollout_table
from pipeline.infer.rollout_table import row_groups, sampled_tables
from pipeline.infer.sample import sample
from pipeline.store.shards import open_writer
from pipeline.weights.phase import Part, _open
from schemas.config import Rollouts, Weights
from schemas.errors import OpdError


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 8), st.integers(1, 60))
def test_row_groups_are_whole_in_order_and_full(lengths: list[int], responses: int, tokens: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_table, "ROW_GROUP", responses)
        patch.setattr(rollout_table, "ROW_GROUP_TOKENS", tokens)
        found = row_groups(lengths)
    assert [i for cut in found for i in range(len(lengths))[cut]] == list(range(len(lengths)))
    for cut in found:
        assert 1 <= cut.stop - cut.start <= responses
        assert sum(lengths[cut]) <= tokens or cut.stop - cut.start == 1
    for cut, after in pairwise(found):  # and the next response would have been one too many
        assert cut.stop - cut.start == responses or sum(lengths[cut]) + lengths[after.start] > tokens


def test_the_default_runs_row_groups_are_those_of_256_responses() -> None:
    assert row_groups([16] * 600) == [slice(0, 256), slice(256, 512), slice(512, 600)]
    assert row_groups([4096] * 20) == [slice(0, 16), slice(16, 20)]
    assert row_groups([1 << 20, 1 << 20]) == [slice(0, 1), slice(1, 2)]


def test_a_batch_may_be_larger_than_a_row_group_and_changes_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_table, "ROW_GROUP", 4)
    monkeypatch.setattr(rollout_table, "rollout_table", lambda *arguments: arguments[3])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    wanted: Any = [SimpleNamespace(rollout_id=str(i)) for i in range(11)]
    prompts, calls = [np.arange(1, 3 + i % 3) for i in range(11)], []

    def sampled(batch_size: int) -> list[list[Any]]:
        def draw(own: Any, seeds: Any, steps: int, temperature: float, top_p: float, top_k: int, advance: Any) -> Any:
            calls.append(len(own))
            return sample(model, own, seeds, np.arange(9), steps, temperature, top_p, batch_size, top_k, advance)

        sampler: Any = SimpleNamespace(sample=draw)
        return list(sampled_tables(sampler, None, wanted, 0, prompts, 0, batch_size, 6, 1.0, 1.0))  # type: ignore[arg-type]

    few, many = sampled(2), sampled(10)
    assert calls == [4, 4, 3, 10, 1]
    assert [len(group) for group in few] == [4, 4, 3] and [len(group) for group in many] == [4, 4, 2, 1]
    for one, other in zip(
        (each for group in few for each in group), (each for group in many for each in group), strict=True
    ):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.behavior_logp, other.behavior_logp, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1024), ({"max_new_tokens": 4096}, 1024), ({"max_new_tokens": 32768}, 128), ({"shard_size": 100}, 100),
     ({"max_new_tokens": [16, 8192]}, 512), ({"shard_tokens": 1}, 1)],
)  # fmt: skip
def test_a_shard_has_as_many_responses_as_both_limits_let_in(options: dict[str, int], expected: int) -> None:
    assert Rollouts.model_validate({"rounds": 2, **options}).shard_responses == expected


def test_offsets_beyond_32_bits_are_refused() -> None:
    half = LARGEST_OFFSET // 2
    assert list_offsets(np.array([half, 0, half + 1])).to_pylist() == [0, half, half, LARGEST_OFFSET]
    with pytest.raises(OpdError, match=r"2,147,483,648 values .*scores\.k_max"):
        list_offsets(np.array([half, half + 2], np.int32))


def test_weights_hold_a_row_group_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is weighed at once are the responses of one row group, and together all of them."""
    rollouts, units, weights = tiny.shards(tmp_path_factory.mktemp("shards"), responses=20, group=8, count=1)[0]
    tables = list(units.row_groups())
    with open_writer(units.path, "units", {}, {"rollouts": rollouts.manifest.sha256}) as writer:
        for table in tables:
            writer.write(table)
    groups = list(_open(Part(rollouts.path, units.path, None, weights.path)).groups(Weights(), check=True))
    assert [len(group.rollouts) for group in groups] == [8, 8, 4]
    every = pl.concat(group.every for group in groups)
    assert every.equals(pl.read_parquet(units.path, columns=["rollout_id", "unit"]))
    for group in groups:
        assert set(group.own["rollout_id"]) <= set(group.rollouts["rollout_id"])
