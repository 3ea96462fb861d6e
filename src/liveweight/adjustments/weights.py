"""The live weights: made to be what a state says, exactly, and never a function of how they got there.

Owns the pristine values of the regions that are changed at present, and the writing. Every change is recomputed from
pristine values in float32, op by op in the ledger's order, then cast to the parameter's dtype. Everything is computed
and checked before the first write. Knows nothing of when it is safe to write: the engine's gate does.

On a CPU and on a GPU it is the same code. The arithmetic is done where the weight lies, so that of an op only its own
numbers travel; the pristine values of what is changed are kept on the host, where memory is not scarce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.adjustments.adjustment import Active, State, effective
from liveweight.adjustments.contributions import Contribution, contributions
from liveweight.adjustments.ops import WeightOp
from liveweight.errors import InvalidInput
from liveweight.sites import ModelSites, Region, require_writable
from liveweight.sites.views import WHOLE

Origin = tuple[str, int, float]  # adjustment's hash, number of the op in it, strength
_WIDE = (torch.float32, torch.float64)  # dtypes that the arithmetic is done in as they are
_UNFINISHED: list[Origin] = [("", -1, 0.0)]  # what made a site's values is not known: a write was cut short


@dataclass(frozen=True, eq=False)
class _Held:
    """The base's own values of a region, in the parameter's dtype, on the host."""

    where: Region
    values: Tensor


@dataclass(frozen=True, eq=False)
class _Rewrite:
    """One site's pending write."""

    site: str
    where: Region  # what is written: what was changed before and what is changed now
    values: Tensor  # in the parameter's dtype; on the host where they are the base's
    cover: _Held  # the base's values of all that is written
    keep: _Held | None  # of all that differs from the base afterwards
    sent: int  # bytes that go to the weight's device for it, but for pristine values that were counted before


@dataclass
class _Plan:
    """What the ops of one state do at one site, in order."""

    origins: list[Origin]
    parts: list[Contribution]
    sent: list[int]  # bytes of each part's own numbers

    @property
    def where(self) -> Region:
        """The region of all parts together."""
        joined = self.parts[0].where | self.parts[0].where
        for part in self.parts[1:]:
            joined = joined | part.where
        return joined


