"""Batched greedy generation gives what one prompt at a time gives."""

from __future__ import annotations

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Clamp
from liveweight.engines.base import Sampling
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.evaluation import answer_batch, generate_batch

QUESTIONS = ["why?", "what is the moon made of?", "say: x", "what is the sun?"]


def one_by_one(engine: TransformersEngine, prompts: list[list[int]], most: int) -> list[list[int]]:
    return [[token.id for token in engine.continue_from(prompt, Sampling(max_tokens=most))] for prompt in prompts]


def test_a_batch_of_unlike_lengths_gives_what_each_prompt_gives_alone(engine: TransformersEngine) -> None:
    prompts = [engine.format.encode_text(question) for question in QUESTIONS]
    assert generate_batch(engine, prompts, 9) == one_by_one(engine, prompts, 9)


def test_a_shared_beginning_is_read_once_and_changes_nothing(engine: TransformersEngine) -> None:
    prompts = [engine.format.encode_text("the same beginning, " + question) for question in QUESTIONS]
    assert generate_batch(engine, prompts, 9) == one_by_one(engine, prompts, 9)


def test_equal_prompts_get_equal_answers_however_many_there_are(engine: TransformersEngine) -> None:
    prompt = engine.format.encode_text("again")
    found = generate_batch(engine, [prompt] * 40, 3)
    assert len(found) == 40 and len({tuple(ids) for ids in found}) == 1


def test_an_active_hook_is_obeyed(engine: TransformersEngine) -> None:
    prompts = [engine.format.encode_text(question) for question in QUESTIONS]
    before = generate_batch(engine, prompts, 6)
    clamp = Clamp(layer=1, neurons=tuple(range(40)), values=torch.full((40,), 9.0))
    engine.become((Active(Adjustment(name="clamp", method="test", ops=(clamp,))),))
    assert generate_batch(engine, prompts, 6) == one_by_one(engine, prompts, 6)
    assert generate_batch(engine, prompts, 6) != before


def test_answers_are_the_texts_of_the_replies(engine: TransformersEngine) -> None:
    prompts = [engine.format.encode_text(question, special=True) for question in QUESTIONS]
    assert answer_batch(engine, QUESTIONS, 5) == [engine.format.decode(ids) for ids in one_by_one(engine, prompts, 5)]


def test_nothing_to_ask_gives_nothing(engine: TransformersEngine) -> None:
    assert generate_batch(engine, [], 5) == []


def test_an_empty_prompt_and_no_tokens_are_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="Prompt 1"):
        generate_batch(engine, [[3], []], 5)
    with pytest.raises(InvalidInput, match="0 tokens"):
        generate_batch(engine, [[3]], 0)
