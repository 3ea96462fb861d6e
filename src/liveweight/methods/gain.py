"""gain: the activation function itself, moved a little for the neurons that are to blame.

Owns the feedback loop on per-neuron gains: what pushed the judged answer is turned down, what pushed the wished one
is turned up, the question is run again, and the move is kept where it helped. Gains fold exactly into columns of
`down`. Knows nothing of how pushes are measured.
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
from liveweight.tracing import Neuron, neuron_pushes, super_neurons

_READ = 2  # contexts whose pushes are added up
_MOVE = 0.15  # the largest move of a gain in the first round
_GROWTH = 1.5  # of the move, after a round that helped
_LARGEST_MOVE = 0.5
_SMALLEST_MOVE = 0.02
_LARGEST = 3.0  # gains stay between 0 and this
_ROUNDS = 8  # at most, each one forward and backward pass and one trial


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Gains of at most `settings.max_neurons` neurons under which the answer is mended, or at least gone.

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
    gains: dict[Neuron, float] = {}
    score = _score(outcome(engine, case, None, contexts))
    removing: tuple[Adjustment, float] | None = None
    tried: list[str] = []
    move = _MOVE
    pushes = _pushes(engine, case, contexts, None)
    for number in range(1, min(_ROUNDS, settings.max_steps) + 1):
        trial = _moved(gains, torch.where(allowed, pushes, 0.0), move, settings.max_neurons, case.kind == "good")
        if not trial:
            break
        adjustment = _adjustment(case, trial, number)
        found = outcome(engine, case, adjustment, contexts)
        tried.append(f"round {number}: {len(trial)} gains (log-probability {float(found.logprobs.mean()):.2f})")
        if case.kind == "good" or found.mends or found.removes:
            everywhere = outcome(engine, case, adjustment)
            if works(case, everywhere, before):
                return adjustment
            if everywhere.removes and case.kind == "fix" and (removing is None or _score(found) > removing[1]):
                removing = (adjustment, _score(found))
        if _score(found) > score:
            gains, score = trial, _score(found)
            pushes = _pushes(engine, case, contexts, adjustment)
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


def _pushes(engine: TransformersEngine, case: Case, contexts: Sequence[Context], trial: Adjustment | None) -> Tensor:
    """(layers, neurons), under `trial`."""
    answer, against = contest(case)
    extra = (Active(trial),) if trial is not None else ()
    with engine.preview((*engine.state, *extra)):
        each = [neuron_pushes(engine, context.prompt, answer, against) for context in contexts[:_READ]]
    return torch.stack(each).sum(0)


def _moved(gains: Mapping[Neuron, float], pushes: Tensor, move: float, most: int, upward: bool) -> dict[Neuron, float]:
    """Gains moved against the pushes (with them, if `upward`), in proportion, the strongest by `move`.

    Neurons that have a gain keep it; new ones join while there is room.
    """
    largest = float(pushes.abs().max())
    if not largest > 0:
        return {}
    found = dict(gains)
    for place in pushes.abs().flatten().sort(descending=True, stable=True).indices.tolist():
        neuron = divmod(place, pushes.shape[1])
        push = float(pushes[neuron])
        if push == 0.0:
            break
        if neuron not in found and len(found) >= most:
            continue
        if neuron not in found or neuron in gains:
            step = move * push / largest
            found[neuron] = min(_LARGEST, max(0.0, gains.get(neuron, 1.0) * (1.0 + (step if upward else -step))))
    return found


def _adjustment(case: Case, gains: Mapping[Neuron, float], rounds: int) -> Adjustment:
    layers: dict[int, list[int]] = {}
    for layer, neuron in sorted(gains):
        layers.setdefault(layer, []).append(neuron)
    ops = tuple(
        Gain(
            layer=layer,
            neurons=tuple(own),
            gains=torch.tensor([gains[layer, neuron] for neuron in own]),
            slopes=torch.ones(len(own)),
        )
        for layer, own in layers.items()
    )
    return Adjustment(
        name=named("gain", case), method="gain", ops=ops, note=f"The gains of {len(gains)} neurons, {rounds} rounds."
    )
