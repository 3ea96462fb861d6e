"""Steering on the embedded model: two words reach the asked-for KL, and what is wished for is seen in an answer."""

from __future__ import annotations

import pytest

from liveweight.adjustments import Active
from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.transformers import TransformersEngine
from liveweight.guard import load_probes
from liveweight.methods.sides import of_words
from liveweight.methods.steer import steering

pytestmark = pytest.mark.real

QUESTION = "Tell me about my neighbour."


def test_two_words_reach_their_kl_and_move_an_answer(embedded: LoadedModel) -> None:
    engine = TransformersEngine(embedded)
    before = engine.fingerprints()
    prompts = [engine.encode(probe.messages) for probe in load_probes().chats[::14]]
    neutral = [ScoreItem(tuple(p), tuple(a)) for p, a in zip(prompts, engine.greedy(prompts, 8), strict=True)]
    found = steering(engine, of_words(engine.format, "Love", "Hate", prompts[:9]), neutral, layer=17, target=0.5)
    assert engine.fingerprints() == before
    assert found.p95_kl == pytest.approx(0.5, rel=0.1)
    assert found.effect > 2.0
    asked = tuple(engine.encode([Message("user", QUESTION)]))
    items = [ScoreItem(asked, tuple(engine.format.encode_continuation(asked, word))) for word in ("Love", "Hate")]
    with engine.preview((Active(found.adjustment()),)):
        love, hate = (score.total for score in engine.score(items))
        (answer,) = engine.greedy([asked], 30)
    assert love > hate
    plain = engine.greedy([asked], 30)[0]
    assert answer != plain
    assert len(set(answer)) > 15  # not babble
