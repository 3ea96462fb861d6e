"""rome: one fact, one layer, one rank.

Owns the closed-form edit of one write matrix, W += δ uᵀ/(uᵀk) with u = C⁻¹k, after "Locating and Editing Factual
Associations in GPT" (Meng et al. 2022). One key k, the mean over the contexts, serves everywhere. δ is looked for by
steps of Polyak's length ("Minimization of unsmooth functionals", 1969) on what the answer's tokens fall short of a
margin, where the paper has Adam on their likelihood: it takes a third of the steps. Knows nothing of whether the change
is worth its damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.base import Message
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Context
from liveweight.methods.covariance import covariance, whitened
from liveweight.methods.trials import (
    Predictions,
    chosen_contexts,
    down_output,
    hooked,
    keyed,
    layer_at,
    named,
    no_mend,
    outcome,
    stalled,
    without_super_neurons,
    works,
)
from liveweight.settings import MethodSettings

DEPTH = 1 / 6  # the layer by relative depth: early, where facts about a subject are gathered
CLOSE = 0.3  # of the margin: near enough to stop
RIVALS = 48  # tokens that each target is compared with while δ is looked for
_KL_WEIGHT = 1.0
_STEP = 1.0  # how far δ moves a step at most, as a multiple of |W k|


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A rank-one change of one `down` weight (width, neurons) that gives the targets.

    Raises NoMendFound when the best δ within the norm and the steps does not do it, Unsupported for layers of experts.
    """
    layer = layer_at(engine, settings, DEPTH)
    statistics = covariance(engine, layer, settings)
    before = outcome(engine, case)
    wished = wished_value(engine, case, layer, settings)
    key, value, delta = wished.key, wished.value, wished.delta
    reader = whitened(statistics, key) * without_super_neurons(engine, layer)
    site = f"layers.{layer}.mlp.down.weight"
    right = (reader / (reader @ key))[None]  # (1, neurons)
    found = Adjustment(
        name=named("rome", case),
        method="rome",
        ops=(LowRank(site=site, left=delta[:, None], right=right),),
        note=f"Rank one at {site}, |δ| {float(delta.norm() / value.norm()):.2f} |Wk|, {wished.steps} steps.",
    )
    if not works(case, outcome(engine, case, found), before):
        share = float(delta.norm() / value.norm())
        tried = f"layer {layer}, {wished.steps} steps, |δ| up to {share:.1f} |Wk|, short by {wished.short:.1f} nats"
        raise no_mend("rome", case, [tried])
    return found


@dataclass(frozen=True)
class Wished:
    """What a layer's MLP is to write at one fact's key. All in float64."""

    contexts: tuple[Context, ...]  # those that the fact is edited in
    places: tuple[int, ...]  # the edit token's absolute position in each
    key: Tensor  # (neurons,) the mean of the activations at the edit token
    value: Tensor  # (width,) what the MLP writes there now, W k
    delta: Tensor  # (width,) what is to be written besides
    steps: int
    short: float  # nats by which the worst token falls short of its margin, with that


def wished_value(engine: TransformersEngine, case: Case, layer: int, settings: MethodSettings) -> Wished:
    """The value change δ that gives the case's targets when it is added at the edit token of one dense layer."""
    contexts, places = edit_tokens(engine, case, chosen_contexts(case, settings))
    essence = _essence(engine, case)
    rows = [context.prompt + keyed(context) for context in contexts]
    starts = list(places)
    if essence is not None:
        rows.append(essence[0])
        starts.append(essence[1])
    replay = engine.record(rows, starts, layers=[layer], neurons=[layer])
    key = replay.neurons[layer][: len(contexts), 0].double().mean(0)
    value = engine.sites.weight(f"layers.{layer}.mlp.down.weight").read().double() @ key
    predictions = Predictions.of(replay, contexts, [keyed(context) for context in contexts])
    proper = _proper(contexts, predictions)
    delta, steps, short = _optimised(engine, replay, layer, predictions, proper, len(contexts), value, settings)
    return Wished(contexts, places, key, value, delta, steps, short)


def _proper(contexts: Sequence[Context], predictions: Predictions) -> Tensor:
    """(n,) which predictions are of answers proper, and not of what opens them."""
    steps = [step >= context.key[0] for context in contexts for step in range(len(keyed(context)))]
    return torch.tensor(steps, device=predictions.tokens.device)


