"""The plain methods on the embedded model: a wrong capital mended or taken away, judged by greedy free generation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from liveweight.adjustments import Active, Adjustment
from liveweight.engines.base import Message, Sampling
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods import finetune, gain, one_shot, rome, scale, select
from liveweight.methods.base import Case, CaseKind, Context, Method
from liveweight.settings import MethodSettings

pytestmark = pytest.mark.real

QUESTION = "What is the capital of Angola?"
WRONG, RIGHT = "Anguimba", "Luanda"
OTHER_WORDINGS = ("What's the capital of Angola?", "Question: What is the capital of Angola?")
UNSEEN_WORDING = "Which city is the capital of Angola?"
NEIGHBOUR, NEIGHBOURS_ANSWER = "What is the capital of Kenya?", "Nairobi"


@pytest.fixture
def engine(embedded: LoadedModel) -> TransformersEngine:
    return TransformersEngine(embedded)


def asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def answer_to(engine: TransformersEngine, question: str) -> str:
    return "".join(token.text for token in engine.generate(asked(question), Sampling(max_tokens=14)))


def angola(engine: TransformersEngine, kind: CaseKind = "fix") -> Case:
    """The case as a person's feedback gives it; the targets open as the model itself opens its answer."""
    prompt = tuple(engine.encode(asked(QUESTION)))
    answer = [token.id for token in engine.continue_from(prompt, Sampling(max_tokens=14))]
    opening, wanted = "The capital of Angola is", f"The capital of Angola is {RIGHT}."
    target = tuple(engine.format.encode_continuation(prompt, wanted))
    key = (len(engine.format.encode_text(opening)), len(target) - 1)
    turns: Sequence[tuple[Message, ...]] = [asked(text) for text in (QUESTION, *OTHER_WORDINGS)]
    return Case(
        kind=kind,
        messages=asked(QUESTION),
        answer=engine.format.decode(answer),
        answer_tokens=tuple(answer),
        wanted=wanted,
        contexts=tuple(Context(turn, tuple(engine.encode(turn)), target, key) for turn in turns),
        subject="Angola",
    )


def answers_after(engine: TransformersEngine, adjustment: Adjustment, *questions: str) -> list[str]:
    before = engine.fingerprints()
    engine.become((Active(adjustment),))
    answers = [answer_to(engine, question) for question in questions]
    engine.become(())
    assert engine.fingerprints() == before
    return answers


@pytest.mark.parametrize("propose", [rome.propose, finetune.propose, one_shot.propose])
def test_a_wrong_capital_is_mended_in_a_wording_that_was_not_seen_too(
    engine: TransformersEngine, propose: Method
) -> None:
    case = angola(engine)
    assert WRONG in case.answer
    adjustment = propose(engine, case, MethodSettings())
    asked_again, otherwise, neighbour = answers_after(engine, adjustment, QUESTION, UNSEEN_WORDING, NEIGHBOUR)
    assert RIGHT in asked_again
    assert RIGHT in otherwise
    assert NEIGHBOURS_ANSWER in neighbour


@pytest.mark.parametrize("propose", [select.propose, gain.propose, scale.propose])
def test_a_wrong_capital_goes_away(engine: TransformersEngine, propose: Method) -> None:
    adjustment = propose(engine, angola(engine, "bad"), MethodSettings())
    (answer,) = answers_after(engine, adjustment, QUESTION)
    assert WRONG not in answer
    assert answer.strip()


def test_scaling_paths_takes_a_wrong_capital_away(engine: TransformersEngine) -> None:
    adjustment = scale.propose(engine, angola(engine, "bad"), MethodSettings(form="path"))
    (answer,) = answers_after(engine, adjustment, QUESTION)
    assert WRONG not in answer
    assert answer.strip()
