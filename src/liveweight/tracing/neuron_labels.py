"""Readable labels for neurons, through the unembedding.

Owns the decoding of a neuron's vectors into tokens, softmax(U · norm(v)), with U the unembedding and norm the final
norm without its bias (a logit lens on weights: Geva et al. 2022, Dar et al. 2023). Vectors are taken as the residual
stream has them: a write column after the norm behind the MLP, where there is one, and a read row times the scale of the
norm before the MLP. Labels always come from the base's weights, whatever is active, so that they are the same at every
version and can be kept on disk (`label_cache.py`). Knows nothing of what a neuron did on any prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.sites import Norm, Region
from liveweight.tracing.capture import Neuron, require_dense
from liveweight.tracing.label_cache import LabelCache

TOP = 8  # tokens of a label
_LOGITS = 16 * 1024 * 1024  # the most logits in memory at once
_ROWS = 8192  # of the unembedding in memory at once
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
    require_dense(engine)
    wanted = list(dict.fromkeys(neurons))
    for layer, neuron in wanted:
        engine.sites.check_neurons(layer, (neuron,))
    cache = LabelCache(cache_dir or engine.loaded.source.cache_dir, engine.info.hash)
    found = {pair: NeuronLabel.model_validate_json(text) for pair, text in cache.get(wanted).items()}
    missing: dict[int, list[int]] = {}
    for layer, neuron in wanted:
        if (layer, neuron) not in found:
            missing.setdefault(layer, []).append(neuron)
    if progress is not None:
        progress(len(found), len(wanted))
    for layer, places in missing.items():
        for part in _computed(engine, layer, places):
            # Kept piece by piece, so that a whole layer cut short goes on from where it was.
            cache.put({(each.layer, each.neuron): each.model_dump_json() for each in part})
            found |= {(each.layer, each.neuron): each for each in part}
            if progress is not None:
                progress(len(found), len(wanted))
    return {pair: found[pair] for pair in wanted}


def label_layer(
    engine: TransformersEngine, layer: int, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> dict[Neuron, NeuronLabel]:
    """Labels of all neurons of a layer; see `label_neurons`."""
    engine.sites.check_layer(layer)
    neurons = range(engine.sites.neurons_of(layer))
    return label_neurons(engine, [(layer, neuron) for neuron in neurons], cache_dir=cache_dir, progress=progress)


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
        parts = ("gate", "up") if engine.sites.gated else ("up",)
        return {part: engine.weights.base(engine.sites.mlp_part(layer, part), where) * scale for part in parts}


def decode_directions(engine: TransformersEngine, directions: Tensor) -> list[Decoded]:
    """Directions of the residual stream (n, width) as distributions over tokens."""
    return _decoded(engine, token_logits(engine, directions.float()))


def token_logits(engine: TransformersEngine, directions: Tensor) -> Tensor:
    """U · norm(v) of directions (n, width): (n, vocabulary), from the base's unembedding, read a part at a time."""
    with engine.gate.step():
        kind = engine.sites.map.norm_kind
        final = Norm("final_norm.weight", kind == "rms_plus_one", kind == "layer")
        if final.centred:
            directions = directions - directions.mean(-1, keepdim=True)
        size = directions.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)  # a zero vector decodes into nothing
        normed = final.direction(directions / size, engine.weights.base(final.site).to(directions))
        vocabulary = engine.sites.vocabulary
        logits = normed.new_empty(len(normed), vocabulary)
        for start in range(0, vocabulary, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, vocabulary))
            part = engine.weights.base("lm_head.weight", Region("rows", rows))
            torch.mm(normed, part.T, out=logits[:, start : start + len(rows)])
        return logits


def _computed(engine: TransformersEngine, layer: int, neurons: list[int]) -> Iterator[list[NeuronLabel]]:
    """Labels of some neurons of one layer, in pieces that fit in memory."""
    size = max(1, _LOGITS // engine.sites.vocabulary)
    for start in range(0, len(neurons), size):
        piece = neurons[start : start + size]
        written = token_logits(engine, write_directions(engine, layer, piece))
        promotes = _decoded(engine, written)
        suppresses = _decoded(engine, written.neg_())
        del written
        reads = {
            part: _decoded(engine, token_logits(engine, directions))
            for part, directions in read_directions(engine, layer, piece).items()
        }
        yield [
            NeuronLabel(
                layer=layer,
                neuron=neuron,
                promotes=promotes[row],
                suppresses=suppresses[row],
                reads={part: decoded[row] for part, decoded in reads.items()},
            )
            for row, neuron in enumerate(piece)
        ]


def _decoded(engine: TransformersEngine, logits: Tensor) -> list[Decoded]:
    """The distribution of each row of (n, vocabulary)."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    decode = engine.format.tokenizer.decode
    return [
        Decoded(
            top=tuple(
                TokenGuess(id=token, text=str(decode([token])), probability=probability)
                for token, probability in zip(ids, probabilities, strict=True)
            ),
            entropy=entropy,
        )
        for ids, probabilities, entropy in zip(tokens.tolist(), values.exp().tolist(), entropies.tolist(), strict=True)
    ]
