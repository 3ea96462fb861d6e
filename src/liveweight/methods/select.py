"""select: the fewest neurons that flip the answer.

Owns the search over (count, factor) among the neurons that attribution ranks highest: those that pushed the judged
answer most over the wished one, super neurons left out. It takes the judged answer away (or, for a good one, makes it
surer); it does not teach another. Knows nothing of how pushes are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from liveweight.adjustments import Adjustment
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
    scaling,
    works,
)
from liveweight.settings import MethodSettings
from liveweight.tracing import Neuron, neuron_pushes, super_neurons

_READ = 3  # contexts whose pushes are added up
_FIRST = 4  # neurons of the first trial
_BISECTIONS = 3  # of the count, and of the factor
_REMOVING = (0.0, -1.0)  # silenced first, then turned round
_STRENGTHENING = (1.5, 2.5)


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Scale the write columns of the fewest neurons, as mildly as does it.

    Raises NoMendFound when no count up to `settings.max_neurons` flips the answer, Unsupported for layers of experts.
    """
    layers = dense_layers(engine, settings)
    contexts = chosen_contexts(case, settings)
    ranked = responsible(engine, case, contexts[:_READ], layers, settings.max_neurons)
    before = {among: outcome(engine, case, None, among) for among in {contexts, case.contexts}}
    tried: list[str] = []

    def flips(count: int, factor: float, among: tuple[Context, ...]) -> bool:
        trial = Adjustment(name="trial", method="select", ops=scaling(ranked[:count], factor))
        found = outcome(engine, case, trial, among)
        tried.append(f"{count} neurons by {factor:.2f}")
        return flipped(case, found, before[among])

    for factor in _STRENGTHENING if case.kind == "good" else _REMOVING:
        count = _fewest(len(ranked), lambda count, factor=factor: flips(count, factor, contexts))  # type: ignore[misc]
        if count is None:
            continue
        gentlest = mildest(factor, lambda factor, count=count: flips(count, factor, contexts))  # type: ignore[misc]
        for chosen in (gentlest, factor):
            if flips(count, chosen, case.contexts):
                return _proposal(case, ranked[:count], chosen)
    raise no_mend("select", case, tried or ["no neuron pushed the answer"])


def responsible(
    engine: TransformersEngine, case: Case, contexts: Sequence[Context], layers: Sequence[int], most: int
) -> list[Neuron]:
    """The neurons that pushed the judged answer, strongest first, summed over contexts; no super neurons."""
    answer, against = contest(case)
    excluded = super_neurons(engine)
    pushes = torch.stack([neuron_pushes(engine, context.prompt, answer, against) for context in contexts]).sum(0)
    order = pushes.flatten().sort(descending=True, stable=True)
    found: list[Neuron] = []
    for place, push in zip(order.indices.tolist(), order.values.tolist(), strict=True):
        neuron = divmod(place, pushes.shape[1])
        if push <= 0 or len(found) == most:
            break
        if neuron[0] in layers and neuron not in excluded:
            found.append(neuron)
    return found


def flipped(case: Case, found: Outcome, before: Outcome) -> bool:
    """Whether the judged answer is gone; for a good one, whether it is surer than `before`."""
    return works(case, found, before) if case.kind == "good" else found.removes


def _fewest(most: int, flips: Callable[[int], bool]) -> int | None:
    """The smallest count that flips: doubled until it does, then halved in between."""
    low, high = 0, min(_FIRST, most)
    while high and not flips(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    for _ in range(_BISECTIONS if high else 0):
        if high - low < 2:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if flips(middle) else (middle, high)
    return high or None


def mildest(factor: float, flips: Callable[[float], bool]) -> float:
    """The factor nearest to 1 that still flips, by bisection."""
    mild, strong = 1.0, factor
    for _ in range(_BISECTIONS):
        middle = (mild + strong) / 2
        mild, strong = (mild, middle) if flips(middle) else (middle, strong)
    return strong


def _proposal(case: Case, neurons: Sequence[Neuron], factor: float) -> Adjustment:
    what = "makes the answer surer" if case.kind == "good" else "removes the judged answer and does not teach another"
    return Adjustment(
        name=named("select", case),
        method="select",
        ops=scaling(neurons, factor),
        note=f"{len(neurons)} neurons by {factor:.2f}; it {what}.",
    )
