"""scale: what fired is turned down, or up.

Owns direct scaling by activity alone, without attribution, in two forms: *unit* scales what active neurons write,
*path* scales the weights between active neurons of one layer and of the next. Super neurons are left out. Its known
danger is unrelated damage: a neuron that fired need not have had to do with the answer. Knows nothing of that damage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liveweight.adjustments import Adjustment, ScaleNeurons, ScalePaths
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case
from liveweight.methods.select import flipped
from liveweight.methods.trials import contest, dense_layers, named, no_mend, outcome, scaling
from liveweight.settings import MethodSettings
from liveweight.tracing import Neuron, read_answer, super_neurons

_ACTIVE = 3.0  # times the root mean square of the layer's activations: this neuron fired,
_SHARE = 0.1  # and so did the most active ones of the layer, up to this share
_FIRST = 8  # neurons of the first trial


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Scale the neurons (or the paths between them) that fired: by 1 - η for bad and fix, by 1 + η for good.

    The most active ones come first; their number doubles until it works, and then η does, once. Raises NoMendFound
    when it does not with `settings.max_neurons` of them, Unsupported for layers of experts.
    """
    layers = dense_layers(engine, settings)
    active = fired(engine, case, layers)[: settings.max_neurons]
    before = outcome(engine, case)
    tried: list[str] = []
    for eta in (settings.eta, 2 * settings.eta):
        factor = 1.0 + eta if case.kind == "good" else 1.0 - eta
        count = min(_FIRST, len(active))
        while count:
            ops = _ops(active[:count], factor, settings)
            changed, what = sum(len(op.neurons) for op in ops), "paths" if settings.form == "path" else "neurons"
            tried.append(f"{changed} {what} by {factor:.2f}")
            found = Adjustment(
                name=named("scale", case), method="scale", ops=ops, note=f"{tried[-1]}, among those that fired most."
            )
            if ops and flipped(case, outcome(engine, case, found), before):
                return found
            count = 0 if count == len(active) else min(2 * count, len(active))
    raise no_mend("scale", case, tried or ["no neuron fired above the others"])


def _ops(neurons: Sequence[Neuron], factor: float, settings: MethodSettings) -> tuple[ScaleNeurons | ScalePaths, ...]:
    return paths(neurons, factor) if settings.form == "path" else scaling(neurons, factor)


def fired(engine: TransformersEngine, case: Case, layers: Sequence[int]) -> list[Neuron]:
    """The neurons that fired where the answer was decided, most active first relative to their layer.

    It was decided where the judged answer parts from the wished one; for a good one, at every token of it.
    """
    answer, against = contest(case)
    reading = read_answer(engine, case.contexts[0].prompt, answer)
    activations = reading.activations[:, -1:] if against else reading.activations  # (layers, P, neurons)
    strength = (activations / activations.square().mean(-1, keepdim=True).sqrt()).abs().amax(1)
    enough = strength.quantile(1.0 - _SHARE, dim=1, keepdim=True).clamp(max=_ACTIVE)
    strength = torch.where(strength >= enough, strength, 0.0)
    excluded = super_neurons(engine)
    order = strength.flatten().sort(descending=True, stable=True)
    found: list[Neuron] = []
    for place, value in zip(order.indices.tolist(), order.values.tolist(), strict=True):
        neuron = divmod(place, strength.shape[1])
        if not value > 0:
            break
        if neuron[0] in layers and neuron not in excluded:
            found.append(neuron)
    return found


def paths(neurons: Sequence[Neuron], factor: float) -> tuple[ScalePaths, ...]:
    """Every path from an active neuron to an active one of the next layer that has any, by one factor."""
    layers: dict[int, list[int]] = {}
    for layer, neuron in sorted(neurons):
        layers.setdefault(layer, []).append(neuron)
    found = []
    for layer, to_layer in zip(list(layers), list(layers)[1:], strict=False):
        pairs = [(a, b) for a in layers[layer] for b in layers[to_layer]]
        found.append(
            ScalePaths(
                layer=layer,
                neurons=tuple(a for a, _ in pairs),
                to_layer=to_layer,
                to_neurons=tuple(b for _, b in pairs),
                factors=torch.full((len(pairs),), factor),
            )
        )
    return tuple(found)
