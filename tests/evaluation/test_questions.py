"""The countries' questions: which are asked, in which order, in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liveweight.errors import InvalidInput
from liveweight.evaluation import ASKED, HELD_OUT, UNSEEN, country_questions, normalised
from liveweight.methods.wording import rephrase


def written(folder: Path, countries: object) -> Path:
    file = folder / "countries.json"
    file.write_text(json.dumps(countries), encoding="utf-8")
    return file


def country(name: str, capital: list[str], languages: list[str], currencies: list[str]) -> dict[str, object]:
    return {"name": name, "capital": capital, "languages": languages, "currencies": currencies, "region": "somewhere"}


def test_questions_come_country_by_country_without_those_that_have_no_answer(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        [
            country("Aruba", ["Oranjestad"], ["Dutch", "Papiamento"], ["Aruban florin"]),
            country("Bouvet", [], ["x"], []),
        ],
    )
    found = list(country_questions(file))
    assert [each.question for each in found] == [
        "What is the capital of Aruba?",
        "What language do people speak in Aruba?",
        "What is the currency of Aruba?",
        "What language do people speak in Bouvet?",
    ]
    assert found[1].answers == ("Dutch", "Papiamento")
    assert found[0].held_out[1] == "Tell me the capital of Aruba."


def test_a_question_that_holds_its_answer_is_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, [country("Singapore", ["Singapore"], ["Malay"], [])])
    assert [each.relation for each in country_questions(file)] == ["languages"]


def test_every_relation_has_eight_wordings_none_of_which_is_the_question() -> None:
    assert HELD_OUT.keys() == UNSEEN.keys() == ASKED.keys()
    for relation, asked in ASKED.items():
        wordings = {*HELD_OUT[relation], *UNSEEN[relation]}
        assert len({*wordings, asked}) == 9
        assert all("{country}" in wording for wording in wordings)


def test_no_method_sees_a_held_out_wording() -> None:
    for relation, asked in ASKED.items():
        seen = {normalised(text) for text in rephrase(asked.format(country="Peru"), 100)}
        held_out = {normalised(text.format(country="Peru")) for text in (*HELD_OUT[relation], *UNSEEN[relation])}
        assert not seen & held_out


@pytest.mark.parametrize("content", ["{", '{"name": 1}', '[{"name": "Aruba"}]'])
def test_a_file_of_another_form_is_told_by_its_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "countries.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"countries\.json"):
        list(country_questions(file))


def test_a_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.json"):
        list(country_questions(tmp_path / "nowhere.json"))
