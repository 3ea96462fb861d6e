"""Another answer of the model's own, in place of one that was judged bad.

Owns where the judged answer may part ways, what the model would say there instead, and whether that claims something
else. Reads the model; what counts as a claim is told from words alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods.wording import content_words, first_sentence, is_about, opening_of, repetition

ALTERNATIVES = 8  # of the judged word, that another answer may begin with
CIRCLING = 0.2  # of its runs of three words said before, and a text goes in circles
UNLIKELY = -7.0  # nats; what is less likely than this the model would not say by itself
_NAMED_WITHIN = 3  # words behind the first new one, in which a name or a number is what the answer says
_SENTENCE = 40  # tokens that a first sentence may have
_REPLY = 48  # tokens of another answer that are looked at
_AT_ONCE = 4  # other answers that are looked at together


def next_best(
    engine: TransformersEngine, turns: Sequence[Message], question: str, answer: list[int], rejected: Sequence[str] = ()
) -> tuple[str, str]:
    """The model's own best answer that claims something else, as a sentence; and what stands behind its opening.

    Nor what answers that were `rejected` before claim. One that goes on in circles is only taken where no other one is
    found.
    """
    prompt = engine.encode(turns)
    judged = first_sentence(engine.format.decode(answer))
    before = [judged, *map(first_sentence, rejected)]
    asked, circling = content_words(question), None
    for head in _heads(engine, prompt, question, answer, judged):
        opening = engine.format.decode(head)
        end = len(prompt) + len(head) - 1
        final = engine.record([[*prompt, *head]], [end], prompts=[len(prompt)]).final[0, 0]
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
                if not all(_claims_another(found[1], each, asked) for each in before):
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
    return [*own, *common] if is_about(judged, asked) else [*common, *own]


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
