"""Everything about one neuron on one page.

Owns reading a text for the places where the neuron is strongest, the neurons that write or read most alike, and putting
both together with its label and its clamp curve. Reads under the present state, but for labels and vectors, which are
the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, table
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.clamping import ClampCurve, clamp_curve
from liveweight.tracing.neuron_labels import (
    NeuronLabel,
    Progress,
    label_neurons,
    read_directions,
    read_parts,
    write_directions,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Kind = Literal["write", "gate", "up"]
_KINDS: tuple[Kind, ...] = ("write", "gate", "up")

TOKENS = 8192  # of the text that are read, at most
CONTEXTS = 8  # places that are told, and neighbours of each kind
_WINDOW = 256  # tokens of one piece of text
_ROWS = 8  # pieces of one pass
_AROUND = 12  # tokens before a place, and half as many behind it
_PROMPTS = 4  # of the strongest places: the prompts of the clamp curve
_STEPS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the clamp curve, times the strongest activation


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(_Value):
    """A place in the text where the neuron is strong: tokens, and its activation at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    at: int  # which of the tokens is the strong one

    @property
    def activation(self) -> float:
        """At the strong token."""
        return self.activations[self.at]


class Neighbour(_Value):
    """A neuron whose vector points the same way."""

    layer: int
    neuron: int
    cosine: float
    text: str  # what it writes


class NeuronPage(_Value, Shown):
    """One neuron: what it writes and reads, where it is strong, what is like it, what it does when it is held."""

    model: str
    label: NeuronLabel
    tokens_read: int
    mean: float  # activation over the text
    deviation: float
    positive: float  # share of the tokens where it is above zero
    strongest: tuple[Place, ...]  # the largest activation first
    lowest: tuple[Place, ...]  # the most negative first
    neighbours: dict[Kind, tuple[Neighbour, ...]]  # by absolute cosine
    curve: ClampCurve

    def __rich__(self) -> RenderableType:
        """The page for a terminal."""
        label = self.label
        shown = table("", "top tokens", "probability>", "entropy>")
        for side in ("promotes", "suppresses", *label.reads):
            found = label.side(side)
            shown.add_row(
                Text(side, "bold"), Text(found.text(8)), f"{found.top[0].probability:.3f}", f"{found.entropy:.2f}"
            )
        parts: list[RenderableType] = [Text.assemble(("Neuron ", ""), (label.name, "bold"), f" of {self.model}"), shown]
        spread = f"over {self.tokens_read:,} tokens: mean {self.mean:.3f}, deviation {self.deviation:.3f}"
        parts += [Text(f"{spread}, above zero at {self.positive:.1%}", "dim"), Text()]
        for title, places in (("strongest", self.strongest), ("most negative", self.lowest)):
            where = table(f"{title}>", "where")
            for place in places:
                where.add_row(f"{place.activation:.2f}", _marked(place))
            parts += [where, Text()]
        alike = table("alike", "neuron", "cosine>", "writes")
        for kind, neighbours in self.neighbours.items():
            for row, each in enumerate(neighbours[:4]):
                name = Text(f"{each.layer}:{each.neuron}", "bold")
                alike.add_row(f"in {kind}" if row == 0 else "", name, f"{each.cosine:+.2f}", Text(each.text))
        curve = table("held at>", f"{self.curve.promoted!r}>", f"{self.curve.suppressed!r}>")
        for point in self.curve.points:
            curve.add_row(f"{point.value:.2f}", f"{point.promoted:.2e}", f"{point.suppressed:.2e}")
        own = f"next token's probability at {self.curve.prompts} of these places; its own value {self.curve.own:.2f}"
        return Group(*parts, alike, Text(), curve, Text(own, "dim"))

    def picture(self) -> Figure:
        """The clamp curve."""
        return self.curve.picture()


