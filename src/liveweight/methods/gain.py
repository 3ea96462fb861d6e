"""gain: the activation function itself, moved a little for the neurons that are to blame.

Owns the feedback loop on per-neuron gains and, where the settings ask for them, slopes: what pushed the judged answer
is turned down, what pushed the wished one is turned up, the question is run again, and the move is kept where it
helped. Gains fold exactly into columns of `down`; a slope does not. Knows nothing of how pushes are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Gain
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Context
from liveweight.methods.trials import (
    Outcome,
    chosen_contexts,
    contest,
    dense_layers,
    named,
    no_mend,
    outcome,
    works,
)
from liveweight.settings import MethodSettings
from liveweight.tracing import Firing, Neuron, read_firing, super_neurons

_READ = 2  # contexts whose pushes are added up
_MOVE = 0.15  # the largest move of a gain in the first round
_GROWTH = 1.5  # of the move, after a round that helped
_LARGEST_MOVE = 0.5
_SMALLEST_MOVE = 0.02
_BOUNDS = ((0.0, 3.0), (0.25, 4.0))  # that gains and slopes stay between
_ROUNDS = 8  # at most, each one forward and backward pass and one trial


Parameter = tuple[int, int, int]  # 0 for a gain and 1 for a slope, layer, neuron


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Gains (and slopes) of at most `settings.max_neurons` neurons under which the answer is mended, or at least gone.

    Where the wished answer does not come, an adjustment after which the judged one is gone is given, and its note says
    that it only removes. Raises NoMendFound when neither happens, Unsupported for layers of experts.
    """
    layers = dense_layers(engine, settings)
    contexts = chosen_contexts(case, settings)
    excluded = super_neurons(engine)  # before any preview: finding them is a preview of its own
    allowed = torch.zeros(engine.sites.layers, engine.sites.neurons, dtype=torch.bool)
    allowed[list(layers)] = True
    for layer, neuron in excluded:
        allowed[layer, neuron] = False
    before = outcome(engine, case)
    values: dict[Parameter, float] = {}
    score = _score(outcome(engine, case, None, contexts))
    removing: tuple[Adjustment, float] | None = None
    tried: list[str] = []
    move = _MOVE
    firing = _firing(engine, case, contexts, None)
    fired = firing.fired > 0  # the log: what fired while the judged answer was made
    for number in range(1, min(_ROUNDS, settings.max_steps) + 1):
        pushes = torch.stack([firing.gain_pushes, firing.slope_pushes][: 1 + settings.slopes])
        trial = _moved(values, torch.where(allowed, pushes, 0.0), move, settings.max_neurons, case.kind == "good")
        if not trial:
            break
        adjustment = _adjustment(case, trial, number, fired)
        found = outcome(engine, case, adjustment, contexts)
        tried.append(f"round {number}: {_counted(trial)} (log-probability {float(found.logprobs.mean()):.2f})")
        if case.kind == "good" or found.mends or found.removes:
            everywhere = outcome(engine, case, adjustment)
            if works(case, everywhere, before):
                return adjustment
            if everywhere.removes and case.kind == "fix" and (removing is None or _score(found) > removing[1]):
                removing = (adjustment, _score(found))
        if _score(found) > score:
            values, score = trial, _score(found)
            firing = _firing(engine, case, contexts, adjustment)
            move = min(_LARGEST_MOVE, _GROWTH * move)
        else:
            move /= 2  # too far: the same pushes, half the way
            if move < _SMALLEST_MOVE:
                break
    if removing is not None:
        note = f"{removing[0].note} It removes the judged answer only."
        return removing[0].model_copy(update={"note": note})
    raise no_mend("gain", case, tried or ["no neuron pushed the answer"])


def _score(found: Outcome) -> float:
    """What a kept move has to raise: the target's log-probability, mean over the contexts."""
    return float(found.logprobs.mean())


def _firing(engine: TransformersEngine, case: Case, contexts: Sequence[Context], trial: Adjustment | None) -> Firing:
    """Summed over the contexts, under `trial`."""
    answer, against = contest(case)
    extra = (Active(trial),) if trial is not None else ()
    with engine.preview((*engine.state, *extra)):
        each = [read_firing(engine, context.prompt, answer, against) for context in contexts[:_READ]]
    return Firing(
        fired=torch.stack([one.fired for one in each]).sum(0),
        gain_pushes=torch.stack([one.gain_pushes for one in each]).sum(0),
        slope_pushes=torch.stack([one.slope_pushes for one in each]).sum(0),
    )


def _moved(
    values: Mapping[Parameter, float], pushes: Tensor, move: float, most: int, upward: bool
) -> dict[Parameter, float]:
    """Gains and slopes moved against their pushes (with them, if `upward`), in proportion, the strongest by `move`.

    `pushes` are (kinds, layers, neurons). Neurons that were moved stay so; new ones join while there is room.
    """
    largest = float(pushes.abs().max())
    if not largest > 0:
        return {}
    found = dict(values)
    neurons = {parameter[1:] for parameter in values}
    for place in pushes.abs().flatten().sort(descending=True, stable=True).indices.tolist():
        row, neuron = divmod(place, pushes.shape[2])
        kind, layer = divmod(row, pushes.shape[1])
        push = float(pushes[kind, layer, neuron])
        if push == 0.0:
            break
        if (layer, neuron) not in neurons:
            if len(neurons) >= most:
                continue
            neurons.add((layer, neuron))
        step = move * push / largest
        low, high = _BOUNDS[kind]
        value = values.get((kind, layer, neuron), 1.0) * (1.0 + (step if upward else -step))
        found[kind, layer, neuron] = min(high, max(low, value))
    return found


def _counted(values: Mapping[Parameter, float]) -> str:
    """How many gains, and how many slopes where there are any."""
    gains, slopes = (sum(parameter[0] == kind for parameter in values) for kind in (0, 1))
    return f"{gains} gains" + (f" and {slopes} slopes" if slopes else "")


def _adjustment(case: Case, values: Mapping[Parameter, float], rounds: int, fired: Tensor) -> Adjustment:
    neurons: list[Neuron] = sorted({(layer, neuron) for _, layer, neuron in values})
    layers: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        layers.setdefault(layer, []).append(neuron)

    def of(kind: int, layer: int, own: Sequence[int]) -> Tensor:
        return torch.tensor([values.get((kind, layer, neuron), 1.0) for neuron in own])

    ops = tuple(
        Gain(layer=layer, neurons=tuple(own), gains=of(0, layer, own), slopes=of(1, layer, own))
        for layer, own in layers.items()
    )
    firing = sum(bool(fired[neuron]) for neuron in neurons)
    note = f"{_counted(values)} of {len(neurons)} neurons, {firing} of which fired; {rounds} rounds."
    return Adjustment(name=named("gain", case), method="gain", ops=ops, note=note)
