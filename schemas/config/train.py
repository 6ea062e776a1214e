"""The optimiser."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.config.section import Section, Text

Beta = Annotated[float, Field(ge=0, lt=1)]


class Lora(Section):
    """Low-rank adapters."""

    rank: int = Field(16, ge=1, description="rank of each update")
    alpha: int = Field(32, ge=1, description="updates are scaled by alpha / rank")
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the modules that get one, such as [q_proj, v_proj]; all-linear: every linear layer but the head",
    )


TRAIN_OPERATION = {"gradient_checkpointing", "save_every", "keep_states", "keep_last_state", "trackers"}
"""Keys of `train` that leave the trained weights as they are, so a round need not be trained again for them."""


class Train(Section):
    """The optimiser."""

    learning_rate: float = Field(4e-5, gt=0, le=1, description="peak learning rate of AdamW")
    warmup_steps: int = Field(4, ge=0, description="linear warm-up, in steps of the whole run")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate after the warm-up, over the whole run; constant: the peak"
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="share of the peak that linear and cosine end at, at the run's last step"
    )
    batch_size: int = Field(16, ge=1, description="responses per step")
    micro_batch_tokens: int = Field(
        4096, ge=1, description="padded tokens per forward pass, prompt and response; one response at least"
    )
    epochs: int = Field(1, ge=1, description="passes over a round's rollouts, which are its budget of steps")
    min_ess: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="end a round before its budget is spent once the effective sample size over the last steps' units of the "
        "policy in training over the one that the round started from falls below this share; the next round samples from there "
        "and may spend what was left. null: never",
    )
    grad_clip: float = Field(1.0, gt=0, description="gradient norm at most")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's decoupled weight decay")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's moments")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of an exponential moving average of the weights, which then is what a round ends with and "
        "what is sampled next; the optimiser goes on from the weights themselves, so that it takes no `min_ess`; null: none",
    )
    lora: Lora | None = Field(
        None,
        description="train adapters instead of all weights (pip install 'offline-opd[lora]'; `{}`: with the defaults below); "
        "a round's checkpoint has them merged, the next round goes on with the same adapters; null: all weights",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="compute layers again in backward instead of keeping what is in them: less memory, a third more compute; "
        "auto: where the estimate of what training takes without is more than nine tenths of what is free",
    )
    save_every: int = Field(50, ge=1, description="steps between resumable states")
    keep_states: int = Field(2, ge=1, description="newest states of a round that are kept, the final one included")
    keep_last_state: bool = Field(
        False,
        description="keep the optimiser's state of a finished run, 12 bytes a trained parameter; without it, if its last "
        "round is trained again, so are those before it",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="where each step's figures go beside train/metrics.jsonl: tensorboard (runs/<run>/tensorboard), wandb, "
        "trackio; fine-tuning (`sft`) has a log of its own; pip install 'offline-opd[trackers]'",
    )

    @model_validator(mode="after")
    def _a_round_starts_from_what_is_trained(self) -> "Train":
        if self.ema is not None and self.min_ess is not None:
            raise ValueError(
                f"`min_ess: {self.min_ess:g}` doesn't go with `ema: {self.ema:g}`: rounds sample from the average and train on "
                "from the weights themselves, so that `min_ess` would end a round by how far these two are apart before its "
                "first step; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _constant_does_not_decay(self) -> "Train":
        if self.schedule == "constant" and self.min_lr_ratio != type(self).model_fields["min_lr_ratio"].default:
            raise ValueError(f"`min_lr_ratio: {self.min_lr_ratio:g}` means nothing to `schedule: constant`")
        return self
