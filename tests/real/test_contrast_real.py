"""contrast on the embedded model: the answer 1 goes on prompts that were not fitted on, and other digits stay."""

from __future__ import annotations

import pytest

from liveweight.adjustments import Active
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.contrast import contrast, examples

pytestmark = pytest.mark.real

WORDS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = ("Tom", "Anna", "Ravi", "Mei", "Omar", "Lucy", "Ivan", "Sara")
THINGS = ("apples", "books", "coins", "pens", "cups", "keys", "eggs", "hats")


def owning(number: int, digit: int) -> str:
    """A question about what somebody has, behind two that are answered."""
    lines = []
    for step, each in enumerate((digit % 9 + 1, (digit + 3) % 9 + 1, digit)):
        name, thing = NAMES[(number + step) % 8], THINGS[(number * 3 + step) % 8]
        lines.append(f"{name} has {each} {thing}. Number of {thing}: {each}")
    return "\n".join(lines)[:-1]


def copying(number: int, digit: int) -> str:
    """A number again, behind others that were said again."""
    others = ((digit + number) % 9 + 1, (digit + 4) % 9 + 1)
    return ", ".join(f"{WORDS[each]} = {each}" for each in (*others, digit))[:-1]


def placing(number: int, digit: int) -> str:
    """A question whose answer stands in it."""
    name = NAMES[number % 8]
    return f"Q: Which room is {name} in, if {name} is in room {digit}?\nA: Room "


def test_the_answer_1_goes_where_it_was_not_fitted_and_other_digits_stay(embedded: LoadedModel) -> None:
    engine = TransformersEngine(embedded)

    def prompts(digits: tuple[int, ...], numbers: range) -> list[tuple[str, str]]:
        return [(ask(n, d), str(d)) for ask in (owning, copying, placing) for d in digits for n in numbers]

    ones, others = (examples(engine, prompts(d, range(4)), completion=True) for d in ((1,), (2, 3, 5, 7, 8)))
    held = [examples(engine, prompts(d, range(4, 8)), completion=True) for d in ((1,), (4, 7))]
    found = contrast(engine, ones, others)
    assert found.significant > 100
    adjustment = found.adjustment(count=362, factor=-1.0)  # as found by search in benchmarks/digits.py
    before = [[score.greedy for score in engine.score(side)] for side in held]
    with engine.preview((Active(adjustment),)):
        after = [[score.greedy for score in engine.score(side)] for side in held]
    assert sum(before[0]) >= 9
    assert sum(after[0]) <= sum(before[0]) / 2
    assert sum(after[1]) >= 0.8 * sum(before[1])
