"""Words around a question: other ways to ask it, what it is about, and how an answer to it is said.

Owns the shipped lists (rephrasings, statements, names) and plain string work on them. Deterministic, and knows nothing
of models: whoever has one chooses among what is offered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import zip_longest
from typing import Any

_SHORT = 4  # letters of a name that may be an abbreviation
_CONNECTORS = {"of", "the", "and", "de", "da", "la", "le", "el", "du", "von", "van", "al"}
_STOPWORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "were",
        "be",
        "do",
        "does",
        "did",
        "what",
        "which",
        "who",
        "whom",
        "whose",
        "where",
        "when",
        "why",
        "how",
        "in",
        "on",
        "at",
        "of",
        "to",
        "for",
        "from",
        "by",
        "and",
        "or",
        "it",
        "its",
        "that",
        "this",
        "there",
        "people",
        "please",
        "tell",
        "me",
        "name",
        "called",
        "know",
        "can",
        "could",
        "you",
        "i",
    ]
)
_ABBREVIATION = re.compile(r"(?:\b(?:St|Dr|Mr|Mrs|Ms|Mt|Ft|No|vs|etc|Jr|Sr)|\b[A-Z](?:\.[A-Z])*)\.$")


_ABOUT = 0.75  # of a question's words, that a text about it has
_MOVED = ("lead", "stmt", "q")  # groups of a rewrite that held a question's beginning
_BEGINNING = re.compile(
    "(?:The|An?|In|On|At|To|For|From|By|With|During|After|Before|According|As|Of|Since|Until|Behind|Under"
    "|Wh(?:at|ich|o|ose|om|ere|en|y)|How|It|This|That|These|Those) "
)
_QUOTES = "\"' \u2018\u2019\u201c\u201d\u00ab\u00bb"
_MARK = "\ue000"  # stands for an answer; no text holds it


@cache
def _list(name: str) -> dict[str, Any]:
    text = resources.files("liveweight.methods").joinpath(name).read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def everyday_questions() -> list[str]:
    """Short questions of many kinds, disjoint from the guard's."""
    questions: list[str] = _list("questions.json")["questions"]
    return questions


def names() -> list[str]:
    """Names of many kinds of things."""
    found: list[str] = _list("names.json")["names"]
    return found


def same_questions() -> list[list[str]]:
    """Questions about many names, each in several wordings: what they differ in is the wording and nothing else."""
    relations, offered = _list("relations.json")["relations"], names()
    found = []
    for number, relation in enumerate(relations):
        for name in offered[number :: len(relations)][:5]:
            question = relation["ask"].format(subj=name)
            found.append([question, *rephrase(question, 7)])
    return found


def questions_about(subject: str) -> list[tuple[str, str]]:
    """What else may be asked about something, and how an answer may begin."""
    return [
        (question.format(s=subject), opening.format(s=subject)) for question, opening in _list("names.json")["about_it"]
    ]


def earlier_turns() -> list[tuple[str, str]]:
    """Unrelated exchanges that may stand before a question."""
    return [(turn["user"], turn["assistant"]) for turn in _list("rephrasings.json")["turns"]]


