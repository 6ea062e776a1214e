"""What the teacher disagreed with, read from a run's tables: texts and places, what changed, and responses to look at."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from pipeline.align.tokens import TokenBytes, from_table
from pipeline.measure.disagreement import (
    KEYS,
    Group,
    Tables,
    change,
    instead,
    lost_in_all,
    masked_because,
    measure,
    ranked,
)
from pipeline.measure.token_view import row_group, token_view
from stages.run.context import prompts_of, vocabulary
from stages.run.run import Phase, Place, Run

MOST_UNITS = 2_000_000
"""Units of a phase that are read, about: of a larger one every k-th row group."""
ROWS = 12
"""Of each table of texts."""
WORST, FIRST = 6, 4
"""Responses of a phase that are shown: those that lose most nats, and the first ones."""
Viewed = tuple[dict[str, Any], pl.DataFrame]
"""A rollout and its `token_view`, which says of masked units why they are."""
UNITS, CANDIDATES = 300, 6
"""Of a response that is shown, and of the teacher's at one of its units."""
BYTES = 600_000
"""Of all responses that are shown, about."""


@dataclass(frozen=True)
class Read:
    """A phase's tables, as far as the report reads them: a row group in memory at a time."""

    phase: Phase

    @cached_property
    def places(self) -> list[Place]:
        """Its shards, each of whose tables is opened once."""
        return list(self.phase)

    @cached_property
    def groups(self) -> list[tuple[Place, int]]:
        """The row groups that are read."""
        every = [(place, number) for place in self.places for number in range(place.units.manifest.row_groups)]
        return every[:: self.step]

    @cached_property
    def step(self) -> int:
        """Every how many of them."""
        return max(1, -(-sum(place.units.rows for place in self.places) // MOST_UNITS))

    @cached_property
    def responses(self) -> int:
        """How many responses they hold."""
        sizes = {place.number: place.rollouts.row_group_sizes() for place in self.places}
        return sum(sizes[place.number][number] for place, number in self.groups)

    def tables(self) -> Iterator[Group]:
        """Rollouts, scores and units of each."""
        for place, number in self.groups:
            yield tuple(row_group(shard, number) for shard in (place.rollouts, place.scores, place.units))  # type: ignore[misc]

    @cached_property
    def teacher_stop(self) -> Any:
        """Ids that end the teacher's answer."""
        return from_table(vocabulary(self.phase.run, "teacher").read(), "teacher")[1]

    @cached_property
    def found(self) -> Tables:
        """What `disagreement.measure` finds."""
        return measure(self.tables(), self.teacher_stop)

    def told(self, rows: pl.DataFrame, student: TokenBytes) -> list[dict[str, Any]]:
        """Rows of texts, and what the teacher would rather have said there: `candidates`."""
        if rows.is_empty():
            return []
        keys = [name for name in KEYS["contexts"] if name in rows.columns]
        candidates = instead(self.tables(), rows, student)
        return rows.join(candidates, on=keys, how="left", nulls_equal=True, maintain_order="left").to_dicts()

    def chosen(self) -> list[str]:
        """Names of the responses to look at: those that lose most nats, then the first ones."""
        lost = self.found["responses"].sort("lost", "rollout_id", descending=[True, False])["rollout_id"]
        place, number = self.groups[0]
        first = row_group(place.rollouts, number)["rollout_id"].head(FIRST)
        return list(dict.fromkeys([*lost.head(WORST), *first]))

    def named(self, names: Sequence[str], student: TokenBytes) -> Iterator[Viewed]:
        """Responses of these names, in their order."""
        return self._views("rollout_id", names, student)

    def answering(self, prompts: Sequence[str], student: TokenBytes) -> Iterator[Viewed]:
        """The first response to each of these prompts, in their order."""
        return self._views("prompt_id", prompts, student)

    def _views(self, key: str, values: Sequence[str], student: TokenBytes) -> Iterator[Viewed]:
        found: dict[str, Viewed] = {}
        for place, number in self.groups:
            rollouts = row_group(place.rollouts, number).filter(pl.col(key).is_in(values)).unique(key, keep="first")
            here = pl.col("rollout_id").is_in(rollouts["rollout_id"].implode())
            if rollouts.is_empty():
                continue
            units, weights, scores = (
                row_group(shard, number).filter(here) for shard in (place.units, place.weights, place.scores)
            )
            because = masked_because(rollouts, scores, units, self.teacher_stop)
            view = token_view(rollouts, units, student, weights).with_columns(because)
            for rollout in rollouts.to_dicts():
                found.setdefault(rollout[key], (rollout, view.filter(rollout_id=rollout["rollout_id"])))
        return (found[value] for value in values if value in found)


def compared(run: Run) -> dict[str, Read]:
    """The phases that are put side by side: held-out rollouts `before` and `after`, else those of the first and the last round.

    Without a second one only `before`, and nothing where nothing is scored.
    """
    phases = [phase for phase in run.phases if "@" not in phase.name]
    held_out = [phase for phase in phases if phase.kind == "eval"]
    chosen = held_out or [phase for phase in phases if phase.kind == "round"]
    ends = chosen if len(chosen) < 2 else [chosen[0], chosen[-1]]
    return {when: Read(phase) for when, phase in zip(("before", "after"), ends, strict=False)}


def disagreements(sides: Mapping[str, Read], student: TokenBytes) -> dict[str, Any]:
    """Tables of texts, contexts, what changed and what is masked, for the page.

    Args:
        sides: what `compared` gives.
    """
    before, *rest = sides.values()
    found = before.found
    lost = {when: lost_in_all(read.found) / max(1, read.responses) for when, read in sides.items()}
    changes = [change(found, after.found, (before.responses, after.responses), ROWS).to_dicts() for after in rest]
    return {
        "phases": {when: read.phase.name for when, read in sides.items()},
        "responses": {when: read.responses for when, read in sides.items()},
        "step": max(read.step for read in sides.values()),
        "lost": lost,
        "texts": {when: read.told(ranked(read.found, "texts", ROWS), student) for when, read in sides.items()},
        "contexts": before.told(ranked(found, "contexts", ROWS), student),
        "changes": changes[0] if changes else [],
        "tenths": {
            when: dict(read.found["tenths"].sort("tenth").select("tenth", pl.col("lost") / pl.col("count")).iter_rows())
            for when, read in sides.items()
        },
        "masked": found["masked"].sort("tokens", descending=True).to_dicts(),
        "tokens": int(found["kinds"]["tokens"].sum()),
    }


def responses(sides: Mapping[str, Read], student: TokenBytes) -> dict[str, Any]:
    """Responses for the token view: chosen ones before, and what was said to the same prompts after.

    Returns:
        JSON-able: `texts`, all that units and candidates say, which those name by number; `prompts`, by name; `shown`, a row a
        response with its `units`, each [text, kind, teacher's log-prob, student's, gap, advantage, weight, teacher's
        candidates as [text, log-prob, ...], the student's as [text, ...], share of the teacher's mass on none of its own,
        why it is masked].
    """
    texts: dict[str, int] = {}
    shown: list[dict[str, Any]] = []
    spent = 0
    for when, read in sides.items():
        prompts = list(dict.fromkeys(one["prompt"] for one in shown))
        views = read.named(read.chosen(), student) if when == "before" else read.answering(prompts, student)
        for rollout, view in views:
            units = [_coded(row, texts) for row in view.head(UNITS).to_dicts()]
            spent += len(str(units))
            if spent > BYTES * (1 if when == "before" else 2) / 2:
                break
            lost = -view["gap"].sum()
            shown.append(
                {"when": when, "id": rollout["rollout_id"], "prompt": rollout["prompt_id"], "lost": round(lost, 2)}
                | {"units": units, "more": max(0, len(view) - UNITS), "cut": rollout["finish_reason"] == "length"}
            )
    names = list(dict.fromkeys(one["prompt"] for one in shown))
    prompts_read = prompts_of(sides["before"].phase).take(names)
    return {"texts": list(texts), "shown": shown, "prompts": {row["prompt_id"]: row["prompt"] for row in prompts_read}}


def _coded(unit: dict[str, Any], texts: dict[str, int]) -> list[Any]:
    """A unit for the page; texts by their number among all."""

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def nats(name: str) -> float | None:
        return None if unit[name] is None else round(unit[name], 3)

    of_teacher = (unit["teacher_candidates"] or [])[:CANDIDATES]
    of_student = (unit["student_candidates"] or [])[:CANDIDATES]
    return [
        number(unit["text"]),
        unit["kind"],
        *map(nats, ("teacher_logp", "student_logp", "gap", "advantage", "weight")),
        [part for one in of_teacher for part in (number(one["text"]), round(one["logp"], 2))],
        [number(one["text"]) for one in of_student],
        nats("teacher_elsewhere"),
        unit["because"],
    ]
