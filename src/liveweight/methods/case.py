"""From a judged reply to a case: contexts, target sentence, what the question is about, what is to be left alone.

Owns choosing, by the model's own likelihood, how the wished answer is to be said: a mend trained behind an opening that
the model never says is never reached. Reads the model; knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from liveweight.engines.base import Message, Score, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.methods.another import next_best
from liveweight.methods.base import Case, CaseKind, Context
from liveweight.methods.wording import (
    content_words,
    earlier_turns,
    first_sentence,
    is_about,
    names,
    opening_of,
    other_questions,
    questions_about,
    rephrase,
    statements,
    subject_of,
    unquoted,
)

BRIEFLY = 3  # ways of asking, and other things that are asked about, of a case that is one of many
CONTEXTS = 12  # ways of asking that a mend is fitted to
OTHERS = 24  # other things that the same question is asked about
ASKED = 12  # other things that are asked about the same thing
ELSEWHERE = 8  # other things that something else is asked about
SAID = 4  # one like question in so many also comes with the whole judged sentence, said of it
OPENING = 11  # tokens of its own opening after which the model may be led to the wished answer
LEEWAY = 2.0  # nats by which the answer may be less likely there than in the common sentence
ASKED_OTHERS = 2  # like questions whose answers' openings are looked at


def build_case(
    engine: TransformersEngine,
    messages: Sequence[Message],
    answer: str,
    answer_tokens: Sequence[int],
    *,
    kind: CaseKind,
    wanted: str | None = None,
    subject: str | None = None,
    previous: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    rejected: Sequence[str] = (),
    brief: bool = False,
) -> Case:
    """Everything that a method may use to mend one judged answer.

    `answer_tokens` are the reply's own tokens; `subject` is what the question is about, where it is known and
    stands in it, else it is looked for; `previous` are prompts and answers (as tokens) of earlier changes and
    protected answers, which a mend must leave alone; `rejected` are answers that were judged bad before. `brief` is
    for one of many: fewer wordings and neighbours. Raises InvalidInput for a fix without a wished answer or a chat
    without a question, NoMendFound where the model has no other answer to give.
    """
    turns = tuple(messages)
    if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
        raise InvalidInput(
            "There is no question to mend an answer to.", hint="The chat must end with a user's message."
        )
    wanted = (wanted or "").strip()
    if kind == "fix" and not wanted:
        raise InvalidInput("The wished answer is empty.", hint="Say what the right answer is.")
    question = turns[-1].content.strip()
    # What ends a name's quotation may be one token with what follows it, so a subject is the name alone.
    subject = unquoted(subject) if subject and subject in question else subject_of(question)
    like = like_names(engine, subject)[: BRIEFLY if brief else None] if subject else []
    if kind == "fix":
        sentence = _best_statement(engine, turns, question, wanted, answer)
        piece = wanted.rstrip(".")
    elif kind == "bad":
        sentence, new = next_best(engine, turns, question, list(answer_tokens), rejected)
        piece = new.rstrip(".")
    else:
        sentence = first_sentence(answer)
        piece = sentence
        if not sentence:
            raise InvalidInput(
                "The answer is empty, so there is nothing to keep.", hint="Judge a reply with some text."
            )
    rewordings = 0 if kind == "good" else BRIEFLY if brief else CONTEXTS - 1
    contexts = _contexts(engine, turns, question, sentence, piece, rewordings=rewordings)
    if kind != "good":
        contexts = _as_opened(engine, contexts, answer, piece, like)
    if kind == "bad":
        contexts = tuple(ended(engine, context) for context in contexts)
    return Case(
        kind=kind,
        messages=turns,
        answer=answer,
        answer_tokens=tuple(answer_tokens),
        wanted=engine.format.decode(contexts[0].target).strip(),
        contexts=contexts,
        subject=subject,
        others=_others(engine, question, contexts, subject, like, answer) if subject else (),
        about=_about(engine, question, subject, like) if subject and not brief else (),
        previous=tuple((tuple(prompt), tuple(reply)) for prompt, reply in previous),
    )


def chat_context(engine: TransformersEngine, messages: Sequence[Message], sentence: str, piece: str = "") -> Context:
    """A chat that is to be answered with a sentence, whose answer proper is `piece`."""
    prompt = engine.encode(messages)
    target = engine.format.encode_continuation(prompt, sentence)
    key = _key(engine, target, sentence, piece) if piece else (0, len(target))
    return Context(tuple(messages), tuple(prompt), tuple(target), key)


def ended(engine: TransformersEngine, context: Context) -> Context:
    """The context with the reply's end behind its sentence: more said of what the model made up is more made up."""
    end = engine.format.end_of_reply
    whole = engine.format.decode(context.target).endswith((".", "!", "?"))
    return replace(context, target=(*context.target, end)) if whole and end is not None else context


