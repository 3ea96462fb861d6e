"""Judging what a model said, from the text alone.

Owns the comparisons behind every figure of the benchmarks: whether an answer stands in a reply's first sentence,
whether a reply gives another answer than one that was rejected, and whether it is babble. Knows nothing of models, of
tokens or of weights; the same text gets the same judgement always.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_SPACE = re.compile(r"\s+")
_NO_WORD = re.compile(r"[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ABBREVIATION = re.compile(r"\b(St|Dr|Mr|Mrs|Ms|Mt|Ft|No|D\.C|U\.S|U\.K|[A-Z])\.$")
_PIECE = re.compile(r"[\w'`\u2019-]+|[^\w\s]")
# Words that carry an answer to a question about a capital, a language or a currency, but are never the answer itself.
_CARRIERS = frozenset(
    """
    a an the this that it its is are was be been has have with and or of in at on by from to as for which who
    where their there they people speak speaks spoken use uses used using pay paid hear known called named
    officially official mainly primarily commonly predominantly also most mostly widely primary main national
    local native modern country nation state island islands republic kingdom territory capital city town language
    languages dialect currency money unit located situated sovereign blend form you will would can i s
    """.split()  # noqa: SIM905 (a hundred words read better as words than as a list)
)

BABBLE_REPETITION = 0.3  # of the 3-grams repeat an earlier one
BABBLE_ENTROPY = 0.7  # of the entropy that as many different 2-grams would have
_SHORTEST = 8  # words; a shorter reply has too few n-grams to be called babble for them


def normalised(text: str) -> str:
    """Lower case, without accents and punctuation, single spaces: what two spellings of a name have in common."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    return _SPACE.sub(" ", _NO_WORD.sub(" ", plain.lower())).strip()


def first_sentence(text: str) -> str:
    """The first sentence of a reply's first line; a full stop behind an abbreviation or an initial does not end it."""
    line = text.strip().split("\n")[0]
    sentence, *rest = _SENTENCE_END.split(line)
    for more in rest:
        if not _ABBREVIATION.search(sentence):
            break
        sentence += " " + more
    return sentence


def says(text: str, answer: str) -> bool:
    """Whether `answer` stands, as whole words, in the first sentence of `text`."""
    wanted = normalised(answer)
    return bool(wanted) and f" {wanted} " in f" {normalised(first_sentence(text))} "


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether any of the answers stands in the first sentence of `text`."""
    return any(says(text, answer) for answer in answers)


def same_first_sentence(one: str, other: str) -> bool:
    """Whether two replies begin with the same sentence, word for word."""
    return first_sentence(one) == first_sentence(other)


def claimed_answer(question: str, reply: str) -> str:
    """What a reply claims: the first run of words of its first sentence that is neither question nor carrier.

    "The capital of Angola is Anguimba, a city ..." claims "anguimba". Punctuation ends a run. The result is normalised,
    and empty where the sentence says nothing new. A proxy, made for one-name questions.
    """
    asked = set(normalised(question).split())
    claimed: list[str] = []
    for piece in _PIECE.findall(first_sentence(reply)):
        words = normalised(piece).split()
        # "Hoi An" goes on with a carrier, but one that is written as a name.
        known = asked if claimed and piece[0].isupper() else asked | _CARRIERS
        new = bool(words) and not all(word in known for word in words)
        if new:
            claimed += words
        elif claimed:
            break
    return " ".join(claimed)


def gives_another(question: str, rejected: str, reply: str) -> bool:
    """Whether `reply` claims something, and not what the `rejected` reply to `question` claimed.

    It is the same answer where the rejected claim stands anywhere in the new first sentence, or where the new claim is
    a part of the rejected one ("dong" for "vietnamese dong").
    """
    old, new = claimed_answer(question, rejected), claimed_answer(question, reply)
    if not new:
        return False
    return not old or not (says(reply, old) or f" {new} " in f" {old} ")


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """The runs of `size` words of a text, normalised, in order."""
    words = normalised(text).split()
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def repetition(text: str, size: int = 3) -> float:
    """The share of a text's n-grams that stood in it before: 1 - distinct / all; 0 where it has none."""
    found = ngrams(text, size)
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def ngram_entropy(text: str, size: int) -> float:
    """The entropy in bits of a text's n-grams: -Σ p log2 p with p the share of each; 0 where it has none."""
    counts = Counter(ngrams(text, size))
    total = sum(counts.values())
    return sum(count / total * math.log2(total / count) for count in counts.values())


def fluency(text: str) -> float:
    """The mean of 2/3 H₂ and 4/3 H₃ in bits, times 100, as in Meng et al. 2022. It grows with a text's length."""
    return 100.0 * (2 / 3 * ngram_entropy(text, 2) + 4 / 3 * ngram_entropy(text, 3)) / 2


def babbles(text: str) -> bool:
    """Whether a reply goes in circles or says nothing.

    Nothing is a reply without a word. A circle is more than BABBLE_REPETITION of its 3-grams repeated, or an entropy
    of its 2-grams below BABBLE_ENTROPY of the highest that their number allows. Under eight words only the first rule
    and one word said throughout count.
    """
    words = normalised(text).split()
    if len(words) < _SHORTEST:
        return not words or (len(words) > 2 and len(set(words)) == 1)
    pairs = len(words) - 1
    return repetition(text) > BABBLE_REPETITION or ngram_entropy(text, 2) < BABBLE_ENTROPY * math.log2(pairs)
