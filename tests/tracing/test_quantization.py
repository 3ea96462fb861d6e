"""Quantising a whole model: which weights, what it costs, and what holding the super weights out is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Quantize, RoundActivations
from liveweight.errors import InvalidInput
from liveweight.sites import model_sites
from liveweight.tracing.plain_text import perplexity, text_of, windows_of
from liveweight.tracing.quantization import Scheme, block_of, linear_sites, quantization, quantized
from liveweight.tracing.super_weights import find_super_weights
from tests.tracing.test_super_weights import COLUMN, LAYER, ROW, model_with_a_super_weight, plain_text
from tests.tracing.tiny_engines import engine_around, tiny_engine, tiny_tokenizer
from tiny_models import ARCHITECTURES, LAYERS, bytes_of, tiny_model

SITE = f"layers.{LAYER}.mlp.down.weight"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_weight_of_the_blocks_is_rounded_and_nothing_else(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(name, tmp_path)
    before = {site: engine.sites.weight(site).read().clone() for site in engine.sites.weight_names()}
    with engine.preview((Active(quantized(engine, Scheme(3, (8, 8)), None)),)):
        moved = {site for site in before if not torch.equal(engine.sites.weight(site).read(), before[site])}
    wished = {
        site
        for site in before
        if site.startswith("layers.") and len(before[site].shape) == 2 and "router" not in site and "spare" not in site
    }
    assert moved == wished == set(linear_sites(engine.sites))
    count = 7 if engine.sites.gated else 6
    if not engine.sites.experts:
        assert len(wished) == count * LAYERS
    ends = set(linear_sites(engine.sites, embeddings=True)) - wished
    assert ends == ({"embed.weight"} if engine.sites.tied else {"embed.weight", "lm_head.weight"})


def test_the_perplexities_are_those_of_a_model_whose_weights_were_rounded_by_hand(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    before = bytes_of(engine.model)
    found = quantization(engine, Scheme(4, (8, 8)), tokens=128)
    assert bytes_of(engine.model) == before and engine.state == ()
    assert found.super_weights == ((SITE, ROW, COLUMN),)
    assert [(row.super_weights_kept, row.super_activations_kept) for row in found.rows] == [
        (False, False),
        (True, False),
    ]
    ids = tiny_tokenizer()(plain_text()[:1000])["input_ids"]
    windows = torch.tensor(ids[:128]).view(2, 64)

    def by_hand(rounding: bool, keep: bool) -> float:
        model = model_with_a_super_weight()
        for site in linear_sites(model_sites(model)) if rounding else ():
            weight = model_sites(model).weight(site).parameter
            for top in range(0, weight.shape[0], 8):
                for left in range(0, weight.shape[1], 8):
                    block = weight.data[top : top + 8, left : left + 8]
                    held = keep and site == SITE and (top // 8, left // 8) == (ROW // 8, COLUMN // 8)
                    value = float(weight[ROW, COLUMN]) if held else 0.0
                    if held:
                        block[ROW % 8, COLUMN % 8] = block.median()
                    step = (block.max() - block.min()) / 15
                    if step > 0:
                        block.copy_(block.min() + step * ((block - block.min()) / step).round())
                    if held:
                        block[ROW % 8, COLUMN % 8] = value
        with torch.no_grad():
            logprobs = model(windows, use_cache=False).logits[:, 1:-1].log_softmax(-1)
        return float((-logprobs.gather(2, windows[:, 2:, None]).mean()).exp())

    assert found.tokens == 2 * 62
    assert found.perplexity == pytest.approx(by_hand(False, False), rel=1e-3)
    assert found.rows[0].perplexity == pytest.approx(by_hand(True, False), rel=1e-3)
    assert found.rows[1].perplexity == pytest.approx(by_hand(True, True), rel=1e-3)
    assert found.rows[1].ratio == pytest.approx(found.rows[1].perplexity / found.perplexity)


def test_what_is_asked_for_is_what_the_adjustment_does(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    plain = quantization(engine, Scheme(4, (64, 64), "z", 3.0), tokens=64)
    scheme = Scheme(4, (64, 64), "z", 3.0, activations=8)
    held = quantization(engine, scheme, tokens=64, keep_super_weights=True, keep_super_activations=True)
    assert not plain.adjustment_keeps and held.adjustment_keeps
    windows = windows_of(engine, tokens=64)
    for found, row in ((plain, 0), (held, -1)):
        state = (Active(found.adjustment),)
        assert perplexity(engine, windows, state) == pytest.approx(found.rows[row].perplexity, rel=1e-6)
    (op,) = (op for op in held.adjustment.ops if isinstance(op, Quantize))
    assert op.keep == ((SITE, ROW, COLUMN),)
    rounds = {op.site: op for op in held.adjustment.ops if isinstance(op, RoundActivations)}
    assert set(rounds) == {f"layers.{n}.{part}" for n in range(LAYERS) for part in ("attn.heads", "mlp.neurons")}
    assert rounds[f"layers.{LAYER}.mlp.neurons"].keep == (COLUMN,)
    assert rounds["layers.0.mlp.neurons"].keep == ()


def test_it_is_measured_on_top_of_what_is_active_and_without_super_weights_there_is_one_row(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    alone = quantization(engine, Scheme(8, (1, 16)), tokens=64)
    assert len(alone.rows) == 1 and alone.super_weights == () and not alone.adjustment_keeps
    active = (Active(quantized(engine, Scheme(2, (64, 64)), None)),)
    engine.become(active)
    after = quantization(engine, Scheme(8, (1, 16)), tokens=64)
    assert after.perplexity != alone.perplexity
    assert engine.state == active


def test_experts_are_rounded_and_their_activations_left_alone(tmp_path: Path) -> None:
    engine = tiny_engine("qwen3_moe", tmp_path)
    found = quantization(engine, Scheme(4, (8, 8), activations=8), tokens=32)
    rounds = [op.site for op in found.adjustment.ops if isinstance(op, RoundActivations)]
    assert "layers.1.mlp.neurons" in rounds and "layers.0.mlp.neurons" not in rounds
    assert "layers.0.mlp.experts.3.gate.weight" in linear_sites(engine.sites)


def test_bits_a_weight_count_what_each_block_stores(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    found = quantization(engine, Scheme(4, (1, 8)), tokens=32)
    assert found.bits_per_weight == pytest.approx(4 + 32 / 8)
    sizes = [
        tiny_model("qwen2").get_parameter(engine.sites.weight(site).parameter_name).numel()
        for site in linear_sites(engine.sites)
    ]
    assert found.weights == sum(sizes)


@pytest.mark.parametrize(("text", "block"), [("64", (64, 64)), ("1x32", (1, 32)), ("8X4", (8, 4))])
def test_a_block_is_a_square_or_rows_and_columns(text: str, block: tuple[int, int]) -> None:
    assert block_of(text) == block


@pytest.mark.parametrize("text", ["", "0", "-1", "8x", "1x2x3", "wide", "1.5"])
def test_another_block_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(InvalidInput, match="no block size"):
        block_of(text)


def test_numbers_and_texts_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(InvalidInput, match="bits"):
        quantization(engine, Scheme(1))
    with pytest.raises(InvalidInput, match="2 tokens, too few"):
        quantization(engine, Scheme(4), text="a")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InvalidInput, match="is empty"):
        text_of(tmp_path / "empty.txt")
    with pytest.raises(InvalidInput, match="cannot be read"):
        text_of(tmp_path / "nowhere.txt")
    assert find_super_weights(engine).weights == ()
