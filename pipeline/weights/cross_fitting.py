"""Estimates that need more than one response, as sums by key: a shard's are small, and `add` those of two shards. Whoever
computes them, they are the same bits as long as shards are added in one order. Folds are of whole responses, so that no
estimate at a response depends on that response.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from pipeline.align.units import UNCOMPARED
from schemas.errors import OpdError

FOLDS = 5
POSITION_EDGES = tuple(2**i for i in range(16))
"""Units; bins of positions double in width."""
SURPRISAL_EDGES = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
"""nats; bins of -log pi_ref."""
RIDGE = 1.0
"""Pseudo-units of the value model's penalty."""
FEATURES = ("one", "log_position", "entropy", "tail", "previous_advantage", "previous_surprisal", "mean_advantage")
RESIDUAL_KEYS: dict[str, tuple[str, ...]] = {
    "token": ("fold", "token_id"),
    "bin": ("fold", "position_bin", "surprisal_bin"),
    "all": ("fold",),
}
"""The residual's kinds of sums and what each is keyed by."""

Sums = dict[str, pl.DataFrame]
"""Counts and sums of a shard or of several, by kind: what `sums_by` gives for its keys."""


def tokens_of_units(
    units: pl.DataFrame, rollouts: pl.DataFrame, column: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of a list column of rollouts, flat, and int64 (units,) where each unit's tokens start and end in them.

    A unit whose rollout is missing is empty. Raises OpdError when a unit reaches beyond its response.
    """
    lists = rollouts.select("rollout_id", column, length=pl.col(column).list.len().fill_null(0).cast(pl.Int64))
    places = lists.select("rollout_id", "length", offset=pl.col("length").cum_sum() - pl.col("length"))
    joined = units.select("rollout_id", "s_start", "s_len").join(
        places, on="rollout_id", how="left", maintain_order="left"
    )
    beyond = joined.filter(pl.col("s_start") + pl.col("s_len") > pl.col("length"))
    if len(beyond):
        raise OpdError(
            f"rollout {beyond['rollout_id'][0]}: a unit reaches beyond the {beyond['length'][0]} values of `{column}`; "
            "these units are of other rollouts: make them again"
        )
    start = joined.select((pl.col("offset") + pl.col("s_start")).fill_null(0)).to_series()
    end = joined.select((pl.col("offset") + pl.col("s_start") + pl.col("s_len")).fill_null(0)).to_series()
    # An empty list would explode to a null.
    flat = lists.filter(pl.col("length") > 0)[column].explode()
    return flat.to_numpy(), start.to_numpy().astype(np.int64), end.to_numpy().astype(np.int64)


def folds_of(rollout_ids: pl.Series) -> pl.Series:
    """Fold of each response, 0 to FOLDS - 1: CRC-32 of its name modulo FOLDS, wherever the response is cut into shards."""
    names = rollout_ids.unique()
    folds = [zlib.crc32(name.encode()) % FOLDS for name in names]
    return rollout_ids.replace_strict(names, folds).cast(pl.Int64).alias("fold")  # none stay strings


def sums_by(table: pl.DataFrame, keys: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """Count and float64 sums of `values` by `keys`: keys, `count`, and `<value>_sum` each, sorted by keys.

    Added one by one in row order, whatever the number of threads.
    """
    groups = table.select(keys).unique().sort(keys)
    at = table.select(keys).join(groups.with_row_index("group"), on=keys, how="left", maintain_order="left")["group"]
    index = at.to_numpy().astype(np.int64)
    sums = {f"{name}_sum": np.bincount(index, table[name].cast(pl.Float64).to_numpy(), len(groups)) for name in values}
    return groups.with_columns(
        count=pl.Series(np.bincount(index, minlength=len(groups)), dtype=pl.Float64)
    ).with_columns(pl.Series(name, column, dtype=pl.Float64) for name, column in sums.items())


def add(left: Sums, right: Sums) -> Sums:
    """Sums over the units of both sides, in float64 and sorted by their keys.

    Floating-point sums depend on their order: add shards from the first to the last, and it is always the same bits.
    """
    return {kind: _add(left[kind], right[kind]) for kind in left}


def _add(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    at = left.columns.index("count")  # keys, count, sums: as `sums_by` has them
    keys, values = left.columns[:at], left.columns[at:]
    both = left.join(right, on=keys, how="full", coalesce=True)
    added = [(pl.col(name).fill_null(0.0) + pl.col(f"{name}_right").fill_null(0.0)).alias(name) for name in values]
    # One chunk, for a sum over several is of chunks.
    return both.select(*keys, *added).sort(keys).rechunk()


def position_sums(table: pl.DataFrame, values: Sequence[str]) -> pl.DataFrame:
    """`sums_by` the column `unit`: over the responses that have a unit at each position."""
    return sums_by(table, ["unit"], values)


def value_features(units: pl.DataFrame) -> pl.DataFrame:
    """Add the columns FEATURES: what is known before a unit is sampled, from cached columns only.

    Args:
        units: rollout_id, unit, cand_logp, tail_logp (schema `units`), advantage and student_logp, in order.
    Returns:
        one; log(1 + unit), not the share of the response, whose length later units decide; entropy in nats of the teacher's
        kept candidates where the unit starts, and the teacher's mass outside them (both 0 when masked); advantage and
        surprisal of the unit before; mean advantage of all units before (0 at the first).
    """
    value = pl.col("advantage")
    logp = pl.element().filter(pl.element() > -np.inf)
    columns = {
        "one": pl.lit(1.0),
        "log_position": (pl.col("unit") + 1).cast(pl.Float64).log(),
        "entropy": pl.col("cand_logp").cast(pl.List(pl.Float64)).list.eval(-logp.exp() * logp).list.sum(),
        "tail": pl.col("tail_logp").cast(pl.Float64).exp(),
        "previous_advantage": value.shift(1).over("rollout_id"),
        "previous_surprisal": -pl.col("student_logp").shift(1).over("rollout_id"),
        "mean_advantage": ((value.cum_sum() - value) / pl.int_range(pl.len()).clip(lower_bound=1)).over("rollout_id"),
    }
    return units.with_columns(**columns).with_columns(pl.col(FEATURES).cast(pl.Float64).fill_null(0.0))


def value_sums(table: pl.DataFrame) -> Sums:
    """Sums of the value model's normal equations, kind `value`, by `fold`: `xx_<i>_<j>_sum` and `xy_<i>_sum`.

    Args:
        table: FEATURES, `fold`, and `target`, the discounted return to go in nats.
    """
    n = range(len(FEATURES))
    xx = {f"xx_{i}_{j}": pl.col(FEATURES[i]) * pl.col(FEATURES[j]) for i in n for j in n if i <= j}
    xy = {f"xy_{i}": pl.col(FEATURES[i]) * pl.col("target") for i in n}
    return {"value": sums_by(table.select("fold", **xx, **xy), ["fold"], [*xx, *xy])}


def values(table: pl.DataFrame, sums: Sums) -> pl.Series:
    """V_t of every unit, nats: ridge regression of the return to go on FEATURES, fitted on the other folds' responses.

    In closed form, beta = (X'X + RIDGE I)^-1 X'y over the other folds' sums (`value_sums`). With no other fold V is 0.
    """
    n = range(len(FEATURES))
    beta = np.zeros((FOLDS, len(FEATURES)))
    for fold in range(FOLDS):  # a handful of small systems
        others = sums["value"].filter(pl.col("fold") != fold).sum()
        if not others["count"].item():
            continue
        xx = np.array([[others[f"xx_{min(i, j)}_{max(i, j)}_sum"].item() for j in n] for i in n])
        xy = np.array([others[f"xy_{i}_sum"].item() for i in n])
        beta[fold] = np.linalg.solve(xx + RIDGE * np.eye(len(FEATURES)), xy)
    features = table.select(FEATURES).to_numpy()
    return pl.Series("value", np.einsum("ij,ij->i", features, beta[table["fold"].to_numpy()]), dtype=pl.Float64)


def group_keys(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add `prompt_id` (of `rollouts`) and `total`, the response's whole return: its sum of advantages, nats."""
    prompts = rollouts.select("rollout_id", "prompt_id")
    total = pl.col("advantage").sum().over("rollout_id")
    return units.with_columns(total=total).join(prompts, on="rollout_id", how="left", maintain_order="left")


def group_sums(table: pl.DataFrame) -> Sums:
    """Number of responses and sum of their returns by prompt, kind `group`; `table` is what `group_keys` gives."""
    responses = table.unique("rollout_id", keep="first", maintain_order=True)
    return {"group": sums_by(responses, ["prompt_id"], ["total"])}


def group(table: pl.DataFrame, sums: Sums) -> pl.Series:
    """R_i less the mean R_j of the *other* responses j to the same prompt, nats; R = sum of A. 0 stands for no others.

    RLOO's leave-one-out baseline (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740) with the return of reverse KL,
    R = log p_T - log p_S of the whole response, and, like RLOO's, the same at every unit. R_i is the return to go and what
    came before, which depends on the history only and adds nothing to the expected gradient; neither does the baseline, which
    depends on other responses only. A response without any unit counts as none.
    """
    both = table.select("prompt_id", "total").join(sums["group"], on="prompt_id", how="left", maintain_order="left")
    own, others = pl.col("total"), pl.col("count") - 1
    mean = pl.when(others > 0).then((pl.col("total_sum") - own) / others).otherwise(0.0)
    return both.select(group=own - mean).to_series()


def residual_keys(units: pl.DataFrame, rollouts: pl.DataFrame) -> pl.DataFrame:
    """Add what Lightning OPD 2.0's residual groups by: `fold`, `token_id`, `position_bin`, `surprisal_bin`.

    Args:
        units: what `credit.advantages` gives; its student_logp stands for log pi_ref.
        rollouts: rollout_id and response_ids.
    Returns:
        `units` with the fold of the response, the first student token of the unit, and the bins of its index and of
        -student_logp by POSITION_EDGES and SURPRISAL_EDGES (bins hold their lower edge).
    """
    ids, start, end = tokens_of_units(units, rollouts, "response_ids")
    token = np.where(end > start, np.append(ids, -1)[start], -1)
    return units.with_columns(
        folds_of(units["rollout_id"]),
        token_id=pl.Series(token, dtype=pl.Int32),
        position_bin=_bin(pl.col("unit"), POSITION_EDGES),
        surprisal_bin=_bin(-pl.col("student_logp"), SURPRISAL_EDGES),
    )


def _bin(value: pl.Expr, edges: Sequence[float]) -> pl.Expr:
    return pl.sum_horizontal([(value >= edge).cast(pl.Int32) for edge in edges])


def residual_sums(table: pl.DataFrame) -> Sums:
    """First pass of the residual over a shard: counts and sums of d by `token`, `bin` and `all` of RESIDUAL_KEYS.

    `table` is what `residual_keys` gives; d = advantage; masked units are left out.
    """
    compared = table.filter(~pl.col("kind").is_in(UNCOMPARED))
    return {kind: sums_by(compared, keys, ["advantage"]) for kind, keys in RESIDUAL_KEYS.items()}


def residual(table: pl.DataFrame, sums: Sums) -> pl.Series:
    """Second pass: d - (mean d by token id + mean d by (position bin, surprisal bin)) / 2, nats; 0 when masked.

    d = log pi_T - log pi_ref. The cross-fitted residual of Lightning OPD 2.0 (arXiv 2607.28449), whose bins we chose: it
    takes off what a teacher that differs from the SFT teacher says about tokens and places in general. The means are over
    the other folds' responses; a key that those lack has their overall mean, and 0 when there are no others.

    Args:
        table: what `residual_keys` gives.
        sums: what `residual_sums` gives, of this shard or added over many.
    """
    means = []
    for kind, keys in RESIDUAL_KEYS.items():
        part = sums[kind]
        rest = [key for key in keys if key != "fold"]
        over = [pl.col(name).sum().over(rest) if rest else pl.col(name).sum() for name in ("advantage_sum", "count")]
        # Sums without the fold itself; a key that one fold alone has seen has none.
        left = part.select(*keys, total=over[0] - pl.col("advantage_sum"), n=over[1] - pl.col("count"))
        mean = pl.when(pl.col("n") > 0).then(pl.col("total") / pl.col("n"))
        means.append(table.select(keys).join(left, on=keys, how="left", maintain_order="left").select(mean).to_series())
    overall = means[2].fill_null(0.0)
    by_token, by_bin = (mean.zip_with(mean.is_not_null(), overall) for mean in means[:2])
    d = table["advantage"].cast(pl.Float64)
    return (
        (d - (by_token + by_bin) / 2)
        .zip_with(~table["kind"].is_in(UNCOMPARED), pl.zeros(len(table), eager=True))
        .alias("residual")
    )
