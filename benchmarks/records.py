"""What the benchmark keeps between runs: the base model's answers.

Owns the base answers in the cache folder, keyed by the model's hash, so that a second run starts at once. The run's
own file is `liveweight.evaluation.records`'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from liveweight import LiveModel
from liveweight.engines.base import Message
from liveweight.engines.fingerprints import write_atomically
from liveweight.evaluation import CountryQuestion, country_questions, generate_batch, is_right

_BATCH = 32  # questions that are asked at once


@dataclass(frozen=True)
class Asked:
    """A question, its right answers, its held-out wordings and what the base model replied."""

    question: str
    answers: tuple[str, ...]
    held_out: tuple[str, ...]
    unseen: tuple[str, ...]
    reply: tuple[int, ...]

    @property
    def wanted(self) -> str:
        """What a fix asks for: the first listed answer."""
        return self.answers[0]


def base_answers(live: LiveModel, data: Path, wrong: int, right: int, tokens: int) -> tuple[list[Asked], list[Asked]]:
    """The first `wrong` questions that the model answers wrongly and the first `right` that it answers rightly."""
    engine = live.engine
    key = f"{engine.info.hash[:20]}-{engine.info.dtype}-{tokens}"
    file = live.settings.cache_dir / "benchmarks" / f"countries-{key}.json"
    known: dict[str, list[int]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    questions = list(country_questions(data / "countries.json"))
    found: dict[bool, list[Asked]] = {True: [], False: []}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("what the model knows", total=wrong + right)
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            missing = [each.question for each in batch if each.question not in known]
            prompts = [engine.encode([Message("user", question)]) for question in missing]
            known |= dict(zip(missing, generate_batch(engine, prompts, tokens), strict=True))
            if missing:
                write_atomically(file, json.dumps(known))
            for each in batch:
                reply = tuple(known[each.question])
                found[is_right(engine.format.decode(reply), each.answers)].append(_asked(each, reply))
            bar.update(task, completed=min(len(found[False]), wrong) + min(len(found[True]), right))
            if len(found[False]) >= wrong and len(found[True]) >= right:
                break
    return found[False][:wrong], found[True][:right]


def _asked(question: CountryQuestion, reply: tuple[int, ...]) -> Asked:
    return Asked(question.question, question.answers, question.held_out, question.unseen, reply)
