"""How strong a direction may be: the factor at which what it moves elsewhere is as much as was asked for.

Owns rows that are run once and then, from any layer on, again with something added to the residual stream; what this
moves, as KL on neutral rows; and the search for the factor at which the KL is a target. Knows nothing of where a
direction comes from or what it is for. Reads only: weights, hooks and random state are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from liveweight.engines.base import ScoreItem
from liveweight.engines.replay import packed_paths, packed_prompts, run_whole
from liveweight.engines.transformers import TransformersEngine

Measure = Literal["mean", "p95"]

_TOKENS = 1000  # of one batch's rows together, what they share counted each time
_POSITIONS = 64  # positions whose whole distributions are compared at once: memory that is used again
_WIDEST = 8.0  # the largest step of a factor while no factor on the other side of the target is known
_INSIDE = 0.1  # a trial between two known factors stays this far (of their distance) from both


@dataclass(frozen=True)
class Point:
    """One trial: a factor, the KL that it costs on neutral rows and the effect that it has on the examples, in nats.

    A row's KL is the mean over its tokens; `mean_kl` and `p95_kl` are over rows.
    """

    factor: float
    mean_kl: float
    p95_kl: float
    effect: float

    def kl(self, measure: Measure) -> float:
        """The figure that is calibrated."""
        return self.mean_kl if measure == "mean" else self.p95_kl


class Rows:
    """Prompts with what is said behind them, each run once under the engine's present state.

    What is said is what is looked at: its tokens are forced, and their distributions compared or their probabilities
    taken, with anything added to the residual stream behind a layer at every position.
    """

    def __init__(self, engine: TransformersEngine, items: Sequence[ScoreItem], layers: Sequence[int]) -> None:
        """Run all rows, keeping what leaves the blocks `layers`: (T, width) a row and layer."""
        self.engine, self.items = engine, list(items)
        self.rows = [[*item.prompt, *item.continuation] for item in items]
        self.streams: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(self.rows) for layer in layers}
        finals = [torch.empty(0)] * len(self.rows)
        for batch in self._batches():
            for row, final in zip(batch, self._first_run(batch, layers), strict=True):
                finals[row] = self._said(row, final)
        self.finals = finals  # a row: (answer tokens, width), what left the final norm where each is predicted

    def __len__(self) -> int:
        return len(self.rows)

    def run(self, layer: int, added: Tensor) -> list[Tensor]:
        """As `finals`, with `added` (width,) in the stream behind the block `layer`, at every position."""
        found = [torch.empty(0)] * len(self.rows)
        for batch in self._batches():
            for row, final in zip(batch, self.run_some(batch, layer, added), strict=True):
                found[row] = final
        return found

    def run_some(self, batch: Sequence[int], layer: int, added: Tensor) -> list[Tensor]:
        """The same for some rows together. Differentiable in `added`, where gradients are on."""
        own = self.streams[layer]
        rows = [self.rows[row] for row in batch]
        with self.engine.gate.step(), self.engine.activations.prompt(self._prompts(batch)):
            inputs = [(own[row].float() + added.to(own[row].device)).to(own[row].dtype) for row in batch]
            finals, _ = run_whole(self.engine.model, self.engine.sites, rows, layer=layer + 1, inputs=inputs)
        return [self._said(row, final) for row, final in zip(batch, finals, strict=True)]

    def kl(self, layer: int, added: Tensor) -> Tensor:
        """(rows,) KL from the model as it is to the model with `added`, mean over each row's tokens, in nats."""
        with torch.no_grad():
            changed = self.run(layer, added)
            each = kl_between(self.engine, torch.cat(self.finals), torch.cat(changed))
        return torch.stack([part.mean() for part in torch.split(each, [len(final) for final in changed])]).clamp(min=0)

    def logprobs(self, layer: int | None = None, added: Tensor | None = None) -> Tensor:
        """(rows,) mean log-probability a token of what is said, with `added` behind `layer` or as the model is."""
        with torch.no_grad():
            finals = self.finals if layer is None or added is None else self.run(layer, added)
            found = []
            for item, final in zip(self.items, finals, strict=True):
                tokens = torch.tensor(item.continuation, device=final.device)[:, None]
                found.append(self.engine.unembed(final).float().log_softmax(-1).gather(1, tokens).mean().cpu())
        return torch.stack(found)

    def _said(self, row: int, final: Tensor) -> Tensor:
        return final[len(self.items[row].prompt) - 1 : -1]

    def _first_run(self, batch: Sequence[int], layers: Sequence[int]) -> list[Tensor]:
        engine, rows = self.engine, [self.rows[row] for row in batch]
        packed: dict[int, Tensor] = {}
        with engine.gate.step(), engine.activations.prompt(self._prompts(batch)), torch.no_grad():
            hooks = [
                engine.sites.activation(f"layers.{layer}.resid").on(
                    lambda value, layer=layer: packed.__setitem__(layer, value[0])  # type: ignore[misc]
                )
                for layer in layers
            ]
            try:
                finals, _ = run_whole(engine.model, engine.sites, rows)
            finally:
                for hook in hooks:
                    hook.remove()
        for layer, stream in packed.items():
            for row, path in zip(batch, packed_paths(engine.model, rows), strict=True):
                self.streams[layer][row] = stream[path]
        return finals

    def _prompts(self, batch: Sequence[int]) -> Tensor:
        paths = packed_paths(self.engine.model, [self.rows[row] for row in batch])
        return packed_prompts(paths, [len(self.items[row].prompt) for row in batch])

    def _batches(self) -> Iterator[list[int]]:
        """All rows in batches of so many tokens, those that begin alike together."""
        batch: list[int] = []
        tokens = 0
        for row in sorted(range(len(self.rows)), key=lambda row: self.rows[row]):
            if batch and tokens + len(self.rows[row]) > _TOKENS:
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += len(self.rows[row])
        if batch:
            yield batch


