"""Relevance patching's rules: a backward pass that follows what a model did and not what it might have done.

Owns the four rules, as hooks that leave every value as it is and change only what a gradient is handed on as:

    norms       x / |x| has the gradient of x / constant                       (Ali et al. 2022, LN-rule)
    activation  act(z) has the gradient of z · (act(z) / z held constant)       (Jafari et al. 2024, identity rule)
    halves      gate · up hands half of its gradient to each of the two        (Arras et al. 2019, half-rule)
    attention   the pattern is constant: only values hand a gradient on         (Ali et al. 2022, AH-rule)

With all of them a model without biases is linear in its parts along the run, and the relevances of everything that was
added to the stream sum to the margin. Source: Jafari et al. 2025, "RelP" (arXiv:2508.21258). Knows nothing of what is
made of the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from liveweight.errors import Unsupported
from liveweight.sites import ModelSites, WeightView
from liveweight.tracing.parts import in_value, ratio

Rule = Literal["norms", "activation", "halves", "attention"]
RELEVANCE: tuple[Rule, ...] = ("norms", "activation", "halves", "attention")


@contextmanager
def rules(sites: ModelSites, chosen: Collection[Rule] = RELEVANCE) -> Iterator[None]:
    """Inside the block, gradients of a forward pass follow the chosen rules; no value changes by a bit.

    Hooks of an active state come before these, so a steered or scaled activation is taken as it is. Raises Unsupported
    where a norm or the activation function is nothing that a rule is known for.
    """
    with ExitStack() as hooks:
        if "norms" in chosen:
            for module in _norms(sites):
                hooks.callback(module.register_forward_hook(_norm_rule(sites, module)).remove)
        for layer in range(sites.layers):
            if "activation" in chosen:
                hooks.callback(_activation(sites, layer).register_forward_hook(_activation_rule).remove)
            if "halves" in chosen and sites.gated:
                down = sites.activation(f"layers.{layer}.mlp.neurons").module
                hooks.callback(down.register_forward_pre_hook(_half_rule).remove)
            if "attention" in chosen:
                for module, mask in _without_pattern(sites, layer):
                    hooks.callback(module.register_forward_hook(_value_rule(mask)).remove)
        yield


# ------------------------------------------------------------------------------------------------------------ norms


def _norms(sites: ModelSites) -> list[nn.Module]:
    """Every norm of the stream. Those of queries and keys belong to the pattern, which the attention rule holds."""
    paths = [path for part, path in sites.map.norms.items() if not part.startswith("attn.")]
    return [block.get_submodule(path) for block in sites.blocks for path in paths] + [sites.final_norm]


def _norm_rule(sites: ModelSites, module: nn.Module) -> Any:
    kind = sites.map.norm_kind
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if epsilon is None or not isinstance(weight, Tensor):
        raise Unsupported(
            f"The norm {type(module).__name__} of this {sites.architecture} model has no epsilon or no weight.",
            hint="Relevance patching knows RMS norms and layer norms; use --by gradient.",
        )

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        given = args[0].float()
        centred = given - given.mean(-1, keepdim=True) if kind == "layer" else given
        with torch.no_grad():
            scale = weight.detach().float() + (1.0 if kind == "rms_plus_one" else 0.0)
            factor = scale * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon)
        return in_value(output, centred * factor)

    return after


# -------------------------------------------------------------------------------------------------------------- MLP


def _activation(sites: ModelSites, layer: int) -> nn.Module:
    found = sites.activation_function(layer)
    if found is None:
        raise Unsupported(
            f"In this {sites.architecture} model the activation function of layer {layer} is no module.",
            hint="Use --by gradient.",
        )
    return found


def _activation_rule(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return in_value(output, args[0] * ratio(output, args[0]))


def _half_rule(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Halve what the products of gate and up hand on, spare neurons' too: half of it goes to each factor."""
    return (in_value(args[0], 0.5 * args[0]), *args[1:])


# -------------------------------------------------------------------------------------------------------- attention


def _without_pattern(sites: ModelSites, layer: int) -> list[tuple[nn.Module, Tensor]]:
    """The modules that make queries or keys, each with 1 at the outputs that are values and 0 elsewhere.

    Whatever computes the attention, its pattern depends on the stream through queries and keys alone.
    """
    views = {part: sites.weight(f"layers.{layer}.attn.{part}.weight") for part in ("q", "k", "v")}
    found: dict[int, tuple[nn.Module, Tensor]] = {}
    for part in ("q", "k"):
        module = views[part].module
        if id(module) not in found:
            found[id(module)] = (module, _values_of(views[part], views["v"]))
    return list(found.values())


def _values_of(pattern: WeightView, values: WeightView) -> Tensor:
    parameter = pattern.parameter
    outputs = parameter.shape[1 if pattern.piece.transposed else 0]
    mask = torch.zeros(outputs, dtype=parameter.dtype, device=parameter.device)
    if values.module is pattern.module:
        mask[values.rows_of(torch.arange(outputs, device=parameter.device))] = 1.0
    return mask


def _value_rule(mask: Tensor) -> Any:
    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return in_value(output, output * mask)

    return after
