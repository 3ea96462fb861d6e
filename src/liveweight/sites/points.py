"""An activation seen as one tensor (…, size), whatever a module takes or returns.

Owns getting and replacing that tensor in a module's inputs or outputs. Registers nothing by itself, except through
`on`, whose handle the caller removes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from liveweight.errors import Unsupported


@dataclass(frozen=True)
class ActivationPoint:
    """Where an activation can be read or replaced: the first input, or the (first) output, of a module.

    `router` marks a router, whose other outputs (the chosen experts and their shares) follow from the first, its
    logits; `renormalises` says whether the chosen shares are made to sum to one.
    """

    site: str
    module: nn.Module
    side: Literal["input", "output"]
    size: int
    router: bool = False
    renormalises: bool = False

    def of_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tensor among a call's arguments: the first positional, else `hidden_states`."""
        found = self._tensor(args[0] if args else kwargs.get("hidden_states"))
        return found if found.shape[-1] == self.size else found[..., : self.size]

    def with_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[Any, dict[str, Any]]:
        """The same call with another tensor; spare neurons, behind the layer's own, stay."""
        whole = self._tensor(args[0] if args else kwargs.get("hidden_states"))
        if whole.shape[-1] != self.size:
            value = torch.cat((value, whole[..., self.size :]), dim=-1)
        if args:
            return (value, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": value}

    def of_output(self, output: Any) -> Tensor:
        """The tensor in what the module returned: itself, or the first of a tuple."""
        return self._tensor(output[0] if isinstance(output, tuple | list) else output)

    def with_output(self, output: Any, value: Tensor) -> Any:
        """What the module returned, with another tensor; a router's choice is made anew from the new logits."""
        if self.router:
            return self._chosen(output, value)
        if isinstance(output, tuple | list):
            return (value, *output[1:])
        return value

    def on(self, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call `change` with the tensor at every forward; what it returns replaces the tensor, None leaves it."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            value = change(self.of_input(args, kwargs))
            return None if value is None else self.with_input(args, kwargs, value)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            value = change(self.of_output(output))
            return None if value is None else self.with_output(output, value)

        if self.side == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)

    def _chosen(self, output: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, shares, _ = output
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        top, chosen = torch.topk(probabilities, shares.shape[-1], dim=-1)
        if self.renormalises:
            top = top / top.sum(dim=-1, keepdim=True)
        return logits, top.to(shares.dtype), chosen

    def _tensor(self, found: Any) -> Tensor:
        if not isinstance(found, Tensor):
            raise Unsupported(
                f"The module at {self.site} carries a {type(found).__name__} where a tensor was expected.",
                hint="This transformers release lays the model out otherwise; use the pinned one.",
            )
        return found
