"""What each part of a model did to an answer: an MLP's output, a head, a neuron, the stream, at every token.

Owns the report of one measure of `part_pushes.py` over the parts of one kind, its view and its picture. Super neurons
are left out of neurons and named apart. Knows nothing of how a picture becomes a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, quoted, short, table
from liveweight.tracing.attribution import answer_ids, excluded_neurons, token_text
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.neuron_labels import NeuronLabel, label_neurons
from liveweight.tracing.part_pushes import (
    MEASURES,
    Comparison,
    Measure,
    comparison,
    part_pushes,
    parts_of,
    patched_pushes,
)
from liveweight.tracing.parts import KINDS, PartKind, points_of, read
from liveweight.tracing.patching import Part, Progress

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CANDIDATES = 256  # neurons, each at one position, that true patching tries: those that relp ranks highest

_NOISE = 1e-6  # of the largest value: below it a token did nothing


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartPush(_Value):
    """What one part did to the answer's margin."""

    layer: int
    index: int | None  # of the neuron or head; None where a layer has one part at a position
    position: int  # counted from the prompt's first token
    token: str  # what the model read there
    push: float  # nats: what the margin loses with the part's other value; below zero it pushed against the answer
    share: float  # push / Attribution.total
    activation: float | None = None  # of a neuron, in the run that gave the answer
    label: NeuronLabel | None = None

    @property
    def name(self) -> str:
        """Layer and index."""
        return f"L{self.layer}" if self.index is None else f"L{self.layer}/{self.index}"


class Attribution(_Value, Shown):
    """What the parts of one kind did to an answer, at every layer and token."""

    model: str
    version: str
    by: Measure
    sites: PartKind
    answer: str
    against: str | None  # the other answer, or None: each token's runner-up
    corrupted: str | None  # the prompt that the other values come from; None: they are zero
    tokens: tuple[str, ...]  # (T,) prompt and answer, as far as the margin needs them
    compared: tuple[tuple[str, str], ...]  # the tokens whose logits make the margin: the answer's, and its rival
    margin: float  # nats
    corrupted_margin: float | None  # nats, of the same tokens behind the corrupted prompt
    values: tuple[tuple[tuple[float, ...], ...], ...]  # (parts, layers, T) nats; of neurons (1, layers, T), their sum
    total: float  # nats: the sum of |push| over every part; what shares are shares of
    pushed: tuple[PartPush, ...]  # strongest first
    opposed: tuple[PartPush, ...]  # strongest first; their pushes are below zero
    left_out: tuple[Neuron, ...]  # super neurons, which are in no list and in no sum
    tried: int | None  # by patching: how many parts were patched

    @property
    def grid(self) -> list[list[float]]:
        """Nats (layers, T), summed over the parts of a layer at a position."""
        return torch.tensor(self.values).sum(0).tolist()

    @property
    def _asked(self) -> str:
        """What was compared with what, in some words."""
        if len(self.compared) == 1:
            answer, rival = (token.strip() or repr(token) for token in self.compared[0])
            return f"{answer} rather than {rival}"
        return short(self.answer.strip(), 48)

    def __rich__(self) -> RenderableType:
        """The strongest parts for and against the answer."""
        head = Text(f"What {_NAMED[self.sites]} did to ").append(self._asked, "bold")
        about = f"by {self.by}; margin {self.margin:.2f} nats"
        if self.corrupted_margin is not None:
            about += f", {self.corrupted_margin:.2f} corrupted"
        if self.tried is not None:
            about += f"; {self.tried:,} patched"
        parts: list[RenderableType] = [head, Text(f"{about}, at {self.version.split(':')[0]}", "dim"), Text()]
        for title, found in (("pushed it", self.pushed), ("pushed against it", self.opposed)):
            labelled = self.sites == "neurons"
            shown = table(title, "nats>", "share>", "at>", "token", *(("writes",) if labelled else ()))
            for each in found:
                negative = each.activation is not None and each.activation < 0
                label = each.label.text(negative=negative, tokens=3) if each.label is not None else ""
                row: list[Any] = [Text(each.name, "bold"), f"{each.push:+.3f}", f"{each.share:.2%}", str(each.position)]
                shown.add_row(*row, quoted(each.token), *((Text(label),) if labelled else ()))
            parts += [shown, Text()]
        if self.left_out:
            named = ", ".join(f"L{layer}/{neuron}" for layer, neuron in self.left_out)
            parts.append(Text(f"Left out: {named}, which hold super weights and push every answer.", "dim"))
        return Group(*parts)

    def picture(self) -> Figure:
        """A heat map, layers by tokens: red pushed the answer, blue pushed against it.

        It begins at the first token that did anything: what stands before a corrupted prompt's first change did not.
        """
        from plotly import graph_objects

        figure = graph_objects.Figure(
            graph_objects.Heatmap(
                z=self.grid,
                colorscale="RdBu_r",
                zmid=0,
                colorbar={"title": "nats"},
                hovertemplate="layer %{y}, position %{x}: %{z:.3f} nats<extra></extra>",
            )
        )
        summed = ", summed" if self.sites in ("neurons", "heads") else ""
        figure.update_layout(
            title=f"{self._asked}: {_NAMED[self.sites]} by {self.by}{summed}",
            template="plotly_white",
        )
        shown = [repr(token)[1:-1] for token in self.tokens]
        moved = torch.tensor(self.grid).abs().amax(0)
        first = int((moved > _NOISE * moved.max()).int().argmax())
        figure.update_xaxes(
            title="token",
            tickvals=list(range(len(shown))),
            ticktext=shown,
            tickangle=-60,
            range=[first - 0.5, len(shown) - 0.5],
        )
        figure.update_yaxes(title="layer")
        return figure


