"""Fine-tuning on the teacher's own answers, before the first round."""

from pydantic import Field, model_validator

from schemas.config.rollouts import Rollouts
from schemas.config.section import Section
from schemas.config.train import Train


class Sft(Section):
    """Fine-tuning on the teacher's own answers, before the first round. All else of the optimiser is as `train` has it."""

    prompts: int = Field(
        0,
        ge=0,
        description="the first so many train prompts are answered by the teacher, with its own prompt, template and engine; "
        "the student is fine-tuned on these answers, and the first round samples from what that makes of it (Lightning OPD's "
        "first half, arXiv 2604.13010). 0: the first round samples from the student as given",
    )
    samples: int = Field(1, ge=1, description="answers to each")
    max_new_tokens: int | None = Field(
        None, ge=1, description="the teacher's tokens per answer at most; null: the largest `rollouts.max_new_tokens`"
    )
    temperature: float = Field(1.0, ge=0, le=100, description="of the teacher; 0: its likeliest token, always")
    top_p: float = Field(1.0, gt=0, le=1, description="the teacher's nucleus mass")
    right_only: bool = Field(
        False, description="keep only answers that `evaluate.scorer` finds right (rejection sampling)"
    )
    epochs: int = Field(1, ge=1, description="passes over the answers")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="peak learning rate")
    warmup_steps: int = Field(4, ge=0, description="linear warm-up, in steps of the fine-tuning")
    batch_size: int = Field(16, ge=1, description="answers per step")

    @model_validator(mode="after")
    def _several_answers_differ(self) -> "Sft":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"`temperature: 0` gives the same answer `samples: {self.samples}` times; set one of them to 1"
            )
        return self

    def horizon(self, rollouts: Rollouts) -> int:
        """Tokens of an answer at most."""
        return self.max_new_tokens or rollouts.longest

    def optimiser(self, train: Train) -> Train:
        """The section `train` as fine-tuning has it."""
        own = {key: value for key, value in self if key in Train.model_fields}
        return train.model_copy(update={**own, "min_ess": None})


SFT_OPTIMISER = tuple(key for key in Sft.model_fields if key in Train.model_fields)
"""Keys that fine-tuning has in the place of those of `train`."""
