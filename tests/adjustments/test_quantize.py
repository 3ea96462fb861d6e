"""Quantisation as an op: the right levels at the right place, what is held out held out, and all of it taken back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liveweight.adjustments import (
    ActivationState,
    Active,
    Adjustment,
    Entries,
    LowRank,
    Quantize,
    RoundActivations,
    WeightState,
    first_layer,
    op_from,
)
from liveweight.adjustments.rounding import Clip, rounded
from liveweight.errors import InvalidInput, UnknownSite
from liveweight.sites import model_sites
from tests.adjustments.expected_weights import expect_only, randn, state_of
from tiny_models import ARCHITECTURES, LAYERS, bytes_of, logits_of, tiny_model, tiny_tokens

SITE = "layers.1.attn.o.weight"


def by_hand(
    matrix: Tensor,
    bits: int,
    block: tuple[int, int],
    clip: Clip = "none",
    clip_at: float = 0.0,
    keep: tuple[tuple[int, int], ...] = (),
) -> Tensor:
    """Block by block and number by number, in float64."""
    values = matrix.double().numpy()
    new = values.copy()
    rows, columns = values.shape
    for top, left in itertools.product(range(0, rows, block[0]), range(0, columns, block[1])):
        places = [
            (row, column)
            for row in range(top, min(top + block[0], rows))
            for column in range(left, min(left + block[1], columns))
        ]
        numbers = [values[place] for place in places]
        middle = sorted(numbers)[(len(numbers) - 1) // 2]
        numbers = [middle if place in keep else values[place] for place in places]
        low, high = min(numbers), max(numbers)
        if clip == "z":
            low, high = np.mean(numbers) - clip_at * np.std(numbers), np.mean(numbers) + clip_at * np.std(numbers)
        if clip == "percentile":
            cut = int((100 - clip_at) / 200 * len(numbers) + 1e-9)
            low, high = sorted(numbers)[cut], sorted(numbers)[-1 - cut]
        numbers = [min(max(number, low), high) for number in numbers]
        low, high = min(numbers), max(numbers)
        for place, number in zip(places, numbers, strict=True):
            share = (number - low) / (high - low) if high > low else 0.0
            new[place] = (
                values[place] if place in keep else low + round(share * (2**bits - 1)) * (high - low) / (2**bits - 1)
            )
    return torch.from_numpy(new).float()


@pytest.mark.parametrize("block", [(1, 8), (4, 4), (5, 7), (3, 100), (1000, 1000)])
@pytest.mark.parametrize(("clip", "clip_at"), [("none", 0.0), ("z", 1.5), ("percentile", 75.0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_those_of_each_block_and_what_is_kept_widens_none(
    bits: int, block: tuple[int, int], clip: Clip, clip_at: float
) -> None:
    matrix = randn(13, 22, seed=bits)
    matrix[4, 9] = 50.0
    keep = ((4, 9), (0, 0))
    found = rounded(matrix, bits, block, clip, clip_at, torch.tensor(keep))
    assert torch.allclose(found, by_hand(matrix, bits, block, clip, clip_at, keep), atol=1e-5)
    assert found[4, 9] == 50.0 and found[0, 0] == matrix[0, 0]
    unkept = rounded(matrix, bits, block, clip, clip_at)
    assert torch.allclose(unkept, by_hand(matrix, bits, block, clip, clip_at), atol=1e-4)
    wide = (found - matrix).abs().mean() < (unkept - matrix).abs().mean()
    assert bool(wide) or clip != "none", "an outlier that is held out leaves finer levels to the rest"


def test_a_block_has_no_more_levels_than_its_bits_name_and_no_error_beyond_half_a_step() -> None:
    matrix = randn(40, 24)
    found = rounded(matrix, 3, (20, 12))
    for rows, columns in itertools.product((slice(0, 20), slice(20, 40)), (slice(0, 12), slice(12, 24))):
        block, new = matrix[rows, columns], found[rows, columns]
        assert len(new.unique()) <= 8
        step = (block.max() - block.min()) / 7
        assert (new - block).abs().max() <= step / 2 + 1e-6
        assert new.min() == block.min() and new.max() == pytest.approx(float(block.max()))


def test_a_block_of_one_value_is_left_alone() -> None:
    assert torch.equal(rounded(torch.full((3, 5), 0.3), 4, (2, 2)), torch.full((3, 5), 0.3))


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    matrix = randn(700, 300)
    threads, found = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(rounded(matrix, 4, (1000, 1000), "z", 2.0).numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_named_matrices_are_rounded_and_strength_lies_between(name: str) -> None:
    sites = model_sites(tiny_model(name))
    expert = 2 if sites.experts_of(0) else None
    down = sites.mlp_part(0, "down", expert)
    op = Quantize(sites=(down, SITE, "lm_head.weight"), bits=3, block=(8, 6), keep=((down, 1, 2),))
    kept = {down: ((1, 2),)}

    def wished(base: Tensor, strength: float, site: str) -> Tensor:
        return base + strength * (by_hand(base, 3, (8, 6), keep=kept.get(site, ())) - base)

    expect_only(sites, op, {site: lambda base, s, site=site: wished(base, s, site) for site in op.sites})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox", "phi3", "mixtral"])
def test_at_full_strength_each_matrix_is_exactly_what_was_rounded_to(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype)
    sites, before = model_sites(model), bytes_of(model)
    matrices = [site for site in sites.weight_names() if len(sites.weight(site).shape) == 2]
    base = {site: sites.weight(site).read().clone() for site in matrices}
    keep = ((matrices[-1], 0, 1),)
    weights = WeightState(sites)
    weights.become(state_of(Quantize(sites=tuple(matrices), bits=4, block=(16, 16), keep=keep)))
    for site in matrices:
        held = torch.tensor([[0, 1]]) if site == matrices[-1] else None
        assert torch.equal(sites.weight(site).read(), rounded(base[site].float(), 4, (16, 16), keep=held).to(dtype)), (
            site
        )
    assert sites.weight(matrices[-1]).read()[0, 1] == base[matrices[-1]][0, 1]
    weights.become(())
    assert bytes_of(model) == before and weights.pristine_bytes == 0


def test_what_came_before_is_rounded_and_what_comes_after_is_not() -> None:
    sites = model_sites(tiny_model("llama"))
    base = sites.weight(SITE).read().clone()
    quantize = state_of(Quantize(sites=(SITE,), bits=4, block=(8, 8)))
    left, right = randn(base.shape[0], 1), randn(1, base.shape[1], seed=1)
    edit = state_of(LowRank(site=SITE, left=left, right=right))
    entry = state_of(Entries(site=SITE, indices=torch.tensor([[0, 0]]), values=torch.tensor([7.0])))
    weights = WeightState(sites)
    weights.become(edit + quantize)
    assert torch.allclose(sites.weight(SITE).read(), by_hand(base + left @ right, 4, (8, 8)), atol=1e-5)
    weights.become(edit + quantize + entry)  # on top of what stands there
    after = sites.weight(SITE).read().clone()
    assert after[0, 0] == 7.0
    weights.become(quantize + edit)
    assert torch.allclose(sites.weight(SITE).read(), by_hand(base, 4, (8, 8)) + left @ right, atol=1e-5)
    fresh = model_sites(tiny_model("llama"))
    WeightState(fresh).become(edit + quantize + entry)
    assert torch.equal(fresh.weight(SITE).read(), after)


@settings(max_examples=25, deadline=None)
@given(
    strengths=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=5),
    bits=st.sampled_from([3, 4, 8]),
    side=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_whatever_strengths_were_tried_before_the_state_is_that_of_a_fresh_model(
    strengths: list[float], bits: int, side: int, dtype: torch.dtype
) -> None:
    model, fresh = tiny_model("gpt2", dtype), tiny_model("gpt2", dtype)
    op = Quantize(sites=("layers.0.mlp.down.weight", "layers.2.attn.q.weight"), bits=bits, block=(side, side))
    weights = WeightState(model_sites(model))
    for strength in strengths:
        weights.become(state_of(op, strength=strength))
    WeightState(model_sites(fresh)).become(state_of(op, strength=strengths[-1]))
    assert bytes_of(model) == bytes_of(fresh)
    weights.become(())
    assert bytes_of(model) == bytes_of(tiny_model("gpt2", dtype))


def test_it_survives_being_saved_and_is_small(tmp_path: Path) -> None:
    sites = model_sites(tiny_model("llama"))
    names = tuple(site for site in sites.weight_names() if len(sites.weight(site).shape) == 2)
    op = Quantize(sites=names, bits=4, block=(64, 64), clip="z", clip_at=3.0, keep=((names[0], 1, 2),))
    saved = Adjustment(name="four bits", method="quantize", ops=(op, RoundActivations(site="embed", bits=8, keep=(2,))))
    saved.save(tmp_path)
    assert Adjustment.load(tmp_path) == saved and Adjustment.load(tmp_path).hash == saved.hash
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5000


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"block": (0, 4)}, "block"),
        ({"sites": ()}, "must not be empty"),
        ({"sites": (SITE, SITE)}, "twice"),
        ({"clip": "z"}, "above 0"),
        ({"clip": "percentile", "clip_at": 101.0}, "at most 100"),
        ({"clip_at": 3.0}, "needs clip"),
        ({"keep": (("embed.weight", 0, 0),)}, "embed.weight, which is not among the sites"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        op_from({"kind": "quantize", "sites": (SITE,), "bits": 4, "block": (8, 8)} | fields)


@pytest.mark.parametrize(
    ("op", "error", "says"),
    [
        (Quantize(sites=("final_norm.weight",), bits=4, block=(8, 8)), InvalidInput, "only matrices"),
        (Quantize(sites=("layers.9.mlp.up.weight",), bits=4, block=(8, 8)), UnknownSite, "layers.9"),
        (Quantize(sites=(SITE,), bits=4, block=(8, 8), keep=((SITE, 24, 0),)), InvalidInput, r"no entry \[24, 0\]"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(op: Quantize, error: type[Exception], says: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(error, match=says):
        WeightState(model_sites(model)).become(state_of(op))
    assert bytes_of(model) == bytes_of(tiny_model("llama"))


# ------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_activations_are_rounded_position_by_position_with_the_kept_entries_as_they_were(name: str) -> None:
    model = tiny_model(name)
    sites, tokens = model_sites(model), tiny_tokens()
    site, seen = "layers.1.mlp.neurons", {}
    activations = ActivationState(sites)
    before = logits_of(model, tokens)
    handle = sites.activation(site).on(lambda value: seen.__setitem__("before", value))
    logits_of(model, tokens)
    handle.remove()
    activations.become(state_of(RoundActivations(site=site, bits=4, keep=(3,))))
    handle = sites.activation(site).on(lambda value: seen.__setitem__("after", value))
    changed = logits_of(model, tokens)
    handle.remove()
    assert not torch.equal(changed, before)
    rows = seen["before"].reshape(-1, seen["before"].shape[-1])
    for row, new in zip(rows, seen["after"].reshape(rows.shape), strict=True):
        assert torch.allclose(new[None], by_hand(row[None], 4, (1, len(row)), keep=((0, 3),)), atol=1e-5)
        assert new[3] == row[3]
    activations.become(state_of(RoundActivations(site=site, bits=4), strength=0.0))
    assert activations.hooks == 0
    assert torch.equal(logits_of(model, tokens), before)


def test_a_rounded_activation_is_placed_and_refused_by_its_site() -> None:
    weights = WeightState(model_sites(tiny_model("llama")))
    one = state_of(RoundActivations(site="layers.1.mlp.neurons", bits=8))
    assert first_layer(weights, (), one) == 1
    assert first_layer(weights, (), state_of(RoundActivations(site="final.resid", bits=8))) == LAYERS
    with pytest.raises(InvalidInput, match="no entry 40"):
        ActivationState(weights.sites).become(
            state_of(RoundActivations(site="layers.1.mlp.neurons", bits=8, keep=(40,)))
        )
    assert Active(one[0].adjustment, 0.5).strength == 0.5