class WeightState:
    """Holds one model's weights to a state."""

    def __init__(self, sites: ModelSites) -> None:
        """Take the weights as they are now for the base."""
        self.sites = sites
        self._state: State = ()
        self._held: dict[str, _Held] = {}
        self._origins: dict[str, list[Origin]] = {}
        self.travelled = 0
        """Bytes handed between the host and the weights' device so far; where that is the CPU, handing over is free."""

    @property
    def state(self) -> State:
        """The state that the weights are in."""
        return self._state

    @property
    def whole(self) -> bool:
        """Whether every weight is known to be that of the state; not where even putting it back was cut short."""
        return all(origins is not _UNFINISHED for origins in self._origins.values())

    @property
    def pristine_bytes(self) -> int:
        """The memory that the kept pristine values take."""
        return sum(held.values.numel() * held.values.element_size() for held in self._held.values())

    def become(self, state: State) -> list[str]:
        """Make the weights those of `state`; the sites that were rewritten, in the model's order.

        All or nothing: on any error the weights are as before. Raises UnknownSite, InvalidInput or Unsupported when an
        op does not fit this model, and InvalidInput when a weight would not be finite in its dtype.
        """
        if effective(state):
            require_writable(self.sites.model)
        plans = self._plans(state)
        try:
            rewritten = self._write(plans)
        except BaseException:  # an interrupt too must not leave half a state behind
            self._write(self._plans(self._state))
            raise
        self._state = state
        return rewritten

    def check(self, state: State) -> None:
        """Raises as `become` would for ops that do not fit this model, touching nothing."""
        self._plans(state)

    def touched(self, state: State) -> dict[str, list[Origin]]:
        """Which ops of a state act on which weight site, in order."""
        return {site: plan.origins for site, plan in self._plans(state).items()}

    @contextmanager
    def preview(self, state: State) -> Iterator[list[str]]:
        """Be `state` inside the `with` block, and what was before after it, however it ends."""
        before = self._state
        rewritten = self.become(state)
        try:
            yield rewritten
        finally:
            self.become(before)

    def survival(self, active: Active) -> float:
        """The share of the entries that an adjustment changes which still differ from the base once rounded.

        Measured for the adjustment alone on the base. 1.0 where it changes no weight.
        """
        meant = survived = 0
        for site, plan in self._plans((active,)).items():
            base = self.base(site, plan.where)
            new = self._compute(plan.parts, base, plan.where)
            meant += int((new != base).sum())
            dtype = self.sites.weight(site).parameter.dtype
            survived += int((new.to(dtype) != base.to(dtype)).sum())
        return survived / meant if meant else 1.0

    def base(self, site: str, where: Region = WHOLE) -> Tensor:
        """A copy of the base's values at a site, in float32 (float64 where the model is), whatever is active now."""
        return _wide(self._pristine(self.sites.canonical(site), where))

    # ------------------------------------------------------------------------------------------------- internal

    def _plans(self, state: State) -> dict[str, _Plan]:
        plans: dict[str, _Plan] = {}
        for active in effective(state):
            for number, op in enumerate(active.adjustment.ops):
                if not isinstance(op, WeightOp):
                    continue
                origin = (active.adjustment.hash, number, float(active.strength))
                numbers = sum(tensor.nbytes for tensor in op.tensors().values())
                for part in contributions(op, active.strength, self.sites, self.base):
                    plan = plans.setdefault(part.site, _Plan([], [], []))
                    plan.origins.append(origin)
                    plan.parts.append(part)
                    plan.sent.append(numbers)
                    numbers = 0  # an op's numbers are counted once
        return plans

    def _pristine(self, site: str, where: Region) -> Tensor:
        """The base's own values at a region, on the weight's device."""
        held, view = self._held.get(site), self.sites.weight(site)
        if held is None:
            return view.gather(where)
        if held.where.index is None:
            return self._handed(_take(held.values, where), view.parameter.device)
        whole = view.gather(WHOLE)
        _put(whole, held.where, self._handed(held.values, whole.device))
        return _take(whole, where)

    def _handed(self, values: Tensor, device: torch.device | str) -> Tensor:
        """Values that go to another device; counted."""
        self.travelled += values.nbytes
        return values.to(device)

    def _write(self, plans: dict[str, _Plan]) -> list[str]:
        """Carry out all plans; the sites that were rewritten. Interrupted, a repetition with any plans is exact."""
        rewrites = [
            self._rewrite(site, plans.get(site))
            for site in self.sites.weight_names()
            if self._origins.get(site) != (plans[site].origins if site in plans else None)
        ]
        for rewrite in rewrites:
            # From here on the kept values cover all that may have been written, until the site is finished.
            self._held[rewrite.site] = rewrite.cover
            self._origins[rewrite.site] = _UNFINISHED
            self.sites.weight(rewrite.site).write(rewrite.values, rewrite.where)
            self.travelled += rewrite.sent
        for rewrite in rewrites:
            if rewrite.keep is None:
                del self._origins[rewrite.site]
                del self._held[rewrite.site]
            else:
                self._origins[rewrite.site] = plans[rewrite.site].origins
                self._held[rewrite.site] = rewrite.keep
        return [rewrite.site for rewrite in rewrites]

    def _rewrite(self, site: str, plan: _Plan | None) -> _Rewrite:
        held = self._held.get(site)
        if plan is None:
            assert held is not None, site  # a site without a plan is rewritten only because something is active there
            return _Rewrite(site, held.where, held.values, held, None, held.values.nbytes + _index_bytes(held.where))
        view = self.sites.weight(site)
        dtype = view.parameter.dtype
        now = plan.where
        where = now if held is None else now | held.where
        before = self._origins.get(site, [])
        done = len(before) if dtype in _WIDE and plan.origins[: len(before)] == before else 0
        if held is not None and _same(held.where, where):
            pristine = held.values  # on the host already
        else:
            pristine = self._handed(self._pristine(site, where), "cpu")
        # Where nothing was lost in a cast, what stands there is the base, or exactly what the first ops made of it.
        stands = done or held is None
        start = view.gather(where) if stands else self._handed(pristine, view.parameter.device)
        values = self._compute(plan.parts[done:], _wide(start), where).to(dtype)
        # A NaN is both the least and the greatest, so that one pass finds every kind of value that is not finite.
        if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values)):
            raise InvalidInput(
                f"The weights at {site} would not be finite in {dtype}.",
                hint="Lower the strength, or undo an earlier change there.",
                site=site,
            )
        # The same tensor twice costs no memory: nothing writes into held values.
        keep = _Held(now, pristine if now.index is None else _take_within(pristine, where, now))
        sent = sum(plan.sent[done:]) + _index_bytes(where)
        return _Rewrite(site, where, values, _Held(where, pristine), keep, sent)

    def _compute(self, parts: list[Contribution], values: Tensor, where: Region) -> Tensor:
        """The parts carried out on a copy of `values`, which lie at `where`."""
        values = values.clone()
        for part in parts:
            place = _localised(part.where, where)
            if place.index is None:
                values = part.change(values)
            else:
                _put(values, place, part.change(_take(values, place)))
        return values


def _same(one: Region, other: Region) -> bool:
    if one.kind != other.kind or one.index is None or other.index is None:
        return one.kind == other.kind == "whole"
    return torch.equal(one.index, other.index)


def _index_bytes(where: Region) -> int:
    return 0 if where.index is None else where.index.nbytes


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in _WIDE else values.float()


def _localised(part: Region, within: Region) -> Region:
    """`part` in the coordinates of a tensor gathered from `within`, where `within` is the whole or of the same kind."""
    if within.index is None or part.index is None:
        return part
    places = part.places(within)
    # Entries gathered from entries are a vector, whose entries are its rows.
    return Region("rows" if part.kind == "entries" else part.kind, places)


def _take_within(values: Tensor, within: Region, part: Region) -> Tensor:
    return _take(values, _localised(part, within))


def _take(values: Tensor, where: Region) -> Tensor:
    """A copy of part of a tensor that a weight's `gather` returned."""
    if where.index is None:
        return values.clone()
    index = where.index.to(values.device)
    match where.kind:
        case "columns":
            return values.index_select(1, index)
        case "entries":
            return values.reshape(-1).index_select(0, index)
        case _:
            return values.index_select(0, index)


def _put(values: Tensor, where: Region, part: Tensor) -> None:
    """Write `part` into a contiguous tensor in place, where `_take` would read it."""
    if where.index is None:
        values.copy_(part)
        return
    index = where.index.to(values.device)
    match where.kind:
        case "columns":
            values[:, index] = part
        case "entries":
            values.view(-1)[index] = part
        case _:
            values[index] = part
