"""Weights: advantages, credit and importance weights of a phase, as tables."""

import json
from dataclasses import asdict

from pipeline.store.shards import read_manifest, write_text
from pipeline.weights.phase import Part, compute
from stages.run import console
from stages.run.context import DEFAULT_CONFIG, ConfigOption, PhaseOption
from stages.run.run import Place, open_run


def main(phase: PhaseOption, config_file: ConfigOption = DEFAULT_CONFIG) -> None:
    """Recompute the weights of a phase's shards, all of which estimators may compare; needs no model."""
    run = open_run(config_file, "weights", phase)
    whole = run.phase(phase)
    figures = compute([part(place) for place in whole], run.settings.weights)
    digests = {path.stem: read_manifest(path).sha256 for path in whole.paths("weights")}
    write_text(whole.weights, json.dumps({**asdict(figures), "shards": digests}, indent=1) + "\n")
    console.say(
        f"{phase} weights: {figures.units:,} units, mean advantage {figures.advantage_mean:.3f} nats, "
        f"effective sample size {100 * figures.ess:.1f} %"
    )
    if figures.incomparable:
        console.say(
            f"{phase} weights: {figures.incomparable:,} of {figures.responses:,} responses have no unit that is compared "
            "and carry no loss"
        )


def part(place: Place) -> Part:
    """The tables of a shard."""
    path = {name: place.path(name).absolute() for name in ("rollouts", "units", "policy", "weights")}
    # Rollouts of another policy need the log-probs of the one that is trained.
    policy = path["policy"] if place.phase.is_foreign else None
    return Part(path["rollouts"], path["units"], policy, path["weights"])


if __name__ == "__main__":
    console.run(main)
