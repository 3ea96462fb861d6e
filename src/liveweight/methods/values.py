"""Values: what a layer's MLP is to write where a fact's subject stands, so that the model says the wished answer.

Owns the search for δ, which is added to what `down` gives at the edit token, for one fact or many at once (the value
optimisation of "Locating and Editing Factual Associations in GPT", Meng et al. 2022). The paper lets Adam raise the
answer's likelihood; here the answer's tokens are to lead by a margin. The least loss of every row is then known to be
0, and each step is the shortest one that brings all rows there as far as their slopes tell (Gauss and Newton's, damped
as Levenberg does), which takes a third of the steps. Knows nothing of how a weight is made to write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.half import half_products
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Context
from liveweight.methods.trials import chosen_contexts, down_output, hooked, keyed
from liveweight.settings import MethodSettings
from liveweight.sites import ActivationPoint

CLOSE = 0.3  # of the margin: near enough to stop
RIVALS = 48  # tokens that each target is compared with while δ is looked for
KL_WEIGHT = 1.0  # of what the subject is, in nats
STEP = 1.0  # how far δ moves a step at most, as a multiple of |W k|
_EARLIER = 4  # earlier answers about the same subject that are held
_PATIENCE = 3  # steps that may bring a fact nothing once its answer leads
_AT_ONCE = 12  # facts that are looked for together
_DAMPING = 0.01  # of the mean squared slope of a fact's rows
_PADDING = 96  # padded tokens that cost less than a batch more


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


@dataclass(frozen=True)
class _Row:
    """One sequence: a fact's context with its target, or something else of its subject that is to stay."""

    fact: int
    tokens: tuple[int, ...]
    place: int  # of the edit token
    context: Context | None  # None: what is said at the end should stay
    held: int = 1  # the number of last positions where that is


@dataclass
class _Batch:
    """Rows of like length, recorded from their edit tokens on."""

    replay: Replay
    facts: Tensor  # (rows,) whose δ each row gets
    at: tuple[Tensor, Tensor]  # row and column of each prediction
    tokens: Tensor  # (n,) what should come there
    owner: Tensor  # (n,) whose prediction it is
    goal: Tensor  # (n,) nats by which it should lead
    rivals: Tensor  # (n, k)
    quiet: tuple[Tensor, Tensor]  # row and column where something is said that is to stay
    reference: Tensor  # (m, vocabulary) log-probabilities there


def wished_values(
    engine: TransformersEngine, cases: Sequence[Case], layer: int, settings: MethodSettings
) -> list[Wished]:
    """The value change δ of each case that gives its targets when it is added at its edit token of one dense layer."""
    return [
        each
        for start in range(0, len(cases), _AT_ONCE)
        for each in _search(engine, cases[start : start + _AT_ONCE], layer, settings)
    ]


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


def _held(engine: TransformersEngine, fact: int, case: Case) -> Iterator[_Row]:
    """What else is said of the subject is to stay: `{subject} is a` as a chat, and what earlier changes answered."""
    if not case.subject or _subject(engine, case.contexts[0], case.subject) is None:
        return
    messages = [Message("user", f"{case.subject} is a")]
    span = engine.format.locate(messages, case.subject)
    if span is not None and span[1] > 0:  # a replay needs a token before the edited one
        yield _Row(fact, tuple(engine.encode(messages)), span[1], None)
    names = [tuple(engine.format.encode_text(lead + case.subject)) for lead in (" ", "")]
    earlier = [(prompt, answer, end) for prompt, answer in case.previous for end in _ends(prompt, names) if end > 0]
    for prompt, answer, end in earlier[-_EARLIER:]:
        yield _Row(fact, (*prompt, *answer[:-1]), end, None, held=len(answer))


def _ends(prompt: Sequence[int], names: Sequence[tuple[int, ...]]) -> list[int]:
    """The position of a name's last token where it last stands in a prompt; nothing where it does not."""
    for start in range(len(prompt) - 1, 0, -1):
        for name in names:
            if name and tuple(prompt[start : start + len(name)]) == name:
                return [start + len(name) - 1]
    return []


