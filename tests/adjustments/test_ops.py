"""Ops are values: checked when made, equal by content, unknown keys refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from liveweight.adjustments import (
    Ablate,
    Clamp,
    Dense,
    Entries,
    Gain,
    LowRank,
    MixHeads,
    ScaleHeads,
    ScaleNeurons,
    ScalePaths,
    Steer,
    op_from,
)
from liveweight.errors import InvalidInput, LiveweightError

NEURONS = {"layer": 1, "neurons": (3, 5), "factors": [0.5, 2.0]}


def test_an_op_owns_its_numbers_as_float32_on_the_cpu() -> None:
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64)
    op = ScaleNeurons(layer=1, neurons=(3, 5), factors=factors)
    factors.zero_()
    assert op.factors.tolist() == [0.5, 2.0]
    assert op.factors.dtype == torch.float32 and op.factors.is_contiguous()
    strided = LowRank(site="embed.weight", left=torch.ones(2, 4).T, right=torch.ones(4, 2).T)
    assert strided.left.is_contiguous() and strided.right.is_contiguous()


def test_equality_and_hash_are_by_content() -> None:
    op, same = ScaleNeurons(**NEURONS), ScaleNeurons(**NEURONS)
    assert op == same and hash(op) == hash(same) and len({op, same}) == 1
    others = [
        ScaleNeurons(**NEURONS | {"layer": 2}),
        ScaleNeurons(**NEURONS | {"factors": [0.5, 2.000001]}),
        ScaleNeurons(**NEURONS | {"side": "read"}),
        ScaleNeurons(**NEURONS | {"expert": 0}),
        Clamp(layer=1, neurons=(3, 5), values=[0.5, 2.0]),
    ]
    assert len({op, *others}) == 1 + len(others)
    assert Steer(site="embed", vector=[0.0]) != Steer(site="embed", vector=[-0.0])


def test_an_op_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ScaleNeurons(**NEURONS).layer = 3  # type: ignore[misc]


def test_an_op_of_one_expanded_number_is_the_op_of_that_number() -> None:
    one = torch.tensor(2.0).expand(1)
    assert Clamp(layer=0, neurons=(1,), values=one) == Clamp(layer=0, neurons=(1,), values=torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (ScaleNeurons, NEURONS | {"strength": 1}, "strength"),
        (ScaleNeurons, NEURONS | {"layer": -1}, "layer"),
        (ScaleNeurons, NEURONS | {"layer": 1.5}, "layer"),
        (ScaleNeurons, NEURONS | {"side": "both"}, "side"),
        (ScaleNeurons, NEURONS | {"factors": [1.0]}, "equally long"),
        (ScaleNeurons, NEURONS | {"factors": [[0.5, 2.0]]}, "one dimension"),
        (ScaleNeurons, NEURONS | {"factors": [float("nan"), 1.0]}, "not finite"),
        (ScaleNeurons, NEURONS | {"factors": "many"}, "factors"),
        (ScaleNeurons, NEURONS | {"neurons": (3, 3)}, "twice"),
        (ScaleNeurons, {"layer": 1, "neurons": (), "factors": []}, "empty"),
        (ScalePaths, {"layer": 1, "neurons": (0,), "to_layer": 1, "to_neurons": (0,), "factors": [0.0]}, "after"),
        (ScalePaths, {"layer": 0, "neurons": (0, 0), "to_layer": 1, "to_neurons": (2, 2), "factors": [0, 1]}, "twice"),
        (ScaleHeads, {"layer": 0, "heads": (1, 1), "factors": [0, 0]}, "twice"),
        (LowRank, {"site": "x", "left": torch.ones(2, 3), "right": torch.ones(2, 2)}, "share r"),
        (LowRank, {"site": "x", "left": torch.ones(2, 0), "right": torch.ones(0, 2)}, "rank 0"),
        (Entries, {"site": "x", "indices": [[0, 0], [0, 0]], "values": [1, 2]}, "twice"),
        (Entries, {"site": "x", "indices": [[0, -1]], "values": [1]}, "negative"),
        (Entries, {"site": "x", "indices": [[0.5, 1.0]], "values": [1]}, "whole"),
        (Entries, {"site": "x", "indices": [[0, 1]], "values": [1, 2]}, "as many"),
        (Dense, {"site": "x", "delta": torch.ones(1, 1, 1)}, "delta"),
        (Steer, {"site": "x", "vector": [[1.0]]}, "vector"),
        (Steer, {"site": "x", "vector": [1.0], "scale": float("inf")}, "scale"),
        (Steer, {"site": "x", "vector": [1.0], "when": "sometimes"}, "when"),
        (Gain, {"layer": 0, "neurons": (1,), "gains": [1.0], "slopes": [0.0]}, "above 0"),
        (Ablate, {"site": "x", "direction": [0.0, 0.0]}, "zero"),
        (MixHeads, {"layer": 0, "matrix": torch.ones(2, 3)}, "heads, heads"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        kind(**fields)
    assert kind.__name__ in str(caught.value)
    assert isinstance(caught.value, LiveweightError)


def test_an_op_is_read_back_from_its_fields_by_its_kind() -> None:
    op = Entries(site="embed.weight", indices=[[1, 2]], values=[3.0])
    assert op_from(op.plain() | op.tensors()) == op
    with pytest.raises(InvalidInput, match="'teleport'"):
        op_from({"kind": "teleport"})
    with pytest.raises(InvalidInput, match="surprise"):
        op_from(op.plain() | op.tensors() | {"surprise": 1})
