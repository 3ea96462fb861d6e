"""Whether a trial's answer is the wished one, on a tiny model: its words, and that the last of them ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from liveweight.engines.base import Score
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Context
from liveweight.methods.trials import closed, keyed, lengthens, says, scored
from liveweight.methods.values import answer_end
from tests.methods.tiny_cases import tiny_case
from tests.tracing.tiny_engines import tiny_engine


@pytest.fixture
def engine(tmp_path: Path) -> TransformersEngine:
    return tiny_engine("llama", tmp_path)


def spoken(engine: TransformersEngine, text: str, key: tuple[int, int]) -> Context:
    context = tiny_case(engine).contexts[0]
    return replace(context, target=tuple(engine.format.encode_text(text)), key=key)


def read(score: Score, *tokens: int) -> Score:
    return replace(score, argmax=score.tokens.new_tensor(tokens))


def test_an_answer_is_closed_by_what_does_not_make_its_last_word_longer(engine: TransformersEngine) -> None:
    context = spoken(engine, "ab.", (0, 2))
    a, b, stop = context.target
    assert keyed(context) == (a, b)
    assert closed(engine, context) == (a, b, stop)
    assert lengthens(engine, context, a)
    assert not lengthens(engine, context, stop)
    assert closed(engine, spoken(engine, "aba", (0, 2))) == (a, b)  # ends within a word
    assert closed(engine, spoken(engine, "ab", (0, 2))) == (a, b)


def test_what_is_said_has_to_end_where_the_answer_does(engine: TransformersEngine) -> None:
    context = spoken(engine, "ab.", (0, 2))
    a, b, stop = context.target
    (score,) = scored(engine, [context])
    assert score.tokens.tolist()[:2] == [a, b]
    assert says(engine, context, read(score, a, b, stop))
    assert not says(engine, context, read(score, a, b, b))
    assert not says(engine, context, read(score, b, b, stop))
    assert says(engine, context, read(score, b, b, stop), first=1)
    assert says(engine, replace(context, target=(a, b)), read(score, a, b, b))  # nothing says where it ends


def test_a_value_is_looked_for_through_the_end_of_the_reply_where_the_target_ends(engine: TransformersEngine) -> None:
    end = engine.format.end_of_reply = 2  # as a model with a template has one
    whole = spoken(engine, "ab.", (0, 2))
    stop = whole.target[2]
    assert answer_end(engine, whole) == (stop, end)
    assert answer_end(engine, spoken(engine, "ab. b", (0, 2))) == (stop,)  # more is to come
    assert answer_end(engine, spoken(engine, "ab", (0, 2))) == ()
    assert answer_end(engine, replace(whole, messages=(), text="zed")) == (stop,)  # a text has no turn to end
