"""The ops that act while the model runs, as hooks on exactly the modules they concern.

Owns the hooks of one model: none at all while no activation op is active, so that an idle model runs at its own
speed. Knows absolute positions, so that decoding with a cache gives what decoding without one gives. Never changes a
tensor in place and never a weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from liveweight.adjustments.adjustment import State, effective
from liveweight.adjustments.contributions import toward
from liveweight.adjustments.experts import ExpertNeurons
from liveweight.adjustments.ops import (
    Ablate,
    ActivationOp,
    Affine,
    BiasRouter,
    Clamp,
    Codebook,
    Gain,
    MixHeads,
    RoundActivations,
    Steer,
)
from liveweight.adjustments.rounding import rounded_rows
from liveweight.errors import InvalidInput, Unsupported
from liveweight.sites import ActivationPoint, ModelSites

STREAM = "stream"  # the site of an Ablate that means every write into the residual stream


class _Here(threading.local):
    """What the forward pass that runs in this thread is about."""

    positions: Tensor | None = None  # (B or 1, T), absolute
    prompt: Tensor | None = None  # (B or 1, 1 or T), the prompt's length in tokens


@dataclass(frozen=True, eq=False)
class _Gains:
    """The gains and slopes of one layer's neurons, where several ops on one neuron multiply."""

    neurons: Tensor  # (n,)
    gains: Tensor  # (n,)
    slopes: Tensor  # (n,)


