"""Replaced neurons read and write as they are told, at the named place only, and can be taken back exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import (
    Active,
    Adjustment,
    Entries,
    LowRank,
    ReplaceNeurons,
    ScaleNeurons,
    State,
    WeightOp,
    WeightState,
    first_layer,
    fold,
    op_from,
)
from liveweight.errors import InvalidInput, UnknownSite
from liveweight.sites import ModelSites, model_sites
from tests.adjustments.expected_weights import expect_only, expert_in, randn, state_of
from tiny_models import ARCHITECTURES, WIDTH, bytes_of, logits_of, tiny_model, tiny_tokens

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
NEURONS = (7, 2)


def bias_of(sites: ModelSites, part: str, layer: int = 0) -> str | None:
    """The bias of part of a layer's MLP, where this architecture has one."""
    site = f"layers.{layer}.mlp.{part}.bias"
    return site if sites.has_weight(site) else None


def replacement(sites: ModelSites, seed: int = 0, neurons: tuple[int, ...] = NEURONS, **fields: Any) -> ReplaceNeurons:
    """New neurons of layer 0 with all the parts that this architecture has."""
    count = len(neurons)
    parts: dict[str, Any] = {
        "up": randn(count, WIDTH, seed=seed),
        "down": randn(WIDTH, count, seed=seed + 1),
        "gate": randn(count, WIDTH, seed=seed + 2) if sites.gated else None,
        "bias": randn(count, seed=seed + 3) if bias_of(sites, "up") else None,
        "expert": expert_in(sites, 0),
    }
    return ReplaceNeurons(layer=0, neurons=neurons, **parts | fields)


def set_rows(values: Tensor) -> Callable[[Tensor, float], Tensor]:
    return lambda base, _: base.index_copy(0, torch.tensor(NEURONS), values)


@every_architecture
def test_replacing_neurons_sets_their_rows_and_a_share_of_their_columns(name: str) -> None:
    sites = model_sites(tiny_model(name))
    op = replacement(sites)
    wished = {
        sites.mlp_part(0, "up", op.expert): set_rows(op.up),
        sites.mlp_part(0, "down", op.expert): lambda base, s: base.index_copy(1, torch.tensor(NEURONS), s * op.down),
    }
    if op.gate is not None:
        wished[sites.mlp_part(0, "gate", op.expert)] = set_rows(op.gate)
    if op.bias is not None:
        wished["layers.0.mlp.up.bias"] = set_rows(op.bias)
    expect_only(sites, op, wished)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_without_a_bias_the_neurons_keep_theirs(name: str) -> None:
    sites = model_sites(tiny_model(name))
    before = {site: sites.weight(site).read().clone() for part in ("up", "down") if (site := bias_of(sites, part))}
    WeightState(sites).become(state_of(replacement(sites, bias=None)))
    assert len(before) == 2
    assert all(torch.equal(sites.weight(site).read(), values) for site, values in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["phi3", "gpt2", "olmoe"])
def test_at_full_strength_the_neurons_hold_exactly_the_values_given(name: str, dtype: torch.dtype) -> None:
    sites = model_sites(tiny_model(name, dtype))
    op = replacement(sites)
    WeightState(sites).become(state_of(op))
    for place, neuron in enumerate(NEURONS):
        read = sites.neuron_read(0, neuron, op.expert)
        assert torch.equal(read["up"], op.up[place].to(dtype))
        assert op.gate is None or torch.equal(read["gate"], op.gate[place].to(dtype))
        assert torch.equal(sites.neuron_write(0, neuron, op.expert), op.down[:, place].to(dtype))