def prompts_of(engine: TransformersEngine, messages: Sequence[Message]) -> list[list[int]]:
    """What a brief case of a fix will look at: the question as asked and in other words, as prompts."""
    turns = tuple(messages)
    return [engine.encode(chat) for chat in _chats(engine, turns, turns[-1].content.strip(), BRIEFLY)]


def _contexts(
    engine: TransformersEngine, turns: tuple[Message, ...], question: str, sentence: str, piece: str, *, rewordings: int
) -> tuple[Context, ...]:
    """As asked; alone, if there were earlier turns; in other words; and after an unrelated exchange."""
    return tuple(chat_context(engine, chat, sentence, piece) for chat in _chats(engine, turns, question, rewordings))


def _chats(
    engine: TransformersEngine, turns: tuple[Message, ...], question: str, rewordings: int
) -> list[tuple[Message, ...]]:
    system = tuple(turn for turn in turns if turn.role == "system")
    alone = (*system, Message("user", question))
    chats = [turns]
    if turns != alone:
        chats.append(alone)
    if rewordings and engine.format.has_template:
        user, assistant = earlier_turns()[0]
        chats.append((*system, Message("user", user), Message("assistant", assistant), Message("user", question)))
    chats += [(*system, Message("user", text)) for text in rephrase(question, rewordings)] if rewordings else []
    return chats[: rewordings + 1]


def _as_opened(
    engine: TransformersEngine, contexts: tuple[Context, ...], answer: str, piece: str, like: Sequence[str]
) -> tuple[Context, ...]:
    """The contexts, with targets that follow the model's own openings where the judged answer has one of its own.

    Where it has one that the wished answer cannot go on from, it gets the one that the same question about other things
    usually has. Where that is the common sentence's, that is taught in every wording.
    """
    scores, elsewhere = _opened_otherwise(engine, contexts)
    if 0 not in elsewhere:
        return contexts
    asked = behind_openings(engine, contexts[:1], [[answer]], scores[:1], piece)[0]
    if asked is contexts[0]:
        usual = _as_others_are_answered(engine, contexts[0], like)
        asked = behind_openings(engine, contexts[:1], [usual], scores[:1], piece)[0]
    if asked is contexts[0]:
        return contexts
    others = elsewhere[1:]
    texts = [[reply] for reply in _begun(engine, [contexts[index] for index in others])]
    behind = behind_openings(engine, [contexts[i] for i in others], texts, [scores[i] for i in others], piece)
    own = {0: asked} | dict(zip(others, behind, strict=True))
    return tuple(own.get(index, context) for index, context in enumerate(contexts))


def reachable(engine: TransformersEngine, case: Case) -> Case:
    """The case of a question with its answer only where the model gets to by itself.

    A method that moves the answer alone, and no opening, learns nothing from an opening that never comes, and little
    from one of more than OPENING tokens. Where the question as asked is to be answered at once, so is every wording.
    Where its answer stands behind an opening, it stands in each wording's own reply where it is likeliest; wordings
    without such a place are left out, because one value cannot answer this at once and open that. Texts to go on with,
    and cases without a new answer, stay as they are.
    """
    if case.kind != "fix" or not case.messages:
        return case
    elsewhere = _opened_otherwise(engine, case.contexts)[1]
    asked, *others = case.contexts
    if 0 in elsewhere or asked.key[0] > OPENING:
        asked = _likeliest(engine, [_at_once(engine, asked), *_own_slots(engine, [asked])[0]])
    if asked.key[0] == 0:
        contexts = [_at_once(engine, each) for each in others]
    else:
        strange = [index for index in elsewhere if index]
        slots = dict(zip(strange, _own_slots(engine, [case.contexts[index] for index in strange]), strict=True))
        offered = [slots.get(index, [each]) for index, each in enumerate(others, start=1)]
        contexts = [_likeliest(engine, each) for each in offered if each]
    return replace(case, contexts=(asked, *contexts), wanted=engine.format.decode(asked.target).strip())


