"""A weight seen as (out, in), wherever and however its model stores it, and regions of it.

Owns reading, and where a write goes; `writing.py` carries it out. Knows nothing of what the weight is for, nor of what
should be written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from liveweight.errors import InvalidInput, Unsupported
from liveweight.sites.architectures import Piece
from liveweight.sites.writing import write


@dataclass(frozen=True, eq=False)
class Region:
    """Part of a weight (out, in): all of it, some rows, some columns, or single entries.

    `index` is int64: row numbers, column numbers, or row·in + column. A vector (a bias, a norm) has rows only.
    """

    kind: Literal["whole", "rows", "columns", "entries"]
    index: Tensor | None = None

    def __or__(self, other: Region) -> Region:
        """The smallest region of these kinds that holds both; sorted. Mixed kinds make the whole."""
        if self.kind != other.kind or self.index is None or other.index is None:
            return WHOLE
        return Region(self.kind, torch.unique(torch.cat((self.index, other.index))))

    def places(self, within: Region) -> Tensor | None:
        """Where this region's rows, columns or entries lie in a tensor gathered from `within`; None for the whole."""
        if self.index is None or within.index is None:
            return self.index
        return torch.searchsorted(within.index, self.index)


WHOLE = Region("whole")


def region(kind: Literal["rows", "columns", "entries"], index: Tensor | tuple[int, ...] | list[int]) -> Region:
    """A region from numbers, in the caller's order."""
    return Region(kind, torch.as_tensor(index, dtype=torch.int64).clone())


@dataclass(frozen=True)
class WeightView:
    """One weight site: a parameter, or the part of one that plays this role.

    `parameter_name` is the parameter's name in the model; `piece` says which part of it; `expert` which slice of a
    stacked one. `sizes` are (heads, kv_heads, head_dim), for the splits that need them. `within` narrows (out, in)
    further, to (dimension, first, length): a grown MLP's own neurons, or its spare ones.
    """

    site: str
    module: nn.Module
    parameter_name: str
    piece: Piece
    sizes: tuple[int, int, int] = (1, 1, 1)
    expert: int | None = None
    within: tuple[int, int, int] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds this weight, perhaps among others."""
        found = getattr(self.module, self.piece.parameter)
        assert isinstance(found, nn.Parameter), self.parameter_name
        return found

    def native(self) -> Tensor:
        """A view on the parameter's own memory: (out, in) or (out,), with out as (heads, head_dim) if interleaved."""
        data = self.parameter.detach()
        if not data.is_floating_point():
            raise Unsupported(
                f"The weight {self.site} is stored as {data.dtype} and cannot be changed in place.",
                hint="Load the model in float32, bfloat16 or float16.",
            )
        if self.expert is not None:
            data = data[self.expert]
        if self.piece.transposed and data.dim() == 2:
            data = data.t()
        data = self._part(data)
        return data if self.within is None else data.narrow(*self.within)

    def _part(self, data: Tensor) -> Tensor:
        heads, kv_heads, head_dim = self.sizes
        match self.piece.split:
            case "whole":
                return data
            case "halves":
                half = data.shape[0] // 2
                return data.narrow(0, self.piece.part * half, half)
            case "qkv":
                sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
                return data.narrow(0, sum(sizes[: self.piece.part]), sizes[self.piece.part])
            case "interleaved":
                return data.view(heads, 3, head_dim, *data.shape[1:]).select(1, self.piece.part)

    def rows_of(self, data: Tensor) -> Tensor:
        """Of something laid out as the whole parameter's outputs, (out of all parts, …), this weight's own rows."""
        part = self._part(data)
        part = part.flatten(0, 1) if self.piece.split == "interleaved" else part
        return part.narrow(*self.within) if self.within is not None and self.within[0] == 0 else part

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (out,) of a vector."""
        native = self.native()
        return tuple(native.flatten(0, 1).shape) if self.piece.split == "interleaved" else tuple(native.shape)

    @property
    def key(self) -> tuple[int, int, tuple[int, ...]]:
        """Names the memory: two sites with one key are one tensor under two names (tied embeddings)."""
        native = self.native()
        return native.untyped_storage().data_ptr(), int(native.storage_offset()), tuple(native.stride())

    def read(self) -> Tensor:
        """The weight as (out, in) or (out,): a view wherever the layout allows one. Not for writing."""
        native = self.native()
        return native.flatten(0, 1) if self.piece.split == "interleaved" else native

    def gather(self, wanted: Region) -> Tensor:
        """A copy: (out, in) of the whole, (n, in) of rows, (out, n) of columns, (n,) of entries."""
        whole = self.read()
        if wanted.index is None:
            return whole.clone(memory_format=torch.contiguous_format)
        index = wanted.index.to(whole.device)
        match wanted.kind:
            case "columns":
                return whole.index_select(1, index).contiguous()
            case "entries" if whole.dim() == 2:
                return whole[index // whole.shape[1], index % whole.shape[1]]
            case _:
                return whole.index_select(0, index).contiguous()

    def write(self, value: Tensor, where: Region = WHOLE) -> None:
        """Write in place what `gather` of the same region returns the shape of; cast to the parameter's dtype.

        The parameter keeps its identity and its memory. Raises InvalidInput when the shape does not fit.
        """
        out_in = self.shape
        expected = _region_shape(out_in, where)
        if tuple(value.shape) != expected:
            raise InvalidInput(
                f"A value of shape {tuple(value.shape)} cannot be written to {self.site}, which needs {expected}.",
                hint="The shape must be that of the region.",
            )
        native = self.native()
        write(native, where, value, head_rows=native.shape[1] if self.piece.split == "interleaved" else 0)


def _region_shape(out_in: tuple[int, ...], where: Region) -> tuple[int, ...]:
    if where.index is None:
        return out_in
    count = len(where.index)
    match where.kind:
        case "columns":
            return (out_in[0], count)
        case "entries":
            return (count,)
        case _:
            return (count, *out_in[1:])
