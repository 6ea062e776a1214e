"""Which responses are right: by the source's own verifier, by equality, and by a function of one's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.measure.scorers import identity, scorer
from pipeline.own_code import source_digest
from pipeline.prompts import collect
from schemas.config import Evaluate, Prompts, Splits
from schemas.errors import OpdError


def row(answer: str | None, **fields: Any) -> dict[str, Any]:
    return {"prompt_id": "p7", "prompt": "?", "answer": answer, "fields": json.dumps(fields)}


@pytest.mark.parametrize(
    ("response", "reference", "extract", "shown", "right"),
    [
        ("it is 42.", " 42\n", "last_number", "42", True),
        ("it is 42.", "43", "last_number", "42", False),
        ("so 1,234", "= 1234", "last_number", "1234", True),
        ("none", "none", "last_number", "", None),
        ("none", "7", "last_number", "", False),
        ("it is 42.", None, "last_number", "42", None),
        ("", None, "last_number", "", None),
        (" a word\n", "a word", "whole", "a word", True),
    ],
)
@pytest.mark.parametrize("name", ["source", "equality"])
def test_equality(
    name: str, response: str, reference: str | None, extract: Any, shown: str, right: bool | None
) -> None:
    score = scorer(Evaluate(scorer=name, extract=extract), "rows.jsonl")
    assert score(response, row(reference)) == (shown, right)


def test_a_source_with_a_verifier_judges_itself() -> None:
    """The verifier of decimal_chain_sum takes 7.50 for 7.5, which equality does not."""
    config = Prompts(source="reasoning-gym:decimal_chain_sum", splits=Splits(examples=0, train=1, test=4))
    for item in collect(config, seed=1).to_pylist():
        shown = f"{item['answer']}0"
        response = f"that makes {shown}"
        assert scorer(Evaluate(), config.source)(response, item) == (shown, True)
        assert scorer(Evaluate(scorer="equality"), config.source)(response, item) == (shown, False)
        assert scorer(Evaluate(), config.source)("that makes 0.5", item) == ("0.5", False)
        assert scorer(Evaluate(), config.source)("no idea", item) == ("", False)


def test_one_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    text = (
        "def near(response, answer, row):\n    return answer and abs(float(response) - float(answer)) <= row['slack']\n"
    )
    Path("judging.py").write_text(text)
    config = Evaluate(scorer="judging:near")
    score = scorer(config, "rows.jsonl")
    assert score(" 4.5\n", row("5", slack=1)) == ("4.5", True)
    assert score("4.5", row("5", slack=0.1)) == ("4.5", False)
    assert score("4.5", row(None, slack=0.1)) == ("4.5", None)
    with pytest.raises(OpdError, match=r"judging:near must give True, False or None .* gave '' for prompt p7"):
        score("4.5", row("", slack=1))
    assert identity(config) == {"scorer": "judging:near", "scorer_code": source_digest("judging:near")}
    with pytest.raises(OpdError, match=r"`evaluate\.scorer`: .*judging\.py has no function 'far'"):
        scorer(Evaluate(scorer="judging:far"), "rows.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"scorer": "magic"},
            "takes source, equality, exact, regex, choice, math, reasoning-gym, code, or module:function of",
        ),
        (
            {"scorer": "a:b", "extract": "whole"},
            "`extract: whole` means nothing to `scorer: a:b`; it is of scorer: source, equality, r",
        ),
    ],
)
def test_keys_that_say_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluate(**values)
