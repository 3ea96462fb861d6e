"""Every figure against one worked out by hand, and the meter against the model itself."""

from __future__ import annotations

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, LowRank
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.evaluation import Edit, EditMeter, Likelihood, efficacy, harmonic, neighbourhood, same_first_sentence
from liveweight.evaluation.generation import answer_batch

FOUND = [
    Likelihood(1.0, 2.0, True),
    Likelihood(3.0, 2.5, False),
    Likelihood(0.5, 0.6, False),
    Likelihood(2.0, 2.0, True),
]


def test_efficacy_is_the_share_where_the_new_answer_is_likelier() -> None:
    assert efficacy(FOUND) == 2 / 4  # 1 < 2, 3 > 2.5, 0.5 < 0.6; a tie is not likelier
    assert efficacy([Likelihood(1.0, None, True)]) is None


def test_neighbourhood_is_the_share_where_the_old_answer_is_likelier() -> None:
    assert neighbourhood(FOUND) == 1 / 4
    assert neighbourhood([]) is None


def test_the_harmonic_mean_is_that_of_what_is_there() -> None:
    assert harmonic(0.5, 1.0) == pytest.approx(2 / 3)  # 2 / (2 + 1)
    assert harmonic(0.9, None, 0.6) == pytest.approx(0.72)  # 2 / (1/0.9 + 1/0.6)
    assert harmonic(1.0, 0.0) == 0.0
    assert harmonic(None) is None


EDITS = [
    Edit("a", "completion", "the moon is", "moon", "made of tea", "far", ("a moon is",), ("the sun is", "a boat is")),
    Edit("b", "question", "what is tea?", "tea", "a boat", None, ("tell me of tea",), ("who are you?",), "tea?"),
]


def nll(engine: TransformersEngine, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    own = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return -float(own.mean()), logits.argmax(-1).tolist() == answer


def test_a_completion_is_scored_as_plain_text_with_answers_behind_a_space(engine: TransformersEngine) -> None:
    meter = EditMeter(engine, EDITS)
    found = meter.measure(EDITS[0])
    text = engine.format.encode_text

    def likelihood(prompt: str) -> Likelihood:
        ids = text(prompt, special=True)
        (new, said), (true, _) = nll(engine, ids, text(" made of tea")), nll(engine, ids, text(" far"))
        return Likelihood(new, true, said)

    assert found.efficacy == efficacy([likelihood("the moon is")])
    assert found.paraphrase == efficacy([likelihood("a moon is")])
    assert found.neighbourhood == neighbourhood([likelihood("the sun is"), likelihood("a boat is")])
    assert found.accuracy == float(likelihood("the moon is").said)
    assert (found.kept, found.chat_paraphrase) == (None, None)  # completions are judged by their likelihoods


def test_without_an_old_answer_only_what_can_be_told_is_told(engine: TransformersEngine) -> None:
    found = EditMeter(engine, EDITS).measure(EDITS[1])
    assert (found.efficacy, found.paraphrase, found.neighbourhood, found.accuracy_neighbourhood) == (None,) * 4
    assert found.accuracy in (0.0, 1.0)
    assert found.kept == 1.0


def test_kept_is_what_the_base_said_and_measuring_all_is_measuring_each(engine: TransformersEngine) -> None:
    meter = EditMeter(engine, EDITS)
    before = answer_batch(engine, ["who are you?"], 32)[0]
    generator = torch.Generator().manual_seed(3)
    op = LowRank(
        site="layers.1.mlp.down.weight",
        left=2.0 * torch.randn(24, 3, generator=generator),
        right=torch.randn(3, 40, generator=generator),
    )
    engine.become((Active(Adjustment(name="shake", method="test", ops=(op,))),))
    after = answer_batch(engine, ["who are you?"], 32)[0]
    assert meter.measure(EDITS[1]).kept == float(same_first_sentence(before, after))
    assert meter.measure_all(EDITS) == [meter.measure(EDITS[0]), meter.measure(EDITS[1])]


def test_a_question_is_scored_as_the_model_would_write_it_and_neighbours_by_their_own_answers(
    engine: TransformersEngine,
) -> None:
    said = answer_batch(engine, ["what is tea?"], 3)[0]
    edit = Edit("c", "question", "what is tea?", "tea", said.strip(), "far", (), ("who are you?",), answers=("a sun",))
    found = EditMeter(engine, [edit]).measure(edit)
    text = engine.format.encode_text
    prompt = engine.encode([Message("user", "who are you?")])
    (new, _), (own, right) = (nll(engine, prompt, text(f" {answer.strip()}")) for answer in (said, "a sun"))
    assert found.neighbourhood == float(own < new)
    assert found.accuracy_neighbourhood == float(right)
    asked = engine.encode([Message("user", "what is tea?")])
    assert found.accuracy == float(nll(engine, asked, text(f" {said.strip()}"))[1])
