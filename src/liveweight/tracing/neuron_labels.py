"""Readable labels for neurons, through the unembedding.

Owns which vectors of a neuron are decoded into tokens (`unembedding.py` does it), as the residual stream has them: a
write column after the norm behind the MLP, where there is one, and a read row times the scale of the norm before the
MLP. Labels always come from the base's weights, whatever is active, so that they are the same at every version and can
be kept on disk (`label_cache.py`). Knows nothing of what a neuron did on any prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.sites import Region
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.label_cache import LabelCache
from liveweight.tracing.unembedding import TOP, Coarse, Distributions, Exact, decode, decode_both, rows_at_once

PACKED = np.dtype([("ids", "<i4", (TOP,)), ("probabilities", "<f4", (TOP,)), ("entropy", "<f4")])
"""One side of a label as it is kept: `promotes`, `suppresses`, then what it reads, one after the other."""

Progress = Callable[[int, int], None]  # done, of how many


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenGuess(_Value):
    """A token that a vector decodes into."""

    id: int
    text: str
    probability: float


class Decoded(_Value):
    """A direction of the residual stream as a distribution over tokens."""

    top: tuple[TokenGuess, ...]  # likeliest first
    entropy: float  # nats; the lower, the more the direction is about few tokens

    def text(self, tokens: int = 4) -> str:
        """The likeliest tokens."""
        return " · ".join(guess.text.strip() or repr(guess.text) for guess in self.top[:tokens])


class NeuronLabel(_Value):
    """What a neuron writes and reads, in tokens. A negative activation writes the opposite: `suppresses`."""

    layer: int
    neuron: int
    promotes: Decoded  # the write column
    suppresses: Decoded  # the write column, negated
    reads: dict[str, Decoded]  # `gate` and `up`, or `up` alone where the MLP is not gated

    @property
    def name(self) -> str:
        """As neurons are written: layer:neuron."""
        return f"{self.layer}:{self.neuron}"

    def side(self, side: str) -> Decoded:
        """`promotes`, `suppresses`, or what it reads by `gate` or `up`."""
        return {"promotes": self.promotes, "suppresses": self.suppresses, **self.reads}[side]

    def text(self, *, negative: bool = False, tokens: int = 4) -> str:
        """The likeliest tokens that the neuron writes (when its activation is negative, those of the opposite)."""
        return (self.suppresses if negative else self.promotes).text(tokens)


def label_neurons(
    engine: TransformersEngine,
    neurons: Iterable[Neuron],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[Neuron, NeuronLabel]:
    """Labels of (layer, neuron) pairs; what is not on disk yet is computed, in bounded memory, and kept there.

    `cache_dir` is the model's own cache unless given. Safe for several processes. Raises UnknownSite for a layer or
    neuron that is not there, and Unsupported for a model with experts.
    """
    kept = packed_labels(engine, neurons, cache_dir=cache_dir, progress=progress)
    return {pair: label_of(engine, pair, packed) for pair, packed in kept.items()}


def label_layer(
    engine: TransformersEngine, layer: int, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> dict[Neuron, NeuronLabel]:
    """Labels of all neurons of a layer; see `label_neurons`."""
    engine.sites.check_layer(layer)
    neurons = range(engine.sites.neurons_of(layer))
    return label_neurons(engine, [(layer, neuron) for neuron in neurons], cache_dir=cache_dir, progress=progress)


def packed_labels(
    engine: TransformersEngine,
    neurons: Iterable[Neuron],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    fast: bool = False,
) -> dict[Neuron, bytes]:
    """As `label_neurons`, each label as it is kept: its sides' `PACKED`, without texts.

    `fast` ones come from a coarse product, see `unembedding.Coarse`, and are kept apart.
    """
    require_dense(engine)
    wanted = list(dict.fromkeys(neurons))
    for layer, neuron in wanted:
        engine.sites.check_neurons(layer, (neuron,))
    cache = LabelCache(cache_dir or engine.loaded.source.cache_dir, engine.info.hash, fast=fast)
    found = cache.get(wanted)
    missing: dict[int, list[int]] = {}
    for layer, neuron in wanted:
        if (layer, neuron) not in found:
            missing.setdefault(layer, []).append(neuron)
    if progress is not None:
        progress(len(found), len(wanted))
    by = Coarse(engine) if fast and missing else Exact(engine)
    for layer, places in missing.items():
        for part in _computed(engine, by, layer, places):
            # Kept piece by piece, so that a whole layer cut short goes on from where it was.
            cache.put(part)
            found |= part
            if progress is not None:
                progress(len(found), len(wanted))
    return {pair: found[pair] for pair in wanted}


# ------------------------------------------------------------------------------------------------------- decoding


def write_directions(engine: TransformersEngine, layer: int, neurons: list[int]) -> Tensor:
    """What each neuron adds to the residual stream a unit of activation: (n, width), the base's, in float32.

    Behind a norm after the MLP this is only the direction: the norm's denominator depends on the input.
    """
    with engine.gate.step():
        site = engine.sites.mlp_part(layer, "down")
        written = engine.weights.base(site, Region("columns", torch.tensor(neurons))).T  # (n, width)
        norm = engine.sites.write_norm(layer)
        return written if norm is None else norm.direction(written, engine.weights.base(norm.site))


def read_directions(engine: TransformersEngine, layer: int, neurons: list[int]) -> dict[str, Tensor]:
    """The directions of the residual stream that each neuron reads, by part: (n, width), the base's, in float32."""
    with engine.gate.step():
        norm = engine.sites.read_norm(layer)
        scale = 1.0 if norm is None else norm.scale(engine.weights.base(norm.site))
        where = Region("rows", torch.tensor(neurons))
        return {
            part: engine.weights.base(engine.sites.mlp_part(layer, part), where) * scale for part in read_parts(engine)
        }


