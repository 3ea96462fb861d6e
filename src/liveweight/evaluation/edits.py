"""Edits that public data sets ask for, in one shape: CounterFact, zsRE, QAEdit, countries.

Owns reading their published files, whichever of them one is, and naming what each is measured on. Knows nothing of
models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liveweight.errors import InvalidInput
from liveweight.evaluation.questions import CountryQuestion, country_questions

Form = Literal["completion", "question"]

# Where each set lies in a folder of data sets, as far as it is asked for by its name.
FILES: dict[str, str] = {
    "counterfact": "counterfact/*.json",
    "qaedit": "qaedit/*.json",
    "zsre": "zsre/*.json",
    "countries": "countries.json",
}


@dataclass(frozen=True)
class Edit:
    """One fact to be changed, and what tells whether that went well.

    `prompt` is what a method is given. A completion ("The mother tongue of X is") is text that goes on; a question is
    asked through the chat template. Paraphrases and neighbours have the prompt's own form.
    """

    label: str  # the case's name in its data set
    form: Form
    prompt: str
    subject: str | None
    new: str  # what the model is to say
    true: str | None  # what is to be said no longer, where the set tells
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()  # prompts whose answers are to stay
    asked: str | None = None  # a chat question for the same fact, for measuring only
    answers: tuple[str, ...] = ()  # of the neighbours, one each, where the set tells and it is not `true`


def edits(data: str, folder: Path | None = None, *, limit: int | None = None) -> list[Edit]:
    """The edits of a data set, by its name in a folder of data sets or by its file.

    A file's format is told from what is in it. Raises InvalidInput for an unknown name, a file that cannot be read, or
    one that is in none of the formats.
    """
    file = _file(data, folder)
    rows = _rows(file)
    if "currencies" in rows[0]:
        return [_of_country(each) for each in country_questions(file)][:limit]
    read = next((read for key, read in _READERS.items() if key in rows[0]), None)
    if read is None:
        raise InvalidInput(
            f"{file} is in none of the formats that are known: its first entry has {', '.join(sorted(rows[0]))[:120]}.",
            hint="Give CounterFact (ROME's JSON), zsRE (MEND's), QAEdit, or countries (mledoze's, reduced).",
        )
    found = []
    for number, row in enumerate(rows[:limit]):
        try:
            found.append(read(row, number))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InvalidInput(
                f"Entry {number} of {file} is not of the form of those before it: {error!r}.",
                hint="Take the entry out, or complete it.",
            ) from error
    return found


def _file(data: str, folder: Path | None) -> Path:
    if data in FILES and folder is not None:
        found = sorted(folder.expanduser().glob(FILES[data]))
        if not found:
            raise InvalidInput(
                f"There is no {FILES[data]} in {folder}.", hint="Name the folder that holds the data, or a file of it."
            )
        return found[0]
    file = Path(data).expanduser()
    if not file.is_file():
        raise InvalidInput(
            f"{data!r} is neither a file nor a data set that is known.",
            hint=f"Give a JSON file, or one of {', '.join(FILES)} with the folder that holds them.",
        )
    return file


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{file} cannot be read as JSON: {error}.", hint="Name another file.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InvalidInput(f"{file} is not a list of edits.", hint="Give a JSON file that holds a list of objects.")
    return rows


def _counterfact(row: Mapping[str, Any], number: int) -> Edit:
    wished = row["requested_rewrite"]
    return Edit(
        label=str(row.get("case_id", number)),
        form="completion",
        prompt=wished["prompt"].format(wished["subject"]),
        subject=wished["subject"],
        new=wished["target_new"]["str"],
        true=wished["target_true"]["str"],
        paraphrases=tuple(row["paraphrase_prompts"]),
        neighbours=tuple(row["neighborhood_prompts"]),
        asked=row.get("chat_question"),
    )


def _zsre(row: Mapping[str, Any], number: int) -> Edit:
    return Edit(
        label=str(number),
        form="question",
        prompt=row["src"],
        subject=row["subject"],
        new=row["alt"],
        true=row["answers"][0] if row.get("answers") else row.get("pred"),
        paraphrases=(row["rephrase"],),
        neighbours=(row["loc"].removeprefix("nq question: "),),
        answers=(row["loc_ans"],),
    )


def _qaedit(row: Mapping[str, Any], number: int) -> Edit:
    return Edit(
        label=str(row.get("id", number)),
        form="question",
        prompt=row["prompt"],
        subject=row.get("subject"),
        new=row["target"].removesuffix(" *"),  # one entry of the published file has such a mark behind its answer
        true=None,
        paraphrases=(row["rephrase"],),
        neighbours=tuple(each["loc"] for each in row["locality"]),
    )


def _of_country(row: CountryQuestion) -> Edit:
    return Edit(
        label=f"{row.country}/{row.relation}",
        form="question",
        prompt=row.question,
        subject=row.country,
        new=row.answers[0],
        true=None,
        paraphrases=row.held_out,
    )


# The entry that only this format has.
_READERS: dict[str, Callable[[Mapping[str, Any], int], Edit]] = {
    "requested_rewrite": _counterfact,
    "alt": _zsre,
    "locality": _qaedit,
}
