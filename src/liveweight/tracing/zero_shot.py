"""Zero-shot accuracy on questions with a few possible answers.

Owns reading samples of MMLU, SST-2 and CoLA from a folder of the user's (`mmlu.json`, `sst2.json`, `cola.json`, each a
list), the words that they are asked in, and how many are answered rightly: the answer with the lowest mean negative
log-likelihood a token is the model's. Knows nothing of what a state is for. Reads only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from liveweight.adjustments import State
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput

Progress = Callable[[int, int], None]  # done, of how many
_LETTERS = "ABCDEFGHIJ"


class Sample(NamedTuple):
    """A prompt, what may follow it, and which of these is right."""

    prompt: str
    answers: tuple[str, ...]
    right: int


class Task(NamedTuple):
    """Samples of one kind."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def guessed(self) -> float:
        """The accuracy of always giving the commonest right answer."""
        return max(Counter(sample.right for sample in self.samples).values()) / len(self.samples)


def _mmlu(entry: Any) -> Sample:
    choices = [str(choice) for choice in entry["choices"]]
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    prompt = "\n".join([str(entry["question"]).strip(), *lines, "Answer:"])
    return Sample(prompt, tuple(f" {letter}" for letter in _LETTERS[: len(choices)]), int(entry["answer"]))


def _sst2(entry: Any) -> Sample:
    return Sample(
        f"Review: {str(entry['sentence']).strip()}\nSentiment:", (" negative", " positive"), int(entry["label"])
    )


def _cola(entry: Any) -> Sample:
    prompt = f"Sentence: {str(entry['sentence']).strip()}\nIs this sentence grammatically correct? Answer:"
    return Sample(prompt, (" no", " yes"), int(entry["label"]))


_KINDS: dict[str, Callable[[Any], Sample]] = {"mmlu": _mmlu, "sst2": _sst2, "cola": _cola}


def read_tasks(folder: Path, most: int) -> list[Task]:
    """The first `most` samples of each task whose file is in `folder`. Raises InvalidInput where none can be read."""
    found = []
    for name, kind in _KINDS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            samples = tuple(kind(entry) for entry in entries[:most])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"{file} cannot be read: {type(error).__name__}: {error}.",
                hint="It must be a list of samples as its public data set has them.",
            ) from error
        if not samples or not all(0 <= sample.right < len(sample.answers) for sample in samples):
            raise InvalidInput(f"{file} has no samples, or one without its right answer.", hint="Restore the file.")
        found.append(Task(name, samples))
    if not found:
        raise InvalidInput(f"{folder} holds none of {', '.join(f'{name}.json' for name in _KINDS)}.")
    return found


def accuracy(
    engine: TransformersEngine, samples: Sequence[Sample], state: State, progress: Callable[[], None] | None = None
) -> float:
    """The share of samples whose right answer the model in `state` finds likeliest.

    One sample a preview, so that a running chat waits for no more than that.
    """
    right = 0
    for sample in samples:
        prompt = tuple(engine.format.encode_text(sample.prompt, special=True))
        items = [ScoreItem(prompt, tuple(engine.format.encode_text(answer))) for answer in sample.answers]
        with engine.preview(state):
            losses = [score.mean_nll for score in engine.score(items)]
        right += losses.index(min(losses)) == sample.right
        if progress is not None:
            progress()
    return right / len(samples)
