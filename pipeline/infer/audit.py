"""An independent look at stored scores: one plain forward of the whole model for one response at a time."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.store.cache import audit_note
from pipeline.store.records import read_record
from pipeline.store.shards import read_manifest
from schemas.records import Audited

LIKELY = -4.0
"""nats; candidates below it are not compared, for they are stored with fewer digits than the comparison needs."""

CHUNK_BYTES = 64 << 20
"""float64 log-probs held at once, bytes: 32 rows of a 262k vocabulary."""

UNAUDITED = "unaudited"
"""Figure of a scores shard's manifest that says why its audit could not be done."""


def unaudited(scores: Path) -> str | None:
    """Why scores that a manifest tells of were never audited; None where they were, then or later.

    Raises OpdError when the manifest or the note of a later audit is damaged.
    """
    manifest, note = read_manifest(scores), audit_note(scores)
    if UNAUDITED not in manifest.figures:
        return None
    if note.exists() and read_record(note, Audited, "opd audit").scores == manifest.sha256:
        return None
    return str(manifest.figures[UNAUDITED])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, of the GPU or of the machine."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in words)


def choose(total: int, count: int, seed: str) -> np.ndarray:
    """Which of `total` responses to look at, ascending: drawn without replacement, the same for the same seed (hex)."""
    rng = np.random.default_rng(int(seed[:16], 16))
    return np.sort(rng.choice(total, min(count, total), replace=False))


def in_precision(model: Any, dtype: str, own: str) -> tuple[Any, str]:
    """A model in another precision, and which one it is in then: a quantised one stays in its `own`, for what its weights are
    without their scales is no model."""
    if getattr(model.config, "quantization_config", None) is not None:
        return model, own
    return model.to(getattr(torch, dtype)), dtype


@dataclass(frozen=True)
class Deltas:
    """|stored - recomputed| of one response, nats, float64: of realised tokens and the end's stopping; of candidates."""

    realised: np.ndarray
    candidates: np.ndarray


@torch.inference_mode()
def deltas(model: Any, prompt: np.ndarray, response: np.ndarray, stop: np.ndarray, rows: pa.Table) -> Deltas:
    """Score one response again; candidates above LIKELY are compared.

    No batch, no padding, no shared prefix, no chunk of a head: what `score` does to be fast is not done here. Of the prompt no
    logits are asked for, where the model's own forward can be told so.

    Args:
        model: the whole teacher, in the precision to compare with.
        prompt, response: token ids.
        stop: ids that end a response.
        rows: the response's rows of a scores shard, its end row too.
    """
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None].to(model.device)
    kept = len(response) + 1
    told = inspect.signature(model.forward).parameters
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in told else {}
    logits = model(input_ids=ids, **fewer).logits[0, -kept:]
    counts = rows["cand_id"].combine_chunks().value_lengths().to_numpy()
    ids_kept, stored = (rows[name].combine_chunks().flatten().to_numpy() for name in ("cand_id", "cand_logp"))
    ends = np.cumsum([0, *counts])
    realised, recomputed, step = [], [], max(1, CHUNK_BYTES // (8 * logits.shape[1]))
    for start in range(0, kept, step):
        logp = torch.log_softmax(logits[start : start + step].double(), -1)
        own, of_row = response[start : start + step], np.repeat(np.arange(len(logp)), counts[start : start + step])
        realised.append(_at(logp, np.arange(len(own)), own))
        recomputed.append(_at(logp, of_row, ids_kept[ends[start] : ends[start + len(logp)]]))
    realised.append(np.logaddexp.reduce(_at(logp, np.full(len(stop), -1), stop), keepdims=True))
    likely = ~(stored <= LIKELY)  # what is no number is compared
    return Deltas(
        np.abs(rows["logp"].to_numpy() - np.concatenate(realised)),
        np.abs(stored[likely] - np.concatenate(recomputed)[likely]),
    )


def _at(logp: torch.Tensor, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = (torch.from_numpy(index.astype(np.int64)).to(logp.device) for index in (rows, ids))
    return logp[tuple(at)].cpu().numpy()


def figures(found: Iterable[Deltas], dtype: str) -> dict[str, Any]:
    """What the manifest keeps of an audit: what was compared, the largest difference, and the mean difference of the realised
    tokens or of the candidates, whichever is larger; NaN where something compared is."""
    every = list(found)
    pools = [np.concatenate([getattr(one, name) for one in every] or [[]]) for name in ("realised", "candidates")]
    return {
        "audit_dtype": dtype,
        "audit_responses": len(every),
        "audit_logps": sum(map(len, pools)),
        "audit_max_delta": round(float(np.max([pool.max(initial=0) for pool in pools])), 6),
        "audit_mean_delta": round(float(np.max([pool.mean() if len(pool) else 0.0 for pool in pools])), 6),
    }
