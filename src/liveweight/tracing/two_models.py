"""Two checkpoints of one shape, read site by site.

Owns whether two models can be compared, which of their weights to put side by side, and the difference as an
adjustment: what makes the first model's weights those of the second. Both are read as bases, whatever is active, one
site at a time. Knows nothing of what is told of a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, Dense, Entries, LowRank, Op
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported

FEW = 1 / 8  # of a weight's entries: up to here their places and values take less room than a whole weight of deltas
_BEYOND = 8  # singular vectors more than asked for, and
_PASSES = 4  # passes over the matrix, for the leading ones to be sharp: Halko, Martinsson and Tropp (2011)


class TwoModels:
    """The weights of `a`, and of `b`, a model of the same shape. Raises InvalidInput where it is of another one."""

    def __init__(self, a: TransformersEngine, b: TransformersEngine) -> None:
        """Compare names and shapes of all weights; nothing is read yet."""
        self.a, self.b = a, b
        one, two = a.sites, b.sites
        for what in ("architecture", "layers", "width", "neurons", "heads", "experts", "vocabulary"):
            if getattr(one, what) != getattr(two, what):
                raise self._unlike(what, getattr(one, what), getattr(two, what))
        # A tied unembedding is the embedding under another name; where one of the two has its own, it counts.
        twice = {"lm_head.weight"} if one.tied and two.tied else set()
        shapes = [
            {name: sites.weight(name).shape for name in sites.weight_names() if ".mlp.spare." not in name}
            for sites in (one, two)
        ]
        for site in sorted(shapes[0].keys() | shapes[1].keys()):
            if shapes[0].get(site) != shapes[1].get(site):
                raise self._unlike(site, shapes[0].get(site, "missing"), shapes[1].get(site, "missing"))
        self.sites = [site for site in shapes[0] if site not in twice]
        """The weights to compare, in the model's order; no memory twice."""

    def both(self, site: str) -> tuple[Tensor, Tensor]:
        """Copies of a weight in the first and in the second model: (out, in) or (out,), in float32 on the CPU."""
        pair = []
        for engine in (self.a, self.b):
            with engine.gate.step():
                pair.append(engine.weights.base(site).cpu())
        return pair[0], pair[1]

    def adjustment(self, changed: list[str], name: str, *, rank: int | None = None) -> Adjustment:
        """What makes the first model's `changed` weights the second's.

        Exactly, to the last bit in float32 but for the sign of a zero: deltas are added (`Dense`) wherever float
        addition gives the second's bits, single entries are set (`Entries`) where it does not, and where few have
        changed. With a `rank` matrices get the nearest change of that rank (`LowRank`) instead, which is less.
        Raises InvalidInput where nothing differs or a rank is below 1, Unsupported where the first model's embedding is
        its unembedding and the second's is not.
        """
        if not changed:
            raise InvalidInput("The two models are the same, so there is no difference to make.", hint="Another one?")
        if rank is not None and rank < 1:
            raise InvalidInput(f"A change of rank {rank} is none.", hint="Give 1 or more, or none for the exact one.")
        tied = self.a.sites.tied and not self.b.sites.tied
        if tied and ("lm_head.weight" in changed or "embed.weight" in changed):
            embed, unembed = (self.both(site)[1] for site in ("embed.weight", "lm_head.weight"))
            if not torch.equal(embed, unembed):
                raise Unsupported(
                    f"Embedding and unembedding are one tensor in {self.a.info.name} and differ in {self.b.info.name}.",
                    hint="The first model has no room for both. Compare the other way round.",
                )
            changed = [site for site in changed if site != "lm_head.weight"]
        ops: list[Op] = []
        placed = 0
        for site in changed:
            one, two = self.both(site)
            if rank is not None and one.dim() == 2:
                ops.append(_low_rank(site, two - one, rank))
                continue
            made, entries = _exact(site, one, two)
            ops += made
            placed += entries
        what = "exact" if rank is None else f"nearest change of rank {rank}"
        note = f"{what}, {len(changed)} of {len(self.sites)} weights."
        if placed:
            note += f" {placed:,} entries are set rather than added to."
        return Adjustment(name=name, method="diff", ops=tuple(ops), note=note)

    def _unlike(self, what: str, one: object, two: object) -> InvalidInput:
        return InvalidInput(
            f"{self.a.info.name} and {self.b.info.name} are not of one shape: {what} is {one} in the first and "
            f"{two} in the second.",
            hint="Compare two checkpoints of one model: a base and what was trained from it, say.",
        )


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of (out, in): (out, r), (r,), (in, r), with r at most `rank`.

    By subspace iteration from a start that is the same at every call, so that like matrices give like vectors. The
    random state is left as it was.
    """
    small = min(matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every GPU, too
        left, values, right = torch.svd_lowrank(matrix, q=min(rank + _BEYOND, small), niter=_PASSES)
    kept = min(rank, small)
    return left[:, :kept], values[:kept], right[:, :kept]


def _low_rank(site: str, delta: Tensor, rank: int) -> LowRank:
    left, values, right = leading(delta, rank)
    return LowRank(site=site, left=left * values, right=right.T)


def _exact(site: str, one: Tensor, two: Tensor) -> tuple[list[Op], int]:
    """The ops that give `two`'s bits at strength 1, and how many entries are set by them."""
    differ = one != two
    if float(differ.float().mean()) <= FEW:
        return [_entries(site, differ, two)], int(differ.sum())
    delta = two - one
    missed = (one + delta) != two  # the difference has more digits than a float holds
    delta[missed] = 0.0
    ops: list[Op] = [Dense(site=site, delta=delta)]
    if bool(missed.any()):
        ops.append(_entries(site, missed, two))
    return ops, int(missed.sum())


def _entries(site: str, where: Tensor, values: Tensor) -> Entries:
    return Entries(site=site, indices=where.nonzero(), values=values[where])
