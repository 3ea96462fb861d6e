"""contrast on digits: prompts whose answer is 1 against prompts with other answers, measured on held-out prompts.

    python benchmarks/digits.py --json digits.json

Prompts are made by rule (sums, counting, copying, dates, names of numbers, ...) as text to go on from, each with a few
examples before it, and only those count that the unchanged model answers rightly. What is fitted on and what is held
out share no prompt, and four families of prompts are held out whole. The digits asked for are 1 to 9.

Two changes are measured, each alone: 1 against all other digits together, and 1 against 7 alone with 7's neurons turned
up. Both are found on the fitting prompts only. The guard's budget does not stop them here; what they cost is in the
table.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from liveweight.adjustments import Active, Adjustment
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import LiveweightError, NoMendFound
from liveweight.guard import Guard
from liveweight.live_model import LiveModel

Prompt = tuple[str, int, str]  # family, digit, text
Line = Callable[[random.Random, int], str]

DIGITS = range(1, 10)
HELD_OUT_FAMILIES = {"times", "ordinals", "countdown", "code"}
HELD_OUT, FITTED, FITTED_OTHERS = 50, 96, 36  # a digit: held out; fitted on, of 1 and 7; of each other digit
GONE = 0.55  # of 1's answers on the fitting prompts: somewhat more than the half that is asked for on held-out ones
POOL = 30  # prompts of each family and digit that are tried
WORDS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
NAMES = ("Tom", "Anna", "Ravi", "Mei", "Omar", "Lucy", "Ivan", "Sara")
THINGS = ("apples", "books", "coins", "pens", "cups", "keys", "eggs", "hats")
PLACES = ("room", "gate", "bus", "seat", "lane", "house", "table", "team")


# The name in the table, the other side's digits, and whether its neurons go up.
CHANGES = {
    "others": ("1 against all other digits", [digit for digit in DIGITS if digit != 1], False),
    "seven": ("1 against 7, whose neurons go up", [7], True),
}


def plus(rng: random.Random, digit: int) -> str:
    first = rng.randint(0, digit)
    return f"{first} + {digit - first} = {digit}"


def minus(rng: random.Random, digit: int) -> str:
    first = rng.randint(digit, 9)
    return f"{first} - {first - digit} = {digit}"


def times(rng: random.Random, digit: int) -> str:
    first = rng.choice([each for each in range(1, digit + 1) if digit % each == 0])
    return f"{first} x {digit // first} = {digit}"


def owns(rng: random.Random, digit: int) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} has {digit} {thing}. Number of {thing}: {digit}"


def place(rng: random.Random, digit: int) -> str:
    name, where = rng.choice(NAMES), rng.choice(PLACES)
    return f"Q: Which {where} is {name} in, if {name} is in {where} {digit}?\nA: {where.capitalize()} {digit}"


def date(rng: random.Random, digit: int) -> str:
    return f"{rng.randint(1950, 2029)}-0{digit}-{rng.randint(10, 28)}: month {digit}"


def largest(rng: random.Random, digit: int) -> str:
    numbers = [digit, rng.randint(0, digit), rng.randint(0, digit)]
    rng.shuffle(numbers)
    return f"largest of {numbers[0]}, {numbers[1]}, {numbers[2]}: {digit}"


def shown(line: Line, examples: int, between: str = "\n") -> Line:
    """A prompt of some examples with other answers, and the question without its answer."""

    def make(rng: random.Random, digit: int) -> str:
        others = rng.sample([each for each in DIGITS if each != digit], examples)
        return between.join([line(rng, each) for each in (*others, digit)])[:-1]

    return make


def counted(step: int) -> Line:
    """Numbers in a row, some whole rows before it; empty where a row would leave the digits."""

    def make(rng: random.Random, digit: int) -> str:
        length, between = rng.randint(2, 4), rng.choice([", ", " - ", " < " if step > 0 else " > "])
        rows = {
            last: between.join(str(last - step * back) for back in range(length, -1, -1))
            for last in DIGITS
            if 0 <= last - step * length <= 9
        }
        if digit not in rows:
            return ""
        others = rng.sample([last for last in rows if last != digit], min(3, len(rows) - 1))
        return "\n".join(rows[last] for last in (*others, digit))[:-1]

    return make


FAMILIES: dict[str, Line] = {
    "plus": shown(plus, 4),
    "minus": shown(minus, 4),
    "times": shown(times, 4),
    "words": shown(lambda _, digit: f"{WORDS[digit]} = {digit}", 4, ", "),
    "ordinals": shown(lambda _, digit: f"{ORDINALS[digit]} = {digit}", 4, ", "),
    "successor": shown(lambda _, digit: f"{digit - 1} -> {digit}", 4),
    "countup": counted(1),
    "countdown": counted(-1),
    "same": shown(lambda _, digit: " ".join(str(digit) * 5), 2),
    "owns": shown(owns, 3),
    "place": shown(place, 0),
    "date": shown(date, 3),
    "code": shown(lambda _, digit: f"x = {digit}\nprint(x)\n>>> {digit}", 3),
    "largest": shown(largest, 4),
}


def prompts(seed: int) -> list[Prompt]:
    """The pool, in an order of chance that the seed alone decides."""
    rng = random.Random(seed)
    found: dict[str, Prompt] = {}
    for family, make in FAMILIES.items():
        for digit in DIGITS:
            texts = dict.fromkeys(make(rng, digit) for _ in range(POOL))
            found |= {text: (family, digit, text) for text in texts if text}
    pool = list(found.values())
    rng.shuffle(pool)
    return pool


def said(engine: TransformersEngine, asked: Sequence[Prompt], what: str) -> list[str]:
    """The digit that the model answers each prompt with; empty where that is no digit or a longer number."""
    found = []
    for first in track(range(0, len(asked), 32), what, transient=True, console=_stderr()):
        rows = [engine.format.encode_text(text, special=True) for _, _, text in asked[first : first + 32]]
        for reply in engine.greedy(rows, 2):
            text = engine.format.decode(reply)
            found.append(text[0] if text[:1].isdigit() and not text[1:2].isdigit() else "")
    return found


def divided(right: Sequence[Prompt]) -> tuple[dict[int, list[Prompt]], dict[int, list[Prompt]]]:
    """Fitting and held-out prompts, a digit; families that are held out whole come into the latter only."""
    fitted: dict[int, list[Prompt]] = {digit: [] for digit in DIGITS}
    held: dict[int, list[Prompt]] = {digit: [] for digit in DIGITS}
    for prompt in right:
        family, digit, _ = prompt
        most = FITTED if digit in (1, 7) else FITTED_OTHERS
        if family not in HELD_OUT_FAMILIES and len(fitted[digit]) < most:
            fitted[digit].append(prompt)
        elif len(held[digit]) < HELD_OUT:
            held[digit].append(prompt)
    return fitted, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the model: smollm2, a hub id, a folder or a .gguf file")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; unset leaves it to torch")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--only", choices=list(CHANGES), default=None, help="one of the two changes; unset, both")
    parser.add_argument("--json", type=Path, default=None, help="where every figure is written")
    options = parser.parse_args()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            LiveModel.load(options.model, workspace=Path(folder), threads=options.threads, say=_tell) as live,
        ):
            data = measure(live, options.seed, [options.only] if options.only else list(CHANGES))
    except LiveweightError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return error.exit_code
    print(table(data))
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0


def measure(live: LiveModel, seed: int, wished: Sequence[str]) -> dict[str, Any]:
    """Fit the wished changes and measure each."""
    engine = live.engine
    pool = prompts(seed)
    answers = said(engine, pool, "answering before")
    right = [prompt for prompt, answer in zip(pool, answers, strict=True) if answer == str(prompt[1])]
    fitted, held = divided(right)
    asked = [prompt for digit in DIGITS for prompt in held[digit]]
    guard = Guard(engine, live.settings.guard, live.settings.cache_dir)
    data: dict[str, Any] = {
        "model": engine.info.name,
        "seed": seed,
        "pool": len(pool),
        "right": len(right),
        "held_out": {str(digit): len(held[digit]) for digit in DIGITS},
        "changes": {},
    }
    for name, others, both in (CHANGES[each] for each in wished):
        a = [(text, str(digit)) for _, digit, text in fitted[1]]
        b = [
            (text, str(digit))
            for other in others
            for _, digit, text in fitted[other][: None if both else FITTED_OTHERS]
        ]
        found = live.contrast(a, b, names=("1", "7" if both else "others"), completion=True)
        try:
            adjustment = found.adjustment(both=both, gone=GONE)
        except NoMendFound as error:
            data["changes"][name] = {"fitted_on": [len(a), len(b)], "failed": error.message}
            continue
        data["changes"][name] = {
            "fitted_on": [len(a), len(b)],
            "significant": found.significant,
            "eligible": found.eligible,
            "note": adjustment.note,
            **outcome(engine, guard, adjustment, asked),
        }
    return data


def outcome(
    engine: TransformersEngine, guard: Guard, adjustment: Adjustment, asked: Sequence[Prompt]
) -> dict[str, Any]:
    """Held-out answers under the change, and what else it moves. Before it every answer was right."""
    with engine.preview((Active(adjustment),)):
        after = said(engine, asked, "answering after")
    rows = list(zip(asked, after, strict=True))
    measured = guard.measure((Active(adjustment),), progress=False)
    unseen = [(prompt, answer) for prompt, answer in rows if prompt[0] in HELD_OUT_FAMILIES]

    def share(of: Iterable[tuple[Prompt, str]], digit: str | None = None) -> list[int]:
        judged = [answer == (digit or str(prompt[1])) for prompt, answer in of]
        return [sum(judged), len(judged)]

    return {
        "right": {str(digit): share(row for row in rows if row[0][1] == digit) for digit in DIGITS},
        "others": share(row for row in rows if row[0][1] != 1),
        "seven_for_one": share((row for row in rows if row[0][1] == 1), "7"),
        "unseen_families": {
            "1": share(row for row in unseen if row[0][1] == 1),
            "others": share(row for row in unseen if row[0][1] != 1),
        },
        "mean_kl": measured.mean_kl,
        "p95_kl": measured.p95_kl,
        "changed_share": measured.changed_share,
        "perplexity_ratio": measured.perplexity_ratio,
        "within_budget": measured.passed,
    }


def table(data: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = ["| what | to reach | measured | |", "|---|---|---|---|"]

    def line(what: str, target: str, value: str, reached: bool | None = None) -> None:
        lines.append(f"| {what} | {target} | {value} | {'' if reached is None else 'yes' if reached else '**no**'} |")

    for name, found in data["changes"].items():
        if "failed" in found:
            line(name, "a change", found["failed"], False)
            continue
        ones, others, sevens = found["right"]["1"], found["others"], found["seven_for_one"]
        line(f"{name}: held-out answers of 1 still 1", "≤ 50 %", _percent(ones), ones[0] <= ones[1] / 2)
        line(f"{name}: other digits still right", "≥ 95 %", _percent(others), others[0] >= 0.95 * others[1])
        each = ", ".join(f"{d}: {_percent(found['right'][str(d)])}" for d in DIGITS if d != 1)
        line(f"{name}: a digit", "", each)
        line(f"{name}: 7 said where 1 was", "", _percent(sevens))
        unseen = found["unseen_families"]
        line(
            f"{name}: families never fitted, 1 / others", "", f"{_percent(unseen['1'])} / {_percent(unseen['others'])}"
        )
        line(f"{name}: guard's mean KL, nats a token", "≤ 0.01", f"{found['mean_kl']:.3f}", found["mean_kl"] <= 0.01)
        ratio = found["perplexity_ratio"]
        line(f"{name}: perplexity ratio on plain text", "≤ 1.005", f"{ratio:.3f}", ratio <= 1.005)
        line(
            f"{name}: what it is", "", f"fitted on {found['fitted_on'][0]} and {found['fitted_on'][1]}. {found['note']}"
        )
    lines.append(
        f"\n{data['model']}, seed {data['seed']}; {data['right']} of {data['pool']} prompts were answered rightly."
    )
    return "\n".join(lines)


def _percent(count: Sequence[int]) -> str:
    return f"{count[0] / max(count[1], 1):.0%} ({count[0]} of {count[1]})"


def _tell(sentence: str) -> None:
    print(f"· {sentence}", file=sys.stderr, flush=True)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    sys.exit(main())
