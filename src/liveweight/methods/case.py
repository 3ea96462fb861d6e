"""From a judged reply to a case: contexts, target sentence, what the question is about, what is to be left alone.

Owns choosing, by the model's own likelihood, how the wished answer is to be said: a mend trained behind an opening that
the model never says is never reached. Reads the model; knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.engines.base import Message, Score, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.methods.base import Case, CaseKind, Context
from liveweight.methods.wording import (
    content_words,
    earlier_turns,
    first_sentence,
    names,
    opening_of,
    other_questions,
    questions_about,
    repetition,
    rephrase,
    statements,
    subject_of,
)

CONTEXTS = 12  # ways of asking that a mend is fitted to
OTHERS = 24  # other things that the same question is asked about
ASKED = 12  # other things that are asked about the same thing
ELSEWHERE = 8  # other things that something else is asked about
SAID = 4  # one like question in so many also comes with the whole judged sentence, said of it
OPENING = 11  # tokens of its own opening after which the model may be led to the wished answer
LEEWAY = 2.0  # nats by which the answer may be less likely there than in the common sentence
ASKED_OTHERS = 2  # like questions whose answers' openings are looked at
ALTERNATIVES = 8  # of the judged word, that another answer may begin with
ABOUT = 0.75  # of a question's words, that a text about it has
CIRCLING = 0.2  # of its runs of three words said before, and a text goes in circles
UNLIKELY = -7.0  # nats; what is less likely than this the model would not say by itself
_NAMED_WITHIN = 3  # words behind the first new one, in which a name or a number is what the answer says
_SENTENCE = 40  # tokens that a first sentence may have
_REPLY = 48  # tokens of another answer that are looked at
_AT_ONCE = 4  # other answers that are looked at together


def build_case(
    engine: TransformersEngine,
    messages: Sequence[Message],
    answer: str,
    answer_tokens: Sequence[int],
    *,
    kind: CaseKind,
    wanted: str | None = None,
    previous: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> Case:
    """Everything that a method may use to mend one judged answer.

    `answer_tokens` are the reply's own tokens; `previous` are prompts and answers (as tokens) of earlier changes and
    protected answers, which a mend must leave alone. Raises InvalidInput for a fix without a wished answer or a chat
    without a question, NoMendFound where the model has no other answer to give.
    """
    turns = tuple(messages)
    if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
        raise InvalidInput(
            "There is no question to mend an answer to.", hint="The chat must end with a user's message."
        )
    question = turns[-1].content.strip()
    subject = subject_of(question)
    like = _like(engine, subject) if subject else []
    if kind == "fix":
        if wanted is None or not wanted.strip():
            raise InvalidInput("The wished answer is empty.", hint="Say what the right answer is.")
        sentence = _best_statement(engine, turns, question, wanted.strip(), answer)
        piece = wanted.strip().rstrip(".")
    elif kind == "bad":
        sentence, new = _next_best(engine, turns, question, list(answer_tokens))
        piece = new.rstrip(".")
    else:
        sentence = first_sentence(answer)
        piece = sentence
        if not sentence:
            raise InvalidInput(
                "The answer is empty, so there is nothing to keep.", hint="Judge a reply with some text."
            )
    contexts = _contexts(engine, turns, question, sentence, piece, rewordings=0 if kind == "good" else CONTEXTS - 1)
    if kind != "good":
        contexts = _as_opened(engine, contexts, answer, piece, like)
    return Case(
        kind=kind,
        messages=turns,
        answer=answer,
        answer_tokens=tuple(answer_tokens),
        wanted=engine.format.decode(contexts[0].target).strip(),
        contexts=contexts,
        subject=subject,
        others=_others(engine, question, contexts, subject, like, answer) if subject else (),
        about=_about(engine, question, subject, like) if subject else (),
        previous=tuple((tuple(prompt), tuple(reply)) for prompt, reply in previous),
    )


def _context(engine: TransformersEngine, messages: Sequence[Message], sentence: str, piece: str = "") -> Context:
    prompt = engine.encode(messages)
    target = engine.format.encode_continuation(prompt, sentence)
    key = _key(engine, target, sentence, piece) if piece else (0, len(target))
    return Context(tuple(messages), tuple(prompt), tuple(target), key)


def _contexts(
    engine: TransformersEngine, turns: tuple[Message, ...], question: str, sentence: str, piece: str, *, rewordings: int
) -> tuple[Context, ...]:
    """As asked; alone, if there were earlier turns; in other words; and after an unrelated exchange."""
    system = tuple(turn for turn in turns if turn.role == "system")
    alone = (*system, Message("user", question))
    chats = [turns]
    if turns != alone:
        chats.append(alone)
    if rewordings and engine.format.has_template:
        user, assistant = earlier_turns()[0]
        chats.append((*system, Message("user", user), Message("assistant", assistant), Message("user", question)))
    chats += [(*system, Message("user", text)) for text in rephrase(question, rewordings)] if rewordings else []
    return tuple(_context(engine, chat, sentence, piece) for chat in chats[: rewordings + 1])


def _as_opened(
    engine: TransformersEngine, contexts: tuple[Context, ...], answer: str, piece: str, like: Sequence[str]
) -> tuple[Context, ...]:
    """The contexts, with targets that follow the model's own openings where the judged answer has one of its own.

    Where it has one that the wished answer cannot go on from, it gets the one that the same question about other things
    usually has. Where that is the common sentence's, that is taught in every wording.
    """
    scores = engine.score([ScoreItem(context.prompt, context.target) for context in contexts])
    elsewhere = [
        index
        for index, (context, score) in enumerate(zip(contexts, scores, strict=True))
        if not bool((score.tokens == score.argmax)[: context.key[0]].all())
    ]
    if 0 not in elsewhere:
        return contexts
    asked = _behind(engine, contexts[:1], [[answer]], scores[:1], piece)[0]
    if asked is contexts[0]:
        usual = _as_others_are_answered(engine, contexts[0], like)
        asked = _behind(engine, contexts[:1], [usual], scores[:1], piece)[0]
    if asked is contexts[0]:
        return contexts
    others = elsewhere[1:]
    replies = engine.greedy([contexts[index].prompt for index in others], OPENING) if others else []
    texts = [[engine.format.decode(reply)] for reply in replies]
    behind = _behind(engine, [contexts[i] for i in others], texts, [scores[i] for i in others], piece)
    own = {0: asked} | dict(zip(others, behind, strict=True))
    return tuple(own.get(index, context) for index, context in enumerate(contexts))


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


def _behind(
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
        subject = subject_of(context.messages[-1].content) or ""
        for opening in dict.fromkeys(opening for reply in own for opening in _openings(first_sentence(reply))):
            if opening[-1].isalnum() and subject in opening and len(engine.format.encode_text(opening)) < OPENING - 1:
                slots.append((row, _context(engine, context.messages, f"{opening} {piece}.", piece)))
    likeliest = [
        (float(score.logprobs[slice(*context.key)].sum()) - LEEWAY, context)
        for context, score in zip(contexts, scores, strict=True)
    ]
    for (row, slot), score in zip(slots, engine.score([_answer_item(slot) for _, slot in slots]), strict=True):
        if score.total > likeliest[row][0]:
            likeliest[row] = (score.total, slot)
    return [context for _, context in likeliest]


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
        if _is_about(opening, words):
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


def _is_about(text: str, asked: set[str]) -> bool:
    """Whether a text speaks of what was asked: it has most of the question's words that carry meaning."""
    return bool(asked) and len(asked & content_words(text)) >= ABOUT * len(asked)


