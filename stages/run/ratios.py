"""Which losses a phase's log-probs are good for."""

from pathlib import Path

from schemas.config.objective import TokenCredit
from schemas.errors import OpdError
from stages.run.run import Run


def refuse_spread(run: Run, rollouts: Path) -> None:
    """Raise OpdError where the loss takes ratios of single tokens: of responses that another tokenizer's policy sampled, only
    sums over whole units are its log-probs (`pipeline.align.retokenise`)."""
    objective, found = run.config.objective, None
    if run.config.weights.reward != "none":
        found = f"`weights.reward: {run.config.weights.reward}`", "leave out both of its keys"
    elif isinstance(objective, TokenCredit) and objective.ratio_clip is not None:
        found = f"`objective.ratio_clip: {list(objective.ratio_clip)}`", "set it to null"
    if found:
        raise OpdError(
            f"{found[0]} takes ratios of tokens to the policy that sampled, but the responses of {rollouts} were sampled in "
            f"another tokenizer's tokens, so that it has no log-probs of this student's: let this student sample, or {found[1]}"
        )
