"""Gates: factors of the weights of whole responses that say little, or mislead, and of units by their response's outcome.

As training goes on, rollouts may suddenly grow long, repeat themselves and be cut, and then make up most of what is trained on
(StableOPD, arXiv 2604.08527). Its cures are a divergence from a reference and other rollouts mixed in; weighing such responses
down, or leaving them out, is the plain remedy, which needs neither.

Whether a response is right says how far the teacher is to be followed in it: all the way where it is wrong (KDRL's mask, arXiv
2506.02208), or where teacher and outcome draw a unit to the same side (SG-OPD, arXiv 2606.09304; OPDVR, arXiv 2608.24696). What
can't be judged passes.
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


def by_outcome(right: float, wrong: float) -> pl.Expr:
    """The factor of a right or a wrong response, 1 of one that can't be judged. Reads `right`."""
    return pl.when(pl.col("right")).then(right).when(~pl.col("right")).then(wrong).otherwise(1.0)


def agreement(agreeing: float, conflicting: float) -> pl.Expr:
    """The factor of a unit by whether its advantage has the sign of its response's outcome; 1 where it has none of either.

    With 1 and 0 the sampled path's loss is OPDVR's, -R log p_S: R = max(0, A) where the response is right, and min(0, A) where
    it is wrong. Signs are of the policy that the weights are made with. Reads `right` and `advantage`.
    """
    towards = pl.col("advantage") * pl.when(pl.col("right")).then(1).when(~pl.col("right")).then(-1)
    return pl.when(towards > 0).then(agreeing).when(towards < 0).then(conflicting).otherwise(1.0)


def columns_read(gate: Gate) -> tuple[str, ...]:
    """The columns of rollouts that `gated` takes beside `rollout_id`; none where every gate is open."""
    return (
        ("finish_reason",) * (gate.truncated != 1)
        + ("response_ids",) * (gate.repetitive != 1)
        + ("right",) * gate.judges
    )


def gated(table: pl.DataFrame, rollouts: pl.DataFrame, gate: Gate) -> pl.DataFrame:
    """Units with their column `weight` times the factors of their response. A response to which several apply has them all.

    Args:
        table: units with `rollout_id` and `weight`, and `advantage` where outcomes are read.
        rollouts: `rollout_id` and what `columns_read` names, a row for each response of `table` at least.
    """
    factors = {
        "finish_reason": truncated(gate.truncated),
        "response_ids": repetitive(gate.repetitive),
        "right": by_outcome(gate.right, gate.wrong),
    }
    for name in columns_read(gate):
        of_response = rollouts.select("rollout_id", gate=factors[name], **({name: name} if name == "right" else {}))
        table = table.join(of_response, on="rollout_id", how="left", maintain_order="left")
        factor = pl.col("gate") * agreement(gate.agreeing, gate.conflicting) if name == "right" else pl.col("gate")
        table = table.with_columns(weight=pl.col("weight") * factor).drop(of_response.columns[1:])
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
