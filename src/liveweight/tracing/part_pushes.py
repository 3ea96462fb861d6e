"""Four measures of one quantity: what an answer's margin M loses, in nats, when one part takes another value.

The other value z' of a part z is what it is in the run of a corrupted prompt, or zero where there is none; it is put
into the run that gave the answer, never the other way round. With d = z - z' from the two runs, each read once:

    patching    M - M(z := z')                          the quantity itself, a run for each part
    gradient    ∂M/∂z · d                               gradient times activation; attribution patching (Nanda 2023)
    relp        the same with relevance patching's rules in place of derivatives, see `relevance.py`
    direct      what d itself adds to the margin through the final norm, whose denominator is held as it was: direct
                logit attribution, a_j (w_j · U_y) of a neuron (Elhage et al. 2021). Later layers do not react

Owns the two runs side by side and these measures. Knows nothing of chats, of rankings or of how they are shown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.sites import ActivationPoint, ModelSites
from liveweight.tracing.capture import require_dense
from liveweight.tracing.parts import (
    Margin,
    PartKind,
    PartReading,
    count_of,
    margin_of,
    points_of,
    read,
    split,
    writes_of,
)
from liveweight.tracing.patching import Part, Progress, lost_by_patching
from liveweight.tracing.relevance import RELEVANCE, Rule, rules

Estimate = Literal["gradient", "direct", "relp"]
Measure = Literal["gradient", "direct", "relp", "patching"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
_NORMS: tuple[Rule, ...] = ("norms",)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two runs of one answer, and what is asked of them: positions before `start` are alike in both."""

    tokens: tuple[int, ...]  # (T,) prompt and answer, as far as the margin needs them
    corrupted: tuple[int, ...] | None  # (T,) likewise; None: the other value of every part is zero
    prompt: int  # tokens of the prompt
    margin: Margin

    @property
    def start(self) -> int:
        """The first position at which the runs differ."""
        if self.corrupted is None:
            return 0
        return next(i for i, (a, b) in enumerate(zip(self.tokens, self.corrupted, strict=True)) if a != b)


def comparison(
    engine: TransformersEngine,
    prompt: Sequence[int],
    answer: Sequence[int],
    against: Sequence[int] = (),
    corrupted: Sequence[int] | None = None,
) -> Comparison:
    """Put two prompts with one answer side by side; all are token ids.

    Raises InvalidInput where the corrupted prompt has another number of tokens or is the same, and as `margin_of`.
    """
    if corrupted is not None and len(corrupted) != len(prompt):
        raise InvalidInput(
            f"The corrupted prompt has {len(corrupted)} tokens, and the prompt has {len(prompt)}.",
            hint="A part is replaced by the one at the same position: word it so that both have equally many.",
        )
    if corrupted is not None and list(corrupted) == list(prompt):
        raise InvalidInput("The corrupted prompt is the prompt itself.", hint="Change something in it.")
    margin = margin_of(engine, prompt, answer, against)
    whole = None if corrupted is None else (*corrupted, *answer)[: margin.length]
    return Comparison((*prompt, *answer)[: margin.length], whole, len(prompt), margin)