def _search(engine: TransformersEngine, cases: Sequence[Case], layer: int, settings: MethodSettings) -> list[Wished]:
    edited = [edit_tokens(engine, case, chosen_contexts(case, settings)) for case in cases]
    rows = [
        _Row(fact, context.prompt + keyed(context), place, context)
        for fact, (contexts, places) in enumerate(edited)
        for context, place in zip(contexts, places, strict=True)
    ]
    rows += [row for fact, case in enumerate(cases) for row in _held(engine, fact, case)]
    batches, keys = [], torch.zeros(len(cases), engine.sites.neurons_of(layer), dtype=torch.float64)
    for group in _alike(rows):
        replay = engine.record([r.tokens for r in group], [r.place for r in group], layers=[layer], neurons=[layer])
        batches.append(_batch(engine, replay, group, settings.margin))
        for index, row in enumerate(group):
            if row.context is not None:
                keys[row.fact] += replay.neurons[layer][index, 0].double().cpu() / len(edited[row.fact][0])
    keys = keys.to(engine.model.device)
    values = keys @ engine.sites.weight(f"layers.{layer}.mlp.down.weight").read().double().T  # (facts, width)
    deltas, steps, short = _descended(engine, batches, layer, values.norm(dim=1), settings)
    return [
        Wished(contexts, places, keys[fact], values[fact], deltas[fact].double(), int(steps[fact]), float(short[fact]))
        for fact, (contexts, places) in enumerate(edited)
    ]


