"""Tests that a program must pass: what a reference says, and the verdict on a program that runs in a sandbox."""

import ast
import json
import os
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.measure.sandbox import Confined, Limits
from schemas.errors import excerpt

NAMED = (("inputs", "outputs"), ("input", "output"))
"""What data sets call the texts, or lists of them, that a program reads and writes."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed, and why, or why not."""

    passed: bool
    why: str


class Tests(Protocol):
    """Judges programs."""

    def judge(self, program: str, limits: Limits) -> Verdict:
        """Run a program under these limits. Raises OpdError when there is no sandbox."""


@dataclass(frozen=True)
class Asserts:
    """Python with assert statements on what the program defines; they run in a process apart from it."""

    text: str

    def judge(self, program: str, limits: Limits) -> Verdict:
        """All asserts must be passed, and one at least."""
        to_program, from_program = os.pipe(), os.pipe()
        try:
            candidate = Confined("candidate", program, limits, channel=(to_program[0], from_program[1]))
            try:
                tests = Confined("tests", self.text, limits, channel=(from_program[0], to_program[1]))
            except BaseException:
                candidate.end(at_once=True)
                raise
        finally:
            for file in (*to_program, *from_program):
                os.close(file)
        ended = tests.end()
        gone = candidate.end(at_once=not _said(ended.output).get("gone"))
        verdict = _said(ended.output)
        if ended.why or not verdict:
            return Verdict(False, ended.why or "the tests gave no verdict")
        if verdict.get("gone"):
            return Verdict(False, gone.why or "it ended before the tests did")
        return Verdict(not verdict["why"], excerpt(verdict["why"] or f"passed {verdict['passed']} asserts"))


@dataclass(frozen=True)
class Cases:
    """What the program must print for which input; compared where none of it runs."""

    cases: tuple[tuple[str, str], ...]

    def judge(self, program: str, limits: Limits) -> Verdict:
        """Every output must be the expected one, space at the ends of lines and of all of it aside."""
        for number, (given, expected) in enumerate(self.cases, 1):
            ended = Confined("program", program, limits, stdin=given.encode()).end()
            if ended.why:
                return Verdict(False, f"case {number}: {ended.why}")
            if _lines(ended.output) != _lines(expected):
                printed, wanted = (excerpt(text, 60) for text in (ended.output, expected))
                return Verdict(False, f"case {number}: printed {printed!r}, expected {wanted!r}")
        return Verdict(True, f"passed {len(self.cases)} cases")


def read_tests(reference: str, entry_point: str | None = None) -> Tests | None:
    """The tests that a reference says; None where it says none.

    Args:
        reference: Python with assert statements, a list of such (MBPP's `test_list`), or JSON of inputs and outputs:
            `[{input: ..., output: ...}]`, `{inputs: [...], outputs: [...]}` (APPS) or `{input: output}`.
        entry_point: the function that tests which define `check(candidate)` are called with (HumanEval).
    """
    data = _data(reference)
    if cases := _cases(data):
        return Cases(cases)
    if isinstance(data, list) and all(isinstance(text, str) for text in data):
        reference = "\n".join(data)
    try:
        tree = ast.parse(reference)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        return None
    called = any(isinstance(node, ast.Name) and node.id == "check" for node in ast.walk(tree))
    defined = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    return Asserts(f"{reference}\ncheck({entry_point})\n" if entry_point and defined and not called else reference)


def _data(reference: str) -> Any:
    """A list or mapping in JSON or as Python writes it."""
    for reads in (json.loads, ast.literal_eval):
        try:
            return reads(reference.strip())
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _cases(data: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(data, dict):
        if names := next((pair for pair in NAMED if set(pair) <= data.keys()), None):
            given, wanted = ([text] if isinstance(text, str) else text for text in map(data.get, names))
            if not isinstance(given, list) or not isinstance(wanted, list) or len(given) != len(wanted):
                return ()
            pairs = list(zip(given, wanted, strict=True))
        else:
            pairs = list(data.items())
    elif isinstance(data, list) and all(isinstance(item, dict) and {"input", "output"} <= item.keys() for item in data):
        if any(item.get("testtype", "stdin") != "stdin" for item in data):  # LiveCodeBench's calls of functions
            return ()
        pairs = [(item["input"], item["output"]) for item in data]
    else:
        return ()
    return tuple(pairs) if all(isinstance(text, str) for pair in pairs for text in pair) else ()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _said(output: str) -> dict[str, Any]:
    try:
        found = json.loads(output)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
