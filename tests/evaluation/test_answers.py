"""Judging replies: every figure below was worked out by hand."""

from __future__ import annotations

import math

import pytest

from liveweight.evaluation import (
    babbles,
    claimed_answer,
    first_sentence,
    fluency,
    gives_another,
    is_right,
    ngram_entropy,
    normalised,
    repetition,
    same_first_sentence,
    says,
)

ANGOLA = "What is the capital of Angola?"
WRONG = "The capital of Angola is Anguimba."


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("São Tomé", "sao tome"),
        ("Saint John's", "saint john s"),
        ("  Port-aux-Français! ", "port aux francais"),
        ("", ""),
    ],
)
def test_normalising_leaves_what_two_spellings_share(text: str, plain: str) -> None:
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("It is Luanda. It lies on the coast.", "It is Luanda."),
        ("It is St. John's. It lies on the coast.", "It is St. John's."),
        ("It is Washington, D.C. and no other. Yes.", "It is Washington, D.C. and no other."),
        ("\n It is Luanda\nand more", "It is Luanda"),
        ("Luanda! Really?", "Luanda!"),
        ("", ""),
    ],
)
def test_the_first_sentence_ends_where_a_reader_would_end_it(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_an_answer_counts_as_whole_words_of_the_first_sentence_only() -> None:
    assert says("The capital is LUANDA.", "Luanda")
    assert not says("The capital is Anguimba. Luanda is another city.", "Luanda")
    assert not says("They speak Frenchify.", "French")
    assert not says("Anything at all.", "")
    assert is_right("They speak French there.", ["Dutch", "French"])
    assert not is_right("They speak German there.", ["Dutch", "French"])
    assert not is_right("They speak German there.", [])


def test_same_first_sentences_may_go_on_differently() -> None:
    assert same_first_sentence("It is Luanda. It is old.", "It is Luanda. It is new.")
    assert not same_first_sentence("It is Luanda.", "It is luanda.")


@pytest.mark.parametrize(
    ("question", "reply", "claim"),
    [
        (ANGOLA, WRONG, "anguimba"),
        (ANGOLA, "Porto-Novo is the capital of Angola.", "porto novo"),
        (ANGOLA, "The capital of Angola is Hoi An, a city in the north.", "hoi an"),
        ("What is the currency of Aruba?", "The currency of Aruba is the Aruba Dollar (AUD).", "dollar"),
        ("What language do people speak in Belize?", "In Belize, the language spoken is called English.", "english"),
        (ANGOLA, "The capital of Angola.", ""),
        (ANGOLA, "", ""),
    ],
)
def test_the_claim_is_the_first_run_of_words_that_the_question_did_not_bring(
    question: str, reply: str, claim: str
) -> None:
    assert claimed_answer(question, reply) == claim


@pytest.mark.parametrize(
    ("reply", "another"),
    [
        ("The capital of Angola is Luanda.", True),
        ("The capital of Angola is Anguimba, a city.", False),
        ("It was called Luanda and is now Anguimba.", False),
        ("The capital of Angola is the capital of Angola.", False),
        ("", False),
    ],
)
def test_another_answer_claims_something_and_not_the_rejected_thing(reply: str, another: bool) -> None:
    assert gives_another(ANGOLA, WRONG, reply) is another


def test_a_part_of_the_rejected_claim_is_not_another_answer() -> None:
    question = "What is the currency of Vietnam?"
    assert not gives_another(question, "It is the Saigon dong.", "It is the dong.")
    assert gives_another(question, "It is the Saigon dong.", "It is the piastre.")


def test_repetition_is_the_share_of_trigrams_that_came_before() -> None:
    # a b c a b c a: trigrams abc bca cab abc bca -> 3 different of 5
    assert repetition("a b c a b c a") == pytest.approx(2 / 5)
    # bigrams ab bc ca ab bc ca -> 3 different of 6
    assert repetition("a b c a b c a", size=2) == pytest.approx(1 / 2)
    assert repetition("a b c d e") == 0.0
    assert repetition("a b") == 0.0


def test_entropy_is_that_of_the_ngrams_shares() -> None:
    # a a b a a: bigrams aa ab ba aa -> shares 1/2, 1/4, 1/4
    assert ngram_entropy("a a b a a", 2) == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 2)
    assert ngram_entropy("a b c d e", 2) == pytest.approx(2.0)
    assert ngram_entropy("a a a a", 2) == 0.0
    assert ngram_entropy("a", 2) == 0.0


def test_fluency_weighs_two_entropies_as_published() -> None:
    # five different words: H2 = log2 4 = 2, H3 = log2 3
    expected = 100 * (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2
    assert fluency("a b c d e") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "babble"),
    [
        ("The capital of Angola is Luanda, a large port on the Atlantic coast.", False),
        ("The capital of the capital of the capital of the capital of the capital.", True),
        ("no no no no no no no no no no no no", True),
        ("ha ha ha", True),
        ("Luanda.", False),
        ("...", True),
        ("", True),
    ],
)
def test_babble_goes_in_circles_or_says_nothing(text: str, babble: bool) -> None:
    assert babbles(text) is babble


def test_the_entropy_rule_finds_a_circle_that_is_longer_than_it_is_frequent() -> None:
    # x and y in turns: 2-grams xy yx ..., entropy 1 bit of log2(11) = 3.46 possible
    assert babbles("x y x y x y x y x y x y")
    # twelve words, one pair twice: 10 of 11 bigrams differ, 3.28 bits of 3.46
    assert not babbles("one two three four five six seven eight nine ten one two")
