"""A folded op is the same function as the op, at every strength; where it would not be, there is no fold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liveweight.adjustments import (
    STREAM,
    Ablate,
    ActivationState,
    Active,
    Adjustment,
    Affine,
    BiasRouter,
    Clamp,
    Codebook,
    Dense,
    Gain,
    MixHeads,
    Op,
    Steer,
    WeightState,
    fold,
    folded,
)
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.sites import ModelSites, model_sites, patchable_layers, with_spare_neurons
from tiny_models import ARCHITECTURES, HEADS, LAYERS, WIDTH, bytes_of, logits_of, tiny_model, tiny_tokens

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expect_same_function(op: Op, sites: ModelSites) -> None:
    folded = fold(op, sites)
    assert folded is not None
    tokens, plain = tiny_tokens(), logits_of(sites.model, tiny_tokens())
    activations, weights = ActivationState(sites), WeightState(sites)
    for strength in (1.0, 0.4, -1.0):
        activations.become((Active(Adjustment(name="op", method="test", ops=(op,)), strength),))
        hooked = logits_of(sites.model, tokens)
        activations.become(())
        with weights.preview((Active(Adjustment(name="folded", method="test", ops=folded), strength),)):
            assert torch.allclose(logits_of(sites.model, tokens), hooked, atol=5e-5), strength
        assert not torch.allclose(hooked, plain, atol=1e-4)


@every_architecture
def test_a_gain_without_a_slope_is_a_scaled_column(name: str) -> None:
    sites = model_sites(tiny_model(name))
    expert = 2 if sites.experts_of(0) else None
    gains, ones = torch.tensor([8.0, -3.0]), torch.ones(2)
    expect_same_function(Gain(layer=0, neurons=(5, 1), gains=gains, slopes=ones, expert=expert), sites)
    assert fold(Gain(layer=0, neurons=(5, 1), gains=gains, slopes=2 * ones, expert=expert), sites) is None


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ARCHITECTURES),
    seed=st.integers(0, 99),
    gains=st.dictionaries(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 30)), st.floats(0, 3, width=32), min_size=1, max_size=8
    ),
    strength=st.sampled_from([1.0, 0.5, 2.0, -1.0]),
    beside=st.booleans(),
)
def test_any_gains_without_slopes_are_the_same_logits_folded_at_any_strength_and_beside_any_other_change(
    name: str, seed: int, gains: dict[tuple[int, int], float], strength: float, beside: bool
) -> None:
    sites = model_sites(tiny_model(name, seed=seed))
    ops = tuple(
        Gain(
            layer=layer,
            neurons=(neuron,),
            gains=torch.tensor([value]),
            slopes=torch.ones(1),
            expert=1 if sites.experts_of(layer) else None,
        )
        for (layer, neuron), value in gains.items()
    )
    acting = Adjustment(name="gains", method="test", ops=ops)
    down = sites.mlp_part(0, "down", 1 if sites.experts_of(0) else None)
    dense = Dense(site=down, delta=0.1 * randn(*sites.weight(down).shape, seed=seed))
    rest = (Active(Adjustment(name="beside", method="test", ops=(dense,))),) if beside else ()
    weights, activations = WeightState(sites), ActivationState(sites)
    plain = bytes_of(sites.model)
    weights.become(rest)
    activations.become((Active(acting, strength),))
    wished = logits_of(sites.model, tiny_tokens())
    activations.become(())
    weights.become((*rest, Active(folded(acting, sites), strength)))
    torch.testing.assert_close(logits_of(sites.model, tiny_tokens()), wished, atol=2e-4, rtol=1e-4)
    weights.become(())
    assert bytes_of(sites.model) == plain


def test_what_does_not_fold_says_which_op_and_why() -> None:
    sites = model_sites(tiny_model("mistral"))
    ones = torch.ones(2)
    gain = Gain(layer=0, neurons=(5, 1), gains=ones, slopes=torch.tensor([1.0, 1.5]))
    cases: list[tuple[Op, str]] = [
        (gain, "slope of neuron 1 in layer 0 is 1.5"),
        (Steer(site="layers.1.resid", vector=randn(WIDTH), positions=(2,)), "some tokens only"),
        (Steer(site="layers.1.resid", vector=randn(WIDTH)), "no bias"),
        (Clamp(layer=0, neurons=(1,), values=torch.ones(1)), "depends on the values"),
    ]
    dense = Dense(site="final_norm.weight", delta=torch.ones(WIDTH))
    for op, why in cases:
        with pytest.raises(Unsupported, match=f"Op 1 .*{why}"):
            folded(Adjustment(name="it", method="test", ops=(dense, op)), sites)
    with pytest.raises(InvalidInput, match="nothing to fold"):
        folded(Adjustment(name="it", method="test", ops=(dense,)), sites)


def test_neurons_that_are_scaled_everywhere_are_scaled_columns() -> None:
    sites = model_sites(tiny_model("llama"))
    fields = {"site": "layers.1.mlp.neurons", "indices": torch.tensor([3, 8]), "factors": torch.tensor([-4.0, 0.5])}
    expect_same_function(Affine(**fields, shifts=torch.zeros(2)), sites)
    assert fold(Affine(**fields, shifts=torch.ones(2)), sites) is None
    assert fold(Affine(**fields, shifts=torch.zeros(2), positions=(1,)), sites) is None
    assert fold(Affine(**fields | {"site": "layers.1.resid"}, shifts=torch.zeros(2)), sites) is None


@every_architecture
def test_mixed_heads_are_another_output_projection(name: str) -> None:
    expect_same_function(MixHeads(layer=1, matrix=randn(HEADS, HEADS)), model_sites(tiny_model(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("part", ["resid", "mlp.neurons", "attn.heads"])
def test_a_constant_steering_is_a_bias_where_there_is_one(name: str, part: str) -> None:
    sites = model_sites(tiny_model(name))
    site = f"layers.1.{part}"
    vector = randn(sites.activation(site).size)
    expect_same_function(Steer(site=site, vector=vector, scale=0.7), sites)
    assert fold(Steer(site=site, vector=vector, when="prompt"), sites) is None
    assert fold(Steer(site=site, vector=vector, positions=(0,)), sites) is None


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo2", "mixtral"])
def test_a_constant_steering_does_not_fold_where_there_is_no_bias(name: str) -> None:
    sites = model_sites(tiny_model(name))
    assert fold(Steer(site="layers.1.resid", vector=randn(WIDTH)), sites) is None
    assert fold(Steer(site="embed", vector=randn(WIDTH)), sites) is None


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "mixtral", "qwen3_moe", "olmoe"]
)
def test_an_ablated_stream_is_a_model_whose_writers_are_orthogonal(name: str) -> None:
    expect_same_function(Ablate(site=STREAM, direction=3 * randn(WIDTH)), model_sites(tiny_model(name)))


def test_what_spare_neurons_write_is_ablated_too() -> None:
    sites = with_spare_neurons(model_sites(tiny_model("llama")), 8)
    layer = patchable_layers(sites.layers)[0]
    for number, part in enumerate(("gate", "up", "down")):
        view = sites.weight(f"layers.{layer}.mlp.spare.{part}.weight")
        view.write(randn(*view.shape, seed=number))
    expect_same_function(Ablate(site=STREAM, direction=3 * randn(WIDTH)), sites)


def test_free_spare_neurons_are_no_part_of_a_fold_so_that_it_can_be_exported() -> None:
    sites = with_spare_neurons(model_sites(tiny_model("llama")), 8)
    ops = fold(Ablate(site=STREAM, direction=randn(WIDTH)), sites)
    assert ops and not any(".spare." in getattr(op, "site", "") for op in ops)


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "gemma2", "gemma3_text", "olmo2"])
def test_an_ablated_stream_does_not_fold_into_tied_embeddings_or_behind_norms(name: str) -> None:
    assert fold(Ablate(site=STREAM, direction=randn(WIDTH)), model_sites(tiny_model(name))) is None


def test_what_no_weight_can_say_does_not_fold_and_a_weight_op_is_itself() -> None:
    sites = model_sites(tiny_model("mixtral"))
    assert fold(Ablate(site="layers.1.resid", direction=randn(WIDTH)), sites) is None
    assert fold(Clamp(layer=0, neurons=(1,), values=torch.ones(1), expert=0), sites) is None
    assert fold(BiasRouter(layer=0, bias=torch.ones(5)), sites) is None
    book = Codebook(site="layers.1.resid", keys=torch.ones(1, WIDTH), radii=torch.ones(1), entries=torch.ones(1, WIDTH))
    assert fold(book, sites) is None
    dense = Dense(site="final_norm.weight", delta=torch.ones(WIDTH))
    assert fold(dense, sites) == (dense,)


@pytest.mark.parametrize(
    ("op", "error", "says"),
    [
        (Gain(layer=9, neurons=(0,), gains=torch.ones(1), slopes=torch.ones(1)), UnknownSite, "layer 9"),
        (MixHeads(layer=0, matrix=torch.ones(3, 3)), InvalidInput, "3 heads"),
        (Steer(site="layers.0.resid", vector=torch.ones(3)), InvalidInput, "3 entries"),
        (Ablate(site="layers.0.resid", direction=torch.ones(3)), InvalidInput, "3 entries"),
        (Ablate(site=STREAM, direction=torch.ones(3)), InvalidInput, "3 entries"),
        (Ablate(site="nowhere", direction=torch.ones(3)), UnknownSite, "nowhere"),
    ],
)
def test_an_op_that_does_not_fit_is_refused(op: Op, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fold(op, model_sites(tiny_model("llama")))
