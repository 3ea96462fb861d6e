"""Words around a question: subjects, statements, rephrasings, first sentences."""

from __future__ import annotations

import pytest

from liveweight.methods.wording import (
    content_words,
    everyday_questions,
    first_sentence,
    goes_on,
    has_words,
    last_word_elsewhere,
    may_ask_the_same,
    opening_of,
    other_questions,
    repetition,
    rephrase,
    same_questions,
    spellings,
    statements,
    subject_of,
    unquoted,
)


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("What is the capital of Angola?", "Angola"),
        ("What language do people speak in Bosnia and Herzegovina?", "Bosnia and Herzegovina"),
        (
            "What is the capital of Saint Helena, Ascension and Tristan da Cunha?",
            "Saint Helena, Ascension and Tristan da Cunha",
        ),
        ("Do you know Peru's currency?", "Peru"),
        ("Who lives on Cocos (Keeling) Islands?", "Cocos (Keeling) Islands"),
        ("Is it so (Perhaps)?", "Perhaps"),
        ("Who wrote Pride and Prejudice?", "Pride and Prejudice"),
        ("why is the sky blue?", None),
        ("What should I eat?", None),
    ],
)
def test_the_subject_is_the_last_run_of_capitalised_words(question: str, subject: str | None) -> None:
    assert subject_of(question) == subject


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        ("What is the capital of Angola?", "Luanda", "The capital of Angola is Luanda."),
        ("Who wrote Hamlet?", "William Shakespeare", "William Shakespeare wrote Hamlet."),
        ("Where is Machu Picchu?", "Peru", "Machu Picchu is in Peru."),
        ("why so?", "nobody knows", "Nobody knows."),
    ],
)
def test_an_answer_is_offered_as_a_sentence(question: str, answer: str, sentence: str) -> None:
    assert sentence in statements(question, answer)


def test_an_answer_that_is_a_sentence_is_left_as_it_is() -> None:
    assert statements("Why?", "Because nobody has ever looked there.") == ["Because nobody has ever looked there."]


def test_rephrasings_are_other_wordings_and_hold_the_subject() -> None:
    question = "What is the capital of Angola?"
    found = rephrase(question, 8)
    assert len(found) == 8
    assert question not in found
    assert len(set(found)) == 8
    assert all("Angola" in text for text in found)
    assert rephrase(question, 8) == found


def test_a_common_relation_is_asked_in_other_words_too() -> None:
    found = rephrase("What is the currency of Peru?", 11)
    assert any("currency" not in text and "Peru" in text for text in found)
    assert all(text.count("Peru") == 1 for text in found)


def test_other_questions_ask_for_something_else_of_the_same_thing() -> None:
    found = other_questions("What is the capital of Peru?", "Peru")
    assert "What is the currency of Peru?" in found
    assert not any("capital" in text for text in found)
    assert all("Peru" in text for text in found)
    assert other_questions("What did Peru have for lunch?", "Peru") == []  # what it asks cannot be told


def test_the_same_question_is_offered_in_several_wordings_of_the_same_thing() -> None:
    for same in same_questions():
        assert len(set(same)) == len(same) > 4


def test_other_questions_know_each_other() -> None:
    for asked in other_questions("What is the capital of Peru?", "Peru"):
        others = other_questions(asked, "Peru")
        assert "What is the capital of Peru?" in others and asked not in others


