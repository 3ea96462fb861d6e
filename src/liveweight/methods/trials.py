"""What the plain methods share: contexts and layers to work on, where answers are predicted, whether a trial worked.

Owns reading a case against a model under a trial adjustment. A trial is previewed: weights and hooks are afterwards
what they were. Knows no method's way of finding a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.base import Score, ScoreItem
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, Unsupported
from liveweight.methods.base import Case, Context
from liveweight.methods.wording import goes_on
from liveweight.settings import MethodSettings
from liveweight.sites import ActivationPoint
from liveweight.tracing import Neuron, super_neurons

_MOST = 0.5  # the share of the contexts that a change must hold in, besides the question as it was asked


@dataclass(frozen=True)
class Outcome:
    """How the model answers in each of a case's contexts, teacher-forced."""

    logprobs: Tensor  # (contexts,) of the target through its key, in nats
    said: Tensor  # (contexts,) whether greedy decoding gives exactly that, no word longer; of a text its key alone
    gone: Tensor  # (contexts,) whether greedy decoding leaves the judged answer where it parts from the target

    @property
    def mends(self) -> bool:
        """The wished answer comes, to the question as asked and in most other contexts."""
        return _mostly(self.said)

    @property
    def removes(self) -> bool:
        """The judged answer no longer comes, to the question as asked and in most other contexts."""
        return _mostly(self.gone)


def outcome(
    engine: TransformersEngine, case: Case, trial: Adjustment | None = None, contexts: Sequence[Context] | None = None
) -> Outcome:
    """Score the case's contexts with `trial` on top of the present state."""
    contexts = case.contexts if contexts is None else contexts
    extra = (Active(trial),) if trial is not None else ()
    with engine.preview((*engine.state, *extra)):
        scores = scored(engine, contexts)
    gone, said = [], []
    for context, score in zip(contexts, scores, strict=True):
        # How the model opens its reply to a text that is to be gone on with is its own affair.
        said.append(says(engine, context, score, 0 if case.messages else context.key[0]))
        apart = parting(case.answer_tokens, context.target)
        judged = torch.tensor(case.answer_tokens[: (apart or 0) + 1])
        seen = score.argmax[: len(judged)]
        gone.append(apart is not None and bool((seen != judged[: len(seen)]).any()))
    return Outcome(
        logprobs=torch.stack([score.logprobs[:-1].sum() for score in scores]),
        said=torch.tensor(said),
        gone=torch.tensor(gone),
    )


def works(case: Case, found: Outcome, before: Outcome) -> bool:
    """Whether an outcome is what was asked for: an answer taught (fix), left (bad) or made surer (good)."""
    if case.kind == "fix":
        return found.mends
    if case.kind == "bad":
        return found.removes
    surer = found.logprobs > before.logprobs
    return bool(found.said[0]) and bool((found.said >= before.said).all()) and _mostly(surer)


def keyed(context: Context) -> tuple[int, ...]:
    """A context's target through the end of the answer proper; what may follow is not asked for."""
    return context.target[: context.key[1]] if 0 < context.key[1] <= len(context.target) else context.target


def closed(engine: TransformersEngine, context: Context) -> tuple[int, ...]:
    """The same and the token that ends its last word there, where the target has one: a full stop."""
    behind = context.target[len(keyed(context)) :][:1]
    return (*keyed(context), *(token for token in behind if not lengthens(engine, context, token)))


def scored(engine: TransformersEngine, contexts: Sequence[Context]) -> list[Score]:
    """Each context's keyed target behind its prompt, and one token more: its `argmax` is what would follow."""
    return engine.score([ScoreItem(each.prompt, (*keyed(each), keyed(each)[-1])) for each in contexts])


def says(engine: TransformersEngine, context: Context, score: Score, first: int = 0) -> bool:
    """Whether greedy decoding gives the keyed target from its token `first` on, no word longer where that is closed."""
    *chosen, after = score.argmax.tolist()
    ends = closed(engine, context) == keyed(context) or not lengthens(engine, context, after)
    return ends and tuple(chosen[first:]) == keyed(context)[first:]


def lengthens(engine: TransformersEngine, context: Context, token: int) -> bool:
    """Whether a token behind the keyed target would make its last word a longer one."""
    text = engine.format.decode(keyed(context))
    return goes_on(text, engine.format.decode([*keyed(context), token]).removeprefix(text))


def parting(answer: Sequence[int], target: Sequence[int]) -> int | None:
    """The first place where two answers differ; None where one begins with all of the other."""
    return next((i for i, (a, b) in enumerate(zip(answer, target, strict=False)) if a != b), None)


def chosen_contexts(case: Case, settings: MethodSettings) -> tuple[Context, ...]:
    """The contexts to optimise on: the question as asked, then others spread evenly over the rest."""
    return case.contexts[:1] + tuple(spread(case.contexts[1:], settings.max_contexts - 1))