def _at_once(engine: TransformersEngine, context: Context) -> Context:
    """The context answered with its answer proper and nothing before it."""
    piece = _piece(engine, context)
    return chat_context(engine, context.messages, f"{piece}.", piece)


def _own_slots(engine: TransformersEngine, contexts: Sequence[Context]) -> list[list[Context]]:
    """Each context's answer proper behind the openings that the model has for it now."""
    replies = _begun(engine, contexts)
    return [_slots(engine, each, [reply], _piece(engine, each)) for each, reply in zip(contexts, replies, strict=True)]


def _piece(engine: TransformersEngine, context: Context) -> str:
    """The answer proper of a context, without a full stop."""
    return engine.format.decode(context.target[slice(*context.key)]).strip().rstrip(".")


def _likeliest(engine: TransformersEngine, contexts: Sequence[Context]) -> Context:
    """The context in which the model finds the answer proper likeliest."""
    if len(contexts) == 1:
        return contexts[0]
    scores = engine.score([_answer_item(context) for context in contexts])
    return max(zip(contexts, scores, strict=True), key=lambda pair: pair[1].total)[0]


def _opened_otherwise(engine: TransformersEngine, contexts: Sequence[Context]) -> tuple[list[Score], list[int]]:
    """Each context's score, and the numbers of those whose targets' openings the model would not say now."""
    scores = engine.score([ScoreItem(context.prompt, context.target) for context in contexts])
    return scores, [
        index
        for index, (context, score) in enumerate(zip(contexts, scores, strict=True))
        if not bool((score.tokens == score.argmax)[: context.key[0]].all())
    ]


def _begun(engine: TransformersEngine, contexts: Sequence[Context]) -> list[str]:
    """How the model's own reply to each context begins."""
    replies = engine.greedy([context.prompt for context in contexts], OPENING) if contexts else []
    return [engine.format.decode(reply) for reply in replies]


def _as_others_are_answered(engine: TransformersEngine, context: Context, like: Sequence[str]) -> list[str]:
    """How the same question about other things is answered, said of this one; empty where that is as the context says.

    By the token that most of these answers begin with.
    """
    question = context.messages[-1].content
    subject, names = subject_of(question), like[:OTHERS]
    if not subject or not names:
        return []
    prompts = [engine.encode([Message("user", question.replace(subject, name))]) for name in names]
    said = [reply[0] if reply else None for reply in engine.greedy(prompts, 1)]
    usual = max(said, key=said.count)
    if said.count(usual) < ASKED_OTHERS or said.count(context.target[0]) == said.count(usual):
        return []
    rows = [row for row, token in enumerate(said) if token == usual][:ASKED_OTHERS]
    replies = engine.greedy([prompts[row] for row in rows], OPENING)
    return [engine.format.decode(reply).replace(names[row], subject) for row, reply in zip(rows, replies, strict=True)]


def behind_openings(
    engine: TransformersEngine,
    contexts: Sequence[Context],
    replies: Sequence[Sequence[str]],
    scores: Sequence[Score],
    piece: str,
) -> list[Context]:
    """The contexts with the wished answer where the model finds it likeliest behind the opening of one of its replies.

    Where that is nowhere near as likely as behind the common sentence's opening (`scores`), the common one stays.
    """
    slots: list[tuple[int, Context]] = []
    for row, (context, own) in enumerate(zip(contexts, replies, strict=True)):
        slots += [(row, slot) for slot in _slots(engine, context, own, piece)]
    likeliest = [
        (float(score.logprobs[slice(*context.key)].sum()) - LEEWAY, context)
        for context, score in zip(contexts, scores, strict=True)
    ]
    for (row, slot), score in zip(slots, engine.score([_answer_item(slot) for _, slot in slots]), strict=True):
        if score.total > likeliest[row][0]:
            likeliest[row] = (score.total, slot)
    return [context for _, context in likeliest]


def _slots(engine: TransformersEngine, context: Context, replies: Sequence[str], piece: str) -> list[Context]:
    """The context with `piece` behind each beginning of the replies' first sentences that names the subject."""
    subject = subject_of(context.messages[-1].content) or ""
    return [
        chat_context(engine, context.messages, f"{opening} {piece}.", piece)
        for opening in dict.fromkeys(opening for reply in replies for opening in _openings(first_sentence(reply)))
        if opening[-1].isalnum() and subject in opening and len(engine.format.encode_text(opening)) < OPENING - 1
    ]


