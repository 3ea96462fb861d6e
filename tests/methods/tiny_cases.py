"""Cases for tiny models, built by hand."""

from __future__ import annotations

from dataclasses import replace

from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, CaseKind, Context

SUBJECT = "zed"
QUESTION = f"what is {SUBJECT}?"
WORDINGS = (QUESTION, f"say: {QUESTION}", f"well, {QUESTION}")


def tiny_case(engine: TransformersEngine, kind: CaseKind = "fix", *, rank: int = 4, subject: str | None = None) -> Case:
    """The model's own two tokens judged; wished for is the first one's `rank`-th best alternative, and one more.

    The answer proper is the first token: on a random model of three layers there is no opening to start from.
    """
    messages = (Message("user", QUESTION),)
    prompt = tuple(engine.encode(messages))
    answer = tuple(token.id for token in engine.continue_from(prompt, Sampling(max_tokens=2)))
    target = answer
    if kind != "good":
        last = engine.trace(prompt, ["final.resid"]).values["final.resid"][-1]
        head = engine.sites.weight("lm_head.weight").parameter
        order = engine.unembed(last.to(head.dtype)).float().argsort(descending=True).tolist()
        target = (order[rank], order[rank + 1])
    turns = [(Message("user", wording),) for wording in WORDINGS]
    contexts = tuple(Context(turn, tuple(engine.encode(turn)), target, (0, 1)) for turn in turns)
    return Case(
        kind=kind,
        messages=messages,
        answer=engine.format.decode(answer),
        answer_tokens=answer,
        wanted=engine.format.decode(target),
        contexts=contexts,
        subject=subject,
    )


def about(engine: TransformersEngine, case: Case, name: str, *, later: int = 0) -> Case:
    """The same questions about something else, with an answer `later` tokens further on in the vocabulary."""
    contexts = []
    for context in case.contexts:
        chat = (Message("user", context.messages[-1].content.replace(SUBJECT, name)),)
        target = tuple((token + later) % engine.sites.vocabulary for token in context.target)
        contexts.append(replace(context, messages=chat, prompt=tuple(engine.encode(chat)), target=target))
    return replace(case, messages=contexts[0].messages, contexts=tuple(contexts), subject=name)
