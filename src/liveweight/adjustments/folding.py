"""Activation ops said as weight ops, where the two are the same function.

Owns the identities and their limits. A fold that is only nearly the same is no fold: None is then the answer. Some
folds depend on the weights that they fold into; they are exact on the weights as they are when `fold` is called.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from liveweight.adjustments.activations import STREAM
from liveweight.adjustments.adjustment import Adjustment
from liveweight.adjustments.ops import (
    Ablate,
    Affine,
    BiasRouter,
    Clamp,
    Codebook,
    Dense,
    Gain,
    LowRank,
    MixHeads,
    Op,
    RoundActivations,
    ScaleNeurons,
    Steer,
    WeightOp,
)
from liveweight.errors import InvalidInput, Unsupported
from liveweight.sites import ModelSites


def fold(op: Op, sites: ModelSites) -> tuple[WeightOp, ...] | None:
    """The weight ops that are the same function as `op` at every strength, or None where there are none.

    Raises UnknownSite or InvalidInput when the op does not fit this model.
    """
    if isinstance(op, WeightOp):
        return (op,)
    match op:
        case Gain():
            sites.check_neurons(op.layer, op.neurons, op.expert)
            if not bool((op.slopes == 1).all()):
                return None
            return (ScaleNeurons(layer=op.layer, neurons=op.neurons, factors=op.gains, expert=op.expert),)
        case MixHeads():
            return (_mixed_output(op, sites),)
        case Steer():
            return _constant(op, sites)
        case Ablate():
            return _orthogonal_writers(op, sites)
        case Affine():
            return _scaled_neurons(op, sites)
        case Clamp() | BiasRouter() | Codebook() | RoundActivations():
            return None
        case _:
            assert_never(op)


def folded(adjustment: Adjustment, sites: ModelSites) -> Adjustment:
    """The adjustment with every op said as weight ops.

    Raises InvalidInput where all of them are already, Unsupported naming the first that no weight can say.
    """
    if not adjustment.activation_ops:
        raise InvalidInput(
            f"{adjustment.name!r} changes weights only, so there is nothing to fold.", hint="Leave it as it is."
        )
    ops: list[Op] = []
    for number, op in enumerate(adjustment.ops):
        found = fold(op, sites)
        if found is None:
            raise Unsupported(
                f"Op {number} of {adjustment.name!r} ({op.kind}) cannot be said as weights: {_why_not(op, sites)}.",
                hint="Leave it acting while the model runs.",
                op=number,
                kind=op.kind,
            )
        ops += found
    note = f"{adjustment.note} Folded into weights.".strip()
    return Adjustment(name=adjustment.name, method=adjustment.method, ops=tuple(ops), note=note)


def _why_not(op: Op, sites: ModelSites) -> str:
    match op:
        case Gain():
            place = int((op.slopes != 1).nonzero()[0, 0])
            return (
                f"the slope of neuron {op.neurons[place]} in layer {op.layer} is {float(op.slopes[place]):g}, "
                "and only a slope of 1 is a scaled column"
            )
        case Steer() | Affine() if op.positions is not None or getattr(op, "when", "always") != "always":
            return "it acts at some tokens only, and weights act at all of them"
        case Steer():
            return f"this {sites.architecture} model has no bias behind {op.site} to hold a constant"
        case Ablate() if op.site == STREAM:
            return "its embeddings are its unembedding too, or there is a norm behind what writes into the stream"
        case _:
            return "what it does depends on the values that come by"


def _mixed_output(op: MixHeads, sites: ModelSites) -> WeightOp:
    """sum_i O_i (sum_j m_ij h_j) = sum_j (sum_i m_ij O_i) h_j, with O_i the columns of `o` that head i writes by."""
    sites.check_layer(op.layer)
    if len(op.matrix) != sites.heads:
        raise InvalidInput(
            f"The matrix mixes {len(op.matrix)} heads; layer {op.layer} has {sites.heads}.", hint="(heads, heads)."
        )
    site = f"layers.{op.layer}.attn.o.weight"
    columns = (
        sites.weight(site).read().float().cpu().reshape(-1, sites.heads, sites.head_dim)
    )  # (width, heads, head_dim)
    delta = torch.einsum("ij,wid->wjd", op.matrix - torch.eye(sites.heads), columns)
    return Dense(site=site, delta=delta.flatten(1))


def _scaled_neurons(op: Affine, sites: ModelSites) -> tuple[WeightOp, ...] | None:
    """Neurons that are scaled at every position, and not shifted, are scaled columns."""
    sites.activation(op.site)
    if not op.site.endswith(".mlp.neurons") or op.positions is not None or bool(op.shifts.any()):
        return None
    neurons = tuple(op.indices.tolist())
    return (ScaleNeurons(layer=int(op.site.split(".")[1]), neurons=neurons, factors=op.factors),)


def _constant(op: Steer, sites: ModelSites) -> tuple[WeightOp, ...] | None:
    """A constant added everywhere is a bias of the projection behind it, where the architecture has one."""
    point = sites.activation(op.site)
    if len(op.vector) != point.size:
        raise InvalidInput(f"The vector has {len(op.vector)} entries; {op.site} has {point.size}.", hint="Same model?")
    if op.when != "always" or op.positions is not None or not op.site.startswith("layers."):
        return None
    _, layer, part = op.site.split(".", 2)
    constant = op.scale * op.vector
    prefix = f"layers.{layer}"
    match part:
        case "resid" if sites.write_norm(int(layer)) is None:
            bias, delta = f"{prefix}.mlp.down.bias", constant
        case "mlp.neurons":
            bias, delta = f"{prefix}.mlp.down.bias", _read(f"{prefix}.mlp.down.weight", sites) @ constant
        case "attn.heads":
            bias, delta = f"{prefix}.attn.o.bias", _read(f"{prefix}.attn.o.weight", sites) @ constant
        case _:
            return None
    return (Dense(site=bias, delta=delta),) if sites.has_weight(bias) else None


def _orthogonal_writers(op: Ablate, sites: ModelSites) -> tuple[WeightOp, ...] | None:
    """W -= d dᵀW for everything that writes into the stream.

    Only the ablation of the whole stream is that: ablating one place leaves what earlier layers read as it was, and
    behind a norm after a projection orthogonality is lost. Tied embeddings are also the unembedding, which must stay.
    """
    if op.site != STREAM:
        point = sites.activation(op.site)
        if len(op.direction) != point.size:
            raise InvalidInput(f"The vector has {len(op.direction)} entries; {op.site} has {point.size}.")
        return None
    if len(op.direction) != sites.width:
        raise InvalidInput(f"The vector has {len(op.direction)} entries; the stream has {sites.width}.")
    if sites.tied or any(sites.write_norm(layer) is not None for layer in range(sites.layers)):
        return None
    direction = op.direction / op.direction.norm()
    folded: list[WeightOp] = []
    for site in ("embed.weight", "positions.weight"):
        if sites.has_weight(site):  # rows are what is written
            along = _read(site, sites) @ direction
            folded.append(LowRank(site=site, left=-along[:, None], right=direction[None]))
    for layer in range(sites.layers):
        writers = [f"layers.{layer}.attn.o"]
        writers += [
            sites.mlp_part(layer, "down", expert).removesuffix(".weight")
            for expert in range(sites.experts_of(layer)) or (None,)
        ]
        spare = f"layers.{layer}.mlp.spare.down"
        if sites.spare_of(layer) and bool(_read(f"{spare}.weight", sites).any()):  # free ones write nothing
            writers.append(spare)
        for writer in writers:
            along = direction @ _read(f"{writer}.weight", sites)
            folded.append(LowRank(site=f"{writer}.weight", left=-direction[:, None], right=along[None]))
            if sites.has_weight(f"{writer}.bias"):
                bias = _read(f"{writer}.bias", sites)
                folded.append(Dense(site=f"{writer}.bias", delta=-(bias @ direction) * direction))
    return tuple(folded)


def _read(site: str, sites: ModelSites) -> Tensor:
    return sites.weight(site).read().float().cpu()