def _next_best(
    engine: TransformersEngine, turns: Sequence[Message], question: str, answer: list[int]
) -> tuple[str, str]:
    """The model's own best answer that claims something else, as a sentence; and what stands behind its opening.

    An answer that goes on in circles is only taken where no other one is found.
    """
    prompt = engine.encode(turns)
    judged = first_sentence(engine.format.decode(answer))
    asked, circling = content_words(question), None
    for head in _heads(engine, prompt, question, answer, judged):
        opening = engine.format.decode(head)
        final = engine.record([[*prompt, *head]], [len(prompt) + len(head) - 1]).final[0, 0]
        with engine.gate.step(), torch.no_grad():
            logprobs = engine.unembed(final).float().cpu().log_softmax(-1)
        likely = [each for each in logprobs.topk(ALTERNATIVES).indices.tolist() if float(logprobs[each]) >= UNLIKELY]
        offered = [each for each in likely if each not in engine.format.end_tokens]
        for start in range(0, len(offered), _AT_ONCE):
            tried = offered[start : start + _AT_ONCE]
            for token, rest in zip(tried, engine.greedy([[*prompt, *head, t] for t in tried], _REPLY), strict=True):
                text = engine.format.decode([*head, token, *rest]).strip()
                sentence = first_sentence(text)
                found = sentence, sentence[len(opening.strip()) :].strip()
                if not _claims_another(found[1], judged, asked):
                    continue
                if repetition(text) <= CIRCLING:
                    return found
                circling = circling or found
    if circling is None:
        raise NoMendFound(
            "The model has no other answer to this question that it would give by itself.",
            hint="Say what the answer should be with fix.",
        )
    return circling


