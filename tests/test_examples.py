"""The worked examples in docstrings: one response of three units, from the teacher's scores to the loss."""

import doctest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.align import student_view
from pipeline.align.tokens import TokenBytes
from pipeline.store.shards import open_shard, open_writer
from schemas.tables import arrow_schema
from train import batch, recipes, stream
from train.policy import UnitLogps


def log(*shares: float) -> list[float]:
    return np.log(shares).tolist()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the docstrings speak of: "abc" by a student with the tokens a, bc and b, read by a teacher with a, b and c."""
    rollout = {"rollout_id": "r", "prompt_id": "p", "sample": 0, "round": 0, "prompt_ids": [1, 3], "response": "abc"}
    rollout |= {"response_ids": [1, 2, 0], "behavior_logp": log(0.25, 0.125, 0.5), "finish_reason": "stop"}
    rows = [
        # token, its logp, where it starts and ends, candidates, stop, tail
        (0, 0.5, 0, 1, [0, 1], (0.5, 0.25), 0.125, 0.125),
        (1, 0.5, 1, 2, [1, 2], (0.5, 0.25), 0.125, 0.125),
        (2, 0.75, 2, 3, [2], (0.75,), 0.125, 0.125),
        (-1, 0.75, 3, 3, [0], (0.125,), 0.75, 0.125),
    ]
    scores = [
        {"rollout_id": "r", "pos": pos, "token_id": token, "entropy": 1.0, "byte_start": start, "byte_end": end}
        | {"logp": log(p)[0], "cand_id": ids, "cand_logp": log(*shares), "stop_logp": log(stop)[0]}
        | {"tail_logp": log(tail)[0], "log_z": None}
        for pos, (token, p, start, end, ids, shares, stop, tail) in enumerate(rows)
    ]
    tables = {
        "rollouts": pa.Table.from_pylist([rollout], schema=arrow_schema("rollouts")),
        "scores": pa.Table.from_pylist(scores, schema=arrow_schema("scores")),
    }
    spelled = pa.array([None, b"a", b"bc", b"b"], pa.large_binary())
    names: dict[str, Any] = {
        **tables,
        "student": TokenBytes("student", spelled, np.array([True, False, False, False]), np.ones(4, bool)),
        "student_stop": np.array([0]),
        "teacher_stop": np.array([3]),
        "pairs": np.array([1, 3, -1, -1]),
    }
    tables["units"] = student_view.student_view(**names)
    said, read = np.log([0.25, 0.125, 0.5]), tables["units"]["teacher_logp"].to_numpy()
    tables["weights"] = pa.table(
        {
            "rollout_id": ["r"] * 3,
            "unit": [0, 1, 2],
            "student_logp": said,
            "advantage": read - said,
            "credit": read - said,
            "weight": [1.0, 0.5, 0.25],
            "is_ratio": [1.0] * 3,
            **dict.fromkeys(("reward", "reference_logp"), pa.nulls(3, pa.float32())),
        }
    ).select(arrow_schema("weights").names)
    folder = tmp_path_factory.mktemp("example")
    kinds = ("rollouts", "units", "weights")
    for kind in kinds:
        with open_writer(folder / f"{kind}.parquet", kind, {}, {}) as writer:
            writer.write(tables[kind].cast(arrow_schema(kind)))
    names["shards"] = [tuple(open_shard(folder / f"{kind}.parquet", kind) for kind in kinds)]
    group = stream._decode(names["shards"][0], 0)
    names |= {"response": group.row(0), "made": batch.collate([group.row(0)])}
    # What the student gives each token and each unit's candidates; two units have an unused slot.
    token = torch.tensor(log(0.25, 0.125, 0.5))
    cand = torch.tensor([log(0.25, 0.5, 0.125), log(0.25, 0.125, 1.0), log(0.25, 0.5, 1.0)])
    return names | {"log_probs": UnitLogps(token, token, cand, torch.zeros(3))}


@pytest.mark.parametrize("module", [student_view, batch, stream, recipes], ids=lambda module: module.__name__)
def test_the_examples_say_what_is_so(module: ModuleType, example: dict[str, Any]) -> None:
    found = doctest.testmod(module, extraglobs=example, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed


def test_the_printed_recipe_of_ones_own_is_the_sampled_path(example: dict[str, Any]) -> None:
    code = (Path(__file__).parents[1] / "docs/how.md").read_text().split("# my_recipes.py,")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec("#" + code, names)
    ours = names["loss"](example["log_probs"], example["made"], {"clip": 0.5})
    sampled = recipes.losses(example["log_probs"], example["made"], recipes.config.Sampled(clip=0.5)).loss
    torch.testing.assert_close(ours, sampled)