def _openings(sentence: str) -> list[str]:
    """How a sentence begins: its first two words or more, without its last one."""
    words = sentence.split(" ")
    return [" ".join(words[:end]) for end in range(2, len(words))]


def _answer_item(context: Context) -> ScoreItem:
    """The answer proper, behind its opening."""
    first, last = context.key
    return ScoreItem((*context.prompt, *context.target[:first]), context.target[first:last])


def _best_statement(
    engine: TransformersEngine, turns: Sequence[Message], question: str, wanted: str, answer: str
) -> str:
    """The sentence for the wished answer that the model itself would most likely say."""
    candidates = statements(question, wanted)
    words = content_words(question)
    # The model's own opening is a candidate too, as far as it is about what was asked.
    for opening in _openings(first_sentence(answer)):
        if is_about(opening, words):
            candidates.append(f"{opening} {wanted.rstrip('.')}.")
    candidates = list(dict.fromkeys(candidates))[:12]
    if len(candidates) == 1:
        return candidates[0]
    prompt = tuple(engine.encode(turns))
    scores = engine.score(
        [ScoreItem(prompt, tuple(engine.format.encode_continuation(prompt, text))) for text in candidates]
    )
    best = max(range(len(candidates)), key=lambda index: scores[index].total)
    return candidates[best]


def _key(engine: TransformersEngine, target: Sequence[int], sentence: str, piece: str) -> tuple[int, int]:
    """Which of the target's tokens hold the answer proper; a space before it that is a token is part of it."""
    start = sentence.rfind(piece)
    if start < 0:
        return 0, len(target)
    first, last, opening = None, len(target), len(sentence[:start].rstrip())
    for index in range(len(target)):
        length = len(engine.format.decode(target[: index + 1]).lstrip())
        if first is None and length > opening:
            first = index
        if length >= start + len(piece):
            last = index + 1
            break
    return first or 0, last


def _others(
    engine: TransformersEngine,
    question: str,
    contexts: Sequence[Context],
    subject: str,
    like: Sequence[str],
    answer: str,
) -> tuple[Context, ...]:
    """The same question about other things of its kind.

    Behind the opening of the question as asked, some behind one that the model has for other wordings, and some with
    the whole of the judged sentence, as if it were said of them: what stands behind an answer is to be left alone too.
    """
    openings = list(
        dict.fromkeys(engine.format.decode(context.target[: context.key[0]]).strip() for context in contexts)
    )
    judged = first_sentence(answer)
    found = []
    for number, name in enumerate(like[:OTHERS]):
        chat = (Message("user", question.replace(subject, name)),)
        chosen = [openings[0]]
        if number % 3 == 0 and len(openings) > 1:
            chosen.append(openings[1 + number // 3 % (len(openings) - 1)])
        if number % SAID == 1:
            chosen.append(judged)
        found += [chat_context(engine, chat, opening.replace(subject, name) or name) for opening in chosen]
    return tuple(found)


def _about(engine: TransformersEngine, question: str, subject: str, like: Sequence[str]) -> tuple[Context, ...]:
    """Other questions about this thing, and a few about other things of its kind."""
    asked = [(text, said) for text, said in questions_about(subject) if text != question]
    asked += [(text, "") for text in other_questions(question, subject)[:ASKED]]
    for number, name in enumerate(like[:ELSEWHERE]):
        texts = other_questions(question, name)
        asked += [(text, opening_of(text)) for text in texts[number % max(len(texts), 1) :][:1]]
    return tuple(chat_context(engine, (Message("user", text),), said) for text, said in asked)


def like_names(engine: TransformersEngine, subject: str) -> list[str]:
    """Names, those most like the subject first by the cosine of their mean embeddings; the subject left out."""
    table = engine.sites.weight("embed.weight").parameter.detach()
    offered = [name for name in names() if name.lower() != subject.lower()]

    def vector(text: str) -> Tensor:
        ids = torch.tensor(engine.format.encode_text(" " + text), device=table.device)
        return torch.nn.functional.normalize(table[ids].float().mean(0), dim=0)

    mine = vector(subject)
    likeness = {name: float(vector(name) @ mine) for name in offered}
    return sorted(offered, key=lambda name: (-likeness[name], name))
