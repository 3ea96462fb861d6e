"""Products in half precision: linear layers in bfloat16, while all else of the model stays as it is.

Owns when that pays (a CPU that multiplies bfloat16 itself, a model in float32) and the rounded copies of the weights.
A search that takes many small steps is two to three times as fast this way, and what it finds is judged by the exact
model afterwards. Knows nothing of what is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NATIVE = ("avx512_bf16", "amx_bf16")


def half_products(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """A context in which the linear layers in `modules` multiply in bfloat16, with inputs and outputs in float32.

    It may be entered again and again; the rounded weights are those of the first use. Does nothing where it would not
    pay. Gradients flow to the inputs, not to the weights.
    """
    linears = [module for part in modules for module in part.modules() if isinstance(module, nn.Linear)]
    weights = [linear.weight for linear in linears]
    if not weights or not _pays(weights[0]):
        return nullcontext()
    return _HalfProducts(weights)


def _pays(weight: Tensor) -> bool:
    capabilities: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and any(capabilities().get(name) for name in _NATIVE)
    )


class _HalfProducts(TorchFunctionMode):
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, Tensor | None] = {id(weight): None for weight in weights}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.linear or kwargs or id(args[1]) not in self._known:
            return func(*args, **(kwargs or {}))
        values, weight, *bias = args
        half = self._known[id(weight)]
        if half is None:
            half = self._known[id(weight)] = weight.detach().to(torch.bfloat16)
        product = functional.linear(values.to(torch.bfloat16), half).to(values.dtype)
        return product + bias[0] if bias and bias[0] is not None else product
