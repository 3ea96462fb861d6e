"""Values: what a layer's MLP is to write where a fact's subject stands, so that the model says the wished answer.

Owns the search for δ, which is added to what `down` gives at the edit token, or wherever a neuron for it would fire
(the value optimisation of "Locating and Editing Factual Associations in GPT", Meng et al. 2022). The paper lets Adam
raise the answer's likelihood; here the answer's tokens are to lead by a margin. The least loss of every row is then
known to be 0, and each step is the shortest one that brings all rows there as far as their slopes tell (Gauss and
Newton's, damped as Levenberg does), which takes a third of the steps. Knows nothing of how a
weight is made to write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.half import half_products
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Context
from liveweight.methods.trials import chosen_contexts, closed, down_output, hooked, keyed, spread
from liveweight.methods.wording import spellings
from liveweight.settings import MethodSettings
from liveweight.sites import ActivationPoint

CLOSE = 0.3  # of the margin: near enough to stop
RIVALS = 48  # tokens that each target is compared with while δ is looked for
CLOSED = 0.5  # nats by which what ends an answer is to lead
KL_WEIGHT = 1.0  # of what the subject is, in nats
STEP = 1.0  # how far δ moves a step at most, as a multiple of |W k|
_EARLIER = 4  # earlier answers about the same subject that are held
_PATIENCE = 3  # steps that may bring a fact nothing once its answer leads
_DAMPING = 0.01  # of the mean squared slope of a fact's rows
_OPENING, _PROPER, _CLOSING = range(3)  # what a token is part of: what opens the answer, the answer, its end


Felt = Callable[[Tensor], Tensor]


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

    tokens: tuple[int, ...]
    place: int  # of the edit token
    context: Context | None  # None: what is said at the end should stay
    held: int = 1  # the number of last positions where that is

    @property
    def prompt(self) -> int:
        """How many of its tokens are the prompt."""
        return len(self.tokens) - self.held + 1 if self.context is None else len(self.context.prompt)


@dataclass
class _Batch:
    """Rows that are run together, recorded from their edit tokens on."""

    replay: Replay
    edited: tuple[Tensor, Tensor]  # where in the replay each row's edit token is
    felt: Tensor  # (B, T) how much of δ is added at each of its tokens
    owner: Tensor  # (B, T) the row that each of them is in
    at: tuple[Tensor, Tensor]  # and each prediction
    row: Tensor  # (n,) whose prediction it is
    tokens: Tensor  # (n,) what should come there
    goal: Tensor  # (n,) nats by which it should lead
    rivals: Tensor  # (n, k)
    quiet: tuple[Tensor, Tensor]  # where something is said that is to stay
    quiet_row: Tensor  # (m,)
    reference: Tensor  # (m, vocabulary) log-probabilities there


def wished_values(
    engine: TransformersEngine,
    cases: Sequence[Case],
    layer: int,
    settings: MethodSettings,
    felt: Sequence[Felt] | None = None,
) -> list[Wished]:
    """The value change δ of each case that gives its targets when it is added at its edit token of one dense layer.

    `felt` says, a case, how much of δ is added at a token where the MLP reads (…, width); unset, all of it at the edit
    token and nothing behind it.
    """
    half = half_products([*engine.sites.blocks[layer:], engine.sites.lm_head])
    each = [None] * len(cases) if felt is None else felt
    return [_search(engine, case, layer, settings, half, own) for case, own in zip(cases, each, strict=True)]


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
    """The subject's first and last token in a context's prompt, where it is there, however it is spelled."""
    locate = partial(engine.format.locate, context.messages)
    if context.text:
        locate = partial(engine.format.locate_text, context.text, special=True)
    elif tuple(engine.encode(context.messages)) != context.prompt:
        return None  # a prompt that was put together in another way has its tokens elsewhere
    return next((span for name in spellings(subject) if (span := locate(name)) is not None), None)


def _held(engine: TransformersEngine, case: Case, questions: int) -> Iterator[_Row]:
    """What else is said of the subject is to stay: `{subject} is a`, to other questions, and to earlier changes'."""
    if not case.subject or _subject(engine, case.contexts[0], case.subject) is None:
        return
    messages = [Message("user", f"{case.subject} is a")]
    span = engine.format.locate(messages, case.subject)
    if span is not None and span[1] > 0:  # a replay needs a token before the edited one
        yield _Row(tuple(engine.encode(messages)), span[1], None)
    for asked in spread([each for each in case.about if case.subject in each.messages[-1].content], questions):
        if (span := _subject(engine, asked, case.subject)) is not None and span[1] > 0:
            yield _Row(asked.tokens, span[1], None, held=len(asked.target) + 1)
    names = [tuple(engine.format.encode_text(lead + case.subject)) for lead in (" ", "")]
    earlier = [(prompt, answer, end) for prompt, answer in case.previous for end in _ends(prompt, names) if end > 0]
    for prompt, answer, end in earlier[-_EARLIER:]:
        yield _Row((*prompt, *answer[:-1]), end, None, held=len(answer))


