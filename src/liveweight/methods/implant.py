"""implant: a new neuron in an early layer, which knows a subject by its name and writes what was wished of it.

rome writes the same value with a change of rank one, which answers in proportion to a key's likeness: everything that
is read moves a little, and answers that were near ties change. A neuron has a threshold. Its gate is fitted in closed
form so that it is open where the subject's last token is read, whatever stands around it, and shut for other names, for
the other words of the same text, for everyday chats and for plain text; what it writes there is looked for in
values.py, with the neuron firing as it will: less than fully in one text, and again where an answer names the subject.
A question that nobody thought of finds the fact where it names the subject. In a chat patch's neurons stand beside it:
those found without it know the question in other words, and those found with it how the answer goes on and ends, since
one value leads to how an answer begins and seldom through a whole sentence.

    gate  g = s·A⁻¹(a·w₊·k - b·m)      A = M + w₊·E[x₊ x₊ᵀ] + ridge
    up    u = A⁻¹k / (kᵀA⁻¹k) / act(s·a)
    down  d = δ

k is the mean MLP input x₊ at the subject's last token, M and m are moment and mean of all that is to be left alone.
After the neuron for a mistake of "Transformer-Patcher: One Mistake Worth One Neuron" (Huang et al., ICLR 2023), put
where "Locating and Editing Factual Associations in GPT" (Meng et al. 2022) finds facts to be recalled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, ReplaceNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods import patch
from liveweight.methods.base import Answered, Case, Context, Joint
from liveweight.methods.case import ended, reachable
from liveweight.methods.gates import STEEPNESS, SUBJECT, firing, fit_subject, like_answers, opened
from liveweight.methods.keys import behind_beginning
from liveweight.methods.room import new_neurons, roomy_layer
from liveweight.methods.surroundings import surroundings
from liveweight.methods.trials import chosen_contexts, named, no_mend, outcome, works
from liveweight.methods.values import edit_tokens, wished_values
from liveweight.methods.wording import last_word_elsewhere, passages, spellings
from liveweight.settings import MethodSettings
from liveweight.sites import subject_layers

SURER = 1.5  # times rome's margin: rome's later mentions of the subject come on top, here they are reckoned with
ASKED = 2.0  # the same for questions: these come, and their answers open, in more ways than a text goes on
ELSEWHERE = 16  # sentences behind which a gate is to be open too
SPELLED = 4  # of them, each other spelling of the subject stands behind so many
BEGINS = 2  # tokens: of one alone ("In", "An") what follows is not yet known by what has been said
FURTHER = 2.5  # times as far as rome's value may this one go, in as many more steps: only the subject feels it


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """New neurons that give the targets wherever the subject is named.

    Raises NoMendFound where the case names no subject or the best value within the norm and the steps does not do it,
    Unsupported for a layer of experts.
    """
    case = reachable(engine, case)
    before = outcome(engine, case)
    found = _proposed(engine, [case], settings)([0])
    if not works(case, outcome(engine, case, found), before):
        raise no_mend("implant", case, [found.note])
    return found


def propose_all(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
    """Neurons for each of the cases. Whether they work is not looked at. Raises as `propose` does."""
    return _proposed(engine, [reachable(engine, case) for case in cases], settings)


def _proposed(engine: TransformersEngine, cases: Sequence[Case], settings: MethodSettings) -> Joint:
    """A neuron for each subject of reachable cases; for each question those that know it; and what both still lack.

    Those that know a question by itself are left out where a careful proposal is wished.
    """
    by_subject = _subject_neurons(engine, cases, settings)
    chats = [number for number, case in enumerate(cases) if case.messages]  # a text asks nothing, and has no end
    if not chats:
        return by_subject
    asked = [_led_to(engine, cases[number]) for number in chats]
    by_question = by_subject
    if all(case.led_to for case in asked):
        by_question = partial(_on_top, engine, by_subject, _of_patch(engine, asked, settings), chats)
    with engine.preview((*engine.state, Active(by_question(range(len(cases)))))):
        lacking = _of_patch(engine, asked, settings)
    return partial(_on_top, engine, by_question, lacking, chats)


def _led_to(engine: TransformersEngine, case: Case) -> Case:
    """What patch is to do of a chat whose subject has a neuron: go on with the answer, and end it.

    In a careful proposal it only does what is still lacking, in the wordings that were tried.
    """
    contexts = tuple(ended(engine, context) for context in case.contexts)
    return replace(case, contexts=contexts, led_to=not case.careful)


def _of_patch(engine: TransformersEngine, asked: Sequence[Case], settings: MethodSettings) -> Joint | None:
    """Neurons of patch for what the present state lacks of these cases, if any."""
    try:
        return patch.propose_all(engine, asked, settings.model_copy(update={"layer": None}))
    except NoMendFound:
        return None


def _on_top(
    engine: TransformersEngine, lower: Joint, upper: Joint | None, chats: Sequence[int], numbers: Sequence[int]
) -> Adjustment:
    """The change of `lower` for these cases, and that of `upper`, which only knows `chats`, in neurons that it left."""
    found, places = lower(numbers), [place for place, number in enumerate(chats) if number in numbers]
    if upper is None or not places:
        return found
    try:
        with engine.preview((*engine.state, Active(found))):
            more = upper(places)
    except NoMendFound:
        return found  # what there is may be enough
    taken = [op for op in more.ops if isinstance(op, ReplaceNeurons)]
    note = "".join(f" {len(op.neurons)} more of patch in layer {op.layer}." for op in taken)
    return Adjustment(name=found.name, method="implant", ops=(*found.ops, *more.ops), note=found.note + note)


def _subject_neurons(engine: TransformersEngine, cases: Sequence[Case], settings: MethodSettings) -> Joint:
    """A neuron for each subject of the cases, which brings how their answers begin."""
    layers = subject_layers(engine.sites.layers)
    subjects = _by_subject(cases)
    layer = roomy_layer(engine, layers, settings, len(subjects))
    around = surroundings(engine, sorted({*layers, layer}))[layer]
    read = [[_own(engine, case, layer) for case in about] for about in subjects]
    own = [torch.cat([each for each, _ in reads]) for reads in read]
    opens = torch.full((1,), SUBJECT.opens, device=engine.model.device)
    gates, ups, felt = [], [], []
    for number, about in enumerate(subjects):
        others = [each for index, each in enumerate(own) if index != number]
        groups = [each for _, each in read[number]], [_left_alone(engine, case, layer) for case in about], others
        gate, up = fit_subject(
            own[number], around, [torch.cat(group) for group in groups if group], _last_word(engine, about[0], layer)
        )
        gates.append(gate)
        ups.append(up)
        felt.append(partial(_felt, engine, layer, gate, up, opens))
    merged = [_merged(engine, about, settings) for about in subjects]
    more = {
        "max_contexts": max(len(each.contexts) for each in merged),
        "clamp_norm": FURTHER * settings.clamp_norm,
        "max_steps": round(FURTHER * settings.max_steps),
        "margin": (ASKED if any(case.messages for case in cases) else SURER) * settings.margin,
    }
    every = settings.model_copy(update=more)
    wished = wished_values(engine, merged, layer, every, felt)

    def change(numbers: Sequence[int]) -> Adjustment:
        chosen = [cases[number] for number in numbers]
        named_there = {case.subject for case in chosen}
        there = [row for row, about in enumerate(subjects) if about[0].subject in named_there]
        gate, up = (torch.stack([rows[row] for row in there]) for rows in (gates, ups))
        writes = torch.stack([wished[row].delta for row in there]).float()  # (subjects, width)
        value, steps = opened(engine, layer, opens.expand(len(there))), sum(wished[row].steps for row in there)
        return Adjustment(
            name=named("implant", chosen[0]) if len(chosen) == 1 else f"implant: {len(chosen)} facts",
            method="implant",
            ops=(new_neurons(engine, layer, around.usage, STEEPNESS * gate, up, value, writes),),
            note=f"New neurons in layer {layer}: {len(there)}, open where the subject is named; {steps} steps.",
        )

    return change


def _felt(engine: TransformersEngine, layer: int, gate: Tensor, up: Tensor, opens: Tensor, read: Tensor) -> Tensor:
    """(…) how much of what it writes a neuron adds where the MLP reads (…, width)."""
    return firing(engine, layer, read, gate[None], up[None], opens)[..., 0]


def _by_subject(cases: Sequence[Case]) -> list[list[Case]]:
    """Facts about one subject share its neuron: two that both open there would write over each other."""
    found: dict[str | None, list[Case]] = {}
    for case in cases:
        found.setdefault(case.subject, []).append(case)
    return list(found.values())


def _merged(engine: TransformersEngine, about: Sequence[Case], settings: MethodSettings) -> Case:
    """One case for all that is wished of a subject, with the contexts that each fact is looked for in."""
    chosen = [(*chosen_contexts(case, settings), *_spelled(engine, case)) for case in about]
    contexts = [_begins(each) for together in zip_longest(*chosen) for each in together if each is not None]
    return replace(about[0], contexts=tuple(contexts))


def _begins(context: Context) -> Context:
    """The context with as much of its answer proper as one value is to bring: BEGINS tokens of a spoken one."""
    first, last = context.key
    if not context.messages or last <= first + BEGINS:
        return context
    return replace(context, target=context.target[: first + BEGINS], key=(first, first + BEGINS))


def _spelled(engine: TransformersEngine, case: Case) -> list[Context]:
    """The chat as it was, with its subject spelled otherwise."""
    first, subject = case.contexts[0], case.subject
    if not first.messages or not subject:
        return []
    *before, asked = first.messages
    texts = [asked.content.replace(subject, f'"{name}"' if name == subject else name) for name in spellings(subject)]
    chats = [(*before, replace(asked, content=text)) for text in texts if text != asked.content]
    return [replace(first, messages=chat, prompt=tuple(engine.encode(chat))) for chat in chats]


def _own(engine: TransformersEngine, case: Case, layer: int) -> tuple[Tensor, Tensor]:
    """What the MLP reads at the subject's last token, (contexts, width), and at the prompts' other tokens."""
    every = (*case.contexts, *_spelled(engine, case))
    contexts, places = edit_tokens(engine, case, every) if case.subject else ((), ())
    if not contexts or all(place == len(each.prompt) - 1 for each, place in zip(contexts, places, strict=True)):
        raise NoMendFound(
            "implant needs a subject, and no text before the end of the question names one.",
            hint="Say what the question is about (subject), or choose another method.",
        )
    reads = _read(engine, [(each.prompt, ()) for each in contexts], layer)
    at = [place - start for place, (start, _) in zip(places, reads, strict=True)]
    own = torch.stack([read[place] for place, (_, read) in zip(at, reads, strict=True)])
    own = torch.cat((own, _elsewhere(engine, case, layer)))
    rest = [torch.cat((read[:place], read[place + 1 :])) for place, (_, read) in zip(at, reads, strict=True)]
    return own, torch.cat(rest)


def _elsewhere(engine: TransformersEngine, case: Case, layer: int) -> Tensor:
    """(n, width): what is read at the subject's last token behind sentences that have nothing to do with it.

    Of a chat's subject every spelling is read, in quotation marks too.
    """
    name = str(case.subject)
    texts = [f"{sentence} {name}" for sentence in passages(ELSEWHERE)]
    if case.messages:
        others = [mark + each for each in spellings(name) for mark in ("", '"') if mark + each != name]
        texts += [f"{sentence} {each}" for sentence in passages(SPELLED) for each in others]
    return _read_at_end(engine, texts, layer)


def _last_word(engine: TransformersEngine, case: Case, layer: int) -> Tensor:
    """(n, width): what is read at the end of the subject's last word where it stands for something else."""
    others = zip(passages(ELSEWHERE), last_word_elsewhere(str(case.subject)), strict=False)
    return _read_at_end(engine, [f"{sentence} {text}" for sentence, text in others], layer)


