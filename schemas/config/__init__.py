"""The run's configuration by section: every key, its type, default and meaning."""

from schemas.config.evaluate import Evaluate, HeldOut, Judged
from schemas.config.load import load_config, parse_config
from schemas.config.model import VLLM_OPTIONS, Model
from schemas.config.objective import (
    Candidates,
    CrossEntropy,
    Hybrid,
    Objective,
    Own,
    RatioClipped,
    Recipe,
    SampledPath,
    Strict1to1,
)
from schemas.config.prompts import Prompts, PromptSource, Splits
from schemas.config.rollouts import Rollouts
from schemas.config.root import Config, Tuning, consistency, credit_in_part, declared, overridden
from schemas.config.scores import Audit, Coverage, Scores
from schemas.config.section import Section, section, variants
from schemas.config.sft import SFT_OPTIMISER, Sft
from schemas.config.train import TRAIN_OPERATION, Lora, Train
from schemas.config.weights import Gate, Weights

__all__ = [
    "SFT_OPTIMISER",
    "TRAIN_OPERATION",
    "VLLM_OPTIONS",
    "Audit",
    "Candidates",
    "Config",
    "Coverage",
    "CrossEntropy",
    "Evaluate",
    "Gate",
    "HeldOut",
    "Hybrid",
    "Judged",
    "Lora",
    "Model",
    "Objective",
    "Own",
    "PromptSource",
    "Prompts",
    "RatioClipped",
    "Recipe",
    "Rollouts",
    "SampledPath",
    "Scores",
    "Section",
    "Sft",
    "Splits",
    "Strict1to1",
    "Train",
    "Tuning",
    "Weights",
    "consistency",
    "credit_in_part",
    "declared",
    "load_config",
    "overridden",
    "parse_config",
    "section",
    "variants",
]
