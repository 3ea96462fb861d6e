"""Directions of the residual stream as distributions over tokens: softmax(U · norm(v)).

Owns this arithmetic, in bounded memory whatever the vocabulary, at little more than the cost of the product with U, the
unembedding; norm is the final norm without its bias (a logit lens on weights: Geva et al. 2022, Dar et al. 2023).
Always of the base's weights, whatever is active. Knows nothing of neurons, and nothing of texts.

The product is made in blocks of tokens. While a block is in the processor's cache, the running sums of its softmax are
taken (Milakov and Gimelshein 2018) and the largest logit of each small group of tokens; the likeliest tokens are then
looked for in the few groups that can hold them. Logits are in bits, so that exponentials are powers of two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.sites import Norm, Region

TOP = 8  # tokens of a distribution
_LOGITS = 64 * 1024 * 1024  # the most in memory at once, in numbers
_BLOCK = 4096  # tokens whose logits are made at once
_GROUP = 64  # tokens of which the largest logit is kept; divides _BLOCK


class Distributions(NamedTuple):
    """What n directions decode into, in float32 on the CPU."""

    ids: Tensor  # (n, TOP), the likeliest first; fewer where the vocabulary is smaller
    probabilities: Tensor  # (n, TOP)
    entropies: Tensor  # (n,), nats; the lower, the more a direction is about few tokens


def decode(engine: TransformersEngine, directions: Tensor) -> Distributions:
    """Directions (n, width) as distributions over tokens."""
    return _joined([part[0] for part in _pieces(engine, directions, both=False)])


def decode_both(engine: TransformersEngine, directions: Tensor) -> tuple[Distributions, Distributions]:
    """Directions (n, width), and their opposites, for the price of one product."""
    parts = _pieces(engine, directions, both=True)
    return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])


def rows_at_once(engine: TransformersEngine) -> int:
    """How many directions fit into memory together."""
    return max(1, _LOGITS // engine.sites.vocabulary)


def _pieces(engine: TransformersEngine, directions: Tensor, both: bool) -> list[list[Distributions]]:
    size = rows_at_once(engine)
    with engine.gate.step(), torch.inference_mode():
        return [_decoded(engine, piece, both) for piece in torch.split(directions.float(), size)]


def _joined(parts: list[Distributions]) -> Distributions:
    return Distributions(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _decoded(engine: TransformersEngine, directions: Tensor, both: bool) -> list[Distributions]:
    """Of the directions and, where `both`, of their opposites."""
    vectors, vocabulary = _normed(engine, directions), engine.sites.vocabulary
    blocks = -(-vocabulary // _BLOCK)
    logits = vectors.new_empty(blocks, len(vectors), min(_BLOCK, -(-vocabulary // _GROUP) * _GROUP))
    sums = [_Sums(len(vectors), logits) for _ in range(1 + both)]
    for number, block in enumerate(logits):
        start = number * _BLOCK
        rows = torch.arange(start, min(start + _BLOCK, vocabulary))
        part = engine.weights.base("lm_head.weight", Region("rows", rows)).float()
        real = block[:, : len(rows)]
        torch.mm(vectors, part.T, out=real)
        block[:, len(rows) :] = -math.inf
        sums[0].add(block, len(rows))
        if both:
            block.neg_()[:, len(rows) :] = -math.inf
            sums[1].add(block, len(rows))
    # With both, the opposites' logits are what memory holds in the end.
    return [each.distributions(logits, vocabulary, -1 if both and not n else 1) for n, each in enumerate(sums)]


def _normed(engine: TransformersEngine, directions: Tensor) -> Tensor:
    """What the unembedding reads of each direction (n, width) behind the final norm, times log2(e)."""
    kind = engine.sites.map.norm_kind
    final = Norm("final_norm.weight", kind == "rms_plus_one", kind == "layer")
    if final.centred:
        directions = directions - directions.mean(-1, keepdim=True)
    size = directions.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)  # a zero vector decodes into nothing
    return final.direction(directions / size, engine.weights.base(final.site).to(directions)) * math.log2(math.e)


class _Sums:
    """The softmax of n rows of logits in bits that come block by block."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._highest = like.new_full((rows,), -math.inf)
        self._sum = like.new_zeros(rows)  # Σ 2^(l - highest)
        self._moment = like.new_zeros(rows)  # Σ l 2^(l - highest)
        self._groups: list[Tensor] = []  # each block's (rows, groups): the largest logit of each group
        self._scratch = like.new_empty(like.shape[1:])

    def add(self, block: Tensor, size: int) -> None:
        """A block (rows, tokens) of which the first `size` tokens count; the others are -inf."""
        largest = block.view(len(block), -1, _GROUP).amax(-1)
        self._groups.append(largest)
        highest = torch.maximum(self._highest, largest.amax(1))
        fade = torch.exp2(self._highest - highest)
        real, powers = block[:, :size], self._scratch[:, :size]
        torch.sub(real, highest[:, None], out=powers).exp2_()
        self._sum.mul_(fade).add_(powers.sum(1))
        self._moment.mul_(fade).add_(torch.linalg.vecdot(powers, real))
        self._highest = highest

    def distributions(self, logits: Tensor, vocabulary: int, sign: int) -> Distributions:
        """The likeliest tokens, out of `sign` times the blocks (blocks, rows, tokens), and the entropies."""
        top = min(TOP, vocabulary)
        groups = torch.cat(self._groups, dim=1)  # (rows, groups)
        best = groups.topk(min(top, groups.shape[1]), dim=1).indices  # none of the top tokens is outside of these
        grouped = logits.view(*logits.shape[:2], -1, _GROUP)
        rows = torch.arange(len(best), device=best.device)[:, None]
        found = sign * grouped[best // grouped.shape[2], rows, best % grouped.shape[2]].flatten(1)
        ids = (best[:, :, None] * _GROUP + torch.arange(_GROUP, device=best.device)).flatten(1)
        values, places = found.masked_fill_(ids >= vocabulary, -math.inf).topk(top, dim=1)
        total = self._highest + self._sum.log2()  # log2 Σ 2^l
        entropies = (total - self._moment / self._sum) * math.log(2)
        probabilities = torch.exp2(values - total[:, None])
        return Distributions(ids.gather(1, places).cpu(), probabilities.cpu(), entropies.cpu())
