"""The reporting checklist as a table: what one needs to compare a run with another one, round by round."""

from collections.abc import Callable, Sequence

from schemas.diagnostics import Diagnostics, Distance, Sampling, Teacher

Cell = Callable[[Diagnostics], str]


def rows(phases: Sequence[Diagnostics]) -> dict[str, dict[str, list[str]]]:
    """Cells of each phase by group and label."""
    return {
        group: {label: [cell(phase) for phase in phases] for label, cell in cells.items()}
        for group, cells in ROWS.items()
    }


def percent(share: float | None, digits: int = 1) -> str:
    """A share for people."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; small ones by their leading digits, so that they don't look like nothing."""
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def _digests(model: Sampling | Teacher) -> str:
    names = (("weights", model.weights), ("tokenizer", model.tokenizer), ("template", model.template))
    return ", ".join(f"{name} {digest[:12] if digest else '-'}" for name, digest in names)


def _sampler(d: Diagnostics) -> str:
    settings = ("temperature", "top_p", "max_new_tokens", "seed", "engine", "dtype")
    found = {name: getattr(d.sampling, name) for name in settings}
    return ", ".join(f"{name} {'-' if value is None else value}" for name, value in found.items())


def _support(d: Diagnostics) -> str:
    kept = d.support
    return (
        f"{kept.of}'s likeliest tokens, p ≥ {kept.min_p:g} up to {percent(kept.mass)} of the mass, at most {kept.k_max}"
    )


def _weights(d: Diagnostics) -> str:
    ceiling = d.loss.truncate
    return d.loss.weights + (f", times importance ratios up to {ceiling:g}" if ceiling else "")


def _gate(d: Diagnostics) -> str:
    return ", ".join(f"{name} times {factor:g}" for name, factor in d.loss.gate.items()) or "-"


def _reward(d: Diagnostics) -> str:
    return "-" if d.loss.reward == "none" else f"{d.loss.reward_coefficient:g} times {d.loss.reward}'s"


def _outcomes(d: Diagnostics) -> str:
    found = d.outcomes
    if found is None:
        return "-"
    return f"{found.right} right, {found.wrong} wrong, {found.unknown} unknown, {found.rewarded} with a reward"


def _reference(d: Diagnostics) -> str:
    return "-" if d.loss.reference is None else f"{d.loss.reference}, its divergence times {d.loss.reference_kl:g}"


def _spread(found: Distance) -> str:
    return f"{number(found.log_ratio)} (± {number(found.log_ratio_sd)})"


def _per_token(value: float | None, per_byte: float | None) -> str:
    return f"{number(value)} ({number(per_byte)} a byte)"


ROWS: dict[str, dict[str, Cell]] = {
    "Objective": {
        "KL direction, estimator": lambda d: f"{d.loss.direction or '-'}, {d.loss.estimator} ({d.loss.recipe})",
        "support": _support,
        "mass outside the candidates": lambda d: d.loss.tail or ("no candidates" if d.loss.direction else "-"),
        "credit": lambda d: d.loss.credit,
        "weights": _weights,
        "gate": _gate,
        "outcomes": _outcomes,
        "reward beside it": _reward,
        "reference policy": _reference,
        "normaliser": lambda d: d.loss.normaliser,
    },
    "Models": {
        "teacher": lambda d: (
            f"{d.teacher.source or '-'}, reads {d.teacher.reads}, {d.teacher.engine}, {d.teacher.dtype}"
        ),
        "teacher's digests": lambda d: _digests(d.teacher),
        "student fine-tuned on samples of": lambda d: d.teacher.student_tuned_on or "not declared",
        "responses sampled by": lambda d: (
            "another run's student" if d.sampling.checkpoint is None else f"checkpoint {d.sampling.checkpoint}"
        ),
        "digests of that student": lambda d: _digests(d.sampling),
        "sampler": _sampler,
        "sampler's log-probs, which ratios are to": lambda d: d.sampling.warning or percent(d.sampling.sampler_logp),
    },
    "Staleness": {
        "rounds behind": lambda d: "reused" if d.staleness.rounds_behind is None else str(d.staleness.rounds_behind),
        "effective sample size, units": lambda d: percent(d.staleness.units.ess),
        "χ², units": lambda d: number(d.staleness.units.chi2),
        "log-ratio of responses, nats per unit": lambda d: _spread(d.staleness.responses),
        "in training, first and last step: effective sample size, units": lambda d: (
            f"{percent(d.training.first.units.ess)}, {percent(d.training.last.units.ess)}" if d.training else "-"
        ),
        "likewise: log-ratio of responses": lambda d: (
            f"{_spread(d.training.first.responses)}, {_spread(d.training.last.responses)}" if d.training else "-"
        ),
        "steps taken, budget": lambda d: (
            f"{d.training.steps}, {d.training.budget}" + (" (stale)" if d.training.ended == "min_ess" else "")
            if d.training
            else "-"
        ),
    },
    "Responses": {
        "responses, student tokens": lambda d: f"{d.texts.responses:,}, {d.texts.student_tokens:,}",
        "tokens in units that carry loss": lambda d: percent(d.coverage.compared),
        "tokens in 1:1 units and stops": lambda d: percent(d.coverage.one_to_one),
        "teacher's kept mass with a student id": lambda d: percent(d.coverage.shared_mass, 3),
        "cut at max_new_tokens": lambda d: percent(d.texts.truncated),
        "mean seq-rep-4, responses above 50 %": lambda d: (
            f"{percent(d.texts.seq_rep_4)}, {percent(d.texts.repetitive)}"
        ),
        "teacher's entropy, nats a token": lambda d: _per_token(d.entropy.teacher, d.entropy.teacher_per_byte),
        "student's entropy, nats a token": lambda d: _per_token(d.entropy.student, d.entropy.student_per_byte),
    },
    "Credit": {
        "mean advantage, nats per unit": lambda d: number(d.credit.advantage_mean),
        "|advantage| in the first and last tenth": lambda d: (
            f"{percent(d.credit.advantage_share.get(0))}, {percent(d.credit.advantage_share.get(9))}"
        ),
        "clipped on the sampled path": lambda d: percent(d.credit.clipped),
        "effective sample size of the weights": lambda d: percent(d.credit.weight_ess),
    },
    "Cost": {
        "student tokens": lambda d: (
            ", ".join(f"{count:,} {origin}" for origin, count in d.sampling.tokens.items()) or "-"
        ),
        "teacher tokens": lambda d: ", ".join(f"{count:,} {origin}" for origin, count in d.teacher.tokens.items()),
        "seconds": lambda d: ", ".join(f"{stage} {s:.0f}" for stage, s in d.seconds.items()) or "-",
    },
}
