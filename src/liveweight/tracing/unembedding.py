"""Directions of the residual stream as distributions over tokens: softmax(U · norm(v)).

Owns this arithmetic, in bounded memory whatever the vocabulary, at little more than the cost of the product with U, the
unembedding; norm is the final norm without its bias (a logit lens on weights: Geva et al. 2022, Dar et al. 2023).
Always of the base's weights, whatever is active. Knows nothing of neurons, and nothing of texts.

The product is made in blocks of tokens. While a block is in the processor's cache, the running sums of its softmax are
taken (Milakov and Gimelshein 2018) and the largest logit of each small group of tokens; the likeliest tokens are then
looked for in the few groups that can hold them. Logits are in bits, so that exponentials are powers of two.

A `Coarse` unembedding makes the product in whole numbers of 8 bits, several times as fast, and looks at the likeliest
tokens again exactly. What the rounding of both factors does to the others is measured in docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from liveweight.engines.transformers import TransformersEngine
from liveweight.sites import Norm, Region

TOP = 8  # tokens of a distribution
_LOGITS = 64 * 1024 * 1024  # the most in memory at once, in numbers
_BLOCK = 4096  # tokens whose logits are made at once
_GROUP = 64  # tokens of which the largest logit is kept; divides _BLOCK
_ROWS, _COLUMNS = 17, 8  # what a GPU multiplies in 8 bits: so many rows at least, a multiple of so many columns
_AGAIN = 2  # times TOP: the tokens that are looked at again behind a coarse product


class Distributions(NamedTuple):
    """What n directions decode into, in float32 on the CPU."""

    ids: Tensor  # (n, TOP), the likeliest first; fewer where the vocabulary is smaller
    probabilities: Tensor  # (n, TOP)
    entropies: Tensor  # (n,), nats; the lower, the more a direction is about few tokens


class Exact:
    """The base's unembedding, read as it is needed."""

    again = 1  # times TOP: how many tokens `settled` is given

    def __init__(self, engine: TransformersEngine) -> None:
        """Nothing is read yet."""
        self.engine = engine
        self._memory: dict[str, Tensor] = {}

    def memory(self, what: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape with whatever is in it: the memory of the last call for `what`, if that is enough.

        Fresh memory for every product costs as much as a quarter of it.
        """
        size = math.prod(shape)
        if what not in self._memory or len(self._memory[what]) < size:
            self._memory[what] = like.new_empty(size)
        return self._memory[what][:size].view(*shape)

    def product(self, vectors: Tensor) -> Callable[[int, int, Tensor], None]:
        """What writes the logits of vectors (n, width) for the tokens from `start` to `stop` into (n, stop - start)."""

        def write(start: int, stop: int, out: Tensor) -> None:
            torch.mm(vectors, self._rows(torch.arange(start, stop)).T, out=out)

        return write

    def settled(self, vectors: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """The exact logits (n, k) of some tokens (n, k), of which `logits` came out of `product`."""
        return logits

    def _rows(self, tokens: Tensor) -> Tensor:
        return self.engine.weights.base("lm_head.weight", Region("rows", tokens)).float()


class Coarse(Exact):
    """The same in whole numbers of 8 bits, a scale a row; as many bytes as it has numbers."""

    again = _AGAIN

    def __init__(self, engine: TransformersEngine) -> None:
        """Round all of it."""
        super().__init__(engine)
        parts = [
            _rounded(self._rows(torch.arange(start, min(start + _BLOCK, engine.sites.vocabulary))))
            for start in range(0, engine.sites.vocabulary, _BLOCK)
        ]
        # (vocabulary, and what makes it a multiple of _COLUMNS, width) int8
        self._whole = pad(torch.cat([whole for whole, _ in parts]), (0, 0, 0, -engine.sites.vocabulary % _COLUMNS))
        self._scales = torch.cat([scales for _, scales in parts])  # (vocabulary,)

    def product(self, vectors: Tensor) -> Callable[[int, int, Tensor], None]:
        """As `Exact.product`, rounded."""
        whole, scales = _rounded(vectors)
        whole = pad(whole, (0, 0, 0, max(0, _ROWS - len(whole))))

        def write(start: int, stop: int, out: Tensor) -> None:
            ahead = stop + (start - stop) % _COLUMNS
            found = torch._int_mm(whole, self._whole[start:ahead].T)  # (n or _ROWS, ahead - start) int32
            torch.mul(found[: len(scales), : stop - start], self._scales[start:stop], out=out).mul_(scales[:, None])

        return write

    def settled(self, vectors: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """As `Exact.settled`, from the unembedding itself."""
        rows = self._rows(ids.flatten()).view(*ids.shape, -1)  # (n, k, width)
        return torch.einsum("nkw,nw->nk", rows, vectors)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, width) as int8, and their scales (n,)."""
    scales = rows.abs().amax(1).clamp_min(1e-30) / 127
    return (rows / scales[:, None]).round_().to(torch.int8), scales


def decode(engine: TransformersEngine, directions: Tensor, by: Exact | None = None) -> Distributions:
    """Directions (n, width) as distributions over tokens; `by` is the unembedding, exact unless given."""
    return _joined([part[0] for part in _pieces(engine, directions, by, both=False)])


def decode_both(
    engine: TransformersEngine, directions: Tensor, by: Exact | None = None
) -> tuple[Distributions, Distributions]:
    """Directions (n, width), and their opposites, for the price of one product."""
    parts = _pieces(engine, directions, by, both=True)
    return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])


