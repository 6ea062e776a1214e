"""Some responses and their units as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.store.rounding import rescaled
from schemas.tables import STOP_ID


@dataclass(frozen=True)
class Batch:
    """Some responses and their units as tensors. B responses, R response tokens in all, U units that are not masked.

    Attributes:
        ids, mask: int64 (B, T), prompt and response without its last token, right-padded with 0; 1 at real ids.
        rows: int64 (R,), flat index into (B * T) of the position that predicts each response token.
        targets: int64 (R,), the response tokens; STOP_ID where a unit is a stop.
        unit_row: int64 (U,), the unit's first token as an index into R.
        response_of_unit: int64 (U,), the unit's response as an index into B.
        token_unit: int64 (R,), the unit each token belongs to; U for tokens of masked units.
        token_behavior_logp: float32 (R,), nats, of each token where it was sampled (the sampler's, if that warped the policy).
        s_len, t_len: int64 (U,), tokens of the unit on either side; a stop counts one.
        teacher_logp, weight: float32 (U,).
        teacher_entropy: float32 (U,), nats, at the unit's start.
        t_log_z: float32 (U,), nats, see schema `units`; NaN where the scores lack `log_z`.
        behavior_logp: float32 (U,), nats, log-prob under what the response was sampled from, temperature and top-p applied (the
            weights' student_logp less log is_ratio, so up to that ratio's clip).
        policy_logp: float32 (U,), nats, under the policy that the weights were made with, which the round starts from.
        first_logp: float32 (U,), nats, under the policy that the first round started from, where `objective.reference` asks for
            it; else `policy_logp`.
        credit_shift: float32 (U,), credit less the advantage that it was formed of, as the weights stage saw and clipped them;
            0 where credit is immediate.
        reward: float32 (U,), the advantage of the response's outcome; 0 where there is none.
        cand_id: int64 (U, K), student ids, STOP_ID for the stop candidate; 0 in unused slots.
        cand_logp: float32 (U, K), -inf in unused slots.
        responses: names of the responses.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    unit_row: torch.Tensor
    response_of_unit: torch.Tensor
    token_unit: torch.Tensor
    token_behavior_logp: torch.Tensor
    s_len: torch.Tensor
    t_len: torch.Tensor
    teacher_logp: torch.Tensor
    teacher_entropy: torch.Tensor
    t_log_z: torch.Tensor
    behavior_logp: torch.Tensor
    policy_logp: torch.Tensor
    first_logp: torch.Tensor
    weight: torch.Tensor
    credit_shift: torch.Tensor
    reward: torch.Tensor
    cand_id: torch.Tensor
    cand_logp: torch.Tensor
    responses: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Response:
    """Views into a row group's arrays."""

    name: str
    prompt: np.ndarray
    response: np.ndarray
    behavior_logp: np.ndarray
    units: dict[str, np.ndarray]
    cand_count: np.ndarray
    cand_id: np.ndarray
    cand_logp: np.ndarray

    def copy(self) -> "Response":
        """The same without the row group."""
        units = {name: column.copy() for name, column in self.units.items()}
        arrays: dict[str, Any] = {
            name: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, units=units, **arrays)


def collate(responses: Sequence[Response]) -> Batch:
    """Tensors of some responses; see `Batch`.

    Of the response that `student_view` has as its example, to the prompt (1, 3), with three units of one student token each:
    row k of the two inputs predicts `targets[k]`, and a unit with fewer candidates than another has slots without mass.

    >>> batch = collate([response])
    >>> batch.ids, batch.rows, batch.targets
    (tensor([[1, 3, 1, 2]]), tensor([1, 2, 3]), tensor([ 1,  2, -1]))
    >>> batch.unit_row, batch.token_unit, batch.s_len, batch.t_len
    (tensor([0, 1, 2]), tensor([0, 1, 2]), tensor([1, 1, 1]), tensor([1, 2, 1]))
    >>> batch.teacher_logp.exp(), batch.weight
    (tensor([0.5000, 0.3750, 0.7500]), tensor([1.0000, 0.5000, 0.2500]))
    >>> batch.cand_id.tolist()
    [[1, 3, -1], [3, -1, 0], [1, -1, 0]]
    >>> batch.cand_logp.exp()
    tensor([[0.5000, 0.2500, 0.1250],
            [0.5000, 0.1250, 0.0000],
            [0.1250, 0.7500, 0.0000]])
    """
    lengths = np.array([len(r.response) for r in responses])
    inputs = [np.concatenate([r.prompt, r.response[:-1]]) for r in responses]
    width = max(map(len, inputs))
    ids = np.zeros((len(responses), width), np.int64)
    for i, row in enumerate(inputs):
        ids[i, : len(row)] = row
    mask = np.arange(width) < np.array([len(row) for row in inputs])[:, None]
    first = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(first, lengths)
    rows = np.repeat([i * width + len(r.prompt) - 1 for i, r in enumerate(responses)], lengths) + within
    targets = np.concatenate([r.response for r in responses]).astype(np.int64)
    units = {key: np.concatenate([r.units[key] for r in responses]) for key in responses[0].units}
    keep = units["comparable"]
    response_of_unit = np.repeat(np.arange(len(responses)), [len(r.cand_count) for r in responses])
    unit_row = first[response_of_unit] + units["s_start"]
    targets[unit_row[units["stops"]]] = STOP_ID
    s_len = units["s_len"].astype(np.int64)
    number = np.where(keep, np.cumsum(keep) - 1, keep.sum())
    token_unit = np.repeat(number, s_len)  # units cover every token once, in order
    counts = np.concatenate([r.cand_count for r in responses])
    slots = max(1, int(counts.max(initial=0)))
    used = np.arange(slots) < counts[:, None]
    cand_id = np.zeros(used.shape, np.int64)
    cand_logp = np.full(used.shape, -np.inf, np.float32)
    cand_id[used] = np.concatenate([r.cand_id for r in responses])
    kept = np.concatenate([r.cand_logp for r in responses])
    cand_logp[used] = rescaled(kept, counts, units["tail_logp"], units["dropped_logp"])
    shift = units["credit"] - units["advantage"]
    first = np.where(np.isnan(units["reference_logp"]), units["student_logp"], units["reference_logp"])
    behavior = units["student_logp"] - np.log(units["is_ratio"])
    arrays: dict[str, Any] = {
        "ids": ids,
        "mask": mask.astype(np.int64),
        "rows": rows,
        "targets": targets,
        "unit_row": unit_row[keep].astype(np.int64),
        "response_of_unit": response_of_unit[keep],
        "token_unit": token_unit,
        "token_behavior_logp": np.concatenate([r.behavior_logp for r in responses]),
        "s_len": s_len[keep],
        "t_len": np.maximum(units["t_len"], 1)[keep].astype(np.int64),
        "teacher_logp": units["teacher_logp"][keep].astype(np.float32),
        "teacher_entropy": units["teacher_entropy"][keep].astype(np.float32),
        "t_log_z": units["t_log_z"][keep].astype(np.float32),
        "behavior_logp": behavior[keep].astype(np.float32),
        "policy_logp": units["student_logp"][keep].astype(np.float32),
        "first_logp": first[keep].astype(np.float32),
        "weight": units["weight"][keep].astype(np.float32),
        "credit_shift": shift[keep].astype(np.float32),
        "reward": np.nan_to_num(units["reward"][keep].astype(np.float32)),
        "cand_id": cand_id[keep],
        "cand_logp": cand_logp[keep],
    }
    return Batch(**{k: torch.from_numpy(v) for k, v in arrays.items()}, responses=tuple(r.name for r in responses))
