"""Replies that are made together, on the embedded model."""

from __future__ import annotations

import pytest

from liveweight.engines.base import Message, Sampling
from liveweight.engines.batching import Batcher
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.transformers import TransformersEngine

pytestmark = pytest.mark.real

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Say hello.",
    "Who are you?",
)


def test_a_seeded_reply_is_the_same_to_the_last_bit_alone_and_among_others(embedded: LoadedModel) -> None:
    engine = TransformersEngine(embedded)
    prompts = [engine.encode([Message("user", question)]) for question in QUESTIONS]
    samplings = [Sampling(max_tokens=12, temperature=0.9 * (seed % 2), seed=seed) for seed in range(len(prompts))]
    pairs = list(zip(prompts, samplings, strict=True))
    alone = [[(token.id, token.logprob) for token in engine.continue_from(*pair)] for pair in pairs]
    batcher = Batcher(engine, rows=3)
    try:
        together = [batcher.submit(*pair) for pair in pairs]
        assert [[(token.id, token.logprob) for token in stream] for stream in together] == alone
    finally:
        batcher.close()
