"""A model with spare neurons says what the checkpoint says, for every architecture."""

from __future__ import annotations

import pytest
import torch

from liveweight.adjustments import LowRank, ReplaceNeurons, WeightState
from liveweight.errors import UnknownSite
from liveweight.sites import ModelSites, model_sites, patchable_layers, subject_layers, with_spare_neurons
from tests.adjustments.expected_weights import randn, state_of
from tiny_models import ARCHITECTURES, WIDTH, bytes_of, logits_of, tiny_model, tiny_tokens

DENSE = [name for name in ARCHITECTURES if not model_sites(tiny_model(name)).experts]


def grown(name: str, count: int = 8) -> ModelSites:
    return with_spare_neurons(model_sites(tiny_model(name)), count)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_grown_model_says_the_same_and_its_new_neurons_are_zero(name: str) -> None:
    plain = model_sites(tiny_model(name))
    before = logits_of(plain.model, tiny_tokens())
    values = {site: plain.weight(site).read().clone() for site in plain.weight_names()}
    sites = grown(name)
    torch.testing.assert_close(logits_of(sites.model, tiny_tokens()), before, rtol=1e-5, atol=1e-6)
    assert sites.parameters == plain.parameters
    for site in sites.weight_names():
        read = sites.weight(site).read()
        assert not bool(read.any()) if ".spare." in site else torch.equal(read, values.pop(site)), site
    assert not values
    for layer in range(sites.layers):
        room = {*subject_layers(sites.layers), *patchable_layers(sites.layers)}
        dense = layer in room and not sites.experts_of(layer)
        assert sites.neurons_of(layer) == plain.neurons_of(layer) and sites.spare_of(layer) == 8 * dense
    assert with_spare_neurons(sites, 8) is sites  # once is enough


@pytest.mark.parametrize("name", DENSE)
def test_a_spare_neuron_does_what_one_of_the_layers_own_would_do(name: str) -> None:
    sites = grown(name)
    layer, own = patchable_layers(sites.layers)[0], sites.neurons
    if sites.has_weight(f"layers.{layer}.mlp.gate.bias"):  # no part of the op
        bias = sites.weight(f"layers.{layer}.mlp.gate.bias")
        bias.write(torch.zeros(bias.shape))
    base, plain = bytes_of(sites.model), logits_of(sites.model, tiny_tokens())
    parts = {
        "up": randn(2, WIDTH, seed=1),
        "down": randn(WIDTH, 2, seed=2),
        "gate": randn(2, WIDTH, seed=3) if sites.gated else None,
        "bias": torch.zeros(2) if sites.has_weight(f"layers.{layer}.mlp.up.bias") else None,
    }
    state = WeightState(sites)
    state.become(state_of(ReplaceNeurons(layer=layer, neurons=(own + 3, own), **parts)))
    spare = logits_of(sites.model, tiny_tokens())
    assert not torch.allclose(spare, plain, atol=1e-4)
    # The same two in the place of two of the layer's own, with what those two did put onto spare neurons.
    read, write = [sites.neuron_read(layer, n) for n in (4, 9)], [sites.neuron_write(layer, n) for n in (4, 9)]
    up_bias = f"layers.{layer}.mlp.up.bias"
    moved = ReplaceNeurons(
        layer=layer,
        neurons=(own + 1, own + 2),
        up=torch.stack([each["up"] for each in read]),
        down=torch.stack(write, dim=1),
        gate=torch.stack([each["gate"] for each in read]) if sites.gated else None,
        bias=sites.weight(up_bias).read()[[4, 9]] if parts["bias"] is not None else None,
    )
    state.become(state_of(ReplaceNeurons(layer=layer, neurons=(4, 9), **parts), moved))
    torch.testing.assert_close(logits_of(sites.model, tiny_tokens()), spare, rtol=1e-4, atol=1e-5)
    state.become(())
    assert bytes_of(sites.model) == base


def test_ops_in_the_checkpoints_coordinates_fit_a_grown_layer() -> None:
    sites = grown("llama")
    layer = patchable_layers(sites.layers)[0]
    op = LowRank(site=f"layers.{layer}.mlp.down.weight", left=randn(WIDTH, 1), right=randn(1, sites.neurons))
    WeightState(sites).become(state_of(op))
    plain = model_sites(tiny_model("llama"))
    WeightState(plain).become(state_of(op))
    torch.testing.assert_close(logits_of(sites.model, tiny_tokens()), logits_of(plain.model, tiny_tokens()))
    with pytest.raises(UnknownSite, match="neuron 40"):
        sites.check_neurons(layer, (40,))
    with pytest.raises(UnknownSite, match="neuron 48") as refused:
        WeightState(sites).become(
            state_of(
                ReplaceNeurons(
                    layer=layer, neurons=(48,), up=randn(1, WIDTH), down=randn(WIDTH, 1), gate=randn(1, WIDTH)
                )
            )
        )
    assert "0 to 47. The last 8 are spare ones" in refused.value.hint


@pytest.mark.parametrize(("layers", "expected"), [(30, [23, 24, 25]), (3, [1]), (2, [0]), (1, [0]), (12, [9, 10])])
def test_late_layers_have_room_and_never_the_last_one(layers: int, expected: list[int]) -> None:
    assert list(patchable_layers(layers)) == expected


@pytest.mark.parametrize(("layers", "expected"), [(30, [5, 6, 7]), (3, [0, 1]), (2, [0]), (1, [0]), (12, [2, 3, 4])])
def test_early_layers_have_room_and_never_the_last_one(layers: int, expected: list[int]) -> None:
    assert list(subject_layers(layers)) == expected