def part_pushes(
    engine: TransformersEngine,
    asked: Comparison,
    kinds: Sequence[PartKind],
    by: Estimate,
    *,
    chosen: Collection[Rule] = RELEVANCE,
) -> dict[PartKind, Tensor]:
    """What each part did to the margin, estimated on one forward and one backward pass; a kind, (layers, T, parts).

    One more forward pass where there is a corrupted prompt. `chosen` are the rules of `relp`. Raises Unsupported for a
    model with experts, and as `rules` does.
    """
    require_dense(engine)
    sites = engine.sites
    points = {kind: points_of(sites, kind) for kind in kinds}
    every = {point.site: point for each in points.values() for point in each}
    followed: dict[Estimate, Collection[Rule]] = {"gradient": (), "direct": _NORMS, "relp": chosen}
    with engine.gate.step():
        other = _other(engine, asked, list(every.values()))
        if by == "direct":
            beside = [point for part in ("attn", "mlp") for point in writes_of(sites, part)]
            every |= {point.site: point for point in (*beside, *points_of(sites, "resid")[-1:])}
        within = rules(sites, followed[by])
        found = read(engine, asked.tokens, list(every.values()), prompt=asked.prompt, gradients=True, rules=within)
        straight = by == "direct" or (by == "relp" and "activation" in chosen)
        with torch.enable_grad():
            margin = asked.margin.of(engine, found.final, straight=straight)
        gradients = _direct(sites, found, margin) if by == "direct" else _whole(found, margin)
    return {
        kind: torch.stack(
            [
                split(_product(found.values[point.site], gradients[point.site], other, point.site), kind, sites)
                for point in points[kind]
            ]
        )
        .sum(-1)
        .cpu()
        for kind in kinds
    }


def _whole(found: PartReading, margin: Tensor) -> dict[str, Tensor]:
    """The margin's gradient at every point, by any way."""
    gradients = torch.autograd.grad(margin, list(found.values.values()), allow_unused=True)
    return {
        site: torch.zeros_like(value) if gradient is None else gradient
        for (site, value), gradient in zip(found.values.items(), gradients, strict=True)
    }


def _direct(sites: ModelSites, found: PartReading, margin: Tensor) -> dict[str, Tensor]:
    """The same straight from each point: through its own layer's write, the stream and the final norm."""
    last = found.values[points_of(sites, "resid")[-1].site]
    (reader,) = torch.autograd.grad(margin, last, retain_graph=True)  # (1, T, width)
    gradients = {}
    for site, value in found.values.items():
        ends = {"mlp.neurons": "mlp.write", "attn.heads": "attn.write"}
        end = next((site.replace(begin, write) for begin, write in ends.items() if site.endswith(begin)), None)
        if end is None:
            gradients[site] = reader
        else:
            (gradients[site],) = torch.autograd.grad(found.values[end], value, reader, retain_graph=True)
    return gradients


def _other(engine: TransformersEngine, asked: Comparison, points: Sequence[ActivationPoint]) -> Mapping[str, Tensor]:
    """The parts in the corrupted run, (1, T, size); none where their other value is zero."""
    return {} if asked.corrupted is None else read(engine, asked.corrupted, points, prompt=asked.prompt).values


def _product(value: Tensor, gradient: Tensor, other: Mapping[str, Tensor], site: str) -> Tensor:
    apart = value.detach() - other[site] if site in other else value.detach()
    return (gradient * apart).float()


def parts_of(engine: TransformersEngine, asked: Comparison, kind: PartKind) -> list[Part]:
    """Every part of a kind at the positions where the runs differ."""
    return [
        Part(layer, position, index)
        for layer in range(engine.sites.layers)
        for position in range(asked.start, len(asked.tokens))
        for index in range(count_of(engine.sites, kind))
    ]


def patched_pushes(
    engine: TransformersEngine,
    asked: Comparison,
    kind: PartKind,
    parts: Sequence[Part] | None = None,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """What the margin really loses by each part, one run a part: (layers, T, parts), zero where none was tried.

    `parts` says which are tried: None is all of them at positions where the runs differ. Raises as `part_pushes`.
    """
    require_dense(engine)
    points = points_of(engine.sites, kind)
    length = len(asked.tokens)
    parts = parts_of(engine, asked, kind) if parts is None else parts
    with engine.gate.step():
        other = _other(engine, asked, points)
        replacement = [other[point.site][0] if other else torch.zeros(length, point.size) for point in points]
        lost = lost_by_patching(
            engine, asked.tokens, asked.margin, kind, parts, replacement, prompt=asked.prompt, progress=progress
        )
    found = torch.zeros(engine.sites.layers, length, count_of(engine.sites, kind))
    if parts:
        found[tuple(torch.tensor(parts).T)] = lost
    return found
