"""The labels of all neurons of a model: made once, searched, compared with another model's.

Owns making them layer by layer (on many machines, if need be: each makes some layers, and their files are put
together), the search in them, and the comparison. How a neuron is decoded is `neuron_labels.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text

from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, table
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.label_cache import LabelCache
from liveweight.tracing.neuron_labels import PACKED, NeuronLabel, Progress, label_of, packed_labels, read_parts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Side = Literal["promotes", "suppresses", "gate", "up"]
SIDES: tuple[Side, ...] = ("promotes", "suppresses", "gate", "up")
How = Literal["text", "token", "regex"]

_LAYERS = re.compile(r"^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NeuronHit(_Value):
    """A neuron one of whose vectors decodes into what was looked for."""

    layer: int
    neuron: int
    side: Side
    token: str  # the likeliest of its tokens that was looked for
    probability: float  # of all its tokens that were looked for, together
    label: NeuronLabel

    def line(self) -> tuple[str, str, str, str]:
        """Its cells in a table."""
        decoded = self.label.side(self.side)
        return (self.label.name, self.side, f"{self.probability:.3f}", decoded.text(6))


class NeuronHits(_Value, Shown):
    """What a search found, the surest first."""

    model: str
    looked_for: str
    found: int  # neurons and sides in all, of which `hits` are the first
    hits: tuple[NeuronHit, ...]

    def __rich__(self) -> RenderableType:
        """One neuron a line."""
        if not self.hits:
            return Text(f"No neuron of {self.model} has {self.looked_for} among its top tokens.")
        shown = table("neuron", "", "probability>", "top tokens")
        for hit in self.hits:
            name, side, probability, text = hit.line()
            shown.add_row(Text(name, "bold"), side, probability, Text(text))
        more = f", of which these are {len(self.hits)}" if self.found > len(self.hits) else ""
        return Group(shown, Text(f"{self.found} times {self.looked_for}{more}.", "dim"))


class LayerAgreement(_Value):
    """How many neurons of one layer keep their likeliest token, by side, as shares."""

    layer: int
    kept: dict[Side, float]


class AtlasComparison(_Value, Shown):
    """Two models' labels side by side, neuron by neuron."""

    models: tuple[str, str]
    kept: dict[Side, float]  # over all layers
    layers: tuple[LayerAgreement, ...]

    def __rich__(self) -> RenderableType:
        """A layer a line."""
        shown = table("layer", *(f"{side}>" for side in self.kept))
        for each in self.layers:
            shown.add_row(str(each.layer), *(f"{each.kept[side]:.1%}" for side in self.kept))
        shown.add_row(Text("all", "bold"), *(f"{share:.1%}" for share in self.kept.values()))
        head = Text(f"Neurons of {self.models[0]} that have the same top token in {self.models[1]}")
        return Group(head, shown)

    def picture(self) -> Figure:
        """The shares over the layers."""
        from plotly import graph_objects

        figure = graph_objects.Figure()
        for side in self.kept:
            y = [each.kept[side] for each in self.layers]
            figure.add_scatter(x=[each.layer for each in self.layers], y=y, mode="lines+markers", name=side)
        figure.update_layout(
            title=f"Top token kept, {self.models[0]} and {self.models[1]}",
            xaxis_title="layer",
            yaxis={"title": "share of neurons", "tickformat": ".0%", "rangemode": "tozero"},
            template="plotly_white",
        )
        return figure


class Coverage(_Value, Shown):
    """Which neurons of a model are labelled, and where the labels are."""

    model: str
    file: str
    layers: dict[int, int]  # labelled neurons by layer
    neurons: int  # of each layer

    @property
    def whole(self) -> bool:
        """Whether no neuron is without its label."""
        return all(count == self.neurons for count in self.layers.values())

    def __rich__(self) -> RenderableType:
        """One line, or two."""
        done = sum(self.layers.values())
        missing = [str(layer) for layer, count in self.layers.items() if count < self.neurons]
        lines = [Text(f"{done:,} of {len(self.layers) * self.neurons:,} neurons of {self.model} are labelled.")]
        if missing:
            lines.append(Text(f"Not yet whole: layers {', '.join(missing)}."))
        return Group(*lines, Text(self.file, "dim"))