def _ends(prompt: Sequence[int], names: Sequence[tuple[int, ...]]) -> list[int]:
    """The position of a name's last token where it last stands in a prompt; nothing where it does not."""
    for start in range(len(prompt) - 1, 0, -1):
        for name in names:
            if name and tuple(prompt[start : start + len(name)]) == name:
                return [start + len(name) - 1]
    return []


def _search(
    engine: TransformersEngine,
    case: Case,
    layer: int,
    settings: MethodSettings,
    half: AbstractContextManager[object],
    felt: Felt | None,
) -> Wished:
    contexts, places = edit_tokens(engine, case, chosen_contexts(case, settings))
    rows = [_Row(each.prompt + closed(engine, each), place, each) for each, place in zip(contexts, places, strict=True)]
    batch = _batch(engine, [*rows, *_held(engine, case, settings.held)], layer, settings.margin, felt)
    key = batch.replay.neurons[layer][batch.edited][: len(rows)].double().mean(0)
    value = engine.sites.weight(f"layers.{layer}.mlp.down.weight").read().double() @ key  # (width,)
    delta, steps, short = _descended(engine, batch, layer, float(value.norm()), settings, half)
    return Wished(contexts, places, key, value, delta.double(), steps, short)


def answer_end(engine: TransformersEngine, context: Context) -> tuple[int, ...]:
    """What ends an answer behind its last word: a full stop and the end of the reply, as far as its target has it."""
    mark, end = closed(engine, context)[len(keyed(context)) :], engine.format.end_of_reply
    whole = len(context.target) == len(keyed(context)) + len(mark)
    return (*mark, end) if mark and whole and context.messages and end is not None else mark


def _batch(engine: TransformersEngine, group: Sequence[_Row], layer: int, margin: float, felt: Felt | None) -> _Batch:
    """Goals: the margin for answers proper, half of their lead for what opens them, a small lead for their ends.

    What the model would not open its answer with now is not asked for: teaching it would use up the value.
    """
    replay = engine.record(
        [row.tokens for row in group],
        [row.place for row in group],
        layers=[layer],
        neurons=[layer],
        mlp_inputs=[layer],
        packed=True,
        prompts=[row.prompt for row in group],
    )
    device = replay.ids.device
    wanted = []
    for index, row in enumerate(group):
        if row.context is None:
            continue
        start, spoken = len(row.context.prompt) - 1, keyed(row.context)
        for step, token in enumerate(spoken):
            kind = _PROPER if step >= row.context.key[0] else _OPENING
            wanted.append((*replay.at(index, start + step), index, token, kind))
        # The answer is to end where its target does, or its last word would grow, and babble follow it.
        for step, token in enumerate(answer_end(engine, row.context), start=len(spoken)):
            wanted.append((*replay.at(index, start + step), index, token, _CLOSING))
    ends = [
        (*replay.at(index, len(row.tokens) - 1 - back), index)
        for index, row in enumerate(group)
        if row.context is None
        for back in range(row.held)
    ]
    b, t, rows, tokens, kinds = _columns(wanted, 5, device)
    quiet_b, quiet_t, quiet_rows = _columns(ends, 3, device)
    with engine.gate.step(), torch.no_grad():
        final = replay.final[b, t]
        leads, rivals = engine.leads(final, tokens)[0], engine.rivals(final, tokens, RIVALS)
        reference = engine.unembed(replay.final[quiet_b, quiet_t]).float().log_softmax(-1)
    opens = torch.where(leads < 0, float("-inf"), leads.clamp(max=2.0) / 2)
    goal = opens.masked_fill(kinds == _PROPER, margin).masked_fill(kinds == _CLOSING, CLOSED)
    edit_b, edit_t = _columns([replay.at(index, row.place) for index, row in enumerate(group)], 2, device)
    parts, owner = torch.zeros_like(replay.final[..., 0]), torch.zeros_like(replay.ids)
    for index, row in enumerate(group):
        for position in range(row.place, len(row.tokens)):
            owner[replay.at(index, position)] = index
    if felt is None:
        parts[edit_b, edit_t] = 1.0
    else:
        parts = felt(replay.mlp_inputs[layer].float())
    return _Batch(
        replay,
        (edit_b, edit_t),
        parts,
        owner,
        (b, t),
        rows,
        tokens,
        goal,
        rivals,
        (quiet_b, quiet_t),
        quiet_rows,
        reference,
    )


