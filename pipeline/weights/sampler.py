"""What is said of responses that were not sampled from the model as it is."""

from collections.abc import Mapping
from typing import Any


def settings(sampling: Mapping[str, Any]) -> str | None:
    """Temperature and top-p in words, where these made the sampler another distribution than the model's; else None.

    Args:
        sampling: what the rollouts' manifest has on record, perhaps nothing.
    """
    temperature, top_p = (sampling.get(name) for name in ("temperature", "top_p"))
    if temperature in (None, 1) and top_p in (None, 1):
        return None
    return f"temperature {temperature if temperature is not None else 1:g}, top-p {top_p if top_p is not None else 1:g}"


def lost(phase: str, sampling: Mapping[str, Any], kept: int, responses: int) -> str | None:
    """A warning where the sampler's log-probs of some responses were not kept, although they differ from the model's.

    Args:
        kept: how many of the `responses` have `sampler_logp`.
    """
    how = settings(sampling)
    if how is None or kept == responses:
        return None
    return (
        f"{phase}: {responses - kept:,} of {responses:,} responses were sampled at {how}, but their log-probs under that "
        "sampler (`sampler_logp`) were not kept: importance ratios and weights are to the model at temperature 1 and don't "
        "correct for it, and the sampled path's gradient is another one; sample them again, or reuse rollouts that have "
        "`sampler_logp`"
    )
