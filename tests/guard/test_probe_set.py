"""The written data of the guard and the methods: probes, re-phrasings and plain text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.engines.base import Message
from liveweight.errors import InvalidInput
from liveweight.guard.probe_set import Probe, ProbeSet, load_probes, normalised

KINDS = {
    "fact": 70,
    "arithmetic": 20,
    "definition": 30,
    "instruction": 30,
    "small_talk": 20,
    "code": 20,
    "language": 26,
    "text": 24,
}


@pytest.fixture(scope="module")
def built_in() -> ProbeSet:
    return load_probes()


def written(folder: Path, *lines: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(id_: str, question: str, kind: str = "fact") -> Probe:
    return Probe(id_, kind, messages=(Message("user", question),))


# The built-in set


def test_the_built_in_set_has_240_probes_of_eight_kinds(built_in: ProbeSet) -> None:
    assert len(built_in) == 240
    assert built_in.kinds == KINDS
    assert len(built_in.chats) == 216
    assert len(built_in.texts) == 24


def test_built_in_ids_are_unique_and_numbered_within_their_kind(built_in: ProbeSet) -> None:
    ids = [probe.id for probe in built_in]
    wished = [f"{kind.replace('_', '-')}-{n:03d}" for kind, count in KINDS.items() for n in range(1, count + 1)]
    assert ids == wished


def test_no_two_built_in_probes_say_the_same_after_normalising(built_in: ProbeSet) -> None:
    said = [normalised(probe.question) for probe in built_in]
    assert all(said)
    assert len(set(said)) == len(said)


def test_no_two_built_in_probes_share_four_fifths_of_their_words(built_in: ProbeSet) -> None:
    words = [(probe.question, set(normalised(probe.question).split())) for probe in built_in]
    for place, (question, one) in enumerate(words):
        for other_question, other in words[:place]:
            assert len(one & other) < 0.8 * len(one | other), (question, other_question)


def test_built_in_questions_are_short_and_built_in_texts_have_25_to_45_words(built_in: ProbeSet) -> None:
    for probe in built_in.chats:
        assert len(probe.messages) == 1
        assert len(probe.question.split()) <= 14, probe.question
    for probe in built_in.texts:
        assert 25 <= len(probe.text.split()) <= 45, probe.id


def test_the_built_in_set_speaks_many_scripts(built_in: ProbeSet) -> None:
    spoken = "".join(probe.question for probe in built_in if probe.kind == "language")
    scripts = {unicodedata.name(letter).split()[0] for letter in spoken if letter.isalpha()}
    assert scripts >= {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "ARABIC", "DEVANAGARI", "HANGUL"}


# The hash


def test_the_hash_is_the_same_on_every_load(built_in: ProbeSet) -> None:
    assert load_probes().hash == built_in.hash
    assert len(built_in.hash) == 64


def test_the_hash_does_not_hang_on_how_the_file_is_spelt(tmp_path: Path) -> None:
    plain = load_probes(written(tmp_path, '{"id": "a", "kind": "fact", "prompt": "Où ?"}'))
    escaped = load_probes(written(tmp_path, "", '{"prompt":"O\\u00f9 ?","kind":"fact","id":"a"}'))
    as_chat = load_probes(
        written(tmp_path, '{"id": "a", "kind": "fact", "messages": [{"role": "user", "content": "Où ?"}]}')
    )
    assert plain.hash == escaped.hash == as_chat.hash


@pytest.mark.parametrize(
    "changed",
    [
        (chat("a", "One?"), chat("b", "Two!")),
        (chat("b", "Two?"), chat("a", "One?")),
        (chat("a", "One?"), chat("c", "Two?")),
        (chat("a", "One?"), chat("b", "Two?", kind="code")),
        (chat("a", "One?"),),
        (chat("a", "One?"), Probe("b", "text", text="Two?")),
    ],
    ids=["wording", "order", "id", "kind", "fewer", "form"],
)
def test_the_hash_changes_with_the_content(changed: tuple[Probe, ...]) -> None:
    assert ProbeSet(changed).hash != ProbeSet((chat("a", "One?"), chat("b", "Two?"))).hash


def test_a_probe_is_hashed_by_what_the_model_reads_and_not_by_its_name() -> None:
    assert chat("a", "One?").hash == chat("b", "One?", kind="code").hash
    assert chat("a", "One?").hash != Probe("a", "text", text="One?").hash
    with_system = Probe("a", "fact", messages=(Message("system", "Be brief."), Message("user", "One?")))
    assert with_system.hash != chat("a", "One?").hash


# Screening


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("What is the capital of Vietnam?", "capital"),
        ("vietnam capital", "capital"),
        ("What currency do people use in Brazil?", "currency"),
        ("What language do people speak in Brazil?", "language"),
        ("How do I print a number in Python?", "python"),
        ("Quelle est la capitale du Vietnam ?", "capitale"),
        ("越南的首都是哪里?", "首都"),
        ("वियतनाम की राजधानी क्या है?", "राजधानी"),
    ],
)
def test_screening_puts_the_related_probe_first_in_any_language(built_in: ProbeSet, query: str, word: str) -> None:
    assert word in normalised(built_in.screen(query, 6)[0].question)


def test_screening_for_a_capital_brings_several_other_capitals(built_in: ProbeSet) -> None:
    first_four = built_in.screen("What is the capital of Vietnam?", 12)[:4]
    assert all("capital" in probe.question for probe in first_four)


@settings(max_examples=30)
@given(query=st.text(max_size=60), count=st.integers(2, 230))
def test_screening_gives_distinct_chats_of_several_kinds(built_in: ProbeSet, query: str, count: int) -> None:
    chosen = built_in.screen(query, count)
    assert len(chosen) == min(count, sum(not probe.asks(query) for probe in built_in.chats))
    assert len({probe.id for probe in chosen}) == len(chosen)
    assert all(probe.is_chat for probe in chosen)
    assert len({probe.kind for probe in chosen}) >= 2


def test_screening_spreads_a_third_over_kinds_not_yet_chosen(built_in: ProbeSet) -> None:
    chosen = built_in.screen("What is the capital of Vietnam?", 18)
    assert len({probe.kind for probe in chosen}) == 7


def test_screening_is_deterministic_across_loads(built_in: ProbeSet) -> None:
    query = "Who wrote War and Peace?"
    assert load_probes().screen(query, 20) == built_in.screen(query, 20)


def test_screening_leaves_out_the_question_itself(built_in: ProbeSet) -> None:
    chosen = built_in.screen("what is the capital of  canada", 216)
    assert "fact-001" not in {probe.id for probe in chosen}
    assert len(chosen) == 215


def test_screening_for_none_or_from_an_empty_set_gives_none(built_in: ProbeSet) -> None:
    assert built_in.screen("Anything", 0) == []
    assert ProbeSet(()).screen("Anything", 5) == []
    with pytest.raises(InvalidInput, match="-1"):
        built_in.screen("Anything", -1)


# A person's own file


def test_a_file_may_mix_prompts_chats_and_texts_without_ids(tmp_path: Path) -> None:
    probes = load_probes(
        written(
            tmp_path,
            '{"prompt": "Hello?"}',
            "",
            '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}',
            '{"id": "mine", "kind": "law", "prompt": "May I\u2028park here?"}',
            '{"text": "A plain text."}',
        )
    )
    assert [probe.id for probe in probes] == ["line-0001", "line-0003", "mine", "line-0005"]
    assert [probe.kind for probe in probes] == ["chat", "chat", "law", "text"]
    assert probes.chats[1].messages == (Message("system", "Be brief."), Message("user", "Who?"))
    assert probes.texts[0].text == "A plain text."


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "Hello?"', "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('["Hello?"]', "a JSON object is needed"),
        ('{"id": "x"}', "none of them"),
        ('{"prompt": "Hello?", "text": "Hello."}', "prompt and text"),
        ('{"prompt": ""}', "'prompt' must be a string that is not empty"),
        ('{"prompt": 7}', "not 7"),
        ('{"text": "  "}', "'text' must be a string"),
        ('{"prompt": "Hello?", "id": null}', "'id' must be a string"),
        ('{"prompt": "Hello?", "answer": "Hi"}', "unknown key 'answer'"),
        ('{"prompt": "Hello?", "kind": "text"}', "does not go with"),
        ('{"text": "Hello.", "kind": "fact"}', "does not go with"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": ["Hello?"]}', "a role and a content"),
        ('{"messages": [{"role": "robot", "content": "Hello?"}]}', "the role 'robot' is none of"),
        ('{"messages": [{"role": "assistant", "content": "Hello."}]}', "must be the user's"),
        ('{"id": "first", "prompt": "Again?"}', "already used on line 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number_with_the_way_out(tmp_path: Path, line: str, reason: str) -> None:
    path = written(tmp_path, '{"id": "first", "prompt": "Fine?"}', "", line)
    with pytest.raises(InvalidInput) as caught:
        load_probes(path)
    assert f"{path}, line 3" in caught.value.message
    assert reason in caught.value.message
    assert caught.value.hint
    assert caught.value.details["line"] == 3


def test_a_file_that_is_missing_empty_or_not_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.jsonl cannot be read"):
        load_probes(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidInput, match=r"mine\.jsonl holds no probe"):
        load_probes(written(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Où ?"}'.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"latin\.jsonl is not UTF-8"):
        load_probes(tmp_path / "latin.jsonl")


def test_a_probe_is_a_chat_or_a_text_and_ids_are_unique() -> None:
    with pytest.raises(InvalidInput, match="'empty'"):
        Probe("empty", "fact")
    with pytest.raises(InvalidInput, match="turn of the assistant"):
        Probe("said", "fact", messages=(Message("assistant", "Hello."),))
    with pytest.raises(InvalidInput, match="'a'"):
        ProbeSet((chat("a", "One?"), chat("a", "Two?")))


def test_the_built_in_file_loads_like_a_persons_own(tmp_path: Path, built_in: ProbeSet) -> None:
    lines = [json.dumps({"id": p.id, "kind": p.kind, "prompt" if p.is_chat else "text": p.question}) for p in built_in]
    assert load_probes(written(tmp_path, *lines)) == built_in


# The re-phrasings

PLACEHOLDER = re.compile(r"\{(\w*)\}")

# One question for every transform, in the order of the transforms.
EXAMPLES = [
    "What is the difference between a frog and a toad?",
    "What is the capital of Vietnam?",
    "What is the highest mountain of the United States?",
    "What was the first name of Mozart?",
    "What are the official colours of the team?",
    "What's Canada's population?",
    "Which city is the capital of Peru?",
    "What is the tallest building in Dubai?",
    "What kind of animal is a newt?",
    "What currency is used in Japan?",
    "What language do people speak in Brazil?",
    "What currency does Japan use?",
    "Which prize did Marie Curie win?",
    "What colour is a ruby?",
    "In which year was the bridge opened?",
    "In which country was chess invented?",
    "In what country is the city of Milan?",
    "In which month do swallows leave?",
    "On which continent is coffee grown?",
    "On which continent is Ghana?",
    "On what day did the market open?",
    "Which planet has the most moons?",
    "Which countries border Nepal?",
    'What does "arid" mean?',
    "What does NATO stand for?",
    "What do you call a baby goat?",
    "What is steel made of?",
    "What do pandas eat?",
    "What does a thermometer measure?",
    "What happens when ice melts?",
    "What is photosynthesis?",
    "What are glaciers?",
    "Who is the author of Don Quixote?",
    "Who was the founder of the company?",
    "Who was Cleopatra?",
    "Who invented the telephone?",
    "Who wrote Hamlet?",
    "Where is Timbuktu?",
    "Where are the Andes?",
    "Where was the treaty signed?",
    "Where do penguins live?",
    "When was the tower built?",
    "When did the war end?",
    "When is the harvest festival?",
    "How many days are there in a leap year?",
    "How many strings does a violin have?",
    "How much does a blue whale weigh?",
    "How far is Rome from Naples?",
    "How tall is a giraffe?",
    "How often do comets return?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Is a tomato sweet or sour?",
    "Is the earth flat?",
    "Are whales fish?",
    "Can you explain tides?",
    "Do fish sleep?",
    "Tell me the capital of Iceland.",
    "The aorta leads blood to which part of the body?",
    "The first member of the band was who?",
    "In Season 16 of Lost, which pilot quit?",
    "They crossed the river. What was its name?",
    "Until what month and year did Ada own the mill?",
    "To which queen did the fleet belong?",
    "What day and month did the market open for the first time?",
    "Which small red bird was shot first?",
    "Which small red river did Ada cross?",
    "Which medallist designed the medal?",
    "Which of them quit?",
    "How many rooms were in the mill?",
    "How many moons?",
    "Who were the queen's brothers?",
    "Who plays the pilot in Lost?",
    "Whom did Ada marry?",
    "When were the coins withdrawn?",
    "Where were the coins made?",
    "What were the newts called?",
    "What did Ada in Lisbon?",
    "The highest hill in town was?",
    "The three longest rivers?",
    "Lost 3 release date in India?",
]


@pytest.fixture(scope="module")
def rephrasings() -> dict[str, Any]:
    file = resources.files("liveweight.methods").joinpath("rephrasings.json")
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def test_there_are_enough_rephrasings_of_every_sort(rephrasings: dict[str, Any]) -> None:
    least = {"wrappers": 24, "transforms": 25, "turns": 6}
    for key, count in least.items():
        said = [json.dumps(item) for item in rephrasings[key]]
        assert len(said) >= count, key
        assert len(set(said)) == len(said), key


def test_every_wrapper_holds_the_question_once(rephrasings: dict[str, Any]) -> None:
    for wrapper in rephrasings["wrappers"]:
        assert PLACEHOLDER.findall(wrapper) == ["q"], wrapper
        assert wrapper != "{q}"


@pytest.mark.parametrize(("place", "question"), list(enumerate(EXAMPLES)))
def test_a_question_is_rewritten_by_the_first_transform_made_for_it(
    rephrasings: dict[str, Any], place: int, question: str
) -> None:
    transforms = rephrasings["transforms"]
    assert len(EXAMPLES) == len(transforms)
    matches = ((number, re.match(each["pattern"], question)) for number, each in enumerate(transforms))
    number, match = next((number, match) for number, match in matches if match)
    assert number == place
    fillers = match.groupdict()
    rewrites = transforms[number]["rewrites"]
    assert 4 <= len(rewrites) <= 8
    assert {name for rewrite in rewrites for name in PLACEHOLDER.findall(rewrite)} == set(fillers)
    rewritten = [rewrite.format(**fillers) for rewrite in rewrites]
    assert len(set(rewritten)) == len(rewritten)
    for text in rewritten:
        assert text[0].isupper() and text[-1] in ".?", text
        assert "  " not in text and "??" not in text


def test_transforms_also_match_without_question_mark_and_capital(rephrasings: dict[str, Any]) -> None:
    """But for a few words, which are a question only with their mark."""
    patterns = [transform["pattern"] for transform in rephrasings["transforms"]]
    for question in EXAMPLES:
        careless = question[0].lower() + question[1:].rstrip("?")
        few_words = next(pattern for pattern in patterns if re.match(pattern, question)).endswith(r")\?$")
        assert few_words or any(re.match(pattern, careless) for pattern in patterns), careless


def test_earlier_turns_are_short(rephrasings: dict[str, Any]) -> None:
    for turn in rephrasings["turns"]:
        assert set(turn) == {"user", "assistant"}
        assert len(f"{turn['user']} {turn['assistant']}".split()) <= 25


# The plain text


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    file = resources.files("liveweight.methods").joinpath("plain_text.txt")
    return file.read_text(encoding="utf-8").strip().split("\n\n")


def sentences(text: str) -> list[str]:
    """The sentences of at least six words, normalised."""
    return [normalised(part) for part in re.split(r"(?<=[.!?])\s+", text) if len(normalised(part).split()) >= 6]


def test_the_plain_text_has_eleven_to_thirteen_thousand_words(paragraphs: list[str]) -> None:
    assert 11_000 <= sum(len(paragraph.split()) for paragraph in paragraphs) <= 13_000
    assert all(paragraph.strip() == paragraph != "" for paragraph in paragraphs)


def test_the_plain_text_repeats_no_sentence_and_few_openings(paragraphs: list[str]) -> None:
    said = [sentence for paragraph in paragraphs for sentence in sentences(paragraph)]
    assert len(set(said)) == len(said)
    openings = Counter(" ".join(sentence.split()[:4]) for sentence in said)
    assert max(openings.values()) <= 4, openings.most_common(3)


def test_the_plain_text_shares_no_sentence_with_the_probes(paragraphs: list[str], built_in: ProbeSet) -> None:
    said = {sentence for paragraph in paragraphs for sentence in sentences(paragraph)}
    for probe in built_in:
        assert said.isdisjoint(sentences(probe.question)), probe.id


# The everyday questions


def test_no_everyday_question_of_the_methods_is_a_probe_of_the_guard(built_in: ProbeSet) -> None:
    file = resources.files("liveweight.methods").joinpath("questions.json")
    questions: list[str] = json.loads(file.read_text(encoding="utf-8"))["questions"]
    asked = {normalised(question) for question in questions}
    assert len(asked) == len(questions) == 160
    assert asked.isdisjoint(normalised(probe.question) for probe in built_in)
