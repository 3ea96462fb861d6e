"""Inside the activation function: which neurons fired, and where their gain and slope would push an answer.

Owns reading the activation function's own input and output while an answer was produced, at the positions that it came
from. With out = g·act(βx)/β the margin's derivatives are, a unit of log g and of log β,

    ∂/∂log g = grad·out          ∂/∂log β = grad·g·(x·act'(βx) - act(βx)/β)

so that gains and slopes can be weighed against each other. The first is the neuron's push as `attribution.py` has it.
Nothing here writes. Knows nothing of what is then moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liveweight.adjustments import Gain, effective
from liveweight.adjustments.contributions import toward
from liveweight.engines.base import Objective
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import Unsupported
from liveweight.tracing.capture import require_dense


@dataclass(frozen=True, eq=False)
class Firing:
    """One answer's neurons, each (layers, neurons)."""

    fired: Tensor  # int64: at how many of the answer's positions the pre-activation was above 0
    gain_pushes: Tensor  # nats a unit of log gain
    slope_pushes: Tensor  # nats a unit of log slope


def read_firing(
    engine: TransformersEngine, prompt: Sequence[int], answer: Sequence[int], against: Sequence[int] = ()
) -> Firing:
    """Read every layer's activation function where the answer came from, under the present state.

    All arguments are token ids; the margin is `read_answer`'s. One forward and one backward pass. Raises Unsupported
    for experts, and where the activation function is no module.
    """
    require_dense(engine)
    sites = engine.sites
    rows = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> pre-activations and what came out, (1, T, neurons + spare)
    with engine.gate.step(), ExitStack() as hooks:
        functions = [_function(engine, layer) for layer in range(sites.layers)]

        def keep(layer: int) -> Any:
            def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                output.retain_grad()
                seen[layer] = (args[0].detach(), output)

            return after

        for layer, function in enumerate(functions):
            hooks.callback(function.register_forward_hook(keep(layer)).remove)  # behind the hooks of active gains
        engine.trace(prompt, ["embed"], Objective(tuple(answer), tuple(against)))
        fired, gained, sloped = [], [], []
        for layer, function in enumerate(functions):
            before, output = seen[layer]
            size = sites.neurons_of(layer)
            x, out = (each.detach()[0, rows, :size].float().cpu() for each in (before, output))
            gradient = torch.zeros_like(out) if output.grad is None else output.grad[0, rows, :size].float().cpu()
            gains, slopes = _gains_and_slopes(engine, layer)
            value, derivative = _with_derivative(function, slopes * x)
            fired.append((x > 0).sum(0))
            gained.append((gradient * out).sum(0))
            sloped.append((gradient * gains * (x * derivative - value / slopes)).sum(0))
    return Firing(torch.stack(fired), torch.stack(gained), torch.stack(sloped))


def _function(engine: TransformersEngine, layer: int) -> nn.Module:
    found = engine.sites.activation_function(layer)
    if found is None:
        raise Unsupported(
            f"In this {engine.sites.architecture} model the activation function of layer {layer} is no module.",
            hint="Use a method that changes weights, such as select.",
        )
    return found


def _gains_and_slopes(engine: TransformersEngine, layer: int) -> tuple[Tensor, Tensor]:
    """What is active on a layer's neurons now: (neurons,) each, 1 where nothing is."""
    gains, slopes = torch.ones(2, engine.sites.neurons_of(layer))
    for active in effective(engine.activations.state):
        for op in active.adjustment.activation_ops:
            if isinstance(op, Gain) and op.layer == layer:
                gains[list(op.neurons)] *= toward(op.gains, active.strength)
                slopes[list(op.neurons)] *= toward(op.slopes, active.strength)
    return gains, slopes


def _with_derivative(function: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z), elementwise."""
    with torch.enable_grad():
        wide = values.detach().requires_grad_()
        result = function.forward(wide)  # `forward` itself: the module's hooks are for the model's own calls
        (derivative,) = torch.autograd.grad(result.sum(), wide)
    return result.detach(), derivative
