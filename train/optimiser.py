"""AdamW on float32 master weights under a low-precision model, and the learning-rate schedule."""

import math
from typing import Any

import torch

from schemas.config import Train


class MasterAdamW:
    """AdamW whose parameters are float32 copies of the model's; the model gets them back rounded after each step.

    In bf16 an update below 1/256 of a weight would vanish; the masters keep it.
    """

    def __init__(self, model: Any, config: Train) -> None:
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {name: p.detach().clone().float() for name, p in self._params.items()}
        self._config = config
        self._adam = torch.optim.AdamW(
            self._masters.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay
        )

    def step(self, learning_rate: float) -> float:
        """Clip the gradients that lie on the model, update, clear them. Returns the norm before clipping."""
        for name, param in self._params.items():
            self._masters[name].grad = None if param.grad is None else param.grad.float()
            param.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._config.grad_clip)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._publish()
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """Masters, moments and step count by name; `load` takes it back bit for bit."""
        out = {f"master/{name}": master for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for key, value in self._adam.state.get(master, {}).items():
                out[f"{key}/{name}"] = value
        return out

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        for name, master in self._masters.items():
            master.copy_(tensors[f"master/{name}"])
            moments = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors
            }
            if moments:
                # Copies: what is loaded must not change with what goes on. AdamW keeps `step` on the CPU.
                self._adam.state[master] = {
                    k: v.clone() if k == "step" else v.to(master.device, copy=True) for k, v in moments.items()
                }
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, param in self._params.items():
            param.copy_(self._masters[name])


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
