"""What a weight op does to which region: coordinates checked against a model, and the arithmetic of each op.

Owns the translation of one op at one strength into contributions (site, region, function of the values there).
Knows nothing of pristine values, of order or of writing: `weights.py` runs contributions one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from liveweight.adjustments.ops import (
    Dense,
    Entries,
    LowRank,
    Quantize,
    ReplaceNeurons,
    ScaleHeads,
    ScaleNeurons,
    ScalePaths,
    WeightOp,
)
from liveweight.adjustments.rounding import rounded
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.sites import ModelSites, Region
from liveweight.sites.views import WHOLE, region

Reader = Callable[[str, Region], Tensor]  # the base's own values at a site's region, in float32 or wider
Change = Callable[[Tensor], Tensor]  # values of a region -> values of the same shape; may work on its argument
# Entries of a matrix at a time. Less than the 32,768 from which torch shares an elementwise step out among threads:
# what is added stays in the cache, and no step waits for a thread that another program keeps from running.
_BLOCK = 32_767


@dataclass(frozen=True, eq=False)
class Contribution:
    """One op's share at one weight site: `change` maps the values at `where` (in its own order) to new ones."""

    site: str
    where: Region
    change: Change


def contributions(op: WeightOp, strength: float, sites: ModelSites, base: Reader) -> Iterator[Contribution]:
    """The contributions of `op` at `strength`. `base` is asked only when a contribution is carried out.

    Raises UnknownSite for a site, layer, neuron, head or expert that the model lacks, InvalidInput for a shape that
    does not fit, Unsupported for what this architecture cannot express.
    """
    match op:
        case ScaleNeurons():
            yield from _scale_neurons(op, strength, sites)
        case ScalePaths():
            yield from _scale_paths(op, strength, sites, base)
        case ScaleHeads():
            sites.check_heads(op.layer, op.heads)
            columns = [head * sites.head_dim + place for head in op.heads for place in range(sites.head_dim)]
            factors = toward(op.factors, strength).repeat_interleave(sites.head_dim)
            yield Contribution(f"layers.{op.layer}.attn.o.weight", region("columns", columns), _times(factors))
        case LowRank():
            yield _low_rank(op, strength, sites)
        case Entries():
            yield _entries(op, strength, sites)
        case Dense():
            _need_shape(op.site, tuple(op.delta.shape), sites)
            yield Contribution(sites.canonical(op.site), WHOLE, _plus(op.delta, strength))
        case ReplaceNeurons():
            yield from _replace_neurons(op, strength, sites)
        case Quantize():
            yield from _quantize(op, strength, sites)
        case _:
            assert_never(op)


def toward(factors: Tensor, strength: float) -> Tensor:
    """1 + s(f - 1), written so that s = 1 gives exactly f and s = 0 exactly 1."""
    return ((1.0 - strength) + strength * factors.double()).float()


def _scale_neurons(op: ScaleNeurons, strength: float, sites: ModelSites) -> Iterator[Contribution]:
    sites.check_neurons(op.layer, op.neurons, op.expert)
    factors = toward(op.factors, strength)
    if op.side == "write":
        down = sites.mlp_part(op.layer, "down", op.expert)
        yield Contribution(down, region("columns", op.neurons), _times(factors))
        return
    if not sites.gated:
        raise Unsupported(
            f"The MLPs of this {sites.architecture} model have no gate, so neurons cannot be scaled on the read side.",
            hint="Use side='write'.",
        )
    up = sites.mlp_part(op.layer, "up", op.expert)
    yield Contribution(up, region("rows", op.neurons), _times(factors[:, None]))
    bias = up.removesuffix("weight") + "bias"
    if sites.has_weight(bias):
        yield Contribution(bias, region("rows", op.neurons), _times(factors))


