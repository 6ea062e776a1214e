"""What a run came to, in words, from its figures alone."""

import math
from collections.abc import Mapping
from typing import Any

from schemas.diagnostics import Diagnostics
from stages.report.checklist import number, percent


def difference(before: tuple[float, float, float], after: tuple[float, float, float]) -> tuple[float, float]:
    """95 % interval of after - before of two estimates, each a value and its interval (MOVER, Zou and Donner 2008, eq. 4).

    As if they were independent, which is too wide where both are of the same prompts.
    """
    (a, a_low, a_high), (b, b_low, b_high) = after, before
    return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def direction(interval: tuple[float, float] | None) -> str | None:
    """Which way something went: `up`, `down`, or `same` where the interval holds 0; None where it was not measured."""
    if interval is None:
        return None
    low, high = interval
    return "up" if low > 0 else "down" if high < 0 else "same"


SCORE = {
    "up": "More held-out answers are right",
    "down": "Fewer held-out answers are right",
    "same": "The score did not measurably change",
}
KL = {"down": "closer to its teacher", "up": "further from its teacher", "same": "not measurably nearer to its teacher"}
GOOD = {("up", "down"), ("up", None), (None, "down"), ("up", "same")}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "last")
MIXED = {("up", "up"), ("up", "same"), ("down", "down"), ("same", "down")}
"""Where score and KL say two things."""


def verdict(summary: Mapping[str, Any], flipped: Mapping[str, int]) -> dict[str, Any]:
    """The headline, whether it is good or bad news, and the figures behind it in a sentence each.

    Args:
        summary: as in `summary.json`.
        flipped: answers of the run's own held-out set that were fixed, broken, and stayed right or wrong.
    """
    before, after, gain = summary["before"], summary["after"], summary["gain"][summary["before"]["split"]]
    said: list[str] = []
    score = direction(gain and gain["accuracy_95"])
    if gain:
        low, high = gain["accuracy_95"]
        ends = f"from {percent(before['accuracy'])} to {percent(after['accuracy'])} on {before['judged']:,} items"
        points = (
            f"{100 * gain['accuracy']:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f}, p {gain['p']:.2g})"
        )
        of = f"Of {sum(flipped.values()):,} answers {flipped['fixed']:,} were fixed and {flipped['broken']:,} broken"
        said.append(f"Held-out accuracy went {ends}: {points}. {of}.")
    else:
        said.append("The score was not measured: no held-out prompt has a reference answer that can be judged.")
    change = None
    if before["reverse_kl"] is not None and after["reverse_kl"] is not None:
        first, last = ((found["reverse_kl"], *found["reverse_kl_95"]) for found in (before, after))
        change = difference(first, last)
        said.append(
            f"Reverse KL to the teacher, unbiased, went from {number(first[0])} to {number(last[0])} nats per token "
            f"(change {last[0] - first[0]:+.3f}, 95 %: {change[0]:+.3f} to {change[1]:+.3f})."
        )
    else:
        said.append("Reverse KL to the teacher was not measured.")
    kl = direction(change)
    parts = [SCORE[score]] if score else []
    parts += [f"{'the' if parts else 'The'} student is {KL[kl]}"] if kl else []
    joint = ", but " if (score, kl) in MIXED else ", and "
    headline = joint.join(parts) or "Neither score nor KL was measured"
    return {"headline": headline + ".", "good": (score, kl) in GOOD, "bad": score == "down" or kl == "up", "said": said}


def reason(found: Mapping[str, Any], summary: Mapping[str, Any]) -> str | None:
    """Why the sampled KL changed, in a few sentences, from `disagreements`; None where there is nothing to compare."""
    if not found["changes"]:
        return None
    lost = found["lost"]
    way = "fell" if lost["after"] < lost["before"] else "rose"
    total = lost["after"] - lost["before"]
    parts = [row for row in found["changes"] if row["share"] is not None and row["share"] > 0][:3]
    sentences = [
        f"What a response loses against the teacher {way} from {lost['before']:.2f} to {lost['after']:.2f} nats."
    ]
    if parts:
        told = ", ".join(
            f"{quoted(row['text'])} (said {row['times']:.0f} times in 100 responses before, {row['times_after']:.0f} after; "
            f"{percent(row['share'], 0)})"
            for row in parts
        )
        sentences.append(f"The largest parts of these {total:+.2f} nats: {told}.")
    before = {(row["text"], row["kind"]): row for row in found["texts"]["before"]}
    if parts and (first := before.get((parts[0]["text"], parts[0]["kind"]))) and first["candidates"]:
        rather = ", ".join(f"{quoted(one['text'])} {percent(one['share'], 0)}" for one in first["candidates"][:3])
        sentences.append(
            f"Where the student said {quoted(first['text'])} before, the teacher gave it {first['teacher_mean']:.1f} nats, the "
            f"student {first['student_mean']:.1f}; the teacher would have said {rather}."
        )
    of_tenth = found["tenths"]
    if of_tenth["before"]:
        worst = max(of_tenth["before"], key=lambda tenth: of_tenth["before"][tenth])
        sentences.append(
            f"By position most was lost in the {ORDINALS[worst]} tenth of a response: {of_tenth['before'][worst]:.2f} nats per "
            f"unit before, {of_tenth['after'].get(worst, 0.0):.2f} after."
        )
    stopped = [summary[when]["stopped"] for when in ("before", "after")]
    sentences.append(
        f"{percent(stopped[0], 0)} of the held-out answers stopped by themselves before, {percent(stopped[1], 0)} after."
    )
    return " ".join(sentences)


def quoted(text: str) -> str:
    """A text within a sentence, its spaces and line breaks to be seen."""
    return "“" + visible(text) + "”"


def visible(text: str) -> str:
    """A text in one line: spaces as ␣ at its ends, line breaks as ⏎, tabs as ⇥."""
    inner = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    bare = inner.strip(" ")
    if not bare:
        return "␣" * len(inner)
    lead, tail = len(inner) - len(inner.lstrip(" ")), len(inner) - len(inner.rstrip(" "))
    return "␣" * lead + bare + "␣" * tail


def endings(rounds: list[Diagnostics]) -> list[dict[str, str]]:
    """Why each round ended, in words, one a trained round."""
    found = []
    for phase in rounds:
        training = phase.training
        if training is None:
            continue
        why = {
            "budget": "took all steps of its budget",
            "min_ess": "stopped early: the policy had moved too far from the one that sampled (train.min_ess)",
            None: "is still under way",
        }[training.ended]
        ess = training.last.since_start.ess
        found.append(
            {"phase": phase.phase, "steps": f"{training.steps} of {training.budget}", "why": why, "ess": percent(ess)}
        )
    return found