def _heads(
    engine: TransformersEngine, prompt: Sequence[int], question: str, answer: list[int], judged: str
) -> list[list[int]]:
    """Beginnings that another answer may go on from: the judged answer's own, and how such a question is answered.

    The latter come first where the judged answer is about something else than what was asked.
    """
    asked = content_words(question)
    own = [answer[:position] for position in _claim_starts(engine, answer, asked)]
    opening = opening_of(question)
    if not opening or judged.startswith(opening):
        return own
    common = [engine.format.encode_continuation(prompt, opening)]
    return [*own, *common] if _is_about(judged, asked) else [*common, *own]


def _claims_another(text: str, judged: str, asked: set[str]) -> bool:
    """Whether the rest of an answer claims something that the judged one does not, and no longer what that one did."""
    old, new = _claims(judged, asked), _claims(text, asked)
    if not new:
        return False
    said = {word.lower() for word in old}
    return _main(new).lower() not in said and not (old and _main(old).lower() in {word.lower() for word in new})


def _claims(text: str, asked: set[str]) -> list[str]:
    """The words of an answer that carry meaning and that the question did not bring, in order."""
    return [word for word in re.findall(r"\w+", text) if content_words(word) - asked]


def _main(claims: Sequence[str]) -> str:
    """The word that an answer is about: a name or a number near its beginning, else the first one."""
    return next((word for word in claims[: _NAMED_WITHIN + 1] if _is_name(word)), claims[0])


def _is_name(word: str) -> bool:
    return word[:1].isupper() or word[:1].isdigit()


def _claim_starts(engine: TransformersEngine, answer: list[int], asked: set[str]) -> list[int]:
    """Positions in the answer where a word begins that the question did not bring, the likeliest first."""
    found: list[tuple[bool, int]] = []
    words, first = 0, None
    for index, token in enumerate(answer[:_SENTENCE]):
        piece = engine.format.decode([token])
        if index and not piece.startswith((" ", "\n")):
            continue
        words += 1
        rest = engine.format.decode(answer[index:]).strip().split(" ")[0]
        if content_words(rest) - asked:
            first = words if first is None and index else first
            found.append((not (_is_name(rest) and words - (first or words) <= _NAMED_WITHIN), index))
    # What stands in the middle of the sentence is what it says, a name or a number above all; its first word may be
    # how the model always begins.
    return ([index for _, index in sorted(found) if index] + [0])[:4] if answer else []


def _key(engine: TransformersEngine, target: Sequence[int], sentence: str, piece: str) -> tuple[int, int]:
    """Which of the target's tokens hold the answer proper."""
    start = sentence.rfind(piece)
    if start < 0:
        return 0, len(target)
    first, last = None, len(target)
    for index in range(len(target)):
        length = len(engine.format.decode(target[: index + 1]).lstrip())
        if first is None and length > start:
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
        found += [_context(engine, chat, opening.replace(subject, name) or name) for opening in chosen]
    return tuple(found)


def _about(engine: TransformersEngine, question: str, subject: str, like: Sequence[str]) -> tuple[Context, ...]:
    """Other questions about this thing, and a few about other things of its kind."""
    asked = [(text, said) for text, said in questions_about(subject) if text != question]
    asked += [(text, "") for text in other_questions(question, subject)[:ASKED]]
    for number, name in enumerate(like[:ELSEWHERE]):
        texts = other_questions(question, name)
        asked += [(text, opening_of(text)) for text in texts[number % max(len(texts), 1) :][:1]]
    return tuple(_context(engine, (Message("user", text),), said) for text, said in asked)


def _like(engine: TransformersEngine, subject: str) -> list[str]:
    """Names, those most like the subject first by the cosine of their mean embeddings; the subject left out."""
    table = engine.sites.weight("embed.weight").parameter.detach()
    offered = [name for name in names() if name.lower() != subject.lower()]

    def vector(text: str) -> Tensor:
        ids = torch.tensor(engine.format.encode_text(" " + text), device=table.device)
        return torch.nn.functional.normalize(table[ids].float().mean(0), dim=0)

    mine = vector(subject)
    likeness = {name: float(vector(name) @ mine) for name in offered}
    return sorted(offered, key=lambda name: (-likeness[name], name))
