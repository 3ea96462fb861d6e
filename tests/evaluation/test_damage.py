"""The three meters: zero on the base, right on a change, and silent."""

from __future__ import annotations

import math

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, LowRank
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.evaluation import Kept, KLMeter, NeighbourMeter, PerplexityMeter, answer_batch, generate_batch

QUESTIONS = ["why?", "what is the moon?", "say x", "who are you?", "one two three"]
TEXT = "the river was calm, and the boats lay still. nobody spoke, and the evening came." * 3


def shaken(engine: TransformersEngine, size: float) -> None:
    """Move one write matrix in a random direction."""
    generator = torch.Generator().manual_seed(3)
    op = LowRank(
        site="layers.1.mlp.down.weight",
        left=size * torch.randn(24, 3, generator=generator),
        right=torch.randn(3, 40, generator=generator),
    )
    engine.become((Active(Adjustment(name="shake", method="test", ops=(op,))),))


def kept(engine: TransformersEngine, tokens: int = 8) -> list[Kept]:
    prompts = [engine.encode([Message("user", question)]) for question in QUESTIONS]
    return [Kept(q, tuple(ids)) for q, ids in zip(QUESTIONS, generate_batch(engine, prompts, tokens), strict=True)]


def test_all_answers_stay_on_the_base_and_the_changed_ones_are_named(engine: TransformersEngine) -> None:
    meter = NeighbourMeter(engine, kept(engine), 8)
    before = answer_batch(engine, QUESTIONS, 8)
    assert meter.measure().unchanged == meter.measure().count == 5
    shaken(engine, 2.0)
    after = answer_batch(engine, QUESTIONS, 8)
    found = meter.measure()
    moved = {q for q, a, b in zip(QUESTIONS, before, after, strict=True) if a.split("\n")[0] != b.split("\n")[0]}
    assert moved  # else this test would show nothing
    assert set(found.changed) <= moved  # a change behind the first sentence's end does not count
    assert found.unchanged == 5 - len(found.changed) < 5


def test_an_answer_that_goes_on_where_it_ended_is_another(engine: TransformersEngine) -> None:
    """Without a full stop only the token behind the sentence tells that it is over."""
    for kept_one in kept(engine):
        for length in range(1, len(kept_one.reply)):
            cut = kept_one.reply[:length]
            text = engine.format.decode(cut)
            if text.strip() and "\n" not in text and not text.endswith((".", "!", "?", " ")):
                ended = Kept(kept_one.question, (*cut, engine.format.end_of_reply or 0))
                assert NeighbourMeter(engine, [ended], 8).measure().unchanged == 0
                return
    raise AssertionError("no reply of this model has such a beginning")


def test_a_changed_answer_may_still_be_right(engine: TransformersEngine) -> None:
    shaken(engine, 2.0)
    now = answer_batch(engine, QUESTIONS[:1], 8)[0]
    word = next((word for word in now.split("\n")[0].split() if word.isalnum()), "")
    if not word:
        word, engine_says = "nothing", False
    else:
        engine_says = True
    engine.become(())
    reply = kept(engine)[0].reply
    meter = NeighbourMeter(engine, [Kept(QUESTIONS[0], reply, (word,))], 8)
    shaken(engine, 2.0)
    found = meter.measure()
    assert found.right == (1 if found.unchanged or engine_says else 0)


def test_kl_is_zero_on_the_base_and_what_the_formula_says_on_a_change(engine: TransformersEngine) -> None:
    meter = KLMeter(engine, QUESTIONS, tokens=4)
    assert meter.measure() == pytest.approx([0.0] * 5, abs=1e-6)
    prompt = engine.encode([Message("user", QUESTIONS[1])])
    reply = generate_batch(engine, [prompt], 4)[0]

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1)

    base = logprobs()
    shaken(engine, 0.5)
    expected = float((base.exp() * (base - logprobs())).sum(-1).mean())
    assert expected > 1e-4
    assert meter.measure()[1] == pytest.approx(expected, rel=1e-3)


def test_perplexity_is_that_of_each_window_behind_its_first_two_tokens(engine: TransformersEngine) -> None:
    meter = PerplexityMeter(engine, TEXT, tokens=90, window=40)
    assert meter.ratio() == pytest.approx(1.0, rel=1e-6)
    ids = engine.format.encode_text(TEXT)[:90]
    total, count = 0.0, 0
    for window in (ids[:40], ids[40:80], ids[80:90]):
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        total -= sum(float(logprobs[place - 1, window[place]]) for place in range(2, len(window)))
        count += len(window) - 2
    assert meter.base == pytest.approx(math.exp(total / count), rel=1e-4)
    shaken(engine, 2.0)
    assert meter.ratio() != pytest.approx(1.0, rel=1e-3)


def test_measuring_leaves_every_weight_as_it_was(engine: TransformersEngine) -> None:
    before = engine.fingerprints()
    NeighbourMeter(engine, kept(engine), 8).measure()
    KLMeter(engine, QUESTIONS).measure()
    PerplexityMeter(engine, TEXT, tokens=60, window=30).measure()
    assert engine.fingerprints() == before


def test_a_meter_without_anything_to_measure_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="no answers"):
        NeighbourMeter(engine, [])
    with pytest.raises(InvalidInput, match="no questions"):
        KLMeter(engine, [])
    with pytest.raises(InvalidInput, match="too short"):
        PerplexityMeter(engine, "a")