def rephrase(question: str, most: int) -> list[str]:
    """Other wordings of a question, never the question itself.

    Other words for what is asked and other forms of the question by turns, every second one with something around it;
    then the question as it is with something around it.
    """
    wrappers: list[str] = _list("rephrasings.json")["wrappers"]
    forms = _rewrites(
        question, [([each["pattern"]], each["rewrites"]) for each in _list("rephrasings.json")["transforms"]]
    )
    relation = _relation(question)
    words = _rewrites(question, [(relation["patterns"], relation["rewrites"])]) if relation else []
    found = [text for pair in zip_longest(words, forms) for text in pair if text not in (None, question)]
    found = found[: most - min(2, most // 3)]
    found = [wrappers[-1 - index // 2].format(q=text) if index % 2 else text for index, text in enumerate(found)]
    return list(dict.fromkeys(found + [wrapper.format(q=question) for wrapper in wrappers]))[:most]


def completions(text: str) -> list[str]:
    """Ways to bring a statement up whose end is left open."""
    forms: list[str] = _list("rephrasings.json")["completions"]
    return [form.format(t=text) for form in forms]


def passages(count: int = 4) -> list[str]:
    """Unrelated sentences that may stand before a text, from all over the plain text."""
    text = resources.files("liveweight.methods").joinpath("plain_text.txt").read_text(encoding="utf-8")
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    return [first_sentence(part) for part in paragraphs[:: max(1, len(paragraphs) // count)][:count]]


def last_word_elsewhere(name: str) -> list[str]:
    """The last word of a name of several words behind other words, where it stands for something else.

    In lower case, since a capital may stand for the name itself ("Einstein", but "a mirror" for "The Daily Mirror").
    """
    *others, last = name.split() or [""]
    texts = [f"{word} {last.lower()}" for word in _list("names.json")["before"]] if others else []
    return [text for text in texts if name.lower() not in text.lower()]


def other_questions(question: str, subject: str) -> list[str]:
    """What else may be asked about the subject of a question, where it can be told what the question asks."""
    relation = _relation(question)
    if relation is None:
        return []
    return [each["ask"].format(subj=subject) for each in _list("relations.json")["relations"] if each is not relation]


def may_ask_the_same(question: str, other: str) -> bool:
    """False where it can be told of two questions what they ask for, and it is not the same."""
    one, two = _relation(question), _relation(other)
    return one is None or two is None or one is two


def _relation(question: str) -> dict[str, Any] | None:
    """The relation that a question asks for, as far as its form tells."""
    relations: list[dict[str, Any]] = _list("relations.json")["relations"]
    return next((each for each in relations if any(re.match(p, question) for p in each["patterns"])), None)


def _rewrites(question: str, offered: Iterable[tuple[list[str], list[str]]]) -> list[str]:
    """What the first of some (patterns, rewrites) that fits a question makes of it."""
    for patterns, rewrites in offered:
        match = next((match for pattern in patterns if (match := re.match(pattern, question))), None)
        if match:
            said = {name: _within(text) if name in _MOVED else text for name, text in match.groupdict().items()}
            return [rewrite.format(**said) for rewrite in rewrites]
    return []


def _within(text: str) -> str:
    """A sentence's beginning as it stands further on: in lower case, unless it begins with a name."""
    return text[:1].lower() + text[1:] if _BEGINNING.match(text) else text


def subject_of(question: str) -> str | None:
    """What a question is about, as far as its letters tell: its last run of capitalised words but for the first word.

    "What is the capital of Bosnia and Herzegovina?" is about Bosnia and Herzegovina. None where no word is capitalised.
    """
    words = list(re.finditer(r"\S+", question))
    runs: list[tuple[int, int]] = []
    joinable = False
    for index, word in enumerate(words):
        text = word.group()
        if index > 0 and text.lstrip("(")[:1].isupper() and text not in ("I", "I'm", "I've", "I'd", "I'll"):
            start = runs.pop()[0] if joinable and runs else word.start()
            runs.append((start, word.end()))
            joinable = not text.endswith((".", "?", "!", ";", ":")) and not text.rstrip("?.!,").endswith("'s")
        else:
            joinable = joinable and text.lower() in _CONNECTORS
    if not runs:
        return None
    start, end = runs[-1]
    subject = re.sub(r"(?:'s)?[?.!,;:]*$", "", question[start:end])
    # A bracket may stand in a name ("Cocos (Keeling) Islands"), but not around it.
    return subject.strip("()") or None if subject.startswith("(") else subject or None


def unquoted(name: str) -> str:
    """A name without quotation marks around it, as far as something is left."""
    return name.strip(_QUOTES) or name


def spellings(name: str) -> list[str]:
    """How people write a name: as given, as a title, in lower case.

    Also in capitals where it is a short word ("nasa"), and a place without where it lies.
    """
    found = [name]
    parts = name.split(", ")
    if len(parts) > 1 and all(part[:1].isupper() and " and " not in part for part in parts):
        found.append(parts[0])
    found += [_title(each) for each in found]
    if name.islower() and name.isalpha() and len(name) <= _SHORT:
        found.append(name.upper())
    return list(dict.fromkeys((*found, name.lower())))


def _title(name: str) -> str:
    words = name.split(" ")
    return " ".join(word if n and word in _CONNECTORS else word[:1].upper() + word[1:] for n, word in enumerate(words))


def statements(question: str, answer: str) -> list[str]:
    """Sentences that give `answer` to `question`; the answer itself where it is a sentence already."""
    answer = answer.strip()
    if len(answer.split()) >= 6 or (answer.endswith((".", "!", "?")) and len(answer.split()) >= 3):
        return [answer if answer.endswith((".", "!", "?")) else answer + "."]
    lists = _list("statements.json")
    bare = answer.rstrip(".")
    found: list[str] = []
    for statement in lists["statements"]:
        match = re.match(statement["pattern"], question.strip())
        if match:
            found = [form.format(a=bare, **match.groupdict()) for form in statement["say"]]
            break
    found += [form.format(a=bare) for form in lists["otherwise"]]
    return [text[:1].upper() + text[1:] for text in dict.fromkeys(found)]


def opening_of(question: str) -> str:
    """How an answer to a question may begin, up to the answer proper; empty where that comes first."""
    return statements(question, _MARK)[0].split(_MARK)[0].strip()


def first_sentence(text: str) -> str:
    """The first sentence of a reply; "St. Louis" and "D.C." don't end one."""
    line = text.strip().split("\n", 1)[0]
    parts = re.split(r"(?<=[.!?])\s+", line)
    sentence = parts[0]
    for part in parts[1:]:
        if not _ABBREVIATION.search(sentence):
            break
        sentence += " " + part
    return sentence


def goes_on(text: str, more: str) -> bool:
    """Whether `more`, directly behind `text`, goes on with its last word or number, in a script that parts words."""
    return all(each.isdigit() or each.lower() != each.upper() for each in (text[-1:], more[:1]))


def has_words(text: str, words: str) -> bool:
    """Whether some words stand in a text, none of them as a part of a longer one.

    A single letter may, where the text is no sentence but a word alone (drawn out, or spelt).
    """
    if len(words) == 1 and words.isalpha() and " " not in text.strip():
        return words in text
    found = re.finditer(re.escape(words), text) if words else ()
    return any(not goes_on(text[: each.start()], words) and not goes_on(words, text[each.end() :]) for each in found)


def content_words(text: str) -> set[str]:
    """The words of a text that carry its meaning, in lower case."""
    return {word for word in re.findall(r"\w+", text.lower()) if word not in _STOPWORDS}


def repetition(text: str) -> float:
    """The share of a text's runs of three words that stood in it before."""
    words = re.findall(r"\w+", text.lower())
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def is_about(text: str, asked: set[str]) -> bool:
    """Whether a text speaks of what was asked: it has most of the question's words that carry meaning."""
    return bool(asked) and len(asked & content_words(text)) >= _ABOUT * len(asked)
