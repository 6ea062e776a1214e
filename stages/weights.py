"""Weights: advantages, credit and importance weights of a phase, as tables."""

from dataclasses import asdict

from pipeline.store.records import write_record
from pipeline.store.shards import read_manifest
from pipeline.weights.credit import Summary
from pipeline.weights.estimator import Loss
from pipeline.weights.phase import Part, compute
from pipeline.weights.sampler import lost, settings
from schemas.records import Weighed
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption
from stages.run.ratios import refuse_spread
from stages.run.run import Phase, Place, open_run


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Recompute the weights of a phase's shards, all of which estimators may compare; needs no model."""
    run = open_run(config_file, "weights", phase)
    whole = run.phase(phase)
    loss = Loss.of(run.settings.objective)
    if read_manifest(whole[0].path("rollouts")).identity.get("spread"):
        refuse_spread(run, whole[0].path("rollouts"))
    figures = compute([part(place) for place in whole], run.settings.weights, loss)
    digests = {path.stem: read_manifest(path).sha256 for path in whole.paths("weights")}
    write_record(whole.weights, Weighed(decided=run.decided, **asdict(figures), shards=digests))
    console.say(
        f"{phase} weights: {figures.units:,} units, mean advantage {figures.advantage_mean:.3f} nats, "
        f"effective sample size {100 * figures.ess:.1f} %"
    )
    if whole.is_judged:
        told = figures.right + figures.wrong
        console.say(
            f"{phase} weights: of {figures.responses:,} responses {figures.right:,} are right and {figures.wrong:,} wrong, "
            f"{figures.responses - told:,} can't be judged and are neither gated nor rewarded; {figures.rewarded:,} have a "
            "reward other than 0"
        )
        if run.settings.weights.reward != "none" and not figures.rewarded:
            console.warn(
                f"{phase} weights: no response has a reward, so `objective.reward` adds nothing: no prompt has both right and "
                "wrong responses that can be judged (`rollouts.samples`, `evaluate.scorer`)"
            )
    if figures.incomparable:
        console.say(
            f"{phase} weights: {figures.incomparable:,} of {figures.responses:,} responses have no unit that is compared "
            "and carry no loss"
        )
    say_how_it_was_sampled(whole, figures, loss)


def say_how_it_was_sampled(phase: Phase, figures: Summary, loss: Loss) -> None:
    """Tell of responses that weren't sampled from the model as it is: how they are corrected, or that they can't be."""
    sampling = read_manifest(phase[0].path("rollouts")).identity.get("sampling", {})
    if warning := lost(phase.name, sampling, figures.warped, figures.responses):
        console.warn(warning)
    if figures.warped:
        ceiling = phase.run.settings.weights.truncate
        how = (
            f"times min(pi_theta / pi_sampler, {ceiling:g}) (`weights.truncate`)"
            if ceiling is not None
            else "of the sampled path times pi_model / pi_sampler, which `weights.truncate` would bound"
            if loss.corrected
            else "unchanged: the loss is of candidates, or has the ratio itself (`objective.ratio_clip`)"
        )
        console.say(
            f"{phase.name} weights: {figures.warped:,} responses were sampled at {settings(sampling) or 'unknown settings'}; "
            f"ratios are to that sampler's log-probs, weights {how}"
        )


def part(place: Place) -> Part:
    """The tables of a shard."""
    beside = place.phase.beside
    path = {name: place.path(name).absolute() for name in ("rollouts", "units", "weights", *beside)}
    for name in ("rollouts", "units", *beside):
        place.check(name, read_manifest(path[name]))  # their bytes are whoever's that reads them
    needed = path["rollouts"], path["units"], path.get("policy"), path["weights"]
    return Part(*needed, outcomes=path.get("outcomes"), reference=path.get("reference"))


if __name__ == "__main__":
    console.run(main)
