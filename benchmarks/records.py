"""What the benchmark keeps between runs: the base model's answers, and every case that was measured.

Owns two JSON files: the base answers in the cache folder, keyed by the model's hash, so that a second run starts at
once; and the run's own file, written after every case. Knows nothing of what the cases mean.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from liveweight import LiveModel
from liveweight.engines.base import Message
from liveweight.engines.fingerprints import write_atomically
from liveweight.errors import InvalidInput
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


class Records:
    """A run's file: what was run on what, and the cases of each part in order."""

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        """Take what the file holds, or is to hold."""
        self.file, self.data = file, data

    @classmethod
    def open(cls, file: Path, header: dict[str, Any], *, resume: bool) -> Records:
        """A new file, or the one to go on with. Raises InvalidInput where it was another run, or is in the way."""
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        if not file.exists():
            return cls(file, {"run": header, "machine": machine})
        if not resume:
            raise InvalidInput(f"{file} is there already.", hint="Use --resume to go on with it, or name another file.")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            before = data["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{file} is not a run's file: {error!r}.", hint="Name another one.") from error
        other = next((name for name in header if before.get(name) != header[name]), None)
        if other is not None:
            raise InvalidInput(
                f"{file} holds a run whose {other} was {before.get(other)!r}, not {header[other]!r}.",
                hint="Run with the same options, or name another file.",
            )
        return cls(file, data)

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The cases of one part that are done."""
        found: list[dict[str, Any]] = self.data.get(part, [])
        return found

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keep one more case, on disk too."""
        self.data.setdefault(part, []).append(row)
        write_atomically(self.file, json.dumps(self.data, indent=1, ensure_ascii=False))