def kl_between(engine: TransformersEngine, before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL in nats between what the unembedding says behind `before` and behind `after`, (N, width) each.

    Differentiable in `after`, where gradients are on.
    """
    parts = []
    for start in range(0, len(before), _POSITIONS):
        some = slice(start, start + _POSITIONS)
        old = engine.unembed(before[some]).float().log_softmax(-1)
        new = engine.unembed(after[some]).float().log_softmax(-1)
        parts.append((old.exp() * (old - new)).sum(-1).cpu())
    return torch.cat(parts)


def summed_up(kl: Tensor) -> tuple[float, float]:
    """Mean and 95th percentile of rows' KL (rows,)."""
    return float(kl.mean()), float(kl.quantile(0.95))


def calibrate(
    trial: Callable[[float], Point],
    target: float,
    measure: Measure,
    *,
    first: float,
    tolerance: float,
    most: int,
) -> tuple[Point, bool]:
    """The trial whose KL is nearest to `target` nats, and whether it is within `tolerance` (a share of it).

    Factors are looked for on logarithmic scales, where KL is nearly a straight line (of slope two, while it is small):
    from `first` outwards until the target lies between two of them, then by secants that are kept inside, at most
    `most` trials. `trial` is told every factor.
    """
    low: tuple[float, float] | None = None  # log factor and log KL, below the target
    high: tuple[float, float] | None = None
    wished, place = math.log(target), math.log(first)
    best: Point | None = None
    for _ in range(most):
        point = trial(math.exp(place))
        level = _level(point.kl(measure))
        if best is None or abs(level - wished) < abs(_level(best.kl(measure)) - wished):
            best = point
        if abs(point.kl(measure) / target - 1.0) <= tolerance:
            return point, True
        if level < wished:
            low = (place, level)
        else:
            high = (place, level)
        if low is None or high is None:
            step = (wished - level) / 2 if math.isfinite(level) else -math.inf
            place += min(max(step, -math.log(_WIDEST)), math.log(_WIDEST))
            continue
        share = (wished - low[1]) / (high[1] - low[1]) if math.isfinite(high[1]) else 0.5
        place = low[0] + min(max(share, _INSIDE), 1.0 - _INSIDE) * (high[0] - low[0])
    assert best is not None
    return best, False


def _level(kl: float) -> float:
    """Its logarithm; infinite where the model broke and the KL is no number."""
    return math.log(max(kl, 1e-12)) if math.isfinite(kl) else math.inf
