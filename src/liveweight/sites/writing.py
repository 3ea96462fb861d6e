"""The one write: values into part of a tensor, in place, on whatever device the tensor lies.

Owns the path from numbers to a running model's memory, the same on a CPU and on a GPU: indices and values go to where
the tensor is, in its type, and one indexed copy there writes them. The tensor keeps its identity and its address, so
that whatever holds it (a captured graph, a view, a tied embedding) sees the new values. Knows nothing of sites or ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from liveweight.sites.views import Region


def write(target: Tensor, where: Region, values: Tensor, *, head_rows: int = 0) -> None:
    """Write `values` to the region `where` of `target`, in place.

    `target` is (out, in) or (out,), or, where `head_rows` says how many rows a head has, (heads, head_rows, in) or
    (heads, head_rows); the region counts rows as (out, in) does. `values` are as `WeightView.gather` returns them.
    On a GPU the write waits for what runs there, and is done when this returns.
    """
    _settle(target)
    values = values.to(target.dtype).to(target.device)  # cast first: the narrower type is what travels
    index = None if where.index is None else where.index.to(target.device)
    columns = target.shape[-1]
    with torch.no_grad():
        if index is None:
            target.copy_(values.reshape(target.shape))
        elif where.kind == "columns":
            target[..., index] = values.reshape(*target.shape[:-1], len(index))
        elif where.kind == "entries" and target.dim() == (3 if head_rows else 2):
            target[(*_rows(index // columns, head_rows), index % columns)] = values
        else:
            target[_rows(index, head_rows)] = values
    _settle(target)


def _rows(rows: Tensor, head_rows: int) -> tuple[Tensor, ...]:
    return (rows // head_rows, rows % head_rows) if head_rows else (rows,)


def _settle(target: Tensor) -> None:
    """Wait for a GPU: another stream may still read what is about to change, or go on before it has."""
    if target.is_cuda:
        torch.cuda.synchronize(target.device)
