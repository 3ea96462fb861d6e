"""What an adjustment does to super weights, and the same adjustment without it.

Owns reading ops for their effect on one entry of a down weight, or on the neuron that it belongs to. Everything is
computed from the op's data and the weight's own value; no model is needed. Touching a super neuron's *rows* in part (a
low-rank change of gate or up) moves its activation a little and leaves the weight alone, so it does not count;
scaling, clamping or re-routing that neuron as a whole does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liveweight.adjustments import (
    Ablate,
    Adjustment,
    Affine,
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
from liveweight.tracing.super_weights import SuperWeight, SuperWeights

TOLERANCE = 0.01  # of the weight's own size


@dataclass(frozen=True)
class Touch:
    """An adjustment that moves a super weight, or what its neuron does, by `change` times its size."""

    weight: SuperWeight
    change: float  # relative; infinite where its neuron is held at a value of its own, or where it is rounded
    ops: tuple[int, ...]  # which ops of the adjustment do it

    def __str__(self) -> str:
        weight = self.weight
        place = f"layers.{weight.layer}.mlp.down [{weight.row}, {weight.column}]"
        if math.isinf(self.change):
            return f"{place}, a super weight, would be rounded, or its neuron held at another value"
        return f"{place}, a super weight, would move by {self.change:.1%} of its size"


def protect(adjustment: Adjustment, super_weights: SuperWeights, *, tolerance: float = TOLERANCE) -> tuple[Touch, ...]:
    """The super weights that an adjustment, at strength 1, would move by more than `tolerance` of their size."""
    touched = []
    for weight in super_weights.confirmed:
        factor, added, others, ops = 1.0, 0.0, 0.0, []
        for number, op in enumerate(adjustment.ops):
            times, plus, other = _effect(op, weight)
            if (times, plus, other) != (1.0, 0.0, 0.0):
                ops.append(number)
            factor, added, others = factor * times, added * times + plus, max(others, other)
        size = abs(weight.value) or 1e-30
        change = max(abs(factor - 1.0 + added / size * _sign(weight.value)), others)
        if change > tolerance:
            touched.append(Touch(weight, change, tuple(ops)))
    return tuple(touched)


def spare(adjustment: Adjustment, super_weights: SuperWeights) -> Adjustment:
    """The same adjustment, with the super neurons left out of it; the super weights keep every bit.

    Neurons are dropped from lists, and the columns of changes to down weights are made zero. The rest of a low-rank
    change is as it was, so one that relied on a super neuron's column does a little less. Of a quantisation only the
    super weights themselves are held out. An adjustment that does nothing to super neurons comes back equal.
    """
    ops: list[Op] = []
    for op in adjustment.ops:
        spared = _spared(op, super_weights)
        if spared is not None:
            ops.append(spared)
    return Adjustment(name=adjustment.name, method=adjustment.method, ops=tuple(ops), note=adjustment.note)


# ---------------------------------------------------------------------------------------------------------- an op


def _effect(op: Op, weight: SuperWeight) -> tuple[float, float, float]:
    """What one op does: (a factor on the weight, what it adds to it, the relative change of its neuron otherwise)."""
    layer, row, column = weight.layer, weight.row, weight.column
    match op:
        case ScaleNeurons() if op.expert is None and op.layer == layer and column in op.neurons:
            return float(op.factors[op.neurons.index(column)]), 0.0, 0.0  # either side is the same function
        case Gain() if op.expert is None and op.layer == layer and column in op.neurons:
            place = op.neurons.index(column)
            return float(op.gains[place]), 0.0, abs(float(op.slopes[place]) - 1.0)
        case Clamp() | ReplaceNeurons() if op.expert is None and op.layer == layer and column in op.neurons:
            return 1.0, 0.0, float("inf")
        case ScalePaths():
            named = [
                abs(float(factor) - 1.0)
                for neuron, to_neuron, factor in zip(op.neurons, op.to_neurons, op.factors, strict=True)
                if (op.layer, neuron) == (layer, column) or (op.to_layer, to_neuron) == (layer, column)
            ]
            return 1.0, 0.0, max(named, default=0.0)
        case Entries() if op.site == weight.site:
            here = (op.indices == torch.tensor([row, column])).all(1).nonzero()
            return (0.0, float(op.values[here[0, 0]]), 0.0) if len(here) else (1.0, 0.0, 0.0)
        case LowRank() if op.site == weight.site:
            return 1.0, float(op.left[row].double() @ op.right[:, column].double()), 0.0
        case Dense() if op.site == weight.site:
            return 1.0, float(op.delta[row, column]), 0.0
        case Quantize() if weight.site in op.sites and (weight.site, row, column) not in op.keep:
            return 1.0, 0.0, float("inf")  # how far it moves is for its block to say
        case Steer() if op.site == f"layers.{layer}.mlp.neurons":
            return 1.0, 0.0, abs(op.scale * float(op.vector[column])) / (abs(weight.activation) or 1e-30)
        case Ablate() if op.site == f"layers.{layer}.mlp.neurons":
            return 1.0, 0.0, float((op.direction[column] / op.direction.norm()) ** 2)
        case Affine() if op.site == f"layers.{layer}.mlp.neurons" and column in op.indices.tolist():
            place = op.indices.tolist().index(column)
            shift = abs(float(op.shifts[place])) / (abs(weight.activation) or 1e-30)
            return 1.0, 0.0, abs(float(op.factors[place]) - 1.0) + shift
        case _:
            return 1.0, 0.0, 0.0


def _spared(op: Op, super_weights: SuperWeights) -> Op | None:
    """The op without the super neurons; None where nothing of it is left."""
    neurons = super_weights.neurons
    match op:
        case ScaleNeurons() | Gain() | Clamp() if op.expert is None:
            return _without(op, [(op.layer, neuron) not in neurons for neuron in op.neurons])
        case ReplaceNeurons() if op.expert is None:
            return _without_replaced(op, [(op.layer, neuron) not in neurons for neuron in op.neurons])
        case ScalePaths():
            ends = zip(op.neurons, op.to_neurons, strict=True)
            return _without(op, [(op.layer, a) not in neurons and (op.to_layer, b) not in neurons for a, b in ends])
        case Entries():
            columns = _columns(op.site, super_weights)
            return _without(op, [int(index[-1]) not in columns for index in op.indices] if columns else [True])
        case Quantize():
            entries = [(weight.site, weight.row, weight.column) for weight in super_weights.confirmed]
            more = [entry for entry in entries if entry[0] in op.sites and entry not in op.keep]
            return _with(op, keep=(*op.keep, *more)) if more else op
        case LowRank():
            return _with(op, right=_zeroed(op.right, _columns(op.site, super_weights)))
        case Dense():
            return _with(op, delta=_zeroed(op.delta, _columns(op.site, super_weights)))
        case Steer():
            return _with(op, vector=_zeroed(op.vector, _columns(_weight_behind(op.site), super_weights)))
        case Affine():
            columns = _columns(_weight_behind(op.site), super_weights)
            keep = torch.tensor([index not in columns for index in op.indices.tolist()])
            if bool(keep.all()):
                return op
            return _with(op, **{name: v[keep] for name, v in op.tensors().items()}) if bool(keep.any()) else None
        case Ablate():
            direction = _zeroed(op.direction, _columns(_weight_behind(op.site), super_weights))
            return _with(op, direction=direction) if bool(direction.any()) else None
        case _:
            return op


def _without_replaced(op: ReplaceNeurons, keep: list[bool]) -> Op | None:
    """Replaced neurons without some of them: rows of what they read with, columns of what they write."""
    if all(keep) or not any(keep):
        return op if all(keep) else None
    chosen = torch.tensor(keep)
    update: dict[str, Any] = {
        name: value[:, chosen] if name == "down" else value[chosen] for name, value in op.tensors().items()
    }
    update["neurons"] = tuple(each for each, stays in zip(op.neurons, keep, strict=True) if stays)
    return _with(op, **update)


def _without(op: Op, keep: list[bool]) -> Op | None:
    """An op that is a list of things, each with its numbers, without some of them."""
    if all(keep):
        return op
    if not any(keep):
        return None
    update: dict[str, Any] = {name: value[torch.tensor(keep)] for name, value in op.tensors().items()}
    for name in type(op).model_fields:
        value = getattr(op, name)
        if isinstance(value, tuple):
            update[name] = tuple(each for each, stays in zip(value, keep, strict=True) if stays)
    return _with(op, **update)


def _with(op: Op, **update: Any) -> Op:
    """The op with other values, checked as any op is."""
    return type(op)(**({name: getattr(op, name) for name in type(op).model_fields} | update))


def _weight_behind(site: str) -> str:
    """The weight that reads an activation: `layers.3.mlp.neurons` is read by `layers.3.mlp.down.weight`."""
    return site.replace(".neurons", ".down.weight")


def _columns(site: str, super_weights: SuperWeights) -> list[int]:
    return sorted({weight.column for weight in super_weights.confirmed if weight.site == site})


def _zeroed(values: Tensor, columns: list[int]) -> Tensor:
    """The same (…, in) with zeros in some columns."""
    if not columns:
        return values
    copy = values.clone()
    copy[..., columns] = 0.0
    return copy


def _sign(value: float) -> float:
    return -1.0 if value < 0 else 1.0