def decode_directions(engine: TransformersEngine, directions: Tensor) -> list[Decoded]:
    """Directions of the residual stream (n, width) as distributions over tokens."""
    return _told(engine, decode(engine, directions))


def _computed(engine: TransformersEngine, by: Exact, layer: int, neurons: list[int]) -> Iterator[dict[Neuron, bytes]]:
    """Labels of some neurons of one layer as they are kept, in pieces that fit in memory."""
    pieces = -(-len(neurons) // rows_at_once(engine))
    for part in np.array_split(neurons, pieces):
        piece = part.tolist()
        sides = [*decode_both(engine, write_directions(engine, layer, piece), by)]
        sides += [decode(engine, each, by) for each in read_directions(engine, layer, piece).values()]
        rows = np.empty((len(piece), len(sides)), PACKED)
        for place, side in enumerate(sides):
            short = TOP - side.ids.shape[1]  # a vocabulary of fewer tokens
            rows[:, place]["ids"] = np.pad(side.ids.numpy(), ((0, 0), (0, short)), constant_values=-1)
            rows[:, place]["probabilities"] = np.pad(side.probabilities.numpy(), ((0, 0), (0, short)))
            rows[:, place]["entropy"] = side.entropies.numpy()
        yield {(layer, neuron): row.tobytes() for neuron, row in zip(piece, rows, strict=True)}


def label_of(engine: TransformersEngine, neuron: Neuron, packed: bytes) -> NeuronLabel:
    """A label as it is kept, with its tokens' texts."""
    sides = np.frombuffer(packed, PACKED)
    parts = [
        _told(engine, Distributions(*(torch.from_numpy(side[name].copy()[None]) for name in PACKED.names or ())))[0]
        for side in sides
    ]
    return NeuronLabel(
        layer=neuron[0],
        neuron=neuron[1],
        promotes=parts[0],
        suppresses=parts[1],
        reads=dict(zip(read_parts(engine), parts[2:], strict=True)),
    )


def read_parts(engine: TransformersEngine) -> tuple[str, ...]:
    """The matrices by which a neuron reads."""
    return ("gate", "up") if engine.sites.gated else ("up",)


def _told(engine: TransformersEngine, found: Distributions) -> list[Decoded]:
    """Distributions with their tokens' texts."""
    text = engine.format.tokenizer.decode
    rows = zip(found.ids.tolist(), found.probabilities.tolist(), found.entropies.flatten().tolist(), strict=True)
    return [
        Decoded(
            top=tuple(
                TokenGuess(id=token, text=str(text([token])), probability=probability)
                for token, probability in zip(ids, probabilities, strict=True)
                if token >= 0
            ),
            entropy=entropy,
        )
        for ids, probabilities, entropy in rows
    ]
