"""Rounding to the nearest of a few levels, block by block, as quantisation does.

Owns the arithmetic: a matrix is cut into blocks of so many rows and columns (what is left at an edge is a smaller
block), outliers of a block are clipped, and each block is rounded to 2^bits levels evenly spaced from its least to its
greatest value,

    step = (max - min) / (2^bits - 1)        w' = min + step · round((w - min) / step)

What is held out is replaced by its block's median first, so that it widens no step, and put back afterwards. Source: Yu
et al. 2024, "The Super Weight in Large Language Models" (arXiv:2411.07191): clip, round, restore. Knows
nothing of models. The same bits with any number of threads: sums are made in pieces that no thread divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Clip = Literal["none", "z", "percentile"]
_PIECE = 4096  # numbers of one sum: less than torch divides among threads


def rounded(
    values: Tensor,
    bits: int,
    block: tuple[int, int],
    clip: Clip = "none",
    clip_at: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """`values` (out, in) rounded; entries `keep` (n, 2) are held out and stay as they are.

    `clip` by z holds a block's values within `clip_at` standard deviations of its mean; by percentile to the range of
    its middle `clip_at` per cent. The levels span what is left.
    """
    held = torch.zeros(values.shape, dtype=torch.bool, device=values.device) if keep is not None and len(keep) else None
    if held is not None and keep is not None:
        held[keep[:, 0].to(values.device), keep[:, 1].to(values.device)] = True
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    for rows, height in _pieces(values.shape[0], block[0]):
        for columns, width in _pieces(values.shape[1], block[1]):
            out = None if held is None else _cut(held[rows, columns], height, width)
            blocks = _rounded(_cut(values[rows, columns], height, width), bits, clip, clip_at, out)
            result[rows, columns] = _joined(blocks, result[rows, columns].shape, height, width)
    return result if held is None else torch.where(held, values, result)


def rounded_rows(values: Tensor, bits: int, keep: Tensor | None = None) -> Tensor:
    """`values` (…, size) with each row a block of its own; entries `keep` (n,) of each row stay as they are."""
    rows = values.reshape(-1, values.shape[-1])
    held = None
    if keep is not None and len(keep):
        held = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        held[:, keep.to(rows.device)] = True
    new = _rounded(rows, bits, "none", 0.0, held)
    return (new if held is None else torch.where(held, rows, new)).view(values.shape)


def _pieces(length: int, size: int) -> Iterator[tuple[slice, int]]:
    """The whole blocks of a side, and the smaller one that is left."""
    whole = length // size * size
    if whole:
        yield slice(0, whole), size
    if length - whole:
        yield slice(whole, length), length - whole


def _cut(values: Tensor, height: int, width: int) -> Tensor:
    """(blocks, height·width), of a matrix that whole blocks make up."""
    rows, columns = values.shape
    cut = values.reshape(rows // height, height, columns // width, width)
    return cut.transpose(1, 2).reshape(-1, height * width)


def _joined(blocks: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
    """What `_cut` took apart."""
    rows, columns = shape
    return blocks.view(rows // height, columns // width, height, width).transpose(1, 2).reshape(rows, columns)


def _rounded(blocks: Tensor, bits: int, clip: Clip, clip_at: float, held: Tensor | None) -> Tensor:
    """Each row (blocks, n) rounded for itself; where `held`, by what the rest of the row needs."""
    if held is not None:
        some = held.any(1)
        middles = blocks.new_zeros(len(blocks))
        if bool(some.any()):
            middles[some] = blocks[some].median(1).values
        blocks = torch.where(held, middles[:, None], blocks)
    if clip != "none":
        low, high = _by_z(blocks, clip_at) if clip == "z" else _by_percentile(blocks, clip_at)
        blocks = torch.minimum(torch.maximum(blocks, low), high)
    least, greatest = torch.aminmax(blocks, dim=1, keepdim=True)
    # Halved first: the distance of two finite numbers need not be finite.
    step = (greatest / 2 - least / 2) * (2.0 / (2**bits - 1))
    levels = ((blocks - least) / torch.where(step > 0, step, 1.0)).round()
    return torch.minimum(levels * step + least, greatest)


def _by_z(blocks: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The bounds (blocks, 1) that lie `most` standard deviations from each row's mean."""
    count = blocks.shape[1]
    mean = _sums(blocks) / count
    deviation = (_sums((_wide(blocks) - mean) ** 2) / count).sqrt()
    return (mean - most * deviation).to(blocks.dtype), (mean + most * deviation).to(blocks.dtype)


def _by_percentile(blocks: Tensor, middle: float) -> tuple[Tensor, Tensor]:
    """The bounds (blocks, 1) of each row's middle per cent: its own values, by rank."""
    count = blocks.shape[1]
    cut = min(int((1.0 - middle / 100.0) / 2.0 * count), (count - 1) // 2)  # on each side
    low = blocks.kthvalue(cut + 1, dim=1, keepdim=True).values
    return low, blocks.kthvalue(count - cut, dim=1, keepdim=True).values


def _sums(blocks: Tensor) -> Tensor:
    """The sum (blocks, 1) of each row, in an order that does not depend on threads."""
    found = _wide(blocks)
    while found.shape[1] > _PIECE:
        pieces = -(-found.shape[1] // _PIECE)
        found = torch.nn.functional.pad(found, (0, pieces * _PIECE - found.shape[1]))
        found = found.view(len(found), pieces, _PIECE).sum(2)
    return found.sum(1, keepdim=True)


def _wide(blocks: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return blocks.float() if blocks.device.type == "mps" else blocks.double()
