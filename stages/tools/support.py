"""Support: what of two vocabularies is shared, and what is not and why."""

import json
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.align.texts import Side
from pipeline.align.vocabularies import pair_ids
from stages.run import console
from stages.run.sides import JsonOption, StudentOption, TeacherOption, open_side

EXAMPLES = 8


def main(teacher: TeacherOption, student: StudentOption, as_json: JsonOption = False) -> None:
    """Compare two vocabularies by the bytes of their tokens."""
    sides = {"teacher": open_side(teacher), "student": open_side(student)}
    figures = {
        "teacher": side_figures(sides["teacher"], sides["student"]),
        "student": side_figures(sides["student"], sides["teacher"]),
    }
    if as_json:
        console.out.print(json.dumps(figures), markup=False, soft_wrap=True)
        return
    table = Table(title=f"{figures['teacher']['shared']:,} tokens in both vocabularies", title_justify="left")
    for heading in ("", "teacher", "student"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("model", teacher, student)
    for key in ("ids", "with_bytes", "special", "without_bytes", "doubles", "shared"):
        table.add_row(key.replace("_", " "), *(f"{figures[role][key]:,}" for role in figures))
    table.add_row("share of its tokens", *(f"{100 * figures[role]['shared_share']:.1f} %" for role in figures))
    console.out.print(table)
    for role, found in figures.items():
        for why, examples in found["not_shared"].items():
            console.out.print(f"{role}, {why}: {'  '.join(examples)}", markup=False, soft_wrap=True)


def side_figures(side: Side, other: Side) -> dict[str, Any]:
    """Counts of one vocabulary and examples of ids that have no partner in the other, by reason."""
    tokens = side.tokens
    paired = pair_ids(tokens, other.tokens) >= 0
    spelled = tokens.has_bytes
    groups = {
        "the other has no token of these bytes": spelled & tokens.canonical & ~paired,
        "another id stands for the same bytes": spelled & ~tokens.canonical,
        "special": tokens.special,
        "no text yields it (padding, unknown, unreachable)": ~spelled & ~tokens.special,
    }
    return {
        "ids": len(tokens),
        "with_bytes": int(spelled.sum()),
        "special": int(tokens.special.sum()),
        "without_bytes": int((~spelled & ~tokens.special).sum()),
        "doubles": int((spelled & ~tokens.canonical).sum()),
        "shared": int(paired.sum()),
        "shared_share": float(paired.sum() / max(1, (spelled & tokens.canonical).sum())),
        "not_shared": {why: _examples(side, np.flatnonzero(ids)) for why, ids in groups.items() if ids.any()},
    }


def _examples(side: Side, ids: np.ndarray) -> list[str]:
    """Some ids spread over the vocabulary, with their bytes."""
    chosen = ids[np.unique(np.linspace(0, len(ids) - 1, EXAMPLES).astype(int))]
    values = side.tokens.bytes.take(chosen).to_pylist()
    return [f"{i}" if value is None else f"{i}:{value!r}" for i, value in zip(chosen.tolist(), values, strict=True)]


if __name__ == "__main__":
    console.run(main)
