"""What a report says of a change beyond the guard: the answer after it, the neurons, the weights, the key.

Owns these measurements under a state that is only previewed. Knows nothing of why a change was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.adjustments import (
    Active,
    Adjustment,
    Affine,
    Clamp,
    Dense,
    Entries,
    Gain,
    LowRank,
    ReplaceNeurons,
    ScaleNeurons,
    State,
)
from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import Unsupported
from liveweight.ledger import Key
from liveweight.reports import TouchedNeuron, WeightsMoved
from liveweight.sites.views import WHOLE
from liveweight.tracing import decode_directions, label_neurons

# Where in the model's depth two questions are told apart best: measured on capitals in three wordings, where the
# middle layers answer to the wording alone (every pair of countries has a cosine above 0.9) and the last ones to the
# opening of the answer alone.
_KEY_DEPTH = 0.85
_AFTER_TOKENS = 40
_SHOWN = 8
_GUESSES = 256  # prompts whose last answer is remembered


def key_of(engine: TransformersEngine, prompt: Sequence[int]) -> Key | None:
    """What the question wakes: the neurons of one late layer at the prompt's last token. None with experts there."""
    layer = int(_KEY_DEPTH * engine.info.layers)
    if engine.sites.experts_of(layer):
        return None
    site = f"layers.{layer}.mlp.neurons"
    return Key(layer, engine.trace(prompt, [site]).values[site][-1])


