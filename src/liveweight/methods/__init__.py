"""The methods, by name, and the order in which `auto` tries them."""

from __future__ import annotations

from collections.abc import Sequence

from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import UnknownMethod
from liveweight.methods import (
    alphaedit,
    constrained,
    contrast,
    finetune,
    gain,
    grace,
    implant,
    lora,
    memit,
    one_shot,
    patch,
    rome,
    scale,
    select,
    steer,
)
from liveweight.methods.base import Case, CaseKind, Context, Described, Method
from liveweight.methods.case import build_case
from liveweight.methods.trials import says, scored
from liveweight.methods.wording import content_words, first_sentence, has_words
from liveweight.sites import EARLY

_TEACH: tuple[CaseKind, ...] = ("fix", "bad", "good")

_ALL = (
    Described(
        "patch",
        patch.propose,
        "One new neuron for each wrong token, shut elsewhere.",
        _TEACH,
        together=patch.propose_all,
        refits=True,
    ),
    Described(
        "select",
        select.propose,
        "Fewest responsible neurons scaled until the answer goes.",
        ("bad", "fix"),
        tunes=("max_neurons", "max_contexts"),
    ),
    Described(
        "scale",
        scale.propose,
        "Every neuron that was active scaled down (bad) or up (good).",
        ("bad", "good"),
        tunes=("eta", "max_neurons"),
    ),
    Described(
        "gain",
        gain.propose,
        "Gains inside the activation function moved, step by step.",
        ("bad", "fix"),
        tunes=("max_neurons", "max_contexts"),
    ),
    Described(
        "rome",
        rome.propose,
        "A rank-one change of one layer, keyed on the subject.",
        _TEACH,
        tunes=("layer", "margin", "clamp_norm", "max_contexts"),
        depth=rome.DEPTH,
    ),
    Described(
        "implant",
        implant.propose,
        "One new neuron that knows the subject by its name.",
        _TEACH,
        by_subject=True,
        refits=True,
        together=implant.propose_all,
        tunes=("layer", "margin", "clamp_norm", "max_contexts"),
        depth=EARLY,
    ),
    Described(
        "memit",
        memit.propose,
        "rome over several layers, beside earlier changes.",
        _TEACH,
        together=memit.propose_all,
        tunes=("margin", "clamp_norm", "max_contexts"),
    ),
    Described(
        "alphaedit",
        alphaedit.propose,
        "memit in what plain text never shows.",
        _TEACH,
        together=alphaedit.propose_all,
        tunes=("margin", "clamp_norm", "max_contexts"),
    ),
    Described(
        "one-shot",
        one_shot.propose,
        "One backward pass, closed form, no search.",
        _TEACH,
        tunes=("layer", "max_contexts"),
        depth=one_shot.DEPTH,
    ),
    Described(
        "finetune",
        finetune.propose,
        "One layer trained on the answer alone.",
        _TEACH,
        tunes=("layer", "target_probability", "max_contexts"),
        depth=finetune.DEPTH,
    ),
    Described(
        "constrained",
        constrained.propose,
        "finetune, with what is to stay held still.",
        _TEACH,
        tunes=("layer", "target_probability", "max_contexts"),
        depth=finetune.DEPTH,
    ),
    Described(
        "grace",
        grace.propose,
        "A codebook at one layer; no weight moves.",
        _TEACH,
        tunes=("layer", "target_probability"),
        depth=grace.DEPTH,
    ),
    Described(
        "lora",
        lora.propose,
        "PEFT's adapters on a few layers, trained on the answer.",
        _TEACH,
        tunes=("target_probability", "max_contexts"),
    ),
    Described("contrast", contrast.propose, "Neurons that statistics tell from neighbours', scaled down.", ("bad",)),
    Described("steer", steer.propose, "A direction added at every token; damaging, to compare with.", ("bad", "fix")),
)

METHODS: dict[str, Described] = {described.name: described for described in _ALL}

# What `auto` tries, the least invasive first; the first that works within the guard's budget is taken.
LADDER: dict[CaseKind, tuple[str, ...]] = {
    "fix": ("patch", "implant", "rome", "one-shot", "finetune"),
    "bad": ("patch", "select", "gain", "finetune"),
    "good": ("patch",),
}

REPLY = 32  # tokens of the reply that is looked at


def method(name: str) -> Described:
    """A method by name. Raises UnknownMethod with the names there are."""
    if name not in METHODS:
        raise UnknownMethod(f"There is no method {name!r}.", hint=f"Choose auto, {', '.join(METHODS)}.")
    return METHODS[name]


def works(engine: TransformersEngine, case: Case) -> bool:
    """Whether the model, as it is now, does what the case asks, in its greedy answer to the first context.

    A fix and a good: the wished answer's words stand, whole, in the first sentence. A bad: the judged answer's word is
    gone.
    """
    context = case.contexts[0]
    if case.kind != "bad" and says(engine, context, scored(engine, [context])[0]):
        return True
    said = first_sentence(engine.format.decode(_greedy(engine, case))).lower()
    if case.kind == "bad":
        judged = first_sentence(case.answer).lower()
        return said != judged and bool(content_words(judged) - content_words(said))
    wished = engine.format.decode(context.target[case.key[0] : case.key[1]]).strip().rstrip(".").lower()
    return has_words(said, wished)


def _greedy(engine: TransformersEngine, case: Case) -> Sequence[int]:
    """The greedy answer to the first context; not generated where it is one that is known.

    That is the judged one, or a bad's other one: whether a wished one comes was looked at before.
    """
    context = case.contexts[0]
    for tokens in ((context.target[:REPLY],) if case.kind == "bad" else ()) + (case.answer_tokens[:REPLY],):
        if tokens and engine.score([ScoreItem(context.prompt, tuple(tokens))])[0].greedy:
            return tokens
    return engine.greedy([context.prompt], REPLY)[0]


__all__ = [
    "LADDER",
    "METHODS",
    "REPLY",
    "Case",
    "CaseKind",
    "Context",
    "Described",
    "Method",
    "build_case",
    "method",
    "works",
]