@every_architecture
def test_a_neuron_that_becomes_a_copy_of_another_adds_what_the_other_writes_times_the_strength(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    expert = expert_in(sites, 0)
    read = sites.neuron_read(0, 9, expert)
    bias, gate_bias = bias_of(sites, "up"), bias_of(sites, "gate")
    copies: list[WeightOp] = [
        ReplaceNeurons(
            layer=0,
            neurons=(4,),
            up=read["up"][None],
            down=sites.neuron_write(0, 9, expert)[:, None],
            gate=read["gate"][None] if sites.gated else None,
            bias=sites.weight(bias).read()[[9]] if bias else None,
            expert=expert,
        )
    ]
    same: list[Entries] = []
    if gate_bias:  # not part of the op
        same.append(Entries(site=gate_bias, indices=[[4]], values=sites.weight(gate_bias).read()[[9]]))
    weights = WeightState(sites)
    plain = logits_of(model, tiny_tokens())
    for strength in (1.0, 0.4, -3.0):
        weights.become((*state_of(*same), *state_of(*copies, strength=strength)))
        found = logits_of(model, tiny_tokens())
        scaled = ScaleNeurons(layer=0, neurons=(4, 9), factors=[0.0, 1.0 + strength], expert=expert)
        weights.become(state_of(scaled))
        assert torch.allclose(found, logits_of(model, tiny_tokens()), atol=5e-5), strength
        assert not torch.allclose(found, plain, atol=1e-4)


@every_architecture
def test_of_two_ops_on_one_neuron_the_later_one_wins_and_leaves_the_others(name: str) -> None:
    model = tiny_model(name)
    sites = model_sites(model)
    weights = WeightState(sites)
    first, second = replacement(sites, seed=1, neurons=(2, 7)), replacement(sites, seed=20, neurons=(7, 11))
    scaled = ScaleNeurons(layer=0, neurons=(7,), factors=[0.5], expert=first.expert)
    weights.become(state_of(first, scaled, second))
    written = torch.stack([sites.neuron_write(0, neuron, first.expert) for neuron in (2, 7, 11)], dim=1)
    assert torch.equal(written, torch.cat((first.down[:, :1], second.down), dim=1))
    weights.become(state_of(second, first, scaled))
    written = torch.stack([sites.neuron_write(0, neuron, first.expert) for neuron in (2, 7, 11)], dim=1)
    assert torch.equal(written, torch.stack((first.down[:, 0], 0.5 * first.down[:, 1], second.down[:, 1]), dim=1))
    weights.become(())
    assert bytes_of(model) == bytes_of(tiny_model(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_only_the_replaced_rows_and_columns_are_kept(name: str, dtype: torch.dtype) -> None:
    sites = model_sites(tiny_model(name, dtype))
    weights = WeightState(sites)
    op = replacement(sites)
    weights.become(state_of(op, strength=0.5))
    parts = 3 if sites.gated else 2
    entries = len(NEURONS) * (parts * WIDTH + (op.bias is not None))
    assert weights.pristine_bytes == entries * dtype.itemsize


def test_all_that_was_set_to_something_else_survives_rounding() -> None:
    sites = model_sites(tiny_model("llama", torch.bfloat16))
    weights = WeightState(sites)
    (active,) = state_of(replacement(sites))
    assert weights.survival(active) > 0.99
    read = sites.neuron_read(0, 7)
    column = sites.neuron_write(0, 7).float()
    nudged = ReplaceNeurons(
        layer=0, neurons=(7,), up=read["up"][None], gate=read["gate"][None], down=column[:, None] * (1 + 1e-6)
    )
    assert weights.survival(state_of(nudged)[0]) == 0.0


def test_the_first_layer_that_differs_is_that_of_the_neurons() -> None:
    sites = model_sites(tiny_model("gpt2"))
    weights = WeightState(sites)
    op = ReplaceNeurons(layer=2, neurons=(1,), up=torch.ones(1, WIDTH), down=torch.ones(WIDTH, 1))
    assert set(weights.touched(state_of(op))) == {"layers.2.mlp.up.weight", "layers.2.mlp.down.weight"}
    assert first_layer(weights, (), state_of(op)) == 2 == first_layer(weights, state_of(op), state_of(op, strength=2.0))
    assert first_layer(weights, (), state_of(op, strength=0.0)) is None
    assert fold(op, sites) == (op,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_the_bytes_do_not_depend_on_what_was_active_before(name: str, dtype: torch.dtype) -> None:
    sites = model_sites(tiny_model(name, dtype))
    op, other = replacement(sites), replacement(sites, seed=9, neurons=(7, 0))
    down = sites.mlp_part(0, "down", op.expert)
    whole = LowRank(site=down, left=randn(WIDTH, 1), right=randn(1, sites.neurons_of(0)))
    one, two, three = (state_of(each, strength=strength) for each, strength in ((op, 0.7), (whole, 1.0), (other, -1.3)))
    histories: list[tuple[State, ...]] = [(), (one,), (one, one + two), (three,), (two + three, three + one)]
    found = set()
    for history in histories:
        sites = model_sites(tiny_model(name, dtype))
        weights = WeightState(sites)
        for state in (*history, one + two + three):
            weights.become(state)
        found.add(tuple(bytes_of(sites.model).values()))
    assert len(found) == 1


ONE = {"layer": 0, "neurons": (1,), "up": torch.ones(1, WIDTH), "down": torch.ones(WIDTH, 1)}
GATED = ONE | {"gate": torch.ones(1, WIDTH)}
NARROW = {"up": torch.ones(1, 9), "down": torch.ones(9, 1), "gate": torch.ones(1, 9)}


@pytest.mark.parametrize(
    ("name", "fields", "error", "says"),
    [
        ("qwen3", GATED | {"layer": 3}, UnknownSite, "layer 3.*0 to 2"),
        ("qwen3", GATED | {"neurons": (40,)}, UnknownSite, "neuron 40.*0 to 39"),
        ("qwen3", GATED | {"expert": 0}, UnknownSite, "no experts"),
        ("mixtral", GATED, UnknownSite, "none was named"),
        ("mixtral", GATED | {"expert": 5}, UnknownSite, "expert 5"),
        ("qwen3_moe", GATED | {"neurons": (32,), "expert": 0}, UnknownSite, "neuron 32.*0 to 31"),
        ("qwen3", GATED | NARROW, InvalidInput, r"\(1, 9\).*\(9, 1\).*24 wide"),
        ("qwen3", ONE, InvalidInput, r"have gates.*\(1, 24\)"),
        ("mixtral", ONE | {"expert": 0}, InvalidInput, "have gates"),
        ("gpt2", GATED, InvalidInput, r"no gates.*\(1, 24\).*Leave the gate out"),
        ("gpt_neox", GATED, InvalidInput, "no gates"),
        ("qwen3", GATED | {"bias": torch.ones(1)}, UnknownSite, r"layers\.0\.mlp\.up\.bias.*\(1,\)"),
        ("olmoe", GATED | {"bias": torch.ones(1), "expert": 0}, UnknownSite, r"experts\.0\.up\.bias"),
        ("phi3", GATED | {"down": torch.full((WIDTH, 1), 3e38)}, InvalidInput, "would not be finite"),
    ],
)
def test_neurons_that_do_not_fit_are_refused_and_the_weights_stay(
    name: str, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = tiny_model(name)
    weights = WeightState(model_sites(model))
    before = bytes_of(model)
    with pytest.raises(error, match=f"(?s){says}"):
        weights.become(state_of(ReplaceNeurons(**fields), strength=2.0))
    assert bytes_of(model) == before and weights.state == () and weights.pristine_bytes == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"neurons": (), "up": torch.ones(0, WIDTH), "down": torch.ones(WIDTH, 0), "gate": None}, "not be empty"),
        ({"neurons": (1, 1)}, "twice"),
        ({"neurons": (1, 2)}, r"up must be \(n, width\) with n = 2 neurons, not \(1, 24\)"),
        ({"up": torch.ones(WIDTH)}, r"up must be .* not \(24,\)"),
        ({"down": torch.ones(1, WIDTH)}, r"down must be .*\(24, 1\).* not \(1, 24\)"),
        ({"gate": torch.ones(WIDTH, 1)}, r"gate must be .*\(1, 24\).* not \(24, 1\)"),
        ({"bias": torch.ones(1, 1)}, r"bias must be .*\(1,\).* not \(1, 1\)"),
        ({"bias": torch.tensor([float("nan")])}, "bias.*not finite"),
        ({"gate": "open"}, "gate.*not numbers"),
        ({"layer": -1}, "layer"),
        ({"strength": 1.0}, "strength"),
    ],
)
def test_shapes_that_do_not_agree_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        ReplaceNeurons(**GATED | change)
    assert "ReplaceNeurons" in str(caught.value)


@pytest.mark.parametrize("parts", [{}, {"gate": torch.ones(1, WIDTH)}, {"bias": torch.ones(1)}, {"expert": 2}])
def test_it_is_the_same_after_disk_and_after_its_fields_with_and_without_its_optional_parts(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    op = ReplaceNeurons(**ONE | parts)
    assert op_from(op.plain() | op.tensors()) == op
    adjustment = Adjustment(name="taught", method="patch", ops=(op,))
    adjustment.save(tmp_path)
    loaded = Adjustment.load(tmp_path)
    assert loaded == adjustment and loaded.ops == (op,) and loaded.hash == adjustment.hash
    assert adjustment.weight_ops == (op,) and Active(loaded).adjustment.activation_ops == ()


def test_each_part_of_it_is_in_its_hash() -> None:
    variants: list[dict[str, Any]] = [{}, {"gate": torch.ones(1, WIDTH)}, {"bias": torch.ones(1)}, {"expert": 0}]
    variants += [{"up": torch.zeros(1, WIDTH)}, {"down": torch.zeros(WIDTH, 1)}, {"neurons": (2,)}, {"layer": 1}]
    ops = [ReplaceNeurons(**ONE | change) for change in variants]
    assert len(set(ops)) == len({Adjustment(name="n", method="m", ops=(op,)).hash for op in ops}) == len(ops)