def _alike(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """The rows in groups of like length behind their edit tokens, so that little is padded."""
    group: list[_Row] = []
    padding = 0
    for row in sorted(rows, key=lambda row: len(row.tokens) - row.place):
        if group:
            more = (len(row.tokens) - row.place) - (len(group[-1].tokens) - group[-1].place)
            padding += more * len(group)
        if padding > _PADDING:
            yield group
            group, padding = [], 0
        group.append(row)
    if group:
        yield group


def _batch(engine: TransformersEngine, replay: Replay, group: Sequence[_Row], margin: float) -> _Batch:
    """Goals: the margin for answers proper, half of their lead for what opens them.

    What the model would not open its answer with now is not asked for: teaching it would use up the value.
    """
    device = replay.ids.device
    wanted = [
        (index, replay.column(index, len(row.context.prompt) - 1 + step), token, row.fact, step >= row.context.key[0])
        for index, row in enumerate(group)
        if row.context is not None
        for step, token in enumerate(keyed(row.context))
    ]
    rows, columns, tokens, owner, proper = (
        torch.tensor(part, device=device) for part in (zip(*wanted, strict=True) if wanted else [[]] * 5)
    )
    rows, columns, tokens, owner = rows.long(), columns.long(), tokens.long(), owner.long()
    ends = [
        (index, len(row.tokens) - 1 - row.place - back)
        for index, row in enumerate(group)
        if row.context is None
        for back in range(row.held)
    ]
    quiet = tuple(torch.tensor(part, device=device).long() for part in (zip(*ends, strict=True) if ends else [[]] * 2))
    with engine.gate.step(), torch.no_grad():
        final = replay.final[rows, columns]
        leads = engine.leads(final, tokens)[0] if wanted else final[:, 0]
        rivals = engine.rivals(final, tokens, RIVALS) if wanted else tokens[:, None]
        reference = engine.unembed(replay.final[quiet]).float().log_softmax(-1)
    opens = torch.where(leads < 0, float("-inf"), leads.clamp(max=2.0) / 2)
    goal = torch.where(proper.bool(), margin, opens)
    facts = torch.tensor([row.fact for row in group], device=device)
    return _Batch(replay, facts, (rows, columns), tokens, owner, goal, rivals, (quiet[0], quiet[1]), reference)


def _descended(
    engine: TransformersEngine, batches: Sequence[_Batch], layer: int, sizes: Tensor, settings: MethodSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Each fact's δ (facts, width), the steps it took, and the nats by which its worst token falls short, (facts,).

    `sizes` (facts,) are the norms of what is written now. A fact that is near enough moves no more, and batches in
    which no fact moves are not run.
    """
    facts, device, close = len(sizes), sizes.device, CLOSE * settings.margin
    sizes = sizes.float()
    point = down_output(engine, layer)
    deltas = torch.zeros(facts, engine.sites.width, device=device)
    best, least = deltas.clone(), torch.full((facts,), float("inf"), device=device)
    short, steps = least.clone(), torch.zeros(facts, dtype=torch.int64)
    since = torch.zeros(facts, dtype=torch.int64, device=device)  # steps that brought a fact nothing
    moving = torch.ones(facts, dtype=torch.bool, device=device)
    half = half_products(engine.sites.blocks[layer:])
    for step in range(settings.max_steps + 1):
        loss, worst = torch.zeros(facts, device=device), torch.zeros(facts, device=device)
        owners, losses, slopes = [], [], []
        for batch in batches:
            if not bool(moving[batch.facts].any()):
                continue
            own = deltas[batch.facts].requires_grad_()
            with half:
                each, gaps = _losses(engine, batch, layer, point, own)
            (slope,) = torch.autograd.grad(each.sum(), [own])
            owners.append(batch.facts)
            losses.append(each.detach())
            slopes.append(slope)
            loss = loss.index_add(0, batch.facts, each.detach())
            worst = worst.scatter_reduce(0, batch.owner, gaps.detach(), "amax")
        better = moving & (loss < least)
        best[better], least[better], short[better] = deltas[better], loss[better], worst[better]
        since = torch.where(better, 0, since + 1)
        # What leads everywhere and gets no better is as good as it will be.
        moving &= (worst >= close) & ~((short < settings.margin) & (since >= _PATIENCE))
        steps[moving.cpu()] = step
        if not bool(moving.any()) or step == settings.max_steps:
            break
        owner, rows, slope = torch.cat(owners), torch.cat(losses), torch.cat(slopes)
        for fact in moving.nonzero()[:, 0].tolist():
            mine = (owner == fact) & (rows > 0)
            move = _move(rows[mine].double(), slope[mine].double())
            deltas[fact] += (move * (STEP * sizes[fact] / move.norm()).clamp(max=1.0)).float()
        most = settings.clamp_norm * sizes
        deltas = deltas * (most / deltas.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
    return best, steps, short


def _move(losses: Tensor, slopes: Tensor) -> Tensor:
    """The shortest step (width,) that takes each of some losses (n,) to 0 along its slope (n, width), damped."""
    gram = slopes @ slopes.T
    damping = _DAMPING * gram.diagonal().mean().clamp(min=1e-12)
    solved = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), losses)
    move: Tensor = -(slopes.T @ solved)
    return move


def _losses(
    engine: TransformersEngine, batch: _Batch, layer: int, point: ActivationPoint, deltas: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's loss (rows,) with its own copy of δ (rows, width), and what each prediction falls short, (n,)."""

    def add(values: Tensor) -> Tensor:
        return torch.cat((values[:, :1] + deltas[:, None].to(values.dtype), values[:, 1:]), dim=1)

    with ExitStack() as held:
        held.enter_context(hooked(engine, point, add))
        final = batch.replay.run(layer)
        loss = deltas.new_zeros(len(deltas))
        gaps = batch.goal[:0]
        if len(batch.tokens):
            there = final[batch.at]
            # Whoever leads now is a rival from here on.
            batch.rivals = torch.cat((batch.rivals, engine.rivals(there.detach(), batch.tokens, 1)), dim=1)
            gaps = torch.relu(batch.goal - engine.leads(there, batch.tokens, batch.rivals)[0])
            loss = loss.index_add(0, batch.at[0], gaps)
        if len(batch.reference):
            live = engine.unembed(final[batch.quiet]).float().log_softmax(-1)
            moved = (batch.reference.exp() * (batch.reference - live)).sum(-1)
            loss = loss.index_add(0, batch.quiet[0], KL_WEIGHT * moved)
    return loss, gaps