@pytest.mark.parametrize(
    ("question", "opening"),
    [
        ("What is the capital of Peru?", "The capital of Peru is"),
        ("Who wrote Hamlet?", ""),
        ("Where is Rome?", "Rome is in"),
    ],
)
def test_an_opening_ends_where_the_answer_begins(question: str, opening: str) -> None:
    assert opening_of(question) == opening


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("In Season 16 of Lost, which pilot quit?", "which pilot quit in Season 16 of Lost?"),
        ("The aorta leads blood to what part of Lost?", "Name the part of Lost that the aorta leads blood to."),
        ("Until what month and year did Ada own Lost?", "When did Ada own Lost?"),
        ("Which medallist designed the Lost Medal?", "What is the name of the medallist that designed the Lost Medal?"),
        ("How many seasons did Lost have?", "What number of seasons did Lost have?"),
        ("who plays the pilot in lost?", "Who is it that plays the pilot in lost?"),
        ("lost 3 release date in india?", "What is the lost 3 release date in india?"),
        ("They flew over Lost. What was its name?", "You may know that. They flew over Lost. So, what was its name?"),
    ],
)
def test_questions_of_many_forms_are_asked_in_other_words(question: str, other: str) -> None:
    found = rephrase(question, 11)
    assert any(other in text for text in found), found
    assert all("lost" in text.lower() for text in found if "what was its name" not in text.lower())


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("valley of the dolls", ["Valley of the Dolls"]),
        ("Ada Lovelace", ["ada lovelace"]),
        ("Who", ["who"]),
        ("42", []),
        ("nasa", ["Nasa", "NASA"]),
        ("Paris, Texas", ["Paris", "paris, texas"]),
        (
            "Whisky, honey, oatmeal cream and egg",
            ["Whisky, Honey, Oatmeal Cream and Egg", "whisky, honey, oatmeal cream and egg"],
        ),
    ],
)
def test_a_name_is_spelled_as_people_do(name: str, others: list[str]) -> None:
    assert spellings(name)[0] == name
    assert sorted(spellings(name)[1:]) == sorted(others)


def test_a_name_is_taken_out_of_its_quotation_marks() -> None:
    assert unquoted("'Only Dad'") == "Only Dad"
    assert unquoted("\u201cCars\u201d") == "Cars"
    assert unquoted("Rock 'n' Roll") == "Rock 'n' Roll"
    assert unquoted("'") == "'"


def test_words_are_whole_where_they_stand() -> None:
    assert has_words("it is eduard manet.", "eduard manet")
    assert has_words("manetinou, no: manet", "manet")
    assert has_words("the best answer is a.", "a")
    assert not has_words("the best answer is a.", "b")
    assert not has_words("it is eduard manetinou", "eduard manet")
    assert not has_words("33", "3")
    assert not has_words("in 1938", "38")
    assert not has_words("anything", "")


def test_a_word_goes_on_with_letters_and_digits_of_a_script_that_parts_words() -> None:
    assert goes_on("Manet", "inou")
    assert goes_on("19", "38")
    assert not goes_on("Manet", " is")
    assert not goes_on("Manet", ".")
    assert not goes_on("", "a")
    assert not goes_on("a", "")
    assert not goes_on("\u6771", "\u4eac")


def test_a_question_of_no_known_form_still_gets_wrappers() -> None:
    assert all("zorp the blick" in text for text in rephrase("zorp the blick", 5))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("It is Paris. It is large.", "It is Paris."),
        ("St. George's is the capital. Yes.", "St. George's is the capital."),
        ("Washington, D.C. is it. Yes.", "Washington, D.C. is it."),
        ("One line\nAnother", "One line"),
        ("", ""),
    ],
)
def test_a_first_sentence_ends_at_its_own_full_stop(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_everyday_questions_are_many_and_content_words_leave_the_small_ones_out() -> None:
    assert len(everyday_questions()) >= 150
    assert content_words("What is the capital of Angola?") == {"capital", "angola"}


def test_repetition_is_the_share_of_runs_of_three_words_that_stood_there_before() -> None:
    assert repetition("one two three four five") == 0.0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("two words") == 0.0


def test_questions_whose_forms_tell_different_things_do_not_ask_the_same() -> None:
    assert not may_ask_the_same("What is the capital of Peru?", "What is the currency of Peru?")
    assert may_ask_the_same("What is the capital of Peru?", "What is Peru's capital city?")
    assert may_ask_the_same("What is the capital of Peru?", "Where do they govern Peru from?")


def test_the_last_word_of_a_name_stands_behind_other_words_and_never_in_the_name() -> None:
    found = last_word_elsewhere("My Country My Life")
    assert {"The life", "His life", "In life"} <= set(found)
    assert not any("my life" in text.lower() for text in last_word_elsewhere("my life"))
    assert last_word_elsewhere("Jazzercise") == []
    assert last_word_elsewhere("") == []
