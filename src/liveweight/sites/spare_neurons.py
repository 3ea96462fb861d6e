"""Room for new neurons: zeros beyond a layer's own, which compute nothing until an op gives them something to do.

Every neuron of a trained model is used somewhere: on the embedded model, taking the eight least used ones of a late
layer away changes the greedy answers to 2.8 % of the guard's probes (one: 0.5 %). A spare neuron costs nothing to take.
The base is therefore the checkpoint with some spare neurons in a few late layers, where it is about to say something,
and in a few early ones, where it has just read what it is asked about; it says what the checkpoint says, since a neuron
whose weights are all zero adds zero.

Owns growing the MLPs of a model that was just loaded. The new neurons have sites of their own
(`layers.{l}.mlp.spare.up.weight`), and every other site stays what it is in the checkpoint, so that an op means the
same on every copy of it. Knows nothing of ops or of who uses the room.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liveweight.sites.model_sites import ADDED, ModelSites, model_sites
from liveweight.sites.views import WeightView

DEPTH = 0.77  # relative depth of the first layer with spare neurons: late enough to know what is about to be said
EARLY = 1 / 6  # of the first early layer that has some: a subject of several tokens has been put together there
SPREAD = 3  # late layers that have some, and early ones
SPARE = 256  # neurons of each


def patchable_layers(layers: int) -> range:
    """The late layers that get spare neurons in a model of so many: never the last one, where there are others."""
    return _layers_from(DEPTH, layers)


def subject_layers(layers: int) -> range:
    """The early layers that do: never the last one, where there are others."""
    return _layers_from(EARLY, layers)


def _layers_from(depth: float, layers: int) -> range:
    first = min(round(depth * layers), max(layers - 2, 0))
    return range(first, max(min(first + SPREAD, layers - 1), first + 1))


def with_spare_neurons(sites: ModelSites, count: int = SPARE) -> ModelSites:
    """The sites of the same model with `count` spare neurons in each early and late layer whose MLP is dense.

    The model's parameters there are new objects afterwards. A model is grown once: later calls change nothing.
    """
    wished = {*subject_layers(sites.layers), *patchable_layers(sites.layers)}
    layers = [layer for layer in sorted(wished) if not sites.experts_of(layer)]
    if count <= 0 or not layers or any(sites.spare_of(layer) for layer in layers):
        return sites
    with torch.no_grad():
        for layer in layers:
            for part in ("gate", "up") if sites.gated else ("up",):
                for kind in ("weight", "bias"):
                    site = f"layers.{layer}.mlp.{part}.{kind}"
                    if sites.has_weight(site):
                        _grow(sites.weight(site), count)
            _grow_inputs(sites.weight(f"layers.{layer}.mlp.down.weight"), count)
    setattr(sites.model, ADDED, dict.fromkeys(layers, count))
    return model_sites(sites.model)


def without_spare_neurons(sites: ModelSites) -> dict[str, Tensor]:
    """The model's tensors by name as its checkpoint has them: those of grown MLPs are cut back to their own neurons."""
    found = dict(sites.model.state_dict())
    for layer in range(sites.layers):
        if not sites.spare_of(layer):
            continue
        own = sites.neurons_of(layer)
        for part in ("gate", "up", "down") if sites.gated else ("up", "down"):
            for kind in ("weight", "bias") if part != "down" else ("weight",):
                site = f"layers.{layer}.mlp.{part}.{kind}"
                if sites.has_weight(site):
                    view = sites.weight(site)
                    found[view.parameter_name] = _cut_back(view, own).contiguous()
    return found


def _cut_back(view: WeightView, own: int) -> Tensor:
    """A grown parameter with its first `own` neurons only; of two halves, of each."""
    data, piece = view.parameter.detach(), view.piece
    dim = int((view.within or (0,))[0] != piece.transposed) if data.dim() == 2 else 0
    if piece.split != "halves":
        return data.narrow(dim, 0, own)
    return torch.cat((data.narrow(dim, 0, own), data.narrow(dim, data.shape[dim] // 2, own)), dim)


def _grow(view: WeightView, count: int) -> None:
    """More outputs. A piece that shares its parameter with another one grows where it ends in it."""
    data, dim = view.parameter.detach(), 1 if view.piece.transposed and view.parameter.dim() == 2 else 0
    size = data.shape[dim]
    # Of two halves the first grows first, so the second one still ends where the parameter does.
    end = size // 2 if view.piece.split == "halves" and view.piece.part == 0 else size
    _put(
        view,
        torch.cat((data.narrow(dim, 0, end), _zeros(data, dim, count), data.narrow(dim, end, size - end)), dim),
    )


def _grow_inputs(view: WeightView, count: int) -> None:
    data, dim = view.parameter.detach(), 0 if view.piece.transposed else 1
    _put(view, torch.cat((data, _zeros(data, dim, count)), dim))


def _zeros(data: Tensor, dim: int, count: int) -> Tensor:
    return data.new_zeros([count if each == dim else size for each, size in enumerate(data.shape)])


def _put(view: WeightView, data: Tensor) -> None:
    """Set the parameter and what its module says of its sizes."""
    module = view.module
    old = view.parameter
    setattr(module, view.piece.parameter, nn.Parameter(data.contiguous(), requires_grad=old.requires_grad))
    if view.piece.parameter != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = data.shape
    elif hasattr(module, "nf"):  # GPT-2's Conv1D, stored (in, out)
        module.nx, module.nf = data.shape  # type: ignore[assignment]
