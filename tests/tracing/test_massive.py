"""Massive activations are found where they are, and named by the token that they are on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Entries, Steer
from liveweight.errors import InvalidInput
from liveweight.tracing.massive import massive
from tests.tracing.test_super_weights import COLUMN, LAYER, ROW, model_with_a_super_weight
from tests.tracing.tiny_engines import engine_around, tiny_engine, tiny_tokenizer
from tiny_models import ARCHITECTURES, EXPERT_ARCHITECTURES, WIDTH

TEXT = "the cat sat on the mat and looked at the dog. " * 4


def test_what_is_massive_is_what_a_plain_forward_pass_says(tmp_path: Path) -> None:
    model = model_with_a_super_weight()
    found = massive(engine_around(model, tmp_path), TEXT, tokens=120)
    ids = tiny_tokenizer()(TEXT)["input_ids"][:120]
    wished = set()
    with torch.no_grad():
        for start in range(0, 120, 64):  # the model's context is 64
            window = torch.tensor([ids[start : start + 64]])
            states = model(window, output_hidden_states=True, use_cache=False).hidden_states
            for layer in range(2):  # transformers puts the last one behind the final norm
                values = states[layer + 1][0].abs()
                floor = max(100.0, 1000.0 * float(values.median()))
                wished |= {(f"layers.{layer}.resid", int(place)) for place in (values > floor).nonzero()[:, 1]}
    streams = {
        (each.site, each.dimension) for each in found.values if each.site in ("layers.0.resid", "layers.1.resid")
    }
    assert streams == wished == {("layers.1.resid", ROW)}
    neurons = [each for each in found.values if each.site == f"layers.{LAYER}.mlp.neurons"]
    assert [each.dimension for each in neurons] == [COLUMN]
    assert neurons[0].largest == pytest.approx(2000.0, rel=1e-3)
    assert neurons[0].count == 120 == found.tokens
    assert neurons[0].first_positions == 2
    assert dict(neurons[0].tokens)[" "] == TEXT[:120].count(" ")


def test_the_token_and_the_position_are_those_of_the_largest_value(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    vector = torch.zeros(WIDTH)
    vector[5] = -9000.0
    op = Steer(site="layers.0.resid", vector=vector, positions=(4,))
    engine.become((Active(Adjustment(name="spike", method="test", ops=(op,))),))
    found = massive(engine, "abcdefgh", tokens=8)
    spike = next(each for each in found.values if each.site == "layers.0.resid")
    assert (spike.layer, spike.dimension, spike.count, spike.first_positions) == (0, 5, 1, 0)
    assert (spike.where.window, spike.where.position, spike.where.token) == (0, 4, "e")
    assert spike.tokens == (("e", 1),)
    assert spike.largest == pytest.approx(-9000.0, rel=1e-3)
    sites = {each.site: each for each in found.sites}
    assert sites["layers.0.resid"].top[0] == pytest.approx(9000.0, rel=1e-3)
    assert sites["layers.0.resid"].top[1] < 100
    assert spike.times == pytest.approx(-spike.largest / sites["layers.0.resid"].median)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_ordinary_model_has_none_and_every_site_is_read(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(name, tmp_path)
    found = massive(engine, TEXT, tokens=50)
    assert found.values == ()
    dense = [layer for layer in range(3) if not engine.sites.experts_of(layer)]
    assert len(found.sites) == 2 + 2 * 3 + len(dense)
    assert len(found.skipped) == 3 - len(dense) and bool(found.skipped) == (name in EXPERT_ARCHITECTURES)
    assert len(found.picture().data) == 10


def test_a_question_is_read_in_the_chat_s_own_words(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    found = massive(engine, "who are you?", chat=True)
    assert found.tokens == len(engine.format.encode_text("who are you?", special=True))


def test_it_is_read_under_what_is_active(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    site = f"layers.{LAYER}.mlp.down.weight"
    op = Entries(site=site, indices=torch.tensor([[ROW, COLUMN]]), values=torch.zeros(1))
    engine.become((Active(Adjustment(name="zero", method="test", ops=(op,))),))
    assert "layers.1.resid" not in {each.site for each in massive(engine, TEXT).values}


@pytest.mark.parametrize(("text", "tokens", "says"), [(" \n", 5, "is empty"), ("abc", 0, "0 tokens")])
def test_nothing_to_read_is_said(text: str, tokens: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=says):
        massive(tiny_engine("llama", tmp_path), text, tokens=tokens)
