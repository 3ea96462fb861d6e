"""A given direction of the residual stream, made as strong as a KL allows.

Owns the strength of a direction that something else found (a feature, say), calibrated as `steer` calibrates its own,
and what is told of it. The direction is added behind a layer at every token. Knows nothing of where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from liveweight.adjustments import Adjustment, Steer
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.methods.calibration import Measure, Point, Rows, calibrate, kl_between, summed_up
from liveweight.tracing.passages import spread

TOLERANCE = 0.1  # of the target, within which a KL counts as reached
_AIM, _TRIALS = 0.05, 14  # where the search stops
_ROUGH, _ROUGH_TRIALS, _FEW = 0.25, 8, 24  # the same on a few rows, where it begins
_FIRST = 0.25  # the first factor tried: this share of the stream's own length


@dataclass(frozen=True, eq=False)
class Directed:
    """A direction with its calibrated strength.

    KL is in nats, a row's being the mean over the tokens of its answer. The effect is how much the log-probability of
    the watched tokens rises where those answers are due, in nats, mean over tokens and places.
    """

    name: str
    layer: int
    vector: Tensor = field(repr=False)  # (width,), float32 on the CPU: factor 1
    factor: float
    measure: Measure
    target: float
    mean_kl: float
    p95_kl: float
    effect: float
    curve: tuple[Point, ...]  # every trial on all rows, by factor
    neutral: int  # rows that the KL was measured on

    @property
    def reached(self) -> float:
        """The KL that was calibrated."""
        return self.mean_kl if self.measure == "mean" else self.p95_kl

    @property
    def norm(self) -> float:
        """The length of what is added at strength 1."""
        return abs(self.factor) * float(self.vector.norm())

    def adjustment(self, strength: float = 1.0) -> Adjustment:
        """What adds it, at `strength` times the calibrated factor; below 0 it is taken away. Raises InvalidInput."""
        if strength == 0:
            raise InvalidInput("At strength 0 nothing is added.", hint="Give 1 (as calibrated), or less, or below 0.")
        note = f"Added at layer {self.layer} at {strength:g} times the factor {self.factor:.3g}, which has "
        note += f"a {self.measure} KL of {self.reached:.3g} on {self.neutral} neutral prompts."
        op = Steer(site=f"layers.{self.layer}.resid", vector=self.vector, scale=strength * self.factor)
        return Adjustment(name=self.name, method="direction", ops=(op,), note=note)

    def as_dict(self) -> dict[str, Any]:
        """All but the vector, as JSON takes it."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("vector", "curve")}
        return plain | {"norm": self.norm, "reached": self.reached, "curve": [asdict(point) for point in self.curve]}


def directed(
    engine: TransformersEngine,
    name: str,
    layer: int,
    vector: Tensor,
    neutral: Sequence[ScoreItem],
    *,
    watched: Sequence[int] = (),
    target: float = 0.5,
    measure: Measure = "p95",
    progress: bool = False,
) -> Directed:
    """The factor of `vector` (width,) behind a layer whose KL on `neutral` prompts and answers is `target` nats.

    Found roughly on a few of the rows, then on all; under the engine's present state. `watched` are tokens whose
    log-probability is followed. Raises UnknownSite for a layer that is not there; InvalidInput for a direction that is
    zero, a target not above 0, and no rows; NoMendFound where no factor reaches the target.
    """
    engine.sites.check_layer(layer)
    if not target > 0:
        raise InvalidInput(f"The target KL cannot be {target}.", hint="Give a number above 0, such as 0.5.")
    if not neutral:
        raise InvalidInput(
            "There are no neutral prompts to calibrate on.", hint="Give the guard a chat probe at least."
        )
    vector = vector.detach().float().cpu()
    if not float(vector.norm()) > 0:
        raise InvalidInput(f"The direction of {name} is zero.", hint="Take another one.")
    tokens = torch.tensor(list(watched), dtype=torch.int64)

    def search(rows: Rows, first: float, tolerance: float, most: int) -> tuple[Point, list[Point], bool]:
        tried: list[Point] = []
        before = torch.cat(rows.finals)
        said = _mean_logprob(engine, before, tokens)

        def trial(factor: float) -> Point:
            with torch.no_grad():
                after = rows.run(layer, factor * vector)
                each = kl_between(engine, before, torch.cat(after))
                effect = _mean_logprob(engine, torch.cat(after), tokens) - said
            parts = torch.split(each, [len(final) for final in after])
            tried.append(Point(factor, *summed_up(torch.stack([part.mean() for part in parts]).clamp(min=0)), effect))
            return tried[-1]

        found, reached = calibrate(trial, target, measure, first=first, tolerance=tolerance, most=most)
        return found, tried, reached

    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        bar.add_task(f"Calibrating {name}", total=None)
        rows = Rows(engine, [neutral[place] for place in spread(len(neutral), _FEW)], [layer])
        stream = float(torch.cat([each[1:] for each in rows.streams[layer]]).float().norm(dim=-1).mean())
        first = _FIRST * stream / float(vector.norm())
        if len(neutral) > len(rows):
            first = search(rows, first, _ROUGH, _ROUGH_TRIALS)[0].factor
            rows = Rows(engine, neutral, [layer])
        found, curve, reached = search(rows, first, _AIM, _TRIALS)
    if not reached and abs(found.kl(measure) / target - 1.0) > TOLERANCE:
        raise NoMendFound(
            f"No strength of {name} has a {measure} KL of {target:g}: {found.kl(measure):.3g} is nearest.",
            hint="Choose another target.",
        )
    return Directed(
        name=name,
        layer=layer,
        vector=vector,
        factor=found.factor,
        measure=measure,
        target=target,
        mean_kl=found.mean_kl,
        p95_kl=found.p95_kl,
        effect=found.effect,
        curve=tuple(sorted(curve, key=lambda point: point.factor)),
        neutral=len(neutral),
    )


def _mean_logprob(engine: TransformersEngine, finals: Tensor, tokens: Tensor) -> float:
    """Mean log-probability of tokens (n,) behind each of `finals` (N, width); 0 where none is watched."""
    if not len(tokens):
        return 0.0
    total = 0.0
    with torch.no_grad():
        for part in torch.split(finals, 64):  # the logits of all at once would not fit
            logits = engine.unembed(part).float()
            total += float((logits[:, tokens.to(logits.device)] - logits.logsumexp(-1, keepdim=True)).mean(1).sum())
    return total / len(finals)
