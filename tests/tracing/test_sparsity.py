"""The share of neurons that can be zero is what a forward pass with those zeros says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Clamp, Steer
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.tracing.sparsity import RULES, sparsity
from tests.tracing.test_super_weights import plain_text
from tests.tracing.tiny_engines import engine_around, tiny_engine, tiny_tokenizer
from tiny_models import DENSE_ARCHITECTURES, LAYERS, NEURONS, WIDTH, tiny_model

TOKENS = 96


def windows() -> list[Tensor]:
    ids = tiny_tokenizer()(plain_text()[:400])["input_ids"][:TOKENS]
    return [torch.tensor([ids[:64]]), torch.tensor([ids[64:]])]


def perplexity(engine: TransformersEngine, cut: dict[int, object]) -> tuple[float, dict[int, float]]:
    """By plain forward passes, each window for itself, with hooks of our own; and each layer's share at zero."""
    zero: dict[int, list[Tensor]] = {}
    handles = []

    def hook(layer: int) -> object:
        def change(values: Tensor) -> Tensor:
            new = values * cut[layer](values)  # type: ignore[operator]
            zero.setdefault(layer, []).append(new == 0)
            return new

        return change

    for layer in cut:
        handles.append(engine.sites.activation(f"layers.{layer}.mlp.neurons").on(hook(layer)))  # type: ignore[arg-type]
    nats, count = 0.0, 0
    with torch.no_grad():
        for window in windows():
            logprobs = engine.model(window, use_cache=False).logits[0, 1:-1].log_softmax(-1)
            nats -= float(logprobs.gather(1, window[0, 2:, None]).sum())
            count += len(logprobs)
    for handle in handles:
        handle.remove()
    return math.exp(nats / count), {
        layer: float(torch.cat([each.flatten() for each in parts]).float().mean()) for layer, parts in zero.items()
    }


