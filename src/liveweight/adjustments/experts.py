"""Clamps and gains of neurons that belong to an expert.

Owns one layer's worth of them. transformers runs all experts in one module over stacked weights, in one of several
ways, and shows no neuron's activation on the way. So the experts run as they are, and the difference that the ops
make, which is linear in the neurons' activations, is added to what the module returns: for the tokens that chose the
expert, and for the touched neurons only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from liveweight.adjustments.ops import Clamp, Gain
from liveweight.errors import Unsupported
from liveweight.sites import ModelSites

_Gained = tuple[Tensor, Tensor, Tensor]  # places among the expert's touched neurons, gains, slopes
_Clamped = tuple[Tensor, Tensor, float]  # places, values, strength


class _Expert:
    """The touched neurons of one expert, in order of first mention, and what is to become of them."""

    def __init__(self) -> None:
        self.neurons: dict[int, int] = {}  # neuron -> place
        self.gains: list[_Gained] = []
        self.clamps: list[_Clamped] = []

    def places(self, neurons: tuple[int, ...]) -> Tensor:
        return torch.tensor([self.neurons.setdefault(neuron, len(self.neurons)) for neuron in neurons])


class ExpertNeurons:
    """Collects the ops on one layer's experts, then registers one hook for all of them."""

    def __init__(self, sites: ModelSites, layer: int) -> None:
        """Raises Unsupported where the activation function is not a module."""
        self.sites = sites
        self.layer = layer
        self._experts: dict[int, _Expert] = {}
        activation = sites.activation_function(layer)
        if activation is None:
            raise Unsupported(
                f"The activation function of the experts in layer {layer} is not a module.", hint="Use ScaleNeurons."
            )
        self._activation = activation

    def clamp(self, op: Clamp, strength: float) -> None:
        """Add a clamp."""
        assert op.expert is not None
        expert = self._experts.setdefault(op.expert, _Expert())
        expert.clamps.append((expert.places(op.neurons), op.values, strength))

    def gain(self, op: Gain, gains: Tensor, slopes: Tensor) -> None:
        """Add a gain, `gains` and `slopes` being those at the wished strength."""
        assert op.expert is not None
        expert = self._experts.setdefault(op.expert, _Expert())
        expert.gains.append((expert.places(op.neurons), gains, slopes))

    def registration(self) -> Callable[[], RemovableHandle]:
        """Registers the hook when called."""
        module = self.sites.experts_module(self.layer)

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            tokens, chosen, shares = named["hidden_states"], named["top_k_index"], named["top_k_weights"]
            total = output.float()
            for number, expert in self._experts.items():
                rows, ranks = torch.where(chosen == number)
                if len(rows):
                    difference = self._difference(number, expert, tokens[rows]) * shares[rows, ranks, None].float()
                    total = total.index_add(0, rows, difference)
            return total.to(output.dtype)

        return lambda: module.register_forward_hook(after, with_kwargs=True)

    def _difference(self, number: int, expert: _Expert, tokens: Tensor) -> Tensor:
        """What the ops add to one expert's output for its tokens (n, width), before its share: (n, width)."""
        neurons = torch.tensor(list(expert.neurons), device=tokens.device)
        gate, up, down = (
            self.sites.weight(self.sites.mlp_part(self.layer, part, number)).read() for part in ("gate", "up", "down")
        )
        wide = tokens.float()
        read = wide @ gate[neurons].float().T  # (n, touched)
        factor = wide @ up[neurons].float().T
        plain = self._activation.forward(read) * factor
        gains, slopes = torch.ones_like(read[0]), torch.ones_like(read[0])
        for places, more_gain, more_slope in expert.gains:
            gains[places] *= more_gain.to(gains.device)
            slopes[places] *= more_slope.to(slopes.device)
        new = gains * self._activation.forward(slopes * read) / slopes * factor
        for places, values, strength in expert.clamps:
            new[:, places] = (1.0 - strength) * new[:, places] + strength * values.to(new.device)
        difference: Tensor = (new - plain) @ down[:, neurons].float().T
        return difference