def _scale_paths(op: ScalePaths, strength: float, sites: ModelSites, base: Reader) -> Iterator[Contribution]:
    sites.check_neurons(op.layer, op.neurons, op.expert)
    sites.check_neurons(op.to_layer, op.to_neurons, op.to_expert)
    readers = tuple(dict.fromkeys(op.to_neurons))
    writers = tuple(dict.fromkeys(op.neurons))
    down = sites.mlp_part(op.layer, "down", op.expert)
    norms = [norm for norm in (sites.write_norm(op.layer), sites.read_norm(op.to_layer)) if norm is not None]
    removed = (strength * (1.0 - op.factors.double())).tolist()
    paths: dict[int, list[tuple[int, float]]] = {reader: [] for reader in readers}
    for neuron, to_neuron, share in zip(op.neurons, op.to_neurons, removed, strict=True):
        paths[to_neuron].append((writers.index(neuron), share))

    def change(rows: Tensor) -> Tensor:  # (readers, width)
        seen = base(down, region("columns", writers)).double().T  # (writers, width)
        for norm in norms:
            seen = norm.direction(seen, base(norm.site, WHOLE).double())
        new = rows.clone()
        for place, reader in enumerate(readers):
            columns = seen[[writer for writer, _ in paths[reader]]].to(rows.device)
            shares = torch.tensor([share for _, share in paths[reader]], dtype=torch.float64, device=rows.device)
            row = rows[place].double()
            wished = shares * (columns @ row)  # how much of each r·v is to go
            gram = columns @ columns.T
            new[place] = (row - columns.T @ (torch.linalg.pinv(gram, hermitian=True) @ wished)).to(rows.dtype)
        return new

    for part in ("gate", "up") if sites.gated else ("up",):
        site = sites.mlp_part(op.to_layer, part, op.to_expert)
        yield Contribution(site, region("rows", readers), change)


