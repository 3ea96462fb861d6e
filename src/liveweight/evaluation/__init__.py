"""Measuring models: questions with known answers, judging replies, and the damage a change did.

What produces the figures in docs/benchmarks.md is in `benchmarks/`; what it is made of is here.
"""

from liveweight.evaluation.answers import (
    babbles,
    claimed_answer,
    first_sentence,
    fluency,
    gives_another,
    is_right,
    ngram_entropy,
    normalised,
    repetition,
    same_first_sentence,
    says,
)
from liveweight.evaluation.damage import Kept, KLMeter, NeighbourMeter, Neighbours, PerplexityMeter
from liveweight.evaluation.edit_metrics import EditMeter, EditScores, Likelihood, efficacy, harmonic, neighbourhood
from liveweight.evaluation.edits import Edit, edits
from liveweight.evaluation.generation import answer_batch, generate_batch
from liveweight.evaluation.questions import ASKED, HELD_OUT, UNSEEN, CountryQuestion, Relation, country_questions
from liveweight.evaluation.sources import instructions, plain_text

__all__ = [
    "ASKED",
    "HELD_OUT",
    "UNSEEN",
    "CountryQuestion",
    "Edit",
    "EditMeter",
    "EditScores",
    "KLMeter",
    "Kept",
    "Likelihood",
    "NeighbourMeter",
    "Neighbours",
    "PerplexityMeter",
    "Relation",
    "answer_batch",
    "babbles",
    "claimed_answer",
    "country_questions",
    "edits",
    "efficacy",
    "first_sentence",
    "fluency",
    "generate_batch",
    "gives_another",
    "harmonic",
    "instructions",
    "is_right",
    "neighbourhood",
    "ngram_entropy",
    "normalised",
    "plain_text",
    "repetition",
    "same_first_sentence",
    "says",
]
