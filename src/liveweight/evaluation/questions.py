"""Questions about countries with known answers, each in several wordings.

Owns reading the countries' file and how each relation is asked about: once as the question that is judged and mended,
and in two times four held-out wordings, which no method may see. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from liveweight.errors import InvalidInput
from liveweight.evaluation.answers import is_right

Relation = Literal["capital", "languages", "currencies"]

ASKED: dict[Relation, str] = {
    "capital": "What is the capital of {country}?",
    "languages": "What language do people speak in {country}?",
    "currencies": "What is the currency of {country}?",
}
HELD_OUT: dict[Relation, tuple[str, ...]] = {
    "capital": (
        "Which city is the capital of {country}?",
        "Tell me the capital of {country}.",
        "Which city is {country}'s capital?",
        "I am preparing for a geography quiz. What's {country}'s capital city?",
    ),
    "languages": (
        "Which language is spoken in {country}?",
        "Tell me the language that people in {country} speak.",
        "If I travel to {country}, what language will I hear?",
        "I am preparing for a geography quiz. What's the language of {country}?",
    ),
    "currencies": (
        "Which currency is used in {country}?",
        "Tell me the currency of {country}.",
        "What money do people pay with in {country}?",
        "I am preparing for a geography quiz. What's {country}'s currency?",
    ),
}
# Written by somebody who saw neither the methods nor their results, and not looked at while methods were developed.
UNSEEN: dict[Relation, tuple[str, ...]] = {
    "capital": (
        "{country} - capital city?",
        "Name the capital city of {country}.",
        "Sorry to bother you, but could you please say what city serves as the capital in {country}?",
        "If I wanted to visit the capital of {country}, which city would I be going to?",
    ),
    "languages": (
        "{country} main language?",
        "Tell me the main language of {country}.",
        "Could you please let me know which language is most widely spoken in {country}?",
        "When folks from {country} chat at home, what language is it usually in?",
    ),
    "currencies": (
        "{country} currency name?",
        "Tell me which currency is used in {country}.",
        "I'd like to know what currency people in {country} pay with.",
        "For {country}, what's the official monetary unit?",
    ),
}


@dataclass(frozen=True)
class CountryQuestion:
    """One question, its right answers (any counts as right; the first is the one to teach) and other wordings of it."""

    country: str
    relation: Relation
    question: str
    answers: tuple[str, ...]
    held_out: tuple[str, ...]
    unseen: tuple[str, ...]


def country_questions(file: Path) -> Iterator[CountryQuestion]:
    """Country by country in the file's order: capital, languages, currencies, those that it lists.

    Left out are questions that hold their own answer ("What is the capital of Singapore?"): any reply that repeats the
    question would be right. `file` is in the format of mledoze/countries, reduced to lists of names. Raises
    InvalidInput for a file that is not there or not of that form.
    """
    for country in _read(file):
        for relation in get_args(Relation):
            answers = tuple(country[relation])
            question = ASKED[relation].format(country=country["name"])
            if not answers or is_right(question, answers):
                continue
            others, unseen = (
                tuple(wording.format(country=country["name"]) for wording in wordings[relation])
                for wordings in (HELD_OUT, UNSEEN)
            )
            yield CountryQuestion(country["name"], relation, question, answers, others, unseen)


def _read(file: Path) -> list[dict[str, Any]]:
    hint = "Give the folder that holds countries.json: a list of objects with name, capital, languages, currencies."
    try:
        countries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{file} cannot be read as JSON: {error}.", hint=hint) from error
    wanted = {"name", *get_args(Relation)}
    if not isinstance(countries, list) or not all(
        isinstance(each, dict) and wanted <= each.keys() for each in countries
    ):
        raise InvalidInput(f"{file} does not hold countries.", hint=hint)
    return countries