def rows_at_once(engine: TransformersEngine) -> int:
    """How many directions fit into memory together."""
    return max(1, _LOGITS // engine.sites.vocabulary)


def _pieces(engine: TransformersEngine, directions: Tensor, by: Exact | None, both: bool) -> list[list[Distributions]]:
    by, pieces = by or Exact(engine), max(1, -(-len(directions) // rows_at_once(engine)))
    with engine.gate.step(), torch.inference_mode():
        return [_decoded(by, _normed(engine, piece), both) for piece in directions.float().chunk(pieces)]


def _joined(parts: list[Distributions]) -> Distributions:
    return Distributions(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _decoded(by: Exact, vectors: Tensor, both: bool) -> list[Distributions]:
    """Of normed vectors and, where `both`, of their opposites."""
    vocabulary = by.engine.sites.vocabulary
    blocks = -(-vocabulary // _BLOCK)
    shape = (blocks, len(vectors), min(_BLOCK, -(-vocabulary // _GROUP) * _GROUP))
    logits = by.memory("logits", shape, vectors)
    sums = [_Sums(len(vectors), by.memory("powers", shape[1:], vectors)) for _ in range(1 + both)]
    write = by.product(vectors)
    for number, block in enumerate(logits):
        start = number * _BLOCK
        size = min(_BLOCK, vocabulary - start)
        write(start, start + size, block[:, :size])
        block[:, size:] = -math.inf
        sums[0].add(block, size)
        if both:
            block.neg_()[:, size:] = -math.inf
            sums[1].add(block, size)
    if not both:
        return [sums[0].distributions(by, vectors, logits)]
    # Memory holds the opposites' logits by now.
    return [sums[0].distributions(by, vectors, logits, opposite=True), sums[1].distributions(by, -vectors, logits)]


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

    def __init__(self, rows: int, scratch: Tensor) -> None:
        """`scratch` (rows, tokens of a block) is memory that is written over."""
        self._highest = scratch.new_full((rows,), -math.inf)
        self._sum = scratch.new_zeros(rows)  # Σ 2^(l - highest)
        self._moment = scratch.new_zeros(rows)  # Σ l 2^(l - highest)
        self._groups: list[Tensor] = []  # each block's (rows, groups): the largest logit of each group
        self._scratch = scratch

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

    def distributions(self, by: Exact, vectors: Tensor, logits: Tensor, opposite: bool = False) -> Distributions:
        """The likeliest tokens and the entropies; `logits` are all blocks (blocks, rows, tokens), or their opposite."""
        vocabulary = by.engine.sites.vocabulary
        top = min(TOP, vocabulary)
        some = min(by.again * TOP, vocabulary)
        groups = torch.cat(self._groups, dim=1)  # (rows, groups)
        best = groups.topk(min(some, groups.shape[1]), dim=1).indices  # none of the top tokens is outside of these
        grouped = logits.view(*logits.shape[:2], -1, _GROUP)
        rows = torch.arange(len(best), device=best.device)[:, None]
        found = grouped[best // grouped.shape[2], rows, best % grouped.shape[2]].flatten(1)
        ids = (best[:, :, None] * _GROUP + torch.arange(_GROUP, device=best.device)).flatten(1)
        found = (-found if opposite else found).masked_fill(ids >= vocabulary, -math.inf)
        values, places = found.topk(some, dim=1)
        ids = ids.gather(1, places)
        settled = by.settled(vectors, ids, values)
        old, new = (torch.exp2(each - self._highest[:, None]) for each in (values, settled))
        summed = self._sum + (new - old).sum(1)  # what a coarse product had wrong among the likeliest
        moment = self._moment + (new * settled - old * values).sum(1)
        values, places = settled.topk(top, dim=1)
        total = self._highest + summed.log2()  # log2 Σ 2^l
        entropies = (total - moment / summed) * math.log(2)
        probabilities = torch.exp2(values - total[:, None])
        return Distributions(ids.gather(1, places).cpu(), probabilities.cpu(), entropies.cpu())
