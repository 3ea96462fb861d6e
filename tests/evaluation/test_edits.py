"""Each published format comes out in one shape; what is in none of them is told by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liveweight.errors import InvalidInput
from liveweight.evaluation import Edit, edits

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Ada",
        "target_new": {"str": "Welsh", "id": "Q1"},
        "target_true": {"str": "English", "id": "Q2"},
    },
    "paraphrase_prompts": ["Ada spoke"],
    "neighborhood_prompts": ["The mother tongue of Bo is", "Cy spoke"],
    "generation_prompts": ["Ada lived in"],
    "chat_question": "What is the mother tongue of Ada?",
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What does UniFirst make?",
    "pred": "hats",
    "rephrase": "What is made by UniFirst?",
    "alt": "aircraft",
    "answers": ["uniforms"],
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
}
QAEDIT = {
    "id": 3,
    "prompt": "who has the most games?",
    "target": "Wilt Chamberlain *",
    "subject": "most games",
    "rephrase": "Which player has the most games?",
    "locality": [{"loc": "who wrote hamlet", "loc_ans": "Shakespeare"}, {"loc": "what is tea", "loc_ans": "a drink"}],
}
COUNTRY = {"name": "Angola", "capital": ["Luanda"], "languages": ["Portuguese"], "currencies": ["Angolan kwanza"]}


def written(folder: Path, rows: Any, name: str = "data.json") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder / name


def test_counterfact_is_completions_with_an_old_answer(tmp_path: Path) -> None:
    assert edits(str(written(tmp_path, [COUNTERFACT]))) == [
        Edit(
            label="7",
            form="completion",
            prompt="The mother tongue of Ada is",
            subject="Ada",
            new="Welsh",
            true="English",
            paraphrases=("Ada spoke",),
            neighbours=("The mother tongue of Bo is", "Cy spoke"),
            asked="What is the mother tongue of Ada?",
        )
    ]


def test_zsre_is_questions_whose_locality_prompt_loses_its_mark(tmp_path: Path) -> None:
    (found,) = edits(str(written(tmp_path, [ZSRE])))
    assert (found.form, found.prompt, found.new, found.true) == (
        "question",
        "What does UniFirst make?",
        "aircraft",
        "uniforms",
    )
    assert (found.paraphrases, found.neighbours) == (("What is made by UniFirst?",), ("who wrote hamlet",))
    assert found.answers == ("Shakespeare",)


def test_qaedit_has_no_old_answer(tmp_path: Path) -> None:
    (found,) = edits(str(written(tmp_path, [QAEDIT])))
    assert (found.label, found.new, found.true) == ("3", "Wilt Chamberlain", None)
    assert found.neighbours == ("who wrote hamlet", "what is tea")


def test_countries_give_a_question_for_each_relation(tmp_path: Path) -> None:
    found = edits(str(written(tmp_path, [COUNTRY])))
    assert [each.label for each in found] == ["Angola/capital", "Angola/languages", "Angola/currencies"]
    assert found[0].new == "Luanda"
    assert len(found[0].paraphrases) == 4


def test_a_set_is_found_by_its_name_and_cut_where_told(tmp_path: Path) -> None:
    written(tmp_path, [COUNTERFACT, COUNTERFACT | {"case_id": 8}], "counterfact/some_name.json")
    assert [each.label for each in edits("counterfact", tmp_path)] == ["7", "8"]
    assert [each.label for each in edits("counterfact", tmp_path, limit=1)] == ["7"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"a": 1}], "none of the formats"),
        ({}, "not a list of edits"),
        ([], "not a list of edits"),
        ([COUNTERFACT, {"case_id": 1}], "Entry 1"),
    ],
)
def test_what_is_of_another_form_is_told(tmp_path: Path, rows: Any, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        edits(str(written(tmp_path, rows)))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="neither a file nor a data set"):
        edits("nonsense", tmp_path)
    with pytest.raises(InvalidInput, match="There is no zsre"):
        edits("zsre", tmp_path)
    (tmp_path / "broken.json").write_text("[", encoding="utf-8")
    with pytest.raises(InvalidInput, match="cannot be read as JSON"):
        edits(str(tmp_path / "broken.json"))