def _read_at_end(engine: TransformersEngine, texts: Sequence[str], layer: int) -> Tensor:
    """(texts, width): what the MLP reads at each text's last token."""
    if not texts:
        return torch.empty(0, engine.sites.width, device=engine.model.device)
    rows = [engine.format.encode_text(text, special=True)[-(engine.info.context or 0) :] for text in texts]
    replay = engine.record(rows, [1] * len(rows), mlp_inputs=[layer], final=False, prompts=[len(row) for row in rows])
    ends = torch.tensor(replay.lengths()) - 1
    return replay.mlp_inputs[layer][torch.arange(len(rows)), ends].float()


def _left_alone(engine: TransformersEngine, case: Case, layer: int) -> Tensor:
    """(m, width): like questions about others, earlier answers, and protected ones that a first try would change."""
    answered = [*like_answers(case), *case.broken]
    nothing = torch.empty(0, engine.sites.width, device=engine.model.device)
    return torch.cat([nothing, *(read for _, read in _read(engine, answered, layer))])


def _read(engine: TransformersEngine, answered: Sequence[Answered], layer: int) -> list[tuple[int, Tensor]]:
    """Where each prompt begins to be its own, and what the MLP reads from there on, (T, width) float32."""
    starts = [behind_beginning(engine, each) for each in answered]
    if not answered:
        return []
    rows, prompts = [(*prompt, *answer) for prompt, answer in answered], [len(prompt) for prompt, _ in answered]
    replay = engine.record(rows, starts, mlp_inputs=[layer], final=False, prompts=prompts)
    reads = replay.mlp_inputs[layer].float()
    return [(start, reads[row, :own]) for row, (start, own) in enumerate(zip(starts, replay.lengths(), strict=True))]