def spread(contexts: Sequence[Context], most: int) -> Sequence[Context]:
    """At most so many contexts, evenly over all of them."""
    return [contexts[index * len(contexts) // most] for index in range(most)] if len(contexts) > most else contexts


def dense_layers(engine: TransformersEngine, settings: MethodSettings) -> list[int]:
    """The layers that may be changed: `settings.layer`, or every layer whose MLP is dense.

    Raises UnknownSite for a layer that is not there, Unsupported where its MLP is made of experts.
    """
    sites = engine.sites
    if settings.layer is not None:
        sites.check_layer(settings.layer)
    wished = range(sites.layers) if settings.layer is None else [settings.layer]
    dense = [layer for layer in wished if not sites.experts_of(layer)]
    if not dense:
        where = "No layer" if settings.layer is None else f"Layer {settings.layer}"
        verb = "has" if settings.layer is None else "has no"
        raise Unsupported(
            f"{where} of this {sites.architecture} model {verb} a single MLP: each token runs through a few experts.",
            hint="Use a method that does not edit one MLP, or name a dense layer where the model has one.",
            architecture=sites.architecture,
        )
    return dense


def layer_at(engine: TransformersEngine, settings: MethodSettings, depth: float) -> int:
    """The dense layer nearest to a relative depth from 0 to 1, or the one that the settings name."""
    wished = depth * engine.sites.layers
    return min(dense_layers(engine, settings), key=lambda layer: (abs(layer - wished), layer))


def down_output(engine: TransformersEngine, layer: int) -> ActivationPoint:
    """What a dense MLP's write matrix gives, before any norm behind it: (B, T, width)."""
    neurons = engine.sites.activation(f"layers.{layer}.mlp.neurons")
    return ActivationPoint(f"layers.{layer}.mlp.down", neurons.module, "output", engine.sites.width)


def without_super_neurons(engine: TransformersEngine, layer: int) -> Tensor:
    """(neurons,) 1 for every neuron of a dense layer, 0 for its super neurons: those columns must keep every bit."""
    device = engine.sites.weight(f"layers.{layer}.mlp.down.weight").parameter.device
    kept = torch.ones(engine.sites.neurons_of(layer), device=device)
    kept[[neuron for where, neuron in sorted(super_neurons(engine)) if where == layer]] = 0.0
    return kept


def scaling(neurons: Sequence[Neuron], factor: float) -> tuple[ScaleNeurons, ...]:
    """Scale the write columns of neurons by one factor: an op a layer, in the model's order."""
    layers: dict[int, list[int]] = {}
    for layer, neuron in sorted(neurons):
        layers.setdefault(layer, []).append(neuron)
    return tuple(
        ScaleNeurons(layer=layer, neurons=tuple(own), factors=torch.full((len(own),), factor))
        for layer, own in layers.items()
    )


@contextmanager
def hooked(
    engine: TransformersEngine, point: ActivationPoint, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Hold the model for one step with gradients and a temporary hook; nobody else's step sees the hook."""
    with engine.gate.step(), torch.enable_grad():
        handle = point.on(change)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Predictions:
    """Where in a replay the targets' tokens are predicted."""

    rows: Tensor  # (n,)
    columns: Tensor  # (n,)
    tokens: Tensor  # (n,) what should come there

    @classmethod
    def of(cls, replay: Replay, contexts: Sequence[Context], targets: Sequence[Sequence[int]]) -> Predictions:
        """Of `targets[i]` behind the prompt of context i, which is row i of the replay."""
        places = [
            (*replay.at(row, len(context.prompt) - 1 + step), token)
            for row, (context, target) in enumerate(zip(contexts, targets, strict=True))
            for step, token in enumerate(target)
        ]
        rows, columns, tokens = (torch.tensor(part, device=replay.ids.device) for part in zip(*places, strict=True))
        return cls(rows, columns, tokens)

    def logprobs(self, engine: TransformersEngine, final: Tensor, contexts: int) -> Tensor:
        """Log-probability of each context's target, (contexts,), from what left the final norm (B, T, width)."""
        logits = engine.unembed(final[self.rows, self.columns]).float()
        each = logits.log_softmax(-1).gather(1, self.tokens[:, None])[:, 0]
        return each.new_zeros(contexts).index_add(0, self.rows, each)


def stalled(losses: Sequence[float], window: int = 5) -> bool:
    """Whether the last `window` steps took too little off the loss (nats) to go on.

    Little is less where the answer is not yet the likelier half: a slow start may still get there.
    """
    least = 0.1 if min(losses) < math.log(2) else 0.01
    return len(losses) > window and min(losses[:-window]) - min(losses[-window:]) < least


def no_mend(method: str, case: Case, tried: Sequence[str]) -> NoMendFound:
    """The error that says what a method tried in vain."""
    wished = {"fix": f"{case.wanted!r} come", "bad": f"{case.answer!r} go", "good": f"{case.answer!r} surer"}[case.kind]
    return NoMendFound(
        f"{method} did not make {wished} in answer to {case.question!r}: it tried {'; '.join(tried)}.",
        hint="Try another method (auto tries them all), another layer, or more steps.",
        method=method,
        tried=list(tried),
    )


def named(method: str, case: Case) -> str:
    """An adjustment's name: the method, the question and what is wished for."""
    wished = {"fix": f" -> {case.wanted}", "bad": " (not that)", "good": " (keep)"}[case.kind]
    return f"{method}: {case.question}{wished}"


def contest(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The judged answer and what it is compared with, each through the token where they part.

    Where they do not part (a `good` answer), the answer through its key, and nothing: each token's runner-up.
    """
    target = case.contexts[0].target
    apart = parting(case.answer_tokens, target)
    if apart is None:
        return keyed(case.contexts[0]), ()
    return case.answer_tokens[: apart + 1], target[: apart + 1]


def _mostly(held: Tensor) -> bool:
    return bool(held[0]) and (len(held) == 1 or float(held[1:].float().mean()) >= _MOST)