def _low_rank(op: LowRank, strength: float, sites: ModelSites) -> Contribution:
    _need_shape(op.site, (op.left.shape[0], op.right.shape[1]), sites)

    def change(values: Tensor) -> Tensor:
        # One rank at a time: each step is a single rounding an entry, so that the sum is the same bits with any
        # number of threads, which a matrix product does not promise.
        left, right = op.left.to(values.device, values.dtype), op.right.to(values.device, values.dtype)
        at_once = max(1, _BLOCK // right.shape[1]) if values.device.type == "cpu" else len(left)
        for start in range(0, len(left), at_once):
            rows = left[start : start + at_once]
            total = rows[:, :1] * right[:1]
            for rank in range(1, left.shape[1]):
                total += rows[:, rank : rank + 1] * right[rank : rank + 1]
            values[start : start + at_once] += total.mul_(strength)
        return values

    return Contribution(sites.canonical(op.site), WHOLE, change)


def _entries(op: Entries, strength: float, sites: ModelSites) -> Contribution:
    shape = sites.weight(op.site).shape
    if op.indices.shape[1] != len(shape):
        raise InvalidInput(
            f"{op.site} has the shape {shape}, so its indices are (n, {len(shape)}), not {tuple(op.indices.shape)}.",
            hint="Give one number a dimension.",
        )
    beyond = (op.indices >= torch.tensor(shape)).any(dim=1)
    if bool(beyond.any()):
        first = op.indices[beyond][0].tolist()
        raise InvalidInput(f"{op.site} has no entry {first}.", hint=f"Its shape is {shape}.")
    flat = op.indices[:, 0] * shape[1] + op.indices[:, 1] if len(shape) == 2 else op.indices[:, 0]
    where = region("entries" if len(shape) == 2 else "rows", flat)

    def change(values: Tensor) -> Tensor:
        return (1.0 - strength) * values + strength * op.values.to(values.device, values.dtype)

    return Contribution(sites.canonical(op.site), where, change)


def _replace_neurons(op: ReplaceNeurons, strength: float, sites: ModelSites) -> Iterator[Contribution]:
    spare = sites.spare_of(op.layer) if op.expert is None else 0
    sites.check_neurons(op.layer, op.neurons, op.expert, spare)
    if op.up.shape[1] != sites.width:
        raise InvalidInput(
            f"The new neurons have up {tuple(op.up.shape)} and down {tuple(op.down.shape)}; this {sites.architecture} "
            f"model is {sites.width} wide.",
            hint="Was it made for another model? up and gate are (n, width), down is (width, n).",
        )
    if sites.gated and op.gate is None:
        raise InvalidInput(
            f"Neurons of this {sites.architecture} model have gates; the new ones of layer {op.layer} have none.",
            hint=f"Give a gate of the shape {tuple(op.up.shape)}.",
        )
    if not sites.gated and op.gate is not None:
        raise InvalidInput(
            f"Neurons of this {sites.architecture} model have no gates; the new ones of layer {op.layer} have a gate "
            f"of the shape {tuple(op.gate.shape)}.",
            hint="Leave the gate out.",
        )
    bias = sites.mlp_part(op.layer, "up", op.expert).removesuffix("weight") + "bias"
    if op.bias is not None and not sites.has_weight(bias):
        raise UnknownSite(
            f"There is no site {bias!r} in this {sites.architecture} model for the new neurons' biases "
            f"{tuple(op.bias.shape)}.",
            hint="Leave the bias out.",
        )
    own = sites.neurons_of(op.layer)
    for is_spare in (False, True):
        places = [place for place, neuron in enumerate(op.neurons) if (neuron >= own) == is_spare]
        if not places:
            continue
        numbers = region("rows", [op.neurons[place] - own * is_spare for place in places])

        def site(part: str, is_spare: bool = is_spare) -> str:
            found = sites.mlp_part(op.layer, part, op.expert)
            return found.replace(".mlp.", ".mlp.spare.") if is_spare else found

        if op.gate is not None:
            yield Contribution(site("gate"), numbers, _become(op.gate[places]))
        yield Contribution(site("up"), numbers, _become(op.up[places]))
        if op.bias is not None:
            yield Contribution(site("up").removesuffix("weight") + "bias", numbers, _become(op.bias[places]))
        columns = Region("columns", numbers.index)
        yield Contribution(site("down"), columns, _become(op.down[:, places], strength))


def _quantize(op: Quantize, strength: float, sites: ModelSites) -> Iterator[Contribution]:
    kept: dict[str, list[tuple[int, int]]] = {}
    for site, row, column in op.keep:
        shape = sites.weight(site).shape
        if len(shape) == 2 and (row >= shape[0] or column >= shape[1]):
            raise InvalidInput(f"{site} has no entry [{row}, {column}].", hint=f"Its shape is {shape}.")
        kept.setdefault(sites.canonical(site), []).append((row, column))
    for site in dict.fromkeys(sites.canonical(each) for each in op.sites):  # two names of one tensor: rounded once
        if len(sites.weight(site).shape) != 2:
            raise InvalidInput(
                f"{site} has the shape {sites.weight(site).shape}; only matrices are quantised.",
                hint="Leave biases and norms out.",
            )
        yield Contribution(
            site, WHOLE, _rounding(op, strength, torch.tensor(kept.get(site, []), dtype=torch.int64).view(-1, 2))
        )


def _rounding(op: Quantize, strength: float, keep: Tensor) -> Change:
    def change(values: Tensor) -> Tensor:
        new = rounded(values, op.bits, op.block, op.clip, op.clip_at, keep)
        places = keep.to(values.device).unbind(1)
        stays = values[places]
        # Not values + s·(new - values): at s = 1 that need not be exactly what was rounded to.
        mixed = values.mul_(1.0 - strength).add_(new.mul_(strength))
        mixed[places] = stays
        return mixed

    return change


def _need_shape(site: str, shape: tuple[int, ...], sites: ModelSites) -> None:
    found = sites.weight(site).shape
    if found != shape:
        raise InvalidInput(
            f"The op on {site} has the shape {shape}; the weight's is {found}.",
            hint="Was it made for another model? Weights are (out, in).",
        )


def _times(factors: Tensor) -> Change:
    return lambda values: values * factors.to(values.device, values.dtype)


def _become(new: Tensor, factor: float = 1.0) -> Change:
    return lambda values: factor * new.to(values.device, values.dtype)


def _plus(delta: Tensor, strength: float) -> Change:
    return lambda values: values.add_(strength * delta.to(values.device, values.dtype))
