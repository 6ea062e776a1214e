"""Which responses are right: by the source's own verifier, by each scorer of the config, and by a function of one's own."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import math_verify
import pytest

from pipeline.measure import sandbox
from pipeline.measure.answers import extract, final
from pipeline.measure.scorers import identity, references_problem, scorer
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


JUDGED = [json.loads(line) for line in (Path(__file__).parent / "judged.jsonl").read_text().splitlines()]
"""Responses with verdicts by hand: scorer, reference, response, right, and where needed the row's fields or the pattern;
`marked`: the reference says itself where its mathematics is; `disagrees`: why the scorer is known to say otherwise."""


@pytest.mark.parametrize("name", sorted({pair["scorer"] for pair in JUDGED}))
def test_verdicts_by_hand(name: str) -> None:
    if name == "code" and all(sandbox.probe(way) for way in sandbox.WALLS):
        pytest.skip("no sandbox can be made here")
    pairs = [pair for pair in JUDGED if pair["scorer"] == name]
    assert {pair["right"] for pair in pairs} == {True, False}
    for given in {json.dumps({key: pair[key] for key in ("pattern",) if key in pair}) for pair in pairs}:
        part = [pair for pair in pairs if json.loads(given).items() <= pair.items()]
        score = scorer(Evaluate(scorer=name, **json.loads(given)), "rows.jsonl")
        rows = [row(pair["reference"], **pair.get("fields", {})) for pair in part]
        found = score.all([pair["response"] for pair in part], rows)
        for pair, (shown, right) in zip(part, found, strict=True):
            assert right is (pair["right"] != ("disagrees" in pair)), (pair, shown)


def test_mathematics_is_judged_as_math_verify_does() -> None:
    pairs = [pair for pair in JUDGED if pair["scorer"] == "math"]
    assert len(JUDGED) >= 300 and len(pairs) >= 150 and sum("disagrees" in pair for pair in JUDGED) <= 5
    score = scorer(Evaluate(scorer="math"), "rows.jsonl")
    for pair in pairs:
        gold = pair["reference"] if pair.get("marked") else "$" + pair["reference"].replace("\\$", "") + "$"
        direct = math_verify.verify(math_verify.parse(gold), math_verify.parse(pair["response"].split("</think>")[-1]))
        if "THINK]" not in pair["response"] and "<|channel|>" not in pair["response"]:
            assert score(pair["response"], row(pair["reference"]))[1] == direct, pair


def test_mathematics_off_the_main_thread() -> None:
    """Where signals, math-verify's timeouts, can't be had."""
    score, found = scorer(Evaluate(scorer="math"), "rows.jsonl"), []
    thread = threading.Thread(target=lambda: found.append(score("so \\boxed{0.5}", row("\\frac12"))))
    thread.start()
    thread.join()
    assert [right for _, right in found] == [True]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("a</think>b</think>c", "c"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "b"),
        ("<think>a", "<think>a"),
        ("<think>a</think>", ""),
    ],
)
def test_the_answer_follows_the_thinking(response: str, answer: str) -> None:
    assert final(response) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\frac{3}{4}", "3/4"),
        ("-\\dfrac34", "-3/4"),
        ("x = 3 / 4.", "3/4"),
        ("48/2 = 24", "24"),
        ("\\boxed{42}", "42"),
        ("\\text{about 5}", "5"),
        ("90^\\circ", "90"),
        ("3\\sqrt{2}", ""),
        ("2^{10}", ""),
        ("2\\pi", ""),
    ],
)
def test_fractions_are_one_number_and_expressions_none(text: str, answer: str) -> None:
    assert extract(text, "last_number") == answer


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ({"scorer": "math"}, "a tall man", "reads numbers, expressions, sets and intervals"),
        ({"scorer": "equality"}, "a tall man", "reads numbers (`math` reads fractions"),
        ({"scorer": "equality"}, "\\frac{1}{4}", "reads numbers (`math` reads fractions"),
        ({"scorer": "equality"}, "3\\sqrt{2}", "reads numbers (`math` reads fractions"),
        ({"scorer": "exact"}, " ", "reads texts"),
        ({"scorer": "choice"}, "a tall man", "reads letters, texts of options"),
        ({"scorer": "choice"}, "F", "reads letters"),
        ({"scorer": "reasoning-gym"}, "7", "reads references of rows whose `source_dataset`"),
        ({"scorer": "code"}, "it doubles", "reads Python with assert statements"),
    ],
)
def test_references_that_cannot_be_read_are_told_and_not_measured(
    values: dict[str, Any], reference: str, message: str
) -> None:
    config = Evaluate(**values)
    good = {"choice": "B", "code": "assert f(1)", "reasoning-gym": "8"}.get(config.scorer, "7")
    fields = {"source_dataset": "chain_sum"} if config.scorer == "reasoning-gym" else {}
    rows = [row(reference), row(good, **fields), row(None)]
    problem = references_problem(config, "rows.jsonl", rows, "split test")
    assert problem and f"`evaluate.scorer: {config.scorer}` {message}" in problem
    assert f"so not 1 of 2 references of split test: not measured, as p7: {reference.strip() or 'nothing'!r}" in problem
    assert scorer(config, "rows.jsonl")("7", rows[0])[1] is None
    assert references_problem(config, "rows.jsonl", rows[1:], "split test") is None
    with pytest.raises(OpdError, match=r"none of the 1 references of split test, such as p7: .*answer_field: null"):
        references_problem(config, "rows.jsonl", [rows[0], rows[2]], "split test")
    assert references_problem(config, "rows.jsonl", [], "split test") is None


def test_a_verifier_that_refuses_its_own_reference_measures_nothing() -> None:
    """A task with words for answers, read as numbers, would be 0 % right in silence."""
    words = Prompts(source="reasoning-gym:letter_jumble", splits=Splits(examples=0, train=1, test=4))
    rows = collect(words, seed=1).to_pylist()
    with pytest.raises(
        OpdError, match=r"that their verifier takes through `evaluate\.extract: last_number`, and so none of"
    ):
        references_problem(Evaluate(), words.source, rows, "split test")
    assert references_problem(Evaluate(extract="whole"), words.source, rows, "split test") is None
    assert scorer(Evaluate(extract="whole"), words.source)(rows[0]["answer"], rows[0])[1] is True


def test_options_in_the_prompt() -> None:
    prompt = "Which is a capital?\n(A) Bergen\n(B) Oslo\n(C) Malmö"
    score = scorer(Evaluate(scorer="choice"), "rows.jsonl")
    asked = row("Oslo") | {"prompt": prompt}
    assert score("It is Oslo.", asked) == ("B", True) and score("(C)", asked) == ("C", False)
    assert score("D", asked) == ("", False)  # there is none


@pytest.mark.parametrize(
    ("choices", "reference", "letter", "text"),
    [
        ({"label": ["1", "2", "3"], "text": ["red", "green", "blue"]}, "1", "A", "red"),
        ({"label": ["1", "2", "3"], "text": ["red", "green", "blue"]}, "3", "C", "blue"),
        ({"label": [1, 2], "text": ["red", "green"]}, "2", "B", "green"),
        ({"label": ["B", "A"], "text": ["red", "green"]}, "B", "B", "red"),
        (["red", "green"], "1", "B", "green"),
        (["4", "5", "6"], "1", "B", "5"),
        (["7", "8"], "7", "A", "7"),
        (["1", "2", "3"], "1", None, "1"),  # the second option, or the first one's text
        ([f"option {i}" for i in range(12)], "10", None, "option 9"),
    ],
)
def test_how_data_sets_name_the_right_option(choices: Any, reference: str, letter: str | None, text: str) -> None:
    asked, score = row(reference, choices=choices), scorer(Evaluate(scorer="choice"), "rows.jsonl")
    right = None if letter is None else True
    assert score(f"The answer is {text}", asked)[1] is right and score(f"({letter or 'A'})", asked)[1] is right


def test_an_answer_that_a_verifier_fails_at_is_wrong() -> None:
    """reasoning-gym's own reads factors with int()."""
    config = Prompts(source="reasoning-gym:prime_factorization", splits=Splits(examples=0, train=1, test=4))
    asked = collect(config, seed=1).to_pylist()[0]
    score = scorer(Evaluate(extract="whole"), config.source)
    assert score("3.5", asked) == ("3.5", False) and score(asked["answer"], asked)[1] is True


def test_capitals_count_unless_ignored() -> None:
    for ignored in (False, True):
        score = scorer(Evaluate(scorer="exact", ignore_case=ignored), "rows.jsonl")
        assert score("YES ", row("yes")) == ("YES", ignored)


def test_what_a_scorer_reads_is_its_identity() -> None:
    assert identity(Evaluate(scorer="regex", pattern="a+")) == {"scorer": "regex", "pattern": "a+"}
    assert identity(Evaluate()) == {"scorer": "source", "extract": "last_number"}
    assert identity(Evaluate(scorer="math")) == {"scorer": "math"}


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
        ({"pattern": "a"}, "`pattern: a` means nothing to `scorer: source`; it is of scorer: regex"),
        ({"scorer": "math", "code_seconds": 3}, "`code_seconds: 3.0` means nothing to `scorer: math`"),
        ({"scorer": "regex"}, "`scorer: regex` needs `pattern`"),
        ({"scorer": "regex", "pattern": "("}, r"`pattern: \(` is no regular expression"),
    ],
)
def test_keys_that_say_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluate(**values)
