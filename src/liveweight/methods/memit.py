"""memit: several facts at once, spread over several layers, beside what earlier changes wrote.

Owns the closed form Δ = R Kᵀ (λC + Kₚ Kₚᵀ + K Kᵀ)⁻¹ for a run of layers, after "Mass-Editing Memory in a Transformer"
(Meng et al. 2023): K are the facts' keys, R what their values still lack, divided among the layers that are left, Kₚ
the keys of earlier changes and protected answers, which then feel nothing. Each layer is solved with the ones before it
already changed. Knows nothing of whether the change is worth its damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Joint
from liveweight.methods.covariance import covariances, ridged, whitened
from liveweight.methods.keys import answer_keys, base_keys
from liveweight.methods.trials import dense_layers, named, no_mend, outcome, without_super_neurons, works
from liveweight.methods.values import Wished, wished_values
from liveweight.settings import MethodSettings

DEPTHS = (1 / 10, 1 / 6)  # the first and the last layer, by relative depth: where facts about a subject are gathered
RIDGE = 0.05  # of a key's own kᵀC⁻¹k: what λ takes off a fact that stands alone

# Keys (n, neurons) of the facts and (m, neurons) of what is to feel nothing, and C -> the right factor (n, neurons).
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A change of some `down` weights (width, neurons) that gives the targets.

    Raises NoMendFound when the layers together do not do it, Unsupported for layers of experts.
    """
    return one_fact("memit", engine, case, settings, solve)


def propose_all(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
    """The values for all the cases; what they need is solved for together. Raises Unsupported for layers of experts."""
    return together("memit", engine, cases, settings, solve)


def one_fact(method: str, engine: TransformersEngine, case: Case, settings: MethodSettings, solve: Solve) -> Adjustment:
    """As `propose`, for any closed form. Raises NoMendFound, Unsupported."""
    before = outcome(engine, case)
    found = together(method, engine, [case], settings, solve)([0])
    if not works(case, outcome(engine, case, found), before):
        layers = ", ".join(str(op.site.split(".")[1]) for op in found.ops if isinstance(op, LowRank))
        raise no_mend(method, case, [f"layers {layers}"])
    return found


def together(
    method: str, engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings, solve: Solve
) -> Joint:
    """The values for all the cases; a change has as high a rank a layer as it has cases.

    Whether each works is not looked at. Raises Unsupported for layers of experts.
    """
    layers, cases = edit_layers(engine, settings), list(cases)
    statistics = covariances(engine, layers, settings)
    wished = wished_values(engine, cases, layers[-1], settings)

    def change(numbers: Sequence[int]) -> Adjustment:
        return _solved(
            method,
            engine,
            [cases[number] for number in numbers],
            [wished[number] for number in numbers],
            statistics,
            solve,
        )

    return change


def _solved(
    method: str,
    engine: TransformersEngine,
    cases: Sequence[Case],
    wished: Sequence[Wished],
    statistics: Mapping[int, Tensor],
    solve: Solve,
) -> Adjustment:
    """One change for some cases and their values, spread over the layers that there are statistics of."""
    layers = sorted(statistics)
    last = layers[-1]
    start: Tensor | None = None
    delta = torch.stack([each.delta for each in wished])  # (n, width)
    previous = list(dict.fromkeys(answered for case in cases for answered in case.previous))
    others = [(each.prompt, each.target) for case in cases for each in case.others]
    ops: list[LowRank] = []
    for number, layer in enumerate(layers):
        trial = Adjustment(name=method, method=method, ops=tuple(ops)) if ops else None
        with engine.preview((*engine.state, *([Active(trial)] if trial else []))):
            keep = without_super_neurons(engine, layer).double()
            keys, stream = _seen(engine, wished, layer, last if len(layers) > 1 else None)
            keys = keys * keep
            kept = torch.cat((answer_keys(engine, others, layer, prompts=True), base_keys(engine, previous, layer)))
            kept = kept.double() * keep
        start = stream if start is None else start
        lacking = delta - (stream - start)
        right = solve(keys, kept, statistics[layer].to(keys.device, torch.float64)) * keep
        left = lacking / (len(layers) - number)
        ops.append(LowRank(site=f"layers.{layer}.mlp.down.weight", left=left.T.contiguous(), right=right))
    steps = sum(each.steps for each in wished)
    return Adjustment(
        name=named(method, cases[0]) if len(cases) == 1 else f"{method}: {len(cases)} facts",
        method=method,
        ops=tuple(ops),
        note=f"Rank {len(cases)} in layers {', '.join(map(str, layers))}, {steps} steps; {len(previous)} kept answers.",
    )


def solve(keys: Tensor, previous: Tensor, statistics: Tensor) -> Tensor:
    """Kᵀ (λC + Kₚ Kₚᵀ + K Kᵀ)⁻¹, (n, neurons) float64, with λ as a share of what the keys weigh under C."""
    weights = (keys.T * whitened(statistics, keys.T)).sum(0)  # kᵀC⁻¹k
    system = RIDGE * weights.median() * ridged(statistics) + previous.T @ previous
    return right_factor(keys, system)


def right_factor(keys: Tensor, system: Tensor) -> Tensor:
    """Kᵀ (A + K Kᵀ)⁻¹ = (I + Kᵀ A⁻¹ K)⁻¹ Kᵀ A⁻¹ for keys in rows (n, neurons) and A (neurons, neurons)."""
    solved = torch.cholesky_solve(keys.T, torch.linalg.cholesky(system)).T  # (n, neurons)
    own = keys @ solved.T + torch.eye(len(keys), device=keys.device, dtype=keys.dtype)
    factor: Tensor = torch.linalg.solve(own, solved)
    return factor


def edit_layers(engine: TransformersEngine, settings: MethodSettings) -> list[int]:
    """The layer that the settings name, or the dense ones between two relative depths.

    Never the model's last beside others, since what a fact still lacks is read behind the last one edited. One alone
    where a norm stands between what a layer writes and the stream: what is lacking is only known in the stream.
    """
    dense = dense_layers(engine, settings)
    if settings.layer is not None:
        return dense
    first, last = (round(depth * engine.sites.layers) for depth in DEPTHS)
    within = [layer for layer in dense if first <= layer <= min(last, engine.sites.layers - 2)]
    if within and any(engine.sites.write_norm(layer) is not None for layer in within):
        return within[-1:]
    return within or [min(dense, key=lambda layer: abs(layer - last))]


def _seen(engine: TransformersEngine, wished: Sequence[Wished], layer: int, last: int | None) -> tuple[Tensor, Tensor]:
    """Each fact's mean at its edit token, float64, under the weights of now.

    The activations of `layer`, (n, neurons), and the residual stream behind `last`, (n, width); zeros where there is
    no `last` to look at.
    """
    contexts = [(c, place) for each in wished for c, place in zip(each.contexts, each.places, strict=True)]
    rows, prompts = [c.prompt[: place + 1] for c, place in contexts], [len(c.prompt) for c, _ in contexts]
    behind = [] if last is None else [last + 1]
    starts = [len(row) - 1 for row in rows]
    replay = engine.record(rows, starts, layers=behind, neurons=[layer], final=False, prompts=prompts)
    keys = _mean_by_fact(replay.neurons[layer][:, 0], wished)
    if last is None:
        return keys, keys.new_zeros(len(wished), engine.sites.width)
    return keys, _mean_by_fact(replay.inputs[last + 1][:, 0], wished)


def _mean_by_fact(values: Tensor, wished: Sequence[Wished]) -> Tensor:
    parts = torch.split(values, [len(each.contexts) for each in wished])
    return torch.stack([part.double().mean(0) for part in parts])
