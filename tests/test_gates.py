"""Gates of whole responses: against plain loops, and through the tables of a phase."""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.shards import open_shard, open_writer
from pipeline.weights.gates import columns_read, gated
from pipeline.weights.phase import Part, compute
from schemas.config import Gate, Weights

response = st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=12))
factor = st.sampled_from([0.0, 0.25, 1.0, 2.0])


def repeats(ids: list[int]) -> bool:
    """Whether more than half of the 4-grams have been there before."""
    grams = Counter(tuple(ids[i : i + 4]) for i in range(len(ids) - 3))
    return sum(grams.values()) - len(grams) > sum(grams.values()) / 2


@settings(deadline=None, max_examples=50)
@given(st.lists(response, min_size=1, max_size=6), factor, factor)
def test_a_units_weight_has_the_factors_of_its_response(
    responses: list[tuple[bool, list[int]]], truncated: float, repetitive: float
) -> None:
    names = [f"r{i}" for i in range(len(responses))]
    rollouts = pl.DataFrame(
        {
            "rollout_id": names,
            "finish_reason": ["length" if cut else "stop" for cut, _ in responses],
            "response_ids": pl.Series([ids for _, ids in responses], dtype=pl.List(pl.Int32)),
        }
    )
    # Units in another order than the responses, as many as there are tokens and one more.
    units = [
        (name, 1.0 + i)
        for name, (_, ids) in zip(names[::-1], responses[::-1], strict=True)
        for i in range(1 + len(ids))
    ]
    table = pl.DataFrame({"rollout_id": [name for name, _ in units], "weight": [weight for _, weight in units]})
    gate = Gate(truncated=truncated, repetitive=repetitive)
    found = gated(table, rollouts.select("rollout_id", *columns_read(gate)), gate)
    of = {
        name: (truncated if cut else 1) * (repetitive if repeats(ids) else 1)
        for name, (cut, ids) in zip(names, responses, strict=True)
    }
    assert found["rollout_id"].equals(table["rollout_id"]) and found.columns == table.columns
    assert found["weight"].to_list() == [weight * of[name] for name, weight in units]


def test_open_gates_read_nothing() -> None:
    assert columns_read(Gate()) == () and columns_read(Gate(truncated=0)) == ("finish_reason",)
    assert set(columns_read(Gate(truncated=0, repetitive=2))) == {"finish_reason", "response_ids"}


@pytest.mark.parametrize("credit", ["immediate", "residual"])
def test_the_weights_of_a_phase_are_gated_and_nothing_else_is(credit: str, tmp_path: Path) -> None:
    """With an estimator that reads a gate's column too."""
    tiny.shards(tmp_path, count=1)
    rollouts, units = (tmp_path / name / "000.parquet" for name in ("rollouts", "units"))
    tables_of_units = list(open_shard(units, "units").row_groups())
    with open_writer(units, "units", {}, {"rollouts": open_shard(rollouts, "rollouts").manifest.sha256}) as writer:
        for table in tables_of_units:
            writer.write(table)
    tables = {}
    for name, gate in (("open", Gate()), ("shut", Gate(truncated=0.25, repetitive=0.0))):
        to = tmp_path / name / "000.parquet"
        compute([Part(rollouts, units, None, to)], Weights(scheme="iw_opd", credit=credit, gate=gate))
        tables[name] = pl.from_arrow(open_shard(to, "weights").read())
    ends = pl.from_arrow(open_shard(rollouts, "rollouts").read())
    cut = set(ends.filter(finish_reason="length")["rollout_id"])
    is_cut = np.array([name in cut for name in tables["open"]["rollout_id"]])
    assert is_cut.any() and not is_cut.all()
    np.testing.assert_allclose(
        tables["shut"]["weight"], tables["open"]["weight"] * np.where(is_cut, 0.25, 1), rtol=1e-6
    )
    assert tables["shut"].drop("weight").equals(tables["open"].drop("weight"))