class ActivationState:
    """Holds one model's hooks to a state."""

    def __init__(self, sites: ModelSites) -> None:
        """No hooks yet."""
        self.sites = sites
        self._state: State = ()
        self._handles: list[RemovableHandle] = []
        self._here = _Here()

    @property
    def state(self) -> State:
        """The state that the hooks carry out."""
        return self._state

    @property
    def hooks(self) -> int:
        """How many hooks are registered."""
        return len(self._handles)

    def become(self, state: State) -> None:
        """Register the hooks of `state` and remove all others. All or nothing.

        Raises UnknownSite, InvalidInput or Unsupported when an op does not fit this model; the hooks are then as
        before.
        """
        register = self._registrations(state)
        handles: list[RemovableHandle] = []
        try:
            for each in register:
                handles.append(each())
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        old, self._handles, self._state = self._handles, handles, state
        for handle in old:
            handle.remove()

    def check(self, state: State) -> None:
        """Raises as `become` would, touching nothing."""
        self._registrations(state)

    @contextmanager
    def prompt(self, lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
        """Say where the prompt ends, for the forward passes inside the `with` block and in this thread.

        `lengths` in tokens: one for the batch, one a row, or (B or 1, T) one a position, for rows that are packed into
        one sequence. Steer with `when` other than always needs it: only the
        caller knows where the prompt ended.
        """
        before = self._here.prompt
        given = torch.as_tensor(lengths, dtype=torch.int64)
        self._here.prompt = given if given.dim() == 2 else given.reshape(-1, 1)
        try:
            yield
        finally:
            self._here.prompt = before

    # ------------------------------------------------------------------------------------------------- internal

    def _registrations(self, state: State) -> list[Callable[[], RemovableHandle]]:
        """What to register, in the ledger's order; every op is checked against the model here."""
        register: list[Callable[[], RemovableHandle]] = []
        gains: dict[int, dict[int, tuple[float, float]]] = {}
        experts: dict[int, ExpertNeurons] = {}
        positioned: set[int] = set()
        for active in effective(state):
            for op in active.adjustment.activation_ops:
                if isinstance(op, Gain):
                    _add_gains(op, active.strength, self.sites, gains, experts)
                elif isinstance(op, Clamp) and self._expert_of(op) is not None:
                    _of_layer(experts, op.layer, self.sites).clamp(op, active.strength)
                else:
                    register += self._point_hooks(op, active.strength, positioned)
        for layer, wished in gains.items():
            module = self.sites.activation_function(layer)
            if module is None:
                raise Unsupported(
                    f"In this {self.sites.architecture} model the activation function of layer {layer} is no module.",
                    hint="Use ScaleNeurons instead of Gain.",
                )
            register.append(_gain_hook(module, _joined(wished)))
        # Blocks hear of positions before anything inside them runs; what experts write comes before what is done to it.
        positions = [self._position_hook(layer) for layer in sorted(positioned)]
        return positions + [neurons.registration() for neurons in experts.values()] + register

    def _expert_of(self, op: Clamp | Gain) -> int | None:
        self.sites.check_neurons(op.layer, op.neurons, op.expert)
        return op.expert

    def _point_hooks(
        self, op: ActivationOp, strength: float, positioned: set[int]
    ) -> list[Callable[[], RemovableHandle]]:
        match op:
            case Steer():
                point = self._point(op.site, op.vector)
                if op.when != "always" or op.positions is not None:
                    positioned.add(_layer_of(op.site, self.sites))
                return [_on(point, self._steer(op, strength))]
            case Clamp():
                point = self.sites.activation(f"layers.{op.layer}.mlp.neurons")
                return [_on(point, _clamp(op, strength))]
            case Ablate():
                if op.site == STREAM:
                    return [
                        _on(self._fits(point, op.direction), _ablate(op, strength))
                        for point in self.sites.stream_writes()
                    ]
                return [_on(self._point(op.site, op.direction), _ablate(op, strength))]
            case MixHeads():
                self.sites.check_layer(op.layer)
                if len(op.matrix) != self.sites.heads:
                    raise InvalidInput(
                        f"The matrix mixes {len(op.matrix)} heads; layer {op.layer} has {self.sites.heads}.",
                        hint="It must be (heads, heads).",
                    )
                return [_on(self.sites.activation(f"layers.{op.layer}.attn.heads"), _mix(op, strength))]
            case BiasRouter():
                self.sites.check_layer(op.layer)
                point = self._point(f"layers.{op.layer}.mlp.router", op.bias)
                return [_on(point, lambda logits: _plus(logits, strength * op.bias))]
            case Codebook():
                return [_on(self._point(op.site, op.keys[0]), _looked_up(op, strength))]
            case Affine():
                point = self.sites.activation(op.site)
                if int(op.indices.max()) >= point.size:
                    raise InvalidInput(
                        f"{op.site} has no entry {int(op.indices.max())}.", hint=f"They are 0 to {point.size - 1}."
                    )
                if op.positions is not None:
                    positioned.add(_layer_of(op.site, self.sites))
                return [_on(point, self._affine(op, strength))]
            case RoundActivations():
                point = self.sites.activation(op.site)
                if op.keep and max(op.keep) >= point.size:
                    raise InvalidInput(
                        f"{op.site} has no entry {max(op.keep)}.", hint=f"They are 0 to {point.size - 1}."
                    )
                return [_on(point, _round(op, strength))]
            case Gain():
                raise AssertionError("gains are joined a layer before")
            case _:
                assert_never(op)

    def _point(self, site: str, vector: Tensor) -> ActivationPoint:
        return self._fits(self.sites.activation(site), vector)

    def _fits(self, point: ActivationPoint, vector: Tensor) -> ActivationPoint:
        if len(vector) != point.size:
            raise InvalidInput(
                f"The vector has {len(vector)} entries; {point.site} has {point.size}.",
                hint="Was it made for another model?",
            )
        return point

    def _steer(self, op: Steer, strength: float) -> Callable[[Tensor], Tensor]:
        vector = (strength * op.scale) * op.vector
        wished = None if op.positions is None else torch.tensor(op.positions, dtype=torch.int64)

        def change(values: Tensor) -> Tensor:
            if op.when == "always" and wished is None:
                return _plus(values, vector)
            positions, chosen = self._at(wished)
            if op.when != "always":
                prompt = self._here.prompt
                if prompt is None:
                    raise InvalidInput(
                        f"A steering of the {op.when} tokens is active, but it was not said where the prompt ends.",
                        hint="Run the model inside `with activations.prompt(length)`.",
                    )
                inside = positions < prompt.to(positions.device)
                chosen = chosen & (inside if op.when == "prompt" else ~inside)
            return _where(chosen, _plus(values, vector), values)

        return change

    def _affine(self, op: Affine, strength: float) -> Callable[[Tensor], Tensor]:
        factors, shifts = toward(op.factors, strength), strength * op.shifts
        wished = None if op.positions is None else torch.tensor(op.positions, dtype=torch.int64)

        def change(values: Tensor) -> Tensor:
            indices, times, plus = (part.to(values.device) for part in (op.indices, factors, shifts))
            new = values.index_copy(-1, indices, (values[..., indices].float() * times + plus).to(values.dtype))
            return new if wished is None else _where(self._at(wished)[1], new, values)

        return change

    def _at(self, wished: Tensor | None) -> tuple[Tensor, Tensor]:
        """The positions (B or 1, T) of this forward pass, and which of them are wished for; None is all."""
        positions = self._here.positions
        assert positions is not None  # the block's own hook has run
        if wished is None:
            return positions, torch.ones_like(positions, dtype=torch.bool)
        return positions, torch.isin(positions, wished.to(positions.device))

    def _position_hook(self, layer: int) -> Callable[[], RemovableHandle]:
        block = self.sites.blocks[layer]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._here.positions = _positions(args, kwargs, layer)

        # First of all, so that a steering of the block's own input already knows its positions.
        return lambda: block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


# ---------------------------------------------------------------------------------------------------- arithmetic


def _plus(values: Tensor, vector: Tensor) -> Tensor:
    return (values.float() + vector.to(values.device)).to(values.dtype)


def _where(chosen: Tensor, new: Tensor, values: Tensor) -> Tensor:
    """`new` at the chosen positions (B or 1, T), `values` elsewhere; both (…, size), tokens flattened or not."""
    rows = values.numel() // (values.shape[-1] * chosen.shape[-1])
    return torch.where(chosen.expand(rows, -1).reshape(*values.shape[:-1], 1), new, values)


def _clamp(op: Clamp, strength: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        neurons = torch.tensor(op.neurons, device=values.device)
        there = values[..., neurons].float()
        new = (1.0 - strength) * there + strength * op.values.to(values.device)
        return values.index_copy(-1, neurons, new.to(values.dtype))

    return change


def _ablate(op: Ablate, strength: float) -> Callable[[Tensor], Tensor]:
    direction = op.direction / op.direction.norm()

    def change(values: Tensor) -> Tensor:
        along = direction.to(values.device)
        wide = values.float()
        projected: Tensor = wide - strength * (wide @ along)[..., None] * along
        return projected.to(values.dtype)

    return change


def _mix(op: MixHeads, strength: float) -> Callable[[Tensor], Tensor]:
    heads = len(op.matrix)
    matrix = torch.eye(heads) + strength * (op.matrix - torch.eye(heads))

    def change(values: Tensor) -> Tensor:
        split = values.float().reshape(*values.shape[:-1], heads, -1)  # (…, heads, head_dim)
        mixed: Tensor = matrix.to(values.device) @ split
        return mixed.reshape(values.shape).to(values.dtype)

    return change


def _looked_up(op: Codebook, strength: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        keys, radii, entries = (part.to(values.device) for part in (op.keys, op.radii, op.entries))
        wide = values.float()
        # Not by the inner product: near a key, where it matters, that loses most of its digits.
        rows = wide.flatten(0, -2)  # (positions, size)
        distances = torch.cdist(rows, keys, compute_mode="donot_use_mm_for_euclid_dist")  # (positions, n)
        nearest = distances.masked_fill(distances > radii, float("inf")).min(-1)
        chosen = entries[nearest.indices].view_as(wide)
        inside = nearest.values.isfinite().view(*values.shape[:-1], 1)
        return torch.where(inside, (wide + strength * (chosen - wide)).to(values.dtype), values)

    return change


def _round(op: RoundActivations, strength: float) -> Callable[[Tensor], Tensor]:
    keep = torch.tensor(op.keep, dtype=torch.int64)

    def change(values: Tensor) -> Tensor:
        wide = values.float()
        new = rounded_rows(wide, op.bits, keep)
        return torch.where(new == wide, values, ((1.0 - strength) * wide + strength * new).to(values.dtype))

    return change


def _gain_hook(module: nn.Module, wished: _Gains) -> Callable[[], RemovableHandle]:
    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        neurons, gains, slopes = (part.to(output.device) for part in (wished.neurons, wished.gains, wished.slopes))
        return output.index_copy(-1, neurons, gained(module, args[0][..., neurons], gains, slopes))

    return lambda: module.register_forward_hook(after)


def gained(activation: nn.Module, values: Tensor, gains: Tensor, slopes: Tensor) -> Tensor:
    """Gain · act(slope·x) / slope of pre-activations (…, n), in their dtype."""
    wide = values.float()
    # `forward` itself, since the module's hooks are for the model's own calls.
    new: Tensor = gains * activation.forward(slopes * wide) / slopes
    return new.to(values.dtype)


# ------------------------------------------------------------------------------------------------------- helpers


def _on(point: ActivationPoint, change: Callable[[Tensor], Tensor]) -> Callable[[], RemovableHandle]:
    return lambda: point.on(change)


def _add_gains(
    op: Gain,
    strength: float,
    sites: ModelSites,
    dense: dict[int, dict[int, tuple[float, float]]],
    experts: dict[int, ExpertNeurons],
) -> None:
    sites.check_neurons(op.layer, op.neurons, op.expert)
    gains, slopes = toward(op.gains, strength), toward(op.slopes, strength)
    if not bool((slopes > 0).all()):
        raise InvalidInput(
            f"At the strength {strength} a slope of layer {op.layer} would not be above 0.", hint="Lower the strength."
        )
    if op.expert is not None:
        _of_layer(experts, op.layer, sites).gain(op, gains, slopes)
        return
    there = dense.setdefault(op.layer, {})
    for neuron, gain, slope in zip(op.neurons, gains.tolist(), slopes.tolist(), strict=True):
        before = there.get(neuron, (1.0, 1.0))
        there[neuron] = (before[0] * gain, before[1] * slope)


def _joined(wished: dict[int, tuple[float, float]]) -> _Gains:
    gains, slopes = zip(*wished.values(), strict=True)
    return _Gains(torch.tensor(list(wished)), torch.tensor(gains), torch.tensor(slopes))


def _of_layer(experts: dict[int, ExpertNeurons], layer: int, sites: ModelSites) -> ExpertNeurons:
    if layer not in experts:
        experts[layer] = ExpertNeurons(sites, layer)
    return experts[layer]


def _layer_of(site: str, sites: ModelSites) -> int:
    """The block whose call says the positions of a site."""
    if site == "embed":
        return 0
    if site == "final.resid":
        return sites.layers - 1
    return int(site.split(".")[1])


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> Tensor:
    """The absolute positions (B or 1, T) of a block's call, from what transformers passes to it."""
    given = kwargs.get("position_ids")
    if given is None:
        given = kwargs.get("cache_position")
    if isinstance(given, Tensor):
        return given if given.dim() == 2 else given[None]
    hidden = args[0] if args else kwargs["hidden_states"]
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    past = int(cache.get_seq_length(layer)) if cache is not None else 0
    return torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