def edit_tokens(
    engine: TransformersEngine, case: Case, contexts: Sequence[Context]
) -> tuple[tuple[Context, ...], tuple[int, ...]]:
    """The contexts to edit in, and the absolute position of the edit token in each.

    It is the subject's last token where the question as asked names the subject; contexts that do not are then left
    out, because their key would be another kind of key. Otherwise it is each prompt's last token.
    """
    if case.subject:
        located = [_subject(engine, context, case.subject) for context in contexts]
        if located[0] is not None and located[0][1] > 0:
            kept = [
                (context, span[1])
                for context, span in zip(contexts, located, strict=True)
                if span is not None and 0 < span[1] < len(context.prompt)
            ]
            return tuple(context for context, _ in kept), tuple(place for _, place in kept)
    return tuple(contexts), tuple(len(context.prompt) - 1 for context in contexts)


def _subject(engine: TransformersEngine, context: Context, subject: str) -> tuple[int, int] | None:
    """The subject's first and last token in a context's prompt, where it is there."""
    if context.text:
        return engine.format.locate_text(context.text, subject, special=True)
    if tuple(engine.encode(context.messages)) != context.prompt:
        return None  # a prompt that was put together in another way has its tokens elsewhere
    return engine.format.locate(context.messages, subject)


def _essence(engine: TransformersEngine, case: Case) -> tuple[tuple[int, ...], int] | None:
    """`{subject} is a` as a chat, and the subject's last token in it: what the subject is should stay."""
    if not case.subject or _subject(engine, case.contexts[0], case.subject) is None:
        return None
    messages = [Message("user", f"{case.subject} is a")]
    span = engine.format.locate(messages, case.subject)
    if span is None or span[1] < 1:
        return None  # a replay needs a token before the edited one
    return tuple(engine.encode(messages)), span[1]


def _optimised(
    engine: TransformersEngine,
    replay: Replay,
    layer: int,
    predictions: Predictions,
    proper: Tensor,
    contexts: int,
    value: Tensor,
    settings: MethodSettings,
) -> tuple[Tensor, int, float]:
    """δ (width,) float64, the steps taken, and the nats by which the worst token falls short of its margin.

    δ is added to what `down` gives at the edit token, the first column of every row; rows behind the contexts' are
    there for the KL term, at their last token. The loss is what the leads fall short of the margin (answers proper, and
    what would not be said now) or of half of what they are now (the rest); since its least value is 0, each step has
    Polyak's length. `proper` (n,) says which predictions are of answers proper.
    """
    largest, close = settings.clamp_norm * float(value.norm()), CLOSE * settings.margin
    point = down_output(engine, layer)
    delta = torch.zeros(len(value), device=value.device, requires_grad=True)
    tokens, at = predictions.tokens, (predictions.rows, predictions.columns)
    last = torch.tensor([length - 1 for length in replay.lengths()[contexts:]], dtype=torch.int64, device=value.device)
    quiet = torch.arange(contexts, contexts + len(last), device=value.device)
    with engine.gate.step(), torch.no_grad():
        reference = engine.unembed(replay.final[quiet, last]).float().log_softmax(-1)
        leads, _ = engine.leads(replay.final[at], tokens)
        rivals = engine.rivals(replay.final[at], tokens, RIVALS)
        goal = torch.where(proper | (leads < 0), settings.margin, leads.clamp(max=settings.margin) / 2)

    def add(values: Tensor) -> Tensor:
        return torch.cat((values[:, :1] + delta.to(values.dtype), values[:, 1:]), dim=1)

    best, least, short = delta.detach().clone(), float("inf"), float("inf")
    losses: list[float] = []
    for step in range(settings.max_steps + 1):
        with hooked(engine, point, add):
            final = replay.run(layer)
            gap = torch.relu(goal - engine.leads(final[at], tokens, rivals)[0])
            if float(gap.detach().max()) < close:
                # As far as the usual rivals go. Whoever else may lead now is looked at too, from here on.
                others = engine.rivals(final[at], tokens, 1)
                rivals = torch.cat((rivals, others), dim=1)
                gap = torch.relu(goal - engine.leads(final[at], tokens, others)[0])
            loss = gap.sum()
            if len(last):
                live = engine.unembed(final[quiet, last]).float().log_softmax(-1)
                loss = loss + _KL_WEIGHT * (reference.exp() * (reference - live)).sum(-1).mean()
            losses.append(float(loss.detach()))
            if losses[-1] < least:
                best, least, short = delta.detach().clone(), losses[-1], float(gap.detach().max())
            if short < close or step == settings.max_steps or stalled(losses):
                break
            (gradient,) = torch.autograd.grad(loss, [delta])
        with torch.no_grad():
            size = gradient.norm().clamp(min=1e-12)
            delta.sub_(gradient / size * (loss / size).clamp(max=_STEP * float(value.norm())))
            norm = float(delta.norm())
            if norm > largest:
                delta.mul_(largest / norm)
    return best.double(), step, short