def prompt_hash(messages: Sequence[Message]) -> str:
    """sha256 of a chat: two questions with the same hash were asked in the same words."""
    turns = [[message.role, " ".join(message.content.split())] for message in messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def answer_under(
    engine: TransformersEngine, state: State, prompt: Sequence[int], draft: Sequence[int] = ()
) -> tuple[str, tuple[int, ...]]:
    """The greedy answer to a prompt under a state, its text and its tokens without the one that ends it.

    `draft` is a guess, else what was said last to this prompt is one: as far as it is right it is read in one pass
    instead of being generated.
    """
    asked = tuple(prompt)
    with engine.gate.step():
        guess = tuple(draft or engine.guesses.pop(asked, ()))[: _AFTER_TOKENS - 1]
        text, ids = _answered(engine, state, asked, guess)
        engine.guesses[asked] = ids
        while len(engine.guesses) > _GUESSES:
            engine.guesses.pop(next(iter(engine.guesses)))
    return text, ids


def _answered(
    engine: TransformersEngine, state: State, prompt: tuple[int, ...], guess: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    if engine.info.context:  # behind what is accepted there has to be room to go on
        guess = guess[: max(0, engine.info.context - len(prompt) - 1)]
    with engine.preview(state):
        accepted: list[int] = []
        if guess:
            said = engine.logits(prompt, guess).argmax(-1).tolist()  # one more than guessed
            right = next((place for place, token in enumerate(guess) if said[place] != token), len(guess))
            if said[right] in engine.format.end_tokens:
                return engine.format.decode(guess[:right]).strip(), guess[:right]
            if not engine.activations.hooks:  # some of which tell what was said from what was asked
                accepted = list(guess[:right])
        tokens = list(engine.continue_from([*prompt, *accepted], Sampling(max_tokens=_AFTER_TOKENS - len(accepted))))
    ids = [*accepted, *(token.id for token in tokens if token.id not in engine.format.end_tokens)]
    text = engine.format.decode(ids).strip()
    return (f"{text}…" if tokens and tokens[-1].finish == "length" else text), tuple(ids)


def moved(engine: TransformersEngine, adjustment: Adjustment) -> WeightsMoved:
    """How many of the model's weights an adjustment rewrites, counted on top of the present state."""
    sites = tuple(engine.weights.touched((Active(adjustment),)))
    entries = 0
    with engine.gate.step():
        before = {site: engine.sites.weight(site).gather(WHOLE) for site in sites}
        with engine.preview((*engine.state, Active(adjustment))):
            for site in sites:
                entries += int((engine.sites.weight(site).gather(WHOLE) != before[site]).sum())
    return WeightsMoved(
        sites=sites,
        entries=entries,
        share=entries / engine.info.parameters,
        survived=engine.survival(Active(adjustment)),
    )


def touched_neurons(engine: TransformersEngine, adjustment: Adjustment) -> tuple[TouchedNeuron, ...]:
    """The neurons that an adjustment acts on most, with the tokens that they promote; new ones, with what they do."""
    effects: dict[tuple[int, int], float] = {}
    written: dict[tuple[int, int], Tensor] = {}  # what new neurons write
    for op in adjustment.ops:
        if isinstance(op, ReplaceNeurons) and op.expert is None:
            written |= {(op.layer, neuron): op.down[:, place] for place, neuron in enumerate(op.neurons)}
        for neuron, effect in _effects(op):
            effects[neuron] = effects.get(neuron, 0.0) + effect
    strongest = sorted(effects, key=lambda neuron: -abs(effects[neuron]))[:_SHOWN]
    new = [pair for pair in strongest if pair in written]
    try:
        found = label_neurons(engine, [pair for pair in strongest if pair not in written])
        labels = {pair: label.text() for pair, label in found.items()}
        if new:
            decoded = decode_directions(engine, torch.stack([written[pair] for pair in new]))
            labels |= {pair: each.text() for pair, each in zip(new, decoded, strict=True)}
    except Unsupported:  # a model with experts: its neurons have no labels yet
        labels = {}
    return tuple(
        TouchedNeuron(layer=layer, neuron=neuron, effect=effects[layer, neuron], label=labels.get((layer, neuron), ""))
        for layer, neuron in strongest
    )


def _effects(op: object) -> list[tuple[tuple[int, int], float]]:
    """((layer, neuron), how much) for the neurons that one op acts on; none where it acts on no dense neuron."""
    match op:
        case ScaleNeurons() if op.expert is None:
            return [((op.layer, n), float(f) - 1.0) for n, f in zip(op.neurons, op.factors, strict=True)]
        case Gain() if op.expert is None:
            each = zip(op.neurons, op.gains.tolist(), op.slopes.tolist(), strict=True)
            return [((op.layer, neuron), gain - 1.0 + slope - 1.0) for neuron, gain, slope in each]
        case Clamp() if op.expert is None:
            return [((op.layer, n), 1.0) for n in op.neurons]
        case Affine() if op.site.endswith(".mlp.neurons"):
            layer = int(op.site.split(".")[1])
            moves = zip(op.indices.tolist(), op.factors.tolist(), op.shifts.tolist(), strict=True)
            return [((layer, neuron), factor - 1.0 + shift) for neuron, factor, shift in moves]
        case ReplaceNeurons() if op.expert is None:
            return [((op.layer, n), float(size)) for n, size in zip(op.neurons, op.down.norm(dim=0), strict=True)]
        case LowRank():
            return _sized(op.site, (op.left.norm(dim=0)[:, None] * op.right).norm(dim=0), op.left.norm(dim=1))
        case Dense():
            return _sized(op.site, op.delta.norm(dim=0), op.delta.norm(dim=-1))
        case Entries() if op.indices.shape[1] == 2 and op.site.endswith(".mlp.down.weight"):
            layer = int(op.site.split(".")[1])
            return [((layer, int(index[1])), float(v)) for index, v in zip(op.indices, op.values, strict=True)]
        case _:
            return []


def _sized(site: str, columns: Tensor, rows: Tensor) -> list[tuple[tuple[int, int], float]]:
    """The largest columns of a write matrix, or rows of a read one, as neurons."""
    part = site.split(".")
    if len(part) != 5 or part[2] != "mlp" or part[3] not in ("down", "up", "gate"):
        return []
    sizes = columns if part[3] == "down" else rows
    if sizes.dim() != 1:
        return []
    top = torch.topk(sizes, min(_SHOWN, len(sizes)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [((int(part[1]), neuron), size) for neuron, size in pairs if size > 0]