def neuron_page(
    engine: TransformersEngine,
    neuron: Neuron,
    text: str,
    *,
    tokens: int = TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> NeuronPage:
    """Read one neuron over the first `tokens` tokens of a text, with its neighbours and its clamp curve.

    Raises UnknownSite for a neuron that is not there, InvalidInput for a text of less than two tokens, Unsupported for
    a model with experts.
    """
    require_dense(engine)
    layer, index = neuron
    engine.sites.check_neurons(layer, (index,))
    pieces = _pieces(engine, text, tokens)
    label = label_neurons(engine, [neuron], cache_dir=cache_dir)[neuron]
    values = _activations(engine, pieces, neuron, progress)
    flat = torch.cat(values)
    strongest, lowest = _places(engine, pieces, values, 1), _places(engine, pieces, values, -1)
    prompts = [pieces[row][: place + 1] for row, place in _order(values, 1)[:_PROMPTS]]
    largest = float(flat.abs().max())
    scale = largest if largest > 0 else 1.0  # a neuron that never fires
    return NeuronPage(
        model=engine.info.name,
        label=label,
        tokens_read=len(flat),
        mean=float(flat.mean()),
        deviation=float(flat.std(correction=0)),
        positive=float((flat > 0).float().mean()),
        strongest=strongest,
        lowest=lowest,
        neighbours=_neighbours(engine, neuron, cache_dir),
        curve=clamp_curve(engine, neuron, prompts, [step * scale for step in _STEPS], cache_dir=cache_dir),
    )


def _pieces(engine: TransformersEngine, text: str, tokens: int) -> list[list[int]]:
    """The text's first tokens in pieces, each behind the tokens that a text of its own begins with."""
    if tokens < 2:
        raise InvalidInput(f"{tokens} tokens of text are too few to read.", hint="Give two or more.")
    head = list(engine.format.before_text)
    ids: list[int] = []
    for line in text.splitlines(keepends=True):  # tokenizers warn of a text longer than the model's context
        if len(ids) >= tokens:
            break
        ids += engine.format.encode_text(line)
    length = min(_WINDOW, engine.info.context or _WINDOW) - len(head)
    ids = ids[:tokens]
    pieces = [head + ids[start : start + length] for start in range(0, len(ids), length)]
    found = [piece for piece in pieces if len(piece) >= 2]
    if not found:
        raise InvalidInput("The text is too short to read a neuron on.", hint="Give a sentence or more.")
    return found


def _activations(
    engine: TransformersEngine, pieces: Sequence[list[int]], neuron: Neuron, progress: Progress | None
) -> list[Tensor]:
    """The neuron's activation at every token but the first of each piece, float32 on the CPU."""
    layer, index = neuron
    found: list[Tensor] = []
    for start in range(0, len(pieces), _ROWS):
        batch = pieces[start : start + _ROWS]
        replay = engine.record(batch, [1] * len(batch), neurons=[layer], final=False)
        rows = replay.neurons[layer][:, :, index].float().cpu()
        found += [row[:length] for row, length in zip(rows, replay.lengths(), strict=True)]
        if progress is not None:
            progress(start + len(batch), len(pieces))
    return found


def _order(values: Sequence[Tensor], sign: int) -> list[tuple[int, int]]:
    """(piece, token) of the strongest places, at most one for every few tokens, the strongest first."""
    flat = torch.cat([value * sign for value in values])
    where = [(row, place + 1) for row, value in enumerate(values) for place in range(len(value))]
    taken: list[tuple[int, int]] = []
    for number in flat.sort(descending=True, stable=True).indices.tolist():
        if len(taken) == CONTEXTS or flat[number] <= 0:
            break
        row, place = where[number]
        if all(row != other or abs(place - there) > _AROUND for other, there in taken):
            taken.append((row, place))
    return taken or [where[int(flat.argmax())]]


def _places(
    engine: TransformersEngine, pieces: Sequence[list[int]], values: Sequence[Tensor], sign: int
) -> tuple[Place, ...]:
    decode = engine.format.tokenizer.decode
    found = []
    for row, place in _order(values, sign):
        start, stop = max(1, place - _AROUND), min(len(pieces[row]), place + _AROUND // 2 + 1)
        found.append(
            Place(
                tokens=tuple(str(decode([token])) for token in pieces[row][start:stop]),
                activations=tuple(values[row][start - 1 : stop - 1].tolist()),
                at=place - start,
            )
        )
    return tuple(place for place in found if place.activation * sign > 0)


def _neighbours(
    engine: TransformersEngine, neuron: Neuron, cache_dir: Path | None
) -> dict[Kind, tuple[Neighbour, ...]]:
    """The neurons of all layers whose vectors have the largest absolute cosine with this one's."""
    layer, index = neuron
    kinds = [kind for kind in _KINDS if kind in ("write", *read_parts(engine))]
    own = {"write": write_directions(engine, layer, [index]), **read_directions(engine, layer, [index])}
    cosines: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    count = engine.sites.neurons
    for other in range(engine.sites.layers):
        rows = list(range(count))
        vectors = {"write": write_directions(engine, other, rows), **read_directions(engine, other, rows)}
        for kind in kinds:
            cosines[kind].append(torch.nn.functional.cosine_similarity(vectors[kind], own[kind]).cpu())
    best: dict[str, list[tuple[Neuron, float]]] = {}
    for kind in kinds:
        every = torch.cat(cosines[kind])
        every[layer * count + index] = 0.0
        top = every.abs().topk(min(CONTEXTS, len(every))).indices.tolist()
        best[kind] = [((place // count, place % count), float(every[place])) for place in top]
    labels = label_neurons(engine, [pair for each in best.values() for pair, _ in each], cache_dir=cache_dir)
    return {
        kind: tuple(
            Neighbour(layer=pair[0], neuron=pair[1], cosine=cosine, text=labels[pair].text(tokens=3))
            for pair, cosine in best[kind]
        )
        for kind in kinds
    }


def _marked(place: Place) -> Text:
    """The tokens on one line, those shaded where the neuron is active, and the strong one marked."""
    strong = abs(place.activation) or 1.0
    shown = Text()
    for number, (token, value) in enumerate(zip(place.tokens, place.activations, strict=True)):
        share = min(1.0, abs(value) / strong)
        text = token.replace("\n", "⏎")
        style = "bold reverse" if number == place.at else "bold" if share > 0.5 else "" if share > 0.2 else "dim"
        shown.append(text, style)
    return shown
