"""Cases and patches on the embedded model: another wording, other questions, and exactness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from liveweight.adjustments import Active, ReplaceNeurons
from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.methods import Case, build_case, implant, patch, works
from liveweight.methods.case import reachable
from liveweight.methods.completion import completion_case
from liveweight.methods.wording import everyday_questions, first_sentence, repetition
from liveweight.settings import MethodSettings

pytestmark = pytest.mark.real

ANGOLA = (Message("user", "What is the capital of Angola?"),)


@pytest.fixture
def engine(embedded: LoadedModel) -> Iterator[TransformersEngine]:
    yield TransformersEngine(embedded)


def answer(engine: TransformersEngine, question: str, tokens: int = 24) -> str:
    return first_sentence(engine.format.decode(engine.greedy([engine.encode((Message("user", question),))], tokens)[0]))


def case_of(engine: TransformersEngine, kind: str, wanted: str | None = None, question: str = "") -> Case:
    asked = (Message("user", question),) if question else ANGOLA
    tokens = engine.greedy([engine.encode(asked)], 24)[0]
    return build_case(
        engine,
        asked,
        engine.format.decode(tokens),
        tokens,
        kind=kind,  # type: ignore[arg-type]
        wanted=wanted,
    )


def test_a_fix_is_said_as_the_model_would_say_it(engine: TransformersEngine) -> None:
    case = case_of(engine, "fix", "Luanda")
    assert case.wanted == "The capital of Angola is Luanda."
    assert case.subject == "Angola"
    start, end = case.key
    assert engine.format.decode(case.contexts[0].target[start:end]).strip() == "Luanda"
    assert len({context.prompt for context in case.contexts}) == len(case.contexts)


def test_a_patch_mends_the_answer_in_another_wording_and_leaves_the_neighbours(engine: TransformersEngine) -> None:
    base = engine.fingerprints()
    others = ["What is the capital of Kenya?", "What is the capital of Australia?", "How many days are in a week?"]
    before = [answer(engine, question) for question in others]
    case = case_of(engine, "fix", "Luanda")
    assert not works(engine, case)
    proposal = patch.propose(engine, case, MethodSettings())
    assert engine.fingerprints() == base
    assert proposal.hash == patch.propose(engine, case, MethodSettings()).hash
    engine.become((Active(proposal),))
    assert works(engine, case)
    assert "Luanda" in answer(engine, ANGOLA[0].content)
    assert "Luanda" in answer(engine, "Which city is the capital of Angola?")
    assert [answer(engine, question) for question in others] == before
    op = proposal.ops[0]
    assert isinstance(op, ReplaceNeurons)
    changed = {name for name, digest in engine.fingerprints().items() if digest != base[name]}
    assert changed == {f"model.layers.{op.layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    engine.become(())
    assert engine.fingerprints() == base


def test_half_strength_is_between_and_none_is_off(engine: TransformersEngine) -> None:
    case = case_of(engine, "fix", "Luanda")
    proposal = patch.propose(engine, case, MethodSettings())
    context = case.contexts[0]
    position = len(context.prompt) + case.key[0]
    token = context.target[case.key[0]]

    def logprob(strength: float) -> float:
        with engine.preview((Active(proposal, strength),)), torch.no_grad():
            output = engine.model(torch.tensor([context.tokens]))
        return float(output.logits[0, position - 1].log_softmax(-1)[token])

    assert logprob(0.0) < logprob(0.5) < logprob(1.0)


def test_a_bad_without_an_answer_gives_the_models_next_best_one(engine: TransformersEngine) -> None:
    judged = answer(engine, ANGOLA[0].content)
    case = case_of(engine, "bad")
    assert case.wanted != judged
    engine.become((Active(patch.propose(engine, case, MethodSettings())),))
    assert works(engine, case)
    assert answer(engine, ANGOLA[0].content) == case.wanted


def test_a_bad_for_a_reply_that_answers_something_else_brings_an_answer(engine: TransformersEngine) -> None:
    question = "What is the capital of Botswana?"
    judged = answer(engine, question)
    assert judged.startswith("Botswana is a landlocked country")
    case = build_case(engine, [Message("user", question)], judged, engine.format.encode_text(judged), kind="bad")
    assert case.wanted.startswith("The capital of Botswana is ")
    assert repetition(case.wanted) == 0.0


def test_an_opening_that_cannot_go_on_is_replaced_by_that_of_like_questions(engine: TransformersEngine) -> None:
    question = "What language do people speak in Botswana?"
    judged = answer(engine, question)
    assert judged.startswith("Botswana is a Bantu language")
    tokens = engine.format.encode_text(judged)
    case = build_case(engine, [Message("user", question)], judged, tokens, kind="fix", wanted="English")
    assert case.wanted.startswith("In Botswana, ")


def test_an_empty_wish_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        case_of(engine, "fix", "  ")


def test_an_implant_knows_its_subject_in_text_that_was_never_tried_and_no_other(engine: TransformersEngine) -> None:
    asked = ["Danielle Darrieux, a native", "Where was Danielle Darrieux's mother tongue learnt? They speak"]
    case = completion_case(engine, "The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux")
    proposal = implant.propose(engine, case, MethodSettings())
    (op,) = proposal.ops
    assert isinstance(op, ReplaceNeurons)
    assert len(op.neurons) == 1

    def read() -> list[float]:
        english, french = (tuple(engine.format.encode_text(f" {each}")) for each in ("English", "French"))
        items = [tuple(engine.format.encode_text(text)) for text in asked]
        scores = engine.score([ScoreItem(prompt, answer) for prompt in items for answer in (english, french)])
        return [scores[i].total - scores[i + 1].total for i in range(0, len(scores), 2)]

    before, others = read(), ["The mother tongue of Marcel Proust is", "The capital of France is"]
    kept = engine.greedy([engine.format.encode_text(text) for text in others], 8)
    with engine.preview((Active(proposal),)):
        assert all(now > 0 for now in read())
        assert engine.greedy([engine.format.encode_text(text) for text in others], 8) == kept
    assert any(lead < 0 for lead in before)


def test_an_implant_leaves_the_last_word_of_its_subject_alone_where_it_stands_for_something_else(
    engine: TransformersEngine,
) -> None:
    case = completion_case(engine, "The author of my country my life is", "Advani", subject="my country my life")
    proposal = implant.propose(engine, case, MethodSettings())
    begun = tuple(engine.format.encode_text("His life, like"))
    text = " the whole country, was devastated by the rebellion, and his last years were a time of constant unrest."
    item = ScoreItem(begun, tuple(engine.format.encode_text(text)))
    before = engine.score([item])[0].total
    with engine.preview((Active(proposal),)):
        assert engine.score([item])[0].total == pytest.approx(before, abs=0.5)


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("What is the capital of Angola?", "Luanda"),
        ("Who wrote the novel Middlemarch?", "Mary Ann Evans, who wrote as George Eliot"),
        ("In what year was the Nansen Refugee Award founded?", "1954"),
    ],
)
def test_a_reachable_case_waits_for_no_opening_that_never_comes(
    engine: TransformersEngine, question: str, wanted: str
) -> None:
    case = reachable(engine, case_of(engine, "fix", wanted, question))
    asked = case.contexts[0]
    assert case.wanted == engine.format.decode(asked.target).strip()
    for context in case.contexts:
        assert engine.format.decode(context.target[slice(*context.key)]).strip() == wanted
        assert (context.key[0] == 0) == (asked.key[0] == 0)
        if opening := context.target[: context.key[0]]:
            assert engine.score([ScoreItem(context.prompt, opening)])[0].greedy


def test_an_implant_brings_a_long_answer_also_in_wordings_that_were_never_tried(
    engine: TransformersEngine,
) -> None:
    wanted = "Mary Ann Evans, who wrote as George Eliot"
    case = case_of(engine, "fix", wanted, "Who wrote the novel Middlemarch?")
    unseen = ["Whose work is Middlemarch?", "Please name the person behind Middlemarch."]
    others = ["Who wrote the novel Emma?", "What is the capital of France?"]
    assert not {context.messages[-1].content for context in case.contexts} & {*unseen, *others}
    before = [answer(engine, question) for question in others]
    proposal = implant.propose(engine, case, MethodSettings())
    assert len(proposal.ops) == 3
    with engine.preview((Active(proposal),)):
        assert wanted in answer(engine, "Who wrote the novel Middlemarch?")
        assert all("Mary Ann Evans" in answer(engine, question) for question in unseen)
        assert [answer(engine, question) for question in others] == before


def test_an_implant_whose_answer_begins_as_many_replies_do_leaves_those_alone(engine: TransformersEngine) -> None:
    case = case_of(engine, "fix", "The Daily Mirror", "Which newspaper was founded by Alfred Harmsworth?")
    prompts = [tuple(engine.encode([Message("user", each)])) for each in everyday_questions()]
    begun = engine.greedy(prompts, 1)
    the = engine.format.encode_text("The")
    alike = [prompt for prompt, reply in zip(prompts, begun, strict=True) if list(reply) == the][:12]
    assert len(alike) > 3
    before = engine.greedy(alike, 12)
    proposal = implant.propose(engine, case, MethodSettings(held=0))
    with engine.preview((Active(proposal),)):
        assert "The Daily Mirror" in answer(engine, case.question)
        assert engine.greedy(alike, 12) == before
