"""One reply in the making: stop words, lengths, likeliest tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from liveweight.engines.base import Sampling, Version
from liveweight.engines.chat_format import ChatFormat, TextStream
from liveweight.engines.generation import Generation
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from tiny_models import tiny_model
from tracing.tiny_engines import tiny_engine, tiny_tokenizer

VERSION = Version(0, "0" * 64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return tiny_engine("llama", tmp_path_factory.mktemp("engine"))


def said(engine: TransformersEngine, text: str, **sampling: object) -> tuple[list[str], str]:
    """What each token tells when a model says this text, and how it ends."""
    ids = [*engine.format.encode_text(text), next(iter(engine.format.end_tokens))]
    generation = Generation(engine.format, [5], Sampling(**({"max_tokens": 100} | sampling)), 0)  # type: ignore[arg-type]
    told = []
    for token in ids:
        logits = torch.full((engine.info.vocabulary,), -20.0)
        logits[token] = 20.0
        made = generation.draw(logits, VERSION)
        told.append(made.text)
        if made.finish:
            return told, made.finish
    raise AssertionError("it did not end")


def test_a_stop_word_ends_the_text_before_it_and_none_of_it_is_told(engine: TransformersEngine) -> None:
    told, finish = said(engine, "one two end three", stop=("end",))
    assert ("".join(told), finish) == ("one two ", "stop")
    assert "e" not in "".join(told[4:])


def test_what_only_seemed_to_be_a_stop_word_is_told_late(engine: TransformersEngine) -> None:
    told, finish = said(engine, "an enemy", stop=("end",))
    assert ("".join(told), finish) == ("an enemy", "stop")


def test_what_was_held_back_is_told_where_the_reply_ends(engine: TransformersEngine) -> None:
    told, finish = said(engine, "the en", stop=("end",))
    assert ("".join(told), finish) == ("the en", "stop")
    told, finish = said(engine, "the en and", stop=("end",), max_tokens=6)
    assert ("".join(told), finish) == ("the en", "length")


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab ", max_size=20), stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_the_text_told_is_the_text_up_to_the_first_stop_word(
    engine: TransformersEngine, text: str, stop: list[str]
) -> None:
    whole = engine.format.decode(engine.format.encode_text(text)) if text else ""
    told, finish = said(engine, text, stop=tuple(stop))
    # The first word that is complete ends it: of those complete with the same letter, the one that begins first.
    ends = [(whole.index(word) + len(word), whole.index(word)) for word in stop if word in whole]
    first = min((end for end, _ in ends), default=None)
    expected = whole if first is None else whole[: min(start for end, start in ends if end == first)]
    assert ("".join(told), finish) == (expected, "stop")


def test_the_likeliest_tokens_come_with_each_token_likeliest_first(engine: TransformersEngine) -> None:
    generation = Generation(engine.format, [5], Sampling(max_tokens=3, top_logprobs=3), 0)
    logits = torch.randn(engine.info.vocabulary, generator=torch.Generator().manual_seed(1))
    token = generation.draw(logits, VERSION)
    order = logits.log_softmax(-1).sort(descending=True)
    assert [id for id, _ in token.top] == order.indices[:3].tolist()
    assert [value for _, value in token.top] == pytest.approx(order.values[:3].tolist())
    assert (token.id, token.logprob) == pytest.approx(token.top[0])


@pytest.mark.parametrize(
    ("prompt", "sampling", "why"),
    [([], Sampling(), "no tokens"), ([1] * 8, Sampling(), "context")],
)
def test_what_cannot_be_gone_on_with_is_refused(
    engine: TransformersEngine, prompt: list[int], sampling: Sampling, why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        Generation(engine.format, prompt, sampling, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 90.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("max_tokens", -1),
        ("seed", 2**64),
    ],
)
def test_a_value_that_no_token_can_be_drawn_with_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"The {name} cannot be {value}"):
        Sampling(**{name: value})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Letters are tokens; what it does not know is a token a byte, as in SentencePiece's models."""
    known = {"<pad>": 0, "<end>": 1, " ": 2} | {letter: 3 + place for place, letter in enumerate("abcdefgh")}
    vocabulary = known | {f"<0x{byte:02X}>": len(known) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@given(st.text(alphabet="abc é🎉ሰ", max_size=40))
def test_pieces_of_characters_come_as_whole_characters(text: str) -> None:
    form = ChatFormat(byte_tokenizer(), tiny_model("llama"))
    stream, ids = TextStream(form), form.encode_text(text)
    assert "".join(stream.push(token) for token in ids) == form.decode(ids) == text


def test_a_reply_ends_with_what_the_template_puts_behind_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}<end_of_turn>{% endfor %}"
    form = ChatFormat(tokenizer, tiny_model("llama"))
    assert form.end_of_reply == tokenizer.convert_tokens_to_ids("<end_of_turn>") != tokenizer.eos_token_id
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    assert ChatFormat(tokenizer, tiny_model("llama")).end_of_reply == tokenizer.eos_token_id


def test_half_a_character_is_no_text(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="half of a character"):
        engine.format.encode_text("a \ud83d b")
