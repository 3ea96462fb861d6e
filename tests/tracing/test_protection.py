"""No adjustment touches a super weight unseen, and what was spared leaves its bytes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import (
    Ablate,
    Active,
    Adjustment,
    Clamp,
    Dense,
    Entries,
    Gain,
    LowRank,
    Op,
    Quantize,
    ReplaceNeurons,
    ScaleNeurons,
    ScalePaths,
    Steer,
)
from liveweight.engines.transformers import TransformersEngine
from liveweight.tracing import SuperWeight, SuperWeights, protect, spare
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import NEURONS, WIDTH

LAYER, ROW, COLUMN = 1, 7, 19
SITE = f"layers.{LAYER}.mlp.down.weight"


def a_super_weight(engine: TransformersEngine) -> SuperWeights:
    value = float(engine.sites.weight(SITE).read()[ROW, COLUMN])
    weight = SuperWeight(
        layer=LAYER,
        row=ROW,
        column=COLUMN,
        value=value,
        activation=4.0,
        output=4.0 * value,
        perplexity_zeroed=900.0,
        perplexity=30.0,
        tokens_measured=100,
        confirmed=True,
    )
    harmless = weight.model_copy(update={"layer": 0, "confirmed": False})
    return SuperWeights(model_hash=engine.info.hash, prompt="", weights=(weight, harmless))


def adjustment(*ops: Op) -> Adjustment:
    return Adjustment(name="a change", method="test", ops=ops, note="a note")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return tiny_engine("llama", tmp_path_factory.mktemp("cache"))


def ones(count: int, value: float) -> torch.Tensor:
    return torch.full((count,), value)


def ops_that_touch() -> dict[str, tuple[Op, float]]:
    """An op of each kind that moves the super weight or its neuron, and by how much of its size."""
    left, right = torch.zeros(WIDTH, 1), torch.zeros(1, NEURONS)
    left[ROW], right[0, COLUMN] = 2.0, 0.5
    vector, direction = torch.zeros(NEURONS), torch.zeros(NEURONS)
    vector[COLUMN], direction[COLUMN], direction[3] = 2.0, 1.0, 1.0
    pair = (COLUMN, 3)
    return {
        "scaled column": (ScaleNeurons(layer=LAYER, neurons=pair, factors=ones(2, 0.5)), 0.5),
        "scaled row": (ScaleNeurons(layer=LAYER, neurons=pair, factors=ones(2, 1.25), side="read"), 0.25),
        "gain": (Gain(layer=LAYER, neurons=pair, gains=ones(2, 1.5), slopes=ones(2, 1.0)), 0.5),
        "slope": (Gain(layer=LAYER, neurons=pair, gains=ones(2, 1.0), slopes=ones(2, 1.2)), 0.2),
        "clamp": (Clamp(layer=LAYER, neurons=pair, values=ones(2, 1.0)), float("inf")),
        "path from it": (
            ScalePaths(layer=LAYER, neurons=pair, to_layer=2, to_neurons=(1, 2), factors=ones(2, 0.0)),
            1.0,
        ),
        "path into it": (
            ScalePaths(layer=0, neurons=(4, 5), to_layer=LAYER, to_neurons=pair, factors=ones(2, 0.0)),
            1.0,
        ),
        "entry": (Entries(site=SITE, indices=torch.tensor([[ROW, COLUMN], [0, 0]]), values=torch.zeros(2)), 1.0),
        "low rank": (LowRank(site=SITE, left=left, right=right), -1.0),
        "dense": (Dense(site=SITE, delta=left @ right), -1.0),
        "steer": (Steer(site=f"layers.{LAYER}.mlp.neurons", vector=vector, scale=3.0), 1.5),
        "quantize": (
            Quantize(sites=(SITE, "layers.0.mlp.up.weight"), bits=4, block=(8, 8), keep=((SITE, 0, 0),)),
            float("inf"),
        ),
        "ablate": (Ablate(site=f"layers.{LAYER}.mlp.neurons", direction=direction), 0.5),
    }


@pytest.mark.parametrize("name", ops_that_touch())
def test_every_kind_of_op_that_touches_a_super_weight_is_reported_and_can_be_spared(
    name: str, engine: TransformersEngine
) -> None:
    op, change = ops_that_touch()[name]
    found = a_super_weight(engine)
    if change < 0:  # an addition of 1, against the weight's own size
        change = 1.0 / abs(found.weights[0].value)
    harmless = ScaleNeurons(layer=0, neurons=(COLUMN,), factors=ones(1, 0.0))
    touches = protect(adjustment(harmless, op), found)
    assert [touch.weight for touch in touches] == [found.weights[0]]
    assert touches[0].change == pytest.approx(change, rel=1e-5)
    assert touches[0].ops == (1,)
    assert protect(adjustment(harmless, op), found, tolerance=change + 0.01 if change < 1e9 else change) == ()
    spared = spare(adjustment(harmless, op), found)
    assert protect(spared, found, tolerance=0.0) == ()
    assert spared.ops[0] == harmless
    assert (spared.name, spared.method, spared.note) == ("a change", "test", "a note")
    engine.check((Active(spared),))


def test_changes_that_leave_a_super_weight_alone_pass_and_come_back_as_they_were(engine: TransformersEngine) -> None:
    found = a_super_weight(engine)
    rest = torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(0))
    elsewhere = adjustment(
        ScaleNeurons(layer=LAYER, neurons=(COLUMN + 1,), factors=ones(1, 0.0)),
        ScaleNeurons(layer=0, neurons=(COLUMN,), factors=ones(1, 0.0)),
        LowRank(site="layers.2.mlp.down.weight", left=rest, right=torch.ones(2, NEURONS)),
        Steer(site="layers.1.resid", vector=torch.ones(WIDTH)),
        Entries(site=SITE, indices=torch.tensor([[ROW, COLUMN + 1]]), values=ones(1, 9.0)),
        Quantize(sites=(SITE,), bits=4, block=(8, 8), keep=((SITE, ROW, COLUMN),)),
        Quantize(sites=("layers.2.mlp.down.weight",), bits=4, block=(8, 8)),
        Entries(site="layers.1.mlp_norm.weight", indices=torch.tensor([[COLUMN]]), values=ones(1, 9.0)),
    )
    assert protect(elsewhere, found) == ()
    assert spare(elsewhere, found) == elsewhere
    assert spare(elsewhere, found).hash == elsewhere.hash


def test_an_adjustment_of_super_neurons_alone_is_left_with_nothing(engine: TransformersEngine) -> None:
    only = adjustment(Clamp(layer=LAYER, neurons=(COLUMN,), values=ones(1, 0.0)))
    assert spare(only, a_super_weight(engine)).ops == ()


def test_ops_that_undo_each_other_are_seen_as_what_they_do_together(engine: TransformersEngine) -> None:
    found = a_super_weight(engine)
    twice = ScaleNeurons(layer=LAYER, neurons=(COLUMN,), factors=ones(1, 2.0))
    half = ScaleNeurons(layer=LAYER, neurons=(COLUMN,), factors=ones(1, 0.5))
    assert protect(adjustment(twice, half), found) == ()
    assert protect(adjustment(twice, twice), found)[0].change == pytest.approx(3.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.floats(-1.0, 2.0))
def test_what_protect_says_is_what_the_weights_do_and_spared_edits_leave_the_bytes(
    engine: TransformersEngine, seed: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = a_super_weight(engine)
    some = torch.randperm(NEURONS, generator=generator)[:20].tolist()
    ops: list[Op] = [
        LowRank(
            site=SITE,
            left=torch.randn(WIDTH, 2, generator=generator),
            right=torch.randn(2, NEURONS, generator=generator),
        ),
        ScaleNeurons(layer=LAYER, neurons=tuple(some), factors=torch.rand(20, generator=generator)),
        Dense(site=SITE, delta=0.1 * torch.randn(WIDTH, NEURONS, generator=generator)),
        Entries(
            site=SITE,
            indices=torch.tensor([[ROW, column] for column in some[:8]]),
            values=torch.randn(8, generator=generator),
        ),
    ]
    order = torch.randperm(len(ops), generator=generator).tolist()[: 1 + seed % 4]
    proposed = adjustment(*(ops[place] for place in order))
    value = found.weights[0].value
    with engine.preview((Active(proposed),)):
        moved = float(engine.sites.weight(SITE).read()[ROW, COLUMN])
    expected = abs(moved - value) / abs(value)
    touches = protect(proposed, found, tolerance=1e-6)
    assert (touches[0].change if touches else 0.0) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with engine.preview((Active(spare(proposed, found), strength),)):
        column = engine.sites.weight(SITE).read()[:, COLUMN].clone()
    assert torch.equal(column, engine.sites.weight(SITE).read()[:, COLUMN])


def test_the_report_of_a_touch_names_the_weight(engine: TransformersEngine, tmp_path: Path) -> None:
    found = a_super_weight(engine)
    touch = protect(adjustment(ScaleNeurons(layer=LAYER, neurons=(COLUMN,), factors=ones(1, 0.0))), found)[0]
    assert touch.weight.site == SITE
    assert str(touch).startswith(f"layers.{LAYER}.mlp.down [{ROW}, {COLUMN}]")


def test_a_replaced_super_neuron_is_seen_and_spared(engine: TransformersEngine) -> None:
    weights = a_super_weight(engine)
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    op = ReplaceNeurons(layer=LAYER, neurons=(COLUMN, 3), gate=rows, up=rows + 1, down=(rows + 2).T.contiguous())
    assert [touch.weight.column for touch in protect(adjustment(op), weights)] == [COLUMN]
    (left,) = spare(adjustment(op), weights).ops
    assert isinstance(left, ReplaceNeurons)
    assert left.neurons == (3,)
    assert torch.equal(left.up, rows[1:] + 1)
    assert torch.equal(left.down, (rows[1:] + 2).T)
    assert protect(adjustment(left), weights) == ()


def test_of_a_quantisation_the_super_weight_is_held_out_and_the_rest_stays_as_proposed(
    engine: TransformersEngine,
) -> None:
    weights = a_super_weight(engine)
    proposed = adjustment(Quantize(sites=(SITE,), bits=3, block=(24, 40)))
    touch = protect(proposed, weights)[0]
    assert "would be rounded" in str(touch)
    spared = spare(proposed, weights)
    before = engine.sites.weight(SITE).read().clone()
    with engine.preview((Active(spared),)):
        after = engine.sites.weight(SITE).read().clone()
    assert after[ROW, COLUMN] == before[ROW, COLUMN]
    assert float((after != before).float().mean()) > 0.9