@pytest.mark.parametrize("name", DENSE_ARCHITECTURES)
def test_every_figure_is_that_of_a_plain_forward_pass_with_those_zeros(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(name, tmp_path)
    steps: list[tuple[int, int]] = []
    found = sparsity(engine, tokens=TOKENS, percent=2.0, progress=lambda *step: steps.append(step))
    assert steps == [(number, 7 * (LAYERS + 3)) for number in range(1, 7 * (LAYERS + 3) + 1)]
    base, _ = perplexity(engine, {})
    assert found.perplexity == pytest.approx(base, rel=1e-3)
    assert found.tokens == TOKENS - 4
    for each in found.layers:
        value, shares = perplexity(engine, {each.layer: lambda a, t=each.threshold: a.abs() >= t})
        assert value / base == pytest.approx(each.ratio, rel=1e-3) and each.ratio <= 1.02
        assert shares[each.layer] == pytest.approx(each.alone, abs=0.02)
    assert [rule.rule for rule in found.rules] == list(RULES)
    for rule in found.rules:
        best = rule.found
        if rule.rule == "top-k":
            cut = {
                layer: lambda a, k=int(best.value): a.abs() >= a.abs().topk(k).values[..., -1:] for layer in range(3)
            }
        elif rule.rule == "threshold":
            cut = {layer: lambda a, t=best.value: a.abs() >= t for layer in range(LAYERS)}
        else:
            continue  # below, where the medians are at hand
        value, shares = perplexity(engine, cut)
        assert value / base == pytest.approx(best.ratio, rel=1e-3) and best.ratio <= 1.02
        assert sum(shares.values()) / LAYERS == pytest.approx(best.share, abs=0.02)
        assert rule.by_layer == pytest.approx([shares[layer] for layer in range(LAYERS)], abs=0.02)


def test_the_relative_rule_counts_in_medians_of_each_layer(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    medians = {}
    for layer in range(LAYERS):
        seen: list[Tensor] = []
        handle = engine.sites.activation(f"layers.{layer}.mlp.neurons").on(lambda value, seen=seen: seen.append(value))
        perplexity(engine, {})
        handle.remove()
        values = torch.cat([each.flatten() for each in seen]).abs().sort().values
        medians[layer] = float(values[len(values) // 2])
    found = sparsity(engine, tokens=TOKENS, percent=20.0, layers=False)
    assert found.layers == ()
    best = found.rules[0].found
    base, _ = perplexity(engine, {})
    cut = {layer: lambda a, t=best.value * medians[layer]: a.abs() >= t for layer in range(LAYERS)}
    value, shares = perplexity(engine, cut)
    assert value / base == pytest.approx(best.ratio, rel=1e-2)
    assert sum(shares.values()) / LAYERS == pytest.approx(best.share, abs=0.02)


def test_a_trial_beyond_what_was_found_costs_too_much_and_with_room_for_anything_all_is_zero(tmp_path: Path) -> None:
    engine = tiny_engine("phi3", tmp_path)
    for rule in sparsity(engine, tokens=TOKENS, percent=1.0, layers=False).rules:
        beyond = [point for point in rule.tried if point.share > rule.found.share]
        assert beyond and all(point.ratio > 1.01 for point in beyond)
        assert all(point.share <= rule.found.share for point in rule.tried if point.ratio <= 1.01)
    for rule in sparsity(engine, tokens=TOKENS, percent=1e9, layers=False).rules:
        assert rule.found.share > 0.9
        assert len(rule.tried) == 8
    free = sparsity(engine, tokens=TOKENS, percent=1e9)
    assert all(each.alone > 0.98 for each in free.layers)
    assert len(free.picture().data) == 7


def test_neurons_that_write_nothing_are_all_found_free(tmp_path: Path) -> None:
    engine = tiny_engine("qwen2", tmp_path)
    with torch.no_grad():
        engine.model.model.layers[1].mlp.down_proj.weight.zero_()
    found = sparsity(engine, tokens=TOKENS, percent=0.5)
    assert found.layers[1].alone > 0.98 and found.layers[1].ratio == pytest.approx(1.0, abs=1e-6)


def test_it_is_measured_under_what_is_active_and_leaves_it(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    quiet = sparsity(engine, tokens=TOKENS)
    vector = torch.full((WIDTH,), 2.0)
    ops = (
        Clamp(layer=0, neurons=tuple(range(NEURONS // 2)), values=torch.zeros(NEURONS // 2)),
        Steer(site="embed", vector=vector),
        Steer(site="layers.1.resid", vector=vector, when="prompt"),
    )
    state = (Active(Adjustment(name="clamp", method="test", ops=ops)),)
    engine.become(state)
    hooks = engine.activations.hooks
    active = sparsity(engine, tokens=TOKENS)
    assert engine.state == state and engine.activations.hooks == hooks
    assert active.perplexity != quiet.perplexity
    with engine.activations.prompt(1000):
        base, _ = perplexity(engine, {})
        assert active.perplexity == pytest.approx(base, rel=1e-3)
        for each in active.layers:
            value, _ = perplexity(engine, {each.layer: lambda a, t=each.threshold: a.abs() >= t})
            assert value / base == pytest.approx(each.ratio, rel=1e-3)
    assert active.layers[0].alone >= 0.48, "half of them are zero already"


@pytest.mark.parametrize("percent", [0.0, -1.0, math.nan, math.inf])
def test_a_rise_that_makes_no_sense_is_refused(percent: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot rise"):
        sparsity(tiny_engine("llama", tmp_path), percent=percent)


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts"):
        sparsity(tiny_engine("mixtral", tmp_path))


def test_where_most_values_are_zero_already_a_rule_begins_with_those(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.ReLU()
        block.mlp.gate_proj.weight.sub_(0.3)
    engine = engine_around(model, tmp_path)
    seen: list[Tensor] = []
    handles = [
        engine.sites.activation(f"layers.{layer}.mlp.neurons").on(lambda value: seen.append(value))
        for layer in range(LAYERS)
    ]
    perplexity(engine, {})
    for handle in handles:
        handle.remove()
    natural = float(torch.cat([each.flatten() == 0 for each in seen]).float().mean())
    assert natural > 0.4
    for rule in sparsity(engine, tokens=TOKENS, percent=5.0, layers=False).rules:
        assert rule.found.share >= natural - 0.02, rule.rule
