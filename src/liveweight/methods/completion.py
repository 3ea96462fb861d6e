"""From a text that the model goes on with to a case: contexts as plain text, behind other texts, and in the chat.

Owns the ways in which a statement ("The mother tongue of X is") may come up without being asked for in so many words:
on its own, behind unrelated passages, and as something that a person says to be completed. What may be asked instead is
not known here. Reads the model; knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.methods.base import Answered, Case, Context
from liveweight.methods.case import OPENING, OTHERS, behind_openings, chat_context, like_names
from liveweight.methods.wording import completions, passages


def completion_case(
    engine: TransformersEngine,
    text: str,
    wanted: str,
    *,
    subject: str | None = None,
    was: str | None = None,
    previous: Sequence[Answered] = (),
) -> Case:
    """Everything that a method may use to make the model go on with `wanted` after `text`.

    `subject` is what the text is about, where it is known to be in it; `was` is what the model says now, else its
    greedy continuation. `previous` as in `build_case`. Raises InvalidInput for an empty text or answer.
    """
    text, wanted = text.strip(), wanted.strip()
    if not text or not wanted:
        raise InvalidInput("There is no text to go on with, or nothing to say.", hint="Give both.")
    if subject is not None and subject not in text:
        subject = None
    first = _plain(engine, text, wanted)
    plain = [_plain(engine, f"{passage} {text}", wanted) for passage in passages()]
    chats = _chats(engine, text, wanted) if engine.format.has_template else []
    # By turns, so that a method which takes a few of them takes both kinds.
    contexts = [first, *(each for pair in zip_longest(chats, plain) for each in pair if each is not None)]
    answer = was.strip() if was else engine.format.decode(engine.greedy([first.prompt], 8)[0]).strip()
    tokens = tuple(engine.format.encode_text(" " + answer))
    names = like_names(engine, subject)[:OTHERS] if subject else []
    others = tuple(_plain(engine, text.replace(subject or "", name), "") for name in names)
    return Case(
        kind="fix",
        messages=(),
        answer=answer,
        answer_tokens=tokens,
        wanted=wanted,
        contexts=tuple(contexts),
        subject=subject,
        others=others,
        previous=tuple((tuple(prompt), tuple(reply)) for prompt, reply in previous),
    )


def _plain(engine: TransformersEngine, text: str, wanted: str) -> Context:
    prompt = tuple(engine.format.encode_text(text, special=True))
    target = tuple(engine.format.encode_text(" " + wanted)) if wanted else ()
    return Context((), prompt, target, (0, len(target)), text)


def _chats(engine: TransformersEngine, text: str, wanted: str) -> list[Context]:
    """A person brings the text up; the model says it with the wished end, opened as it opens now where that will do."""
    chats = [chat_context(engine, (Message("user", each),), f"{text} {wanted}.", wanted) for each in completions(text)]
    scores = engine.score([ScoreItem(each.prompt, each.target) for each in chats])
    replies = engine.greedy([each.prompt for each in chats], OPENING)
    return behind_openings(engine, chats, [[engine.format.decode(reply)] for reply in replies], scores, wanted)
