"""What `pipeline.infer.vllm` has run inside of vLLM, wherever its model is: in this process or in workers of its own.

vLLM imports this module by name. Only plain values go in (`extra_args` of a request) and out (`Drawn.take_drawn`), so
that they can cross processes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from pipeline.infer.sample import draw, uniforms_of


@dataclass
class _Request:
    """One response under way; arrays have a place for each token it may come to."""

    rules: dict[str, Any]
    uniforms: np.ndarray
    logps: np.ndarray
    top_id: np.ndarray


_requests: dict[int, _Request] = {}
"""By the key that `pipeline.infer.vllm.sample` gave each."""


def _request(rules: dict[str, Any]) -> _Request:
    steps = rules["steps"]
    logps, top_id = np.zeros((2, steps), np.float32), np.zeros((steps, rules["top_k"]), np.int32)
    return _Request(rules, uniforms_of(rules["seed"], steps), logps, top_id)


class Drawn:
    """Methods that vLLM adds to its workers."""

    def take_drawn(self, keys: list[int]) -> list[tuple[bytes, bytes]]:
        """Each request's log-probs, float32 (2, steps), and likeliest ids, int32 (steps, top_k); nothing where none drew."""
        taken = [_requests.pop(key) for key in keys if key in _requests]
        return [(request.logps.tobytes(), request.top_id.tobytes()) for request in taken]


class Drawer(LogitsProcessor):
    """Draws each row's token with `pipeline.infer.sample.draw` and leaves it the only one possible.

    vLLM also asks for draws at the ends of unfinished prefill chunks and throws them away, and may preempt a request and
    run it again. Neither does harm: how many tokens are out says which draw this is.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[_Request, list[int]]] = {}
        """By row of the batch: a request and the ids that it has so far, a list that vLLM goes on to fill."""

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest id changes."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests through the batch's rows."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, out in batch_update.added:
            rules = (params.extra_args or {}).get("draw")
            self.rows.pop(index, None)
            if rules is not None:
                if rules["key"] not in _requests:
                    _requests[rules["key"]] = _request(rules)
                self.rows[index] = (_requests[rules["key"]], out)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if direction == MoveDirectionality.SWAP and replaced is not None:
                self.rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, vocab): -inf but for each row's draw."""
        if not self.rows:  # vLLM's own requests, before ours
            return logits
        assert sorted(self.rows) == list(range(len(logits))), "every request in the batch is ours"
        rows = [self.rows[index] for index in range(len(logits))]
        steps = [len(out) for _, out in rows]
        rules = rows[0][0].rules  # one call's requests have all but key and seed in common
        uniform = torch.tensor([request.uniforms[step] for (request, _), step in zip(rows, steps, strict=True)])
        stop = torch.tensor(rules["stop"], device=logits.device)
        draws = draw(logits, uniform.to(logits.device), stop, rules["temperature"], rules["top_p"], rules["top_k"])
        logps, top_id = draws.logps.cpu().numpy(), draws.top_id.cpu().numpy()
        for index, ((request, _), step) in enumerate(zip(rows, steps, strict=True)):
            request.logps[:, step], request.top_id[step] = logps[:, index], top_id[index]
        return logits.fill_(-torch.inf).scatter_(1, draws.token[:, None], 0.0)
