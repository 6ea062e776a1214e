"""Gates: factors of the weights of whole responses that say little, or mislead.

As training goes on, rollouts may suddenly grow long, repeat themselves and be cut, and then make up most of what is trained on
(StableOPD, arXiv 2604.08527). Its cures are a divergence from a reference and other rollouts mixed in; weighing such responses
down, or leaving them out, is the plain remedy, which needs neither.
"""

import polars as pl

from schemas.config import Gate

NGRAM = 4
REPETITIVE = 0.5
"""seq-rep-4 above which most of a response's 4-grams have been there before."""


def truncated(factor: float) -> pl.Expr:
    """`factor` of a response that was cut at the longest length, else 1. Reads `finish_reason`."""
    return pl.when(pl.col("finish_reason") == "length").then(factor).otherwise(1.0)


def repetitive(factor: float) -> pl.Expr:
    """`factor` of a response whose seq-rep-4 is above 1/2, else 1. Reads `response_ids`."""
    return pl.when(pl.col("response_ids").map_batches(seq_rep, pl.Float64) > REPETITIVE).then(factor).otherwise(1.0)


def columns_read(gate: Gate) -> tuple[str, ...]:
    """The columns of rollouts that `gated` takes beside `rollout_id`; none where every gate is open."""
    return ("finish_reason",) * (gate.truncated != 1) + ("response_ids",) * (gate.repetitive != 1)


def gated(table: pl.DataFrame, rollouts: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """Units with their column `weight` times the factors of their response. A response to which both apply has both.

    Args:
        table: units with `rollout_id` and `weight`.
        rollouts: `rollout_id` and what `columns_read` names, a row for each response of `table` at least.
    """
    factors = {"finish_reason": truncated(gate.truncated), "response_ids": repetitive(gate.repetitive)}
    for name in columns_read(gate):
        of_response = rollouts.select("rollout_id", gate=factors[name])
        table = table.join(of_response, on="rollout_id", how="left", maintain_order="left")
        table = table.with_columns(weight=pl.col("weight") * pl.col("gate")).drop("gate")
    return table


def seq_rep(ids: pl.Series) -> pl.Series:
    """seq-rep-4 of each response: 1 - distinct/all 4-grams of its tokens, 0 where it has none.

    Welleck et al. (arXiv 1908.04319), section 4. `ids` is a list column (responses,); float64 (responses,).
    """
    responses = pl.DataFrame({"ids": ids}).with_row_index("response")
    tokens = responses.filter(pl.col("ids").list.len() > 0).explode("ids")
    names = [f"token_{k}" for k in range(NGRAM)]
    grams = tokens.select(
        "response",
        *(pl.col("ids").shift(-k).alias(name) for k, name in enumerate(names)),
        last=pl.col("response").shift(1 - NGRAM),
    ).filter(pl.col("last") == pl.col("response"))
    rep = grams.group_by("response").agg(seq_rep=1 - pl.struct(names).n_unique() / pl.len())
    joined = responses.join(rep, on="response", how="left", maintain_order="left")
    return joined["seq_rep"].fill_null(0.0)
