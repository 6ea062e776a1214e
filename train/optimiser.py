"""AdamW on float32 master weights under a low-precision model, and the learning-rate schedule."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from schemas.config import Train
from schemas.errors import OpdError
from train.distributed import full, like, sum_gradients


class MasterAdamW:
    """AdamW whose parameters are float32 copies of the model's; the model gets them back rounded after each step.

    In bf16 an update below 1/256 of a weight would vanish; the masters keep it. For the same reason gradients are summed on
    the masters: as soon as a backward pass has a parameter's, it is added there in float32 and taken off the model. With
    `train.ema` an exponential moving average of the masters runs along, starting at them. Of a sharded model (FSDP2), each
    rank has its part of all of it.
    """

    def __init__(self, model: Any, config: Train) -> None:
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {name: p.detach().clone().float() for name, p in self._params.items()}
        self._average = {name: master.clone() for name, master in self._masters.items()} if config.ema else {}
        for name, param in self._params.items():
            param.register_post_accumulate_grad_hook(partial(_hand_over, self._masters[name]))
        self._config = config
        # Fused: one pass over memory instead of one for each operation, with the same arithmetic but for its last bits.
        self._adam = torch.optim.AdamW(
            self._masters.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def step(self, learning_rate: float) -> float:
        """Sum the gradients of backward passes since the last step over ranks, clip, update, clear them.

        Returns the norm before clipping.
        """
        masters = list(self._masters.values())
        sum_gradients(masters)
        norm = full(torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(masters, self._config.grad_clip, norm)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad()
        for name, average in self._average.items():
            average.lerp_(self._masters[name], 1 - self._config.ema)  # type: ignore[operator]
        self._publish()
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """Masters, moments, step count and average by name, as they lie here; `load` takes them back bit for bit, whole."""
        out: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            kept = {"master": master, **self._adam.state.get(master, {})}
            if self._average:
                kept["ema"] = self._average[name]
            out |= {f"{key}/{name}": value for key, value in kept.items()}
        return out

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from the whole tensors of a `state`, of any number of ranks. Raises OpdError for one of other parameters."""
        theirs = {name.removeprefix("master/") for name in tensors if name.startswith("master/")}
        if theirs != self._masters.keys():
            raise OpdError(
                f"the training state before this one holds {len(theirs)} weights, and {len(self._masters)} are trained now, "
                "not all the same; train the rounds before this one again with this `train.lora`"
            )
        for name, master in self._masters.items():
            master.copy_(like(tensors[f"master/{name}"], master))
            if self._average:
                before = tensors.get(f"ema/{name}", tensors[f"master/{name}"])  # an average may start at any round
                self._average[name].copy_(like(before, master))
            moments = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors
            }
            if moments:
                # Copies: what is loaded must not change with what goes on. Of `step` every rank has all.
                self._adam.state[master] = {
                    k: v.to(master.device, copy=True) if k == "step" else like(v, master) for k, v in moments.items()
                }
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, param in self._params.items():
            param.copy_(self._masters[name])


def _hand_over(master: torch.Tensor, param: torch.Tensor) -> None:
    """Add the gradient of a backward pass to its master's, in float32, and clear it; both sharded alike, or neither."""
    grad, param.grad = param.grad, None
    if master.grad is None:
        master.grad = grad.float()  # type: ignore[union-attr]
    else:
        master.grad += grad  # type: ignore[arg-type]


def learning_rate(config: Train, step: int, total: int) -> float:
    """The rate at a step of the run (counted from 0): linear warm-up to the peak, then `schedule`.

    linear and cosine end at `min_lr_ratio` of the peak at the run's last step; cosine is half a period, without restarts
    (SGDR eq. 5, arXiv 1608.03983); constant stays at the peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = min(1.0, (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps))
    decayed = {"linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2, "constant": 0.0}[config.schedule]
    return config.learning_rate * (1 - (1 - config.min_lr_ratio) * decayed)
