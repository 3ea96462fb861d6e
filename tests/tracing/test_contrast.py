"""Reading two sides and their statistics, on tiny models, against the textbook and against engine.trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from liveweight.engines.base import Objective, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.tracing import SuperWeight, SuperWeights, super_neurons
from liveweight.tracing.contrast import read, separate
from liveweight.tracing.super_weights import FORMAT
from tests.tracing.tiny_engines import tiny_engine

FOUR = ("llama", "gpt2", "phi3", "qwen3")


def sides(engine: TransformersEngine, count: int = 7) -> tuple[list[ScoreItem], list[ScoreItem]]:
    """Prompts that end in a letter and are answered by a digit; those of side b are longer."""
    generator = torch.Generator().manual_seed(1)

    def item(length: int, answer: str) -> ScoreItem:
        prompt = torch.randint(3, 40, (length,), generator=generator).tolist()
        return ScoreItem(tuple(prompt), tuple(engine.format.encode_text(answer)))

    return [item(4 + i, "1") for i in range(count)], [item(5 + i, "7") for i in range(count + 2)]


@pytest.mark.parametrize("architecture", FOUR)
def test_an_example_is_the_neurons_where_its_answer_is_due(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    items = [ScoreItem((5, 6, 7), (8,)), ScoreItem((9, 10, 11, 12), (13, 14, 15))]
    found, _ = read(engine, items)
    for row, item in enumerate(items):
        tokens = (*item.prompt, *item.continuation[:-1])
        for layer in range(engine.sites.layers):
            site = f"layers.{layer}.mlp.neurons"
            expected = engine.trace(tokens, [site]).values[site][len(item.prompt) - 1 :].mean(0)
            torch.testing.assert_close(found[row, layer], expected, atol=1e-5, rtol=1e-4)


def test_the_statistics_are_scipy_s_and_cohen_s(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    a, b = sides(engine)
    found = separate(engine, a, b)
    values = read(engine, [*a, *b])[0].double().numpy()
    first, second = values[: len(a)], values[len(a) :]
    welch = stats.ttest_ind(first, second, equal_var=False).pvalue
    pooled = np.sqrt(
        ((len(a) - 1) * first.var(0, ddof=1) + (len(b) - 1) * second.var(0, ddof=1)) / (len(a) + len(b) - 2)
    )
    np.testing.assert_allclose(found.p.numpy(), welch, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.effect_size.numpy(), (first.mean(0) - second.mean(0)) / pooled, rtol=1e-3)
    corrected = stats.false_discovery_control(welch.ravel()).reshape(welch.shape)
    np.testing.assert_allclose(found.q.numpy(), corrected, rtol=1e-3, atol=1e-6)
    assert found.tested == welch.size
    assert float(found.consistency.min()) >= 0.0
    assert float(found.consistency.max()) <= 1.0


@pytest.mark.parametrize("architecture", FOUR)
def test_push_is_what_a_neuron_does_for_its_own_side_less_twice_what_it_does_for_the_other(
    architecture: str, tmp_path: Path
) -> None:
    engine = tiny_engine(architecture, tmp_path)
    a, b = sides(engine)
    found = separate(engine, a, b)
    for layer, neuron in ((1, 3), (0, 8), (2, 20)):
        site = f"layers.{layer}.mlp.neurons"

        def pushed(item: ScoreItem, site: str = site, neuron: int = neuron) -> float:
            trace = engine.trace(item.prompt, [site], Objective(item.continuation))
            return float((trace.values[site] * trace.gradients[site])[len(item.prompt) - 1, neuron])

        own, other = [pushed(item) for item in a], [pushed(item) for item in b]
        if abs(float(found.mean_a[layer, neuron])) < abs(float(found.mean_b[layer, neuron])):
            own, other = other, own
        expected = np.mean(own) - 2 * np.mean(np.maximum(other, 0))
        assert float(found.push[layer, neuron]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_two_sides_with_the_same_answers_can_be_told_apart_too(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    a, b = sides(engine)
    same = [ScoreItem(item.prompt, a[0].continuation) for item in b]
    assert float(separate(engine, a, same).push.abs().max()) > 0


def test_a_super_neuron_tells_nothing(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    a, b = sides(engine)
    plain = separate(engine, a, b)
    assert float(plain.push[0, 2].abs()) > 0
    weight = SuperWeight(
        layer=0, row=1, column=2, value=1.0, activation=1.0, output=1.0,
        perplexity_zeroed=9.0, perplexity=1.0, tokens_measured=1, confirmed=True,
    )  # fmt: skip
    known = SuperWeights(model_hash=engine.info.hash, prompt="", weights=(weight,))
    file = tmp_path / "super_weights" / f"{engine.info.hash}-{FORMAT}.json"
    file.write_text(known.model_dump_json(), encoding="utf-8")
    found = separate(engine, a, b)
    assert (float(found.push[0, 2]), float(found.effect_size[0, 2]), float(found.q[0, 2])) == (0.0, 0.0, 1.0)
    assert found.tested == plain.tested - 1


def test_reading_leaves_weights_hooks_and_random_state_as_they_were(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    a, b = sides(engine)
    super_neurons(engine)  # found once a model
    before, random = engine.fingerprints(), torch.get_rng_state()
    separate(engine, a, b)
    assert engine.fingerprints() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())


def test_too_few_prompts_and_experts_are_refused_by_name(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    a, b = sides(engine)
    with pytest.raises(InvalidInput, match="first side has 2 prompts"):
        separate(engine, a[:2], b)
    with pytest.raises(Unsupported, match="experts"):
        separate(tiny_engine("qwen3_moe", tmp_path), a, b)
