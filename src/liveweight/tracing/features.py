"""Features of one MLP layer: groups of neurons that fire together, with the text they fire on and what they write.

Owns making them from a text, their direction in the residual stream, and what is told of each: its neurons, the places
where its coefficient is largest, the tokens that its direction decodes into. The arithmetic is `factorisation.py`'s,
the text `passages.py`'s, keeping them `feature_cache.py`'s. Activations are read under the present weights, super
neurons left out; directions and tokens are of the base's down projection and unembedding, as labels are. Nothing here
writes to the model, and steering is not known here.

Source: Shafran, Geiger and Geva 2025, "Decomposing MLP Activations into Interpretable Features via Semi-Nonnegative
Matrix Factorization" (arXiv:2506.10920).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.tracing.capture import require_dense
from liveweight.tracing.factorisation import Factors, factorise
from liveweight.tracing.feature_cache import FeatureCache
from liveweight.tracing.feature_report import Context, Feature, FeatureNeuron, Features, FeatureSettings
from liveweight.tracing.neuron_labels import decode_directions, label_neurons, write_directions
from liveweight.tracing.passages import Passage, passages, read_neurons
from liveweight.tracing.plain_text import plain_text
from liveweight.tracing.super_weights import super_neurons

DEPTH = 0.75  # relative, of the layer that is read where none is named: late enough for what is written to be words
NEURONS, CONTEXTS = 8, 5  # of a feature that are told
_BEFORE, _AFTER = 12, 6  # tokens around the one where a coefficient is large
_ACTIVE = 0.1  # of a feature's largest coefficient: a token above it counts as one that has the feature

Progress = Callable[[str, int, int], None]  # what, done, of how many


def find_features(
    engine: TransformersEngine,
    *,
    layer: int | None = None,
    k: int = 100,
    share: float = 0.02,
    text: str | None = None,
    text_name: str | None = None,
    tokens: int = 8192,
    rounds: int = 200,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Features:
    """The features of a layer on a text (None: the plain English that ships), under the present weights.

    `k` features of `share` of the layer's neurons each, from at most `tokens` tokens spread evenly over the text.
    Memory is 4 bytes a neuron and token, a few times over. The same settings give the same features, and a second call
    reads them from `cache_dir` (None: the model's own). Raises UnknownSite for a layer that is not there, Unsupported
    for a model with experts, InvalidInput for a text without tokens and for a `k`, `share`, `tokens` or `rounds` that
    cannot be.
    """
    require_dense(engine)
    place = default_layer(engine) if layer is None else layer
    engine.sites.check_layer(place)
    text_name = text_name or ("plain English" if text is None else "text")
    text = plain_text() if text is None else text
    settings = FeatureSettings(
        layer=place,
        k=k,
        share=share,
        tokens=tokens,
        rounds=rounds,
        seed=seed,
        text=text_name,
        text_hash=hashlib.sha256(text.encode()).hexdigest(),
    )
    cache = FeatureCache(cache_dir or engine.loaded.source.cache_dir, engine.info.hash)
    # Asked before the gate closes: what is found for the first time takes passes of its own.
    left_out = tuple(sorted(neuron for at, neuron in super_neurons(engine, cache_dir) if at == place))
    with engine.gate.step():  # so that all of it is read of one state
        version = engine.version.hash
        found = cache.get(version, settings)
        if found is not None:
            return found
        read = passages(engine, text, tokens)
        values = read_neurons(engine, place, read, _told(progress, "Reading the text"))
    values[list(left_out)] = 0.0
    factors = factorise(
        values.to(engine.model.device),
        k,
        share=share,
        rounds=rounds,
        seed=seed,
        progress=_told(progress, "Factorising"),
    )
    found = _report(engine, settings, version, read, values, factors, left_out)
    cache.put(found)
    return found


def last_features(engine: TransformersEngine, cache_dir: Path | None = None) -> Features | None:
    """What was made or asked for last of this model at its present weights; None where nothing was."""
    cache = FeatureCache(cache_dir or engine.loaded.source.cache_dir, engine.info.hash)
    return cache.last(engine.version.hash)


def labelled(engine: TransformersEngine, feature: Feature, cache_dir: Path | None = None) -> Feature:
    """The feature with a label at each of its neurons; see `label_neurons`."""
    pairs = [(feature.layer, each.neuron) for each in feature.neurons]
    labels = label_neurons(engine, pairs, cache_dir=cache_dir)
    neurons = tuple(
        each.model_copy(update={"label": labels[pair].text(negative=each.weight < 0)})
        for each, pair in zip(feature.neurons, pairs, strict=True)
    )
    return feature.model_copy(update={"neurons": neurons})


def residual_directions(engine: TransformersEngine, layer: int, directions: Tensor) -> Tensor:
    """What directions of a layer's neurons (neurons, k) add to the residual stream: (k, width), float32 on the CPU.

    Behind a norm after the MLP only the direction of it means something; see `write_directions`.
    """
    written = write_directions(engine, layer, list(range(engine.sites.neurons_of(layer)))).float()  # (neurons, width)
    return (directions.to(written).T @ written).cpu()


def default_layer(engine: TransformersEngine) -> int:
    """The layer that is read where none is named."""
    return round(DEPTH * (engine.sites.layers - 1))


# ------------------------------------------------------------------------------------------------------ internal


def _report(
    engine: TransformersEngine,
    settings: FeatureSettings,
    version: str,
    read: list[Passage],
    values: Tensor,
    factors: Factors,
    left_out: tuple[int, ...],
) -> Features:
    directions, coefficients = factors.directions.cpu(), factors.coefficients.cpu()
    written = residual_directions(engine, settings.layer, directions)
    promotes, suppresses = decode_directions(engine, written), decode_directions(engine, -written)
    total = float(values.double().pow(2).sum())
    where = [(number, place) for number, each in enumerate(read) for place in range(each.start, len(each.ids))]
    features = []
    for number in range(directions.shape[1]):
        column, row = directions[:, number], coefficients[number]
        top = float(row.max())
        features.append(
            Feature(
                number=number,
                layer=settings.layer,
                energy=float(row.double().pow(2).sum()) / total,
                active=float((row > _ACTIVE * top).float().mean()) if top > 0 else 0.0,
                written=float(written[number].norm()),
                neurons=tuple(
                    FeatureNeuron(neuron=neuron, weight=float(column[neuron]))
                    for neuron in column.abs().topk(min(NEURONS, len(column))).indices.tolist()
                    if float(column[neuron]) != 0
                ),
                contexts=_contexts(engine, read, where, row),
                promotes=promotes[number],
                suppresses=suppresses[number],
            )
        )
    return Features(
        model=engine.info.name,
        model_hash=engine.info.hash,
        version=version,
        settings=settings,
        neurons=len(directions),
        tokens=len(where),
        passages=len(read),
        errors=factors.errors,
        left_out=left_out,
        features=tuple(features),
        directions=directions,
        coefficients=coefficients,
        written=written,
        texts=tuple(str(engine.format.tokenizer.decode([read[a].ids[b]])) for a, b in where[: read[0].read]),
    )


def _contexts(
    engine: TransformersEngine, read: list[Passage], where: list[tuple[int, int]], coefficients: Tensor
) -> tuple[Context, ...]:
    """The places with the largest coefficients, one a passage, the largest first."""
    found: dict[int, Context] = {}
    decode = engine.format.tokenizer.decode
    for at in coefficients.argsort(descending=True, stable=True).tolist():
        number, place = where[at]
        if len(found) == CONTEXTS or not float(coefficients[at]) > 0:
            break
        if number not in found:
            ids = read[number].ids
            found[number] = Context(
                before=str(decode(ids[max(0, place - _BEFORE) : place])),
                token=str(decode([ids[place]])),
                after=str(decode(ids[place + 1 : place + 1 + _AFTER])),
                coefficient=float(coefficients[at]),
            )
    return tuple(found.values())


def _told(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, of: progress(what, done, of)