_NAMED: Mapping[PartKind, str] = {
    "neurons": "neurons",
    "mlp": "MLP outputs",
    "heads": "attention heads",
    "resid": "the residual stream",
}


def attribute(
    engine: TransformersEngine,
    messages: Sequence[Message],
    answer: str | Sequence[int],
    *,
    by: Measure | None = None,
    sites: PartKind = "mlp",
    against: str | Sequence[int] | None = None,
    corrupted: Sequence[Message] | None = None,
    top: int = 20,
    labels: bool = True,
    exclude: Collection[Neuron] | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Attribution:
    """Explain an answer to a chat by the parts of one kind, at every layer and token, under the present weights.

    `answer` and `against` are texts, or tokens as the model gave them; the margin is `margin_of`'s. `corrupted` is the
    chat that each part's other value comes from, of as many tokens; None is zero for each. `by` None is what correlates
    best with patching: gradient for neurons, relp for the rest. Neurons are patched only where relp ranks them among
    the CANDIDATES strongest. `exclude` are neurons left out, None the super neurons. Raises InvalidInput for a measure,
    a kind or a prompt that cannot be, and Unsupported for a model with experts.
    """
    by = by or ("gradient" if sites == "neurons" else "relp")
    for value, known in ((by, MEASURES), (sites, KINDS)):
        if value not in known:
            raise InvalidInput(f"{value!r} is none of {', '.join(known)}.", hint="Choose one of them.")
    if top < 1:
        raise InvalidInput(f"{top} parts cannot be listed.", hint="Give top=1 or more.")
    other = None if corrupted is None else next((m.content for m in reversed(corrupted) if m.role == "user"), "")
    if other is not None and not other.strip():
        raise InvalidInput("The corrupted prompt is empty.", hint="Leave it out to compare with zero.")
    require_dense(engine)
    prompt = engine.encode(messages)
    tokens = answer_ids(engine, prompt, answer)
    rivals = answer_ids(engine, prompt, against) if against is not None else ()
    if against is not None and not rivals:
        raise InvalidInput("The answer to compare with is empty.", hint="Leave it out to compare with the runner-up.")
    out = excluded_neurons(engine, exclude, cache_dir) if sites == "neurons" else frozenset()
    with engine.gate.step():
        asked = comparison(engine, prompt, tokens, rivals, None if corrupted is None else engine.encode(corrupted))
        tried = None
        if by == "patching":
            parts = _candidates(engine, asked, out) if sites == "neurons" else parts_of(engine, asked, sites)
            found, tried = patched_pushes(engine, asked, sites, parts, progress=progress), len(parts)
        else:
            found = part_pushes(engine, asked, (sites,), by)[sites]
        margins = [None if ids is None else _margin(engine, asked, ids) for ids in (asked.tokens, asked.corrupted)]
        points = points_of(engine.sites, "neurons") if sites == "neurons" else []
        values = read(engine, asked.tokens, points, prompt=asked.prompt).values
        version = engine.version
    for layer, neuron in out:
        found[layer, :, neuron] = 0.0
    total = float(found.abs().sum())
    read_there = [token_text(engine, token) for token in asked.tokens]
    strongest = [_strongest(found, top), _strongest(-found, top)]
    wanted = {(part.layer, part.number) for part in (*strongest[0], *strongest[1])}
    known_labels = label_neurons(engine, sorted(wanted), cache_dir=cache_dir) if labels and sites == "neurons" else {}

    def described(parts: Sequence[Part]) -> tuple[PartPush, ...]:
        return tuple(
            PartPush(
                layer=part.layer,
                index=None if sites in ("mlp", "resid") else part.number,
                position=part.position,
                token=read_there[part.position],
                push=float(found[part]),
                share=float(found[part]) / total if total else 0.0,
                activation=float(values[points[part.layer].site][0, part.position, part.number]) if points else None,
                label=known_labels.get((part.layer, part.number)),
            )
            for part in parts
        )

    kept = found.sum(-1, keepdim=True) if sites == "neurons" else found
    assert margins[0] is not None
    return Attribution(
        model=engine.info.name,
        version=str(version),
        by=by,
        sites=sites,
        answer=engine.format.decode(tokens),
        against=engine.format.decode(rivals) if rivals else None,
        corrupted=other,
        tokens=tuple(read_there),
        compared=tuple(
            (token_text(engine, token), token_text(engine, rival))
            for token, rival in zip(asked.margin.tokens, asked.margin.rivals, strict=True)
        ),
        margin=margins[0],
        corrupted_margin=margins[1],
        values=tuple(tuple(map(tuple, part)) for part in kept.permute(2, 0, 1).tolist()),
        total=total,
        pushed=described(strongest[0]),
        opposed=described(strongest[1]),
        left_out=tuple(sorted(out)),
        tried=tried,
    )


def _margin(engine: TransformersEngine, asked: Comparison, tokens: Sequence[int]) -> float:
    with torch.no_grad():
        return float(asked.margin.of(engine, read(engine, tokens, [], prompt=asked.prompt).final))


def _strongest(pushes: Tensor, count: int) -> list[Part]:
    """The parts of (layers, T, parts) above zero, the largest first; of equal ones the first in the model."""
    values, order = pushes.flatten().sort(descending=True, stable=True)
    order = order[:count][values[:count] > 0]
    places = torch.stack(torch.unravel_index(order, pushes.shape), dim=1).tolist()
    return [Part(*place) for place in places]


def _candidates(engine: TransformersEngine, asked: Comparison, out: Collection[Neuron]) -> list[Part]:
    """The neurons worth a run of their own: those that relp finds to have moved the margin most, either way."""
    ranked = part_pushes(engine, asked, ("neurons",), "relp")["neurons"].abs()
    for layer, neuron in out:
        ranked[layer, :, neuron] = 0.0
    return _strongest(ranked, CANDIDATES)