@dataclass(frozen=True, eq=False)
class Atlas:
    """The labels of some layers, or all, of one model, in memory: 270 bytes a neuron."""

    engine: TransformersEngine
    layers: tuple[int, ...]
    packed: NDArray[np.void]  # (layers, neurons, sides) of PACKED

    @property
    def sides(self) -> tuple[Side, ...]:
        """What there is of each neuron."""
        return tuple(side for side in SIDES if side in ("promotes", "suppresses", *read_parts(self.engine)))

    def label(self, layer: int, neuron: int) -> NeuronLabel:
        """One neuron's label. Raises UnknownSite, and InvalidInput for a layer that is not in this atlas."""
        self.engine.sites.check_neurons(layer, (neuron,))
        if layer not in self.layers:
            raise InvalidInput(f"Layer {layer} is not in this atlas.", hint="Make it with this layer, or with all.")
        return label_of(self.engine, (layer, neuron), self.packed[self.layers.index(layer), neuron].tobytes())

    def find(
        self,
        what: str,
        *,
        how: How = "text",
        layers: Sequence[int] | None = None,
        sides: Sequence[Side] | None = None,
        top: int = 20,
    ) -> NeuronHits:
        """The neurons whose vectors decode into a word, the surest first.

        Among a vector's top tokens are looked for those that hold `what`, ignoring case (`text`), that are `what`
        beside the space before them (`token`), or in which the regular expression `what` is found (`regex`). Raises
        InvalidInput for what no token of this model can be, UnknownSite for a layer that is not there.
        """
        wanted = self._tokens(what, how)
        told = {"text": "", "token": "the token ", "regex": "a match of "}[how] + repr(what)
        if not len(wanted):
            raise InvalidInput(f"No token of this model is {told}.", hint="Look for a part of it, or another spelling.")
        if top < 1:
            raise InvalidInput(f"{top} neurons cannot be listed.", hint="Give top=1 or more.")
        chosen = [self.sides.index(side) for side in self._checked(sides)]
        for layer in layers or ():
            self.engine.sites.check_layer(layer)
        rows = [place for place, layer in enumerate(self.layers) if layers is None or layer in layers]
        there = self.packed[rows][:, :, chosen]
        matches = np.isin(there["ids"], wanted)  # (layers, neurons, sides, TOP)
        strength = np.where(matches, there["probabilities"], 0.0).sum(-1)
        places = np.argwhere(matches.any(-1))
        order = np.argsort(-strength[tuple(places.T)], kind="stable")
        hits = []
        for row, neuron, side in places[order[:top]].tolist():
            first = int(matches[row, neuron, side].argmax())
            token = int(there["ids"][row, neuron, side, first])
            hits.append(
                NeuronHit(
                    layer=self.layers[rows[row]],
                    neuron=neuron,
                    side=self.sides[chosen[side]],
                    token=str(self.engine.format.tokenizer.decode([token])),
                    probability=float(strength[row, neuron, side]),
                    label=self.label(self.layers[rows[row]], neuron),
                )
            )
        name = self.engine.info.name
        return NeuronHits(model=name, looked_for=told, found=len(places), hits=tuple(hits))

    def compare(self, other: Atlas) -> AtlasComparison:
        """The share of neurons that have the same likeliest token in another model of the same shape and tokens.

        Raises InvalidInput where the two have other layers, neurons or tokens.
        """
        if self.layers != other.layers or self.packed.shape != other.packed.shape or self.sides != other.sides:
            raise InvalidInput(
                f"{self.engine.info.name} and {other.engine.info.name} have other layers or neurons: "
                f"{self.packed.shape[:2]} and {other.packed.shape[:2]}.",
                hint="Compare two checkpoints of one model.",
            )
        if self._texts != other._texts:
            raise InvalidInput(
                f"{self.engine.info.name} and {other.engine.info.name} have other tokens.",
                hint="Compare two checkpoints of one model.",
            )
        same = self.packed["ids"][..., 0] == other.packed["ids"][..., 0]  # (layers, neurons, sides)
        return AtlasComparison(
            models=(self.engine.info.name, other.engine.info.name),
            kept=dict(zip(self.sides, same.mean((0, 1)).tolist(), strict=True)),
            layers=tuple(
                LayerAgreement(layer=layer, kept=dict(zip(self.sides, shares, strict=True)))
                for layer, shares in zip(self.layers, same.mean(1).tolist(), strict=True)
            ),
        )

    def surest(self, side: Side = "promotes") -> list[Neuron]:
        """All neurons, those first whose vector decodes into one token with the highest probability."""
        found = self.packed["probabilities"][:, :, self.sides.index(side), 0]
        order = np.argsort(-found, axis=None, kind="stable")
        return [(self.layers[place // found.shape[1]], place % found.shape[1]) for place in order.tolist()]

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Every token's text."""
        tokens = [[token] for token in range(self.engine.sites.vocabulary)]
        return tuple(map(str, self.engine.format.tokenizer.batch_decode(tokens)))

    def _tokens(self, what: str, how: How) -> NDArray[np.int64]:
        """The tokens that are meant."""
        if not what.strip():
            raise InvalidInput("There is nothing to look for.", hint="Give a word, or a part of one.")
        word = what.strip()
        if how == "regex":
            try:
                pattern = re.compile(what)
            except re.error as error:
                raise InvalidInput(f"{what!r} is no regular expression: {error}.", hint="Escape it.") from error
            fits = [pattern.search(text) is not None for text in self._texts]
        elif how == "token":
            fits = [text.strip() == word for text in self._texts]
        else:
            fits = [word.casefold() in text.casefold() for text in self._texts]
        return np.flatnonzero(fits)

    def _checked(self, sides: Sequence[Side] | None) -> Sequence[Side]:
        unknown = next((side for side in sides or () if side not in self.sides), None)
        if unknown is not None:
            raise InvalidInput(f"A neuron of this model has no {unknown!r}.", hint=f"It has {', '.join(self.sides)}.")
        return sides or self.sides


def read_atlas(
    engine: TransformersEngine,
    layers: Sequence[int] | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    fast: bool = False,
) -> Atlas:
    """The labels of all neurons of some layers (None: all); what is not on disk yet is computed and kept there.

    `cache_dir` and `progress` as in `label_neurons`. `fast` rounds the product with the unembedding to 8 bits and looks
    at the likeliest tokens again exactly; such labels are kept apart. Raises UnknownSite for a layer that is not there,
    Unsupported for a model with experts.
    """
    require_dense(engine)
    chosen = tuple(range(engine.sites.layers) if layers is None else dict.fromkeys(layers))
    for layer in chosen:
        engine.sites.check_layer(layer)
    count = engine.sites.neurons
    kept = packed_labels(
        engine,
        [(layer, neuron) for layer in chosen for neuron in range(count)],
        cache_dir=cache_dir,
        progress=progress,
        fast=fast,
    )
    sides = 2 + len(read_parts(engine))
    rows = np.frombuffer(b"".join(kept.values()), PACKED).reshape(len(chosen), count, sides)
    return Atlas(engine, chosen, rows)


def coverage(engine: TransformersEngine, cache_dir: Path | None = None, *, fast: bool = False) -> Coverage:
    """Which neurons are labelled already. Raises Unsupported for a model with experts."""
    require_dense(engine)
    cache = _cache(engine, cache_dir, fast)
    counts = cache.counts()
    layers = {layer: counts.get(layer, 0) for layer in range(engine.sites.layers)}
    return Coverage(model=engine.info.name, file=str(cache.path), layers=layers, neurons=engine.sites.neurons)


def merge(engine: TransformersEngine, files: Sequence[Path], cache_dir: Path | None = None) -> int:
    """Put the labels of files that other machines made beside one's own; how many were new.

    Raises InvalidInput for a file that is not there or holds another model's labels.
    """
    caches = {cache.path.name: cache for cache in (_cache(engine, cache_dir, fast) for fast in (False, True))}
    for file in files:
        if file.name not in caches:
            raise InvalidInput(
                f"{file} does not hold labels of {engine.info.name}.",
                hint=f"The file of this model is called {min(caches)} or {max(caches)} on every machine.",
            )
    return sum(caches[file.name].absorb(file) for file in files)


def layer_range(text: str) -> tuple[int, ...]:
    """`5` or `0-14` as layers. Raises InvalidInput."""
    found = _LAYERS.match(text)
    if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
        raise InvalidInput(f"{text!r} names no layers.", hint="Write 5, or 0-14.")
    return tuple(range(int(found[1]), int(found[2] or found[1]) + 1))


def _cache(engine: TransformersEngine, cache_dir: Path | None, fast: bool) -> LabelCache:
    return LabelCache(cache_dir or engine.loaded.source.cache_dir, engine.info.hash, fast=fast)