def _columns(table: Sequence[tuple[int, ...]], count: int, device: torch.device) -> list[Tensor]:
    """A table's columns, (rows,) each, also of an empty one."""
    return list(torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, count).unbind(1))


def _descended(
    engine: TransformersEngine,
    batch: _Batch,
    layer: int,
    size: float,
    settings: MethodSettings,
    half: AbstractContextManager[object],
) -> tuple[Tensor, int, float]:
    """δ (width,), the steps it took, and the nats by which the worst token falls short with it.

    `size` is the norm of what is written now.
    """
    point = down_output(engine, layer)
    delta = torch.zeros(engine.sites.width, device=engine.model.device)
    best, least, short, leads, since = delta, float("inf"), float("inf"), False, 0
    for step in range(settings.max_steps + 1):
        own = delta.expand(len(batch.replay.rows), -1).clone().requires_grad_()
        with half:
            losses, gaps = _losses(engine, batch, layer, point, own)
        loss, worst = float(losses.detach().sum()), float(gaps.detach().max())
        lead = bool(((gaps < batch.goal) | (gaps <= 0)).all())  # openings have goals that are less than near enough
        since += 1
        if (not lead, loss) < (not leads, least):  # one that leads everywhere, though it loses more by the margin
            best, least, short, leads, since = delta, loss, worst, lead, 0
        # What leads everywhere and gets no better is as good as it will be.
        if (lead and worst < CLOSE * settings.margin) or (leads and since >= _PATIENCE) or step == settings.max_steps:
            break
        (slopes,) = torch.autograd.grad(losses.sum(), [own])
        some = losses.detach() > 0
        move = _move(losses.detach()[some].double(), slopes[some].double()).float()
        delta = delta + move * (STEP * size / move.norm()).clamp(max=1.0)
        delta = delta * (settings.clamp_norm * size / delta.norm().clamp(min=1e-12)).clamp(max=1.0)
    return best, step, short


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
        return values + (batch.felt[..., None] * deltas[batch.owner]).to(values.dtype)

    with ExitStack() as held:
        held.enter_context(hooked(engine, point, add))
        final = batch.replay.run(layer)
        there = final[batch.at]
        # Whoever leads now is a rival from here on.
        batch.rivals = torch.cat((batch.rivals, engine.rivals(there.detach(), batch.tokens, 1)), dim=1)
        gaps = torch.relu(batch.goal - engine.leads(there, batch.tokens, batch.rivals)[0])
        loss = deltas.new_zeros(len(deltas)).index_add(0, batch.row, gaps)
        if len(batch.reference):
            live = engine.unembed(final[batch.quiet]).float().log_softmax(-1)
            moved = (batch.reference.exp() * (batch.reference - live)).sum(-1)
            loss = loss.index_add(0, batch.quiet_row, KL_WEIGHT * moved)
    return loss, gaps
