"""Room for new neurons: which of a layer's are free to be replaced.

Owns the order in which they are taken: spare ones first, then the least used of the layer's own; and how a new neuron
is put in a layer that is gated, or not. Knows nothing of when it is open and of what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from liveweight.adjustments import ReplaceNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, Unsupported
from liveweight.settings import MethodSettings


def roomy_layer(
    engine: TransformersEngine,
    layers: Sequence[int],
    settings: MethodSettings,
    needs: int,
    planned: Mapping[int, int] | None = None,
) -> int:
    """The layer that the settings name; or the first of `layers` with `needs` spare neurons left, else the emptiest.

    `planned` are neurons, a layer, that will be taken besides those that are. Raises UnknownSite for a layer that is
    not there, Unsupported for one with experts.
    """
    if settings.layer is not None:
        engine.sites.check_layer(settings.layer)
        layer = settings.layer
    else:
        replaced = _taken(engine)
        taken = {each: len(replaced.get(each, ())) + (planned or {}).get(each, 0) for each in layers}
        roomy = [each for each in layers if taken[each] + needs <= engine.sites.spare_of(each)]
        layer = roomy[0] if roomy else min(layers, key=taken.__getitem__)
    if engine.sites.experts_of(layer):
        raise Unsupported(
            f"Layer {layer} has experts, and a new neuron needs a dense MLP.",
            hint="Choose another method, such as finetune.",
        )
    return layer


def free_neurons(engine: TransformersEngine, layer: int, usage: Tensor, count: int) -> tuple[int, ...]:
    """`count` neurons that no active change has taken: spare ones while there are any, then those of least usage.

    `usage` (neurons,) is what each of the layer's own usually contributes; super neurons, the most used ones, are never
    taken. Raises NoMendFound where more than half of the layer's own would be.
    """
    taken = _taken(engine).get(layer, set())
    own = engine.sites.neurons_of(layer)
    spare = range(own, own + engine.sites.spare_of(layer))
    free = [neuron for neuron in (*spare, *usage.argsort().tolist()) if neuron not in taken]
    if len(free) < count + own // 2:
        raise NoMendFound(
            f"More than half of the neurons of layer {layer} hold changes already.",
            hint="Undo some changes, name another layer, or give more spare_neurons.",
        )
    return tuple(sorted(free[:count]))


def new_neurons(
    engine: TransformersEngine, layer: int, usage: Tensor, gates: Tensor, ups: Tensor, opened: Tensor, writes: Tensor
) -> ReplaceNeurons:
    """Free neurons that write `writes` (n, width) where they are open. Raises as `free_neurons` does.

    `gates` and `ups` (n, width) are their rows, `opened` (n,) what the activation function gives where they are open.
    In a layer without gates the gate row is the one that reads, and `ups` is not needed.
    """
    count, gated = len(gates), engine.sites.gated
    return ReplaceNeurons(
        layer=layer,
        neurons=free_neurons(engine, layer, usage, count),
        gate=gates if gated else None,
        up=ups / opened[:, None] if gated else gates,
        down=(writes if gated else writes / opened[:, None]).T.contiguous(),
        bias=torch.zeros(count) if engine.sites.has_weight(f"layers.{layer}.mlp.up.bias") else None,
    )


def _taken(engine: TransformersEngine) -> dict[int, set[int]]:
    """Neurons that active changes have replaced, by layer."""
    taken: dict[int, set[int]] = {}
    for active in engine.state:
        for op in active.adjustment.ops:
            if isinstance(op, ReplaceNeurons):
                taken.setdefault(op.layer, set()).update(op.neurons)
    return taken
