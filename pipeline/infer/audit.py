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
    logits = model(input_ids=ids, **fewer).logits[0, -kept:].double()
    logp = torch.log_softmax(logits, -1).cpu().numpy()
    stopping = np.logaddexp.reduce(logp[-1, stop])
    realised = np.append(logp[np.arange(len(response)), response], stopping)
    counts = rows["cand_id"].combine_chunks().value_lengths().to_numpy()
    ids_kept, stored = (rows[name].combine_chunks().flatten().to_numpy() for name in ("cand_id", "cand_logp"))
    recomputed = logp[np.repeat(np.arange(len(counts)), counts), ids_kept]
    likely = stored > LIKELY
    return Deltas(np.abs(rows["logp"].to_numpy() - realised), np.abs(stored[likely] - recomputed[likely]))


def figures(found: Iterable[Deltas], dtype: str) -> dict[str, Any]:
    """What the manifest keeps of an audit: what was compared, the largest difference, and the mean difference of the realised
    tokens or of the candidates, whichever is larger."""
    every = list(found)
    pools = [np.concatenate([getattr(one, name) for one in every] or [[]]) for name in ("realised", "candidates")]
    return {
        "audit_dtype": dtype,
        "audit_responses": len(every),
        "audit_logps": sum(map(len, pools)),
        "audit_max_delta": round(max(float(pool.max(initial=0)) for pool in pools), 6),
        "audit_mean_delta": round(max(float(pool.mean()) if len(pool) else 0.0 for pool in pools), 6),
    }
