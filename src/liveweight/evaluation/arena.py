"""The arena: methods on the same cases, one by one, one after another in one model, or all at once.

Owns the order of measuring and the run's file, which is written after every case, so that a run that was killed goes on
where it was. What a method proposes is carried out whatever the guard says of it, and what the guard says is kept
beside; nothing is written to a ledger. Knows no method, and nothing of tables and pictures.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from liveweight.adjustments import Active, Adjustment
from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine, raw_bytes
from liveweight.errors import InvalidInput, NoMendFound, StateConflict, Unsupported
from liveweight.evaluation.damage import KLMeter, PerplexityMeter
from liveweight.evaluation.edit_metrics import EditMeter, EditScores, mean
from liveweight.evaluation.edits import Edit
from liveweight.evaluation.records import Records
from liveweight.evidence import moved
from liveweight.guard import Guard
from liveweight.ladder import AUTO, Limits, Phases, climb, sparing
from liveweight.methods import LADDER, METHODS, Case, build_case
from liveweight.methods.base import Answered
from liveweight.methods.completion import completion_case
from liveweight.methods.tuned import read_tuned, settings_for
from liveweight.settings import MethodSettings

Mode = Literal["single", "sequential", "batch"]
Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

POINTS = (1, 10, 100, 250, 500)  # numbers of edits behind which a sequence is measured
COLLAPSE = 100.0  # times the base's perplexity: what such a model says is noise
_REPLY = 40  # tokens of the judged answer
_ROUNDS = 5  # of decoding, with and without the changes


@dataclass(frozen=True)
class Plan:
    """What is run, in which way."""

    data: str
    cases: tuple[Edit, ...]
    methods: tuple[str, ...]
    mode: Mode = "single"
    points: tuple[int, ...] = POINTS
    seed: int = 0
    damage_every: int = 1  # KL and perplexity of every so many single cases
    measured: int | None = None  # of a sequence's edits so far, at each point; drawn by the seed. Unset, all
    collapse: float = COLLAPSE  # the perplexity ratio from which on a sequence is not gone on with

    def header(self, engine: TransformersEngine, settings: MethodSettings) -> Row:
        """As the run's file says it; methods may be added to a run, so they are not in it."""
        told = json.dumps([asdict(case) for case in self.cases], sort_keys=True)
        return {
            "model": engine.info.name,
            "hash": engine.info.hash,
            "dtype": engine.info.dtype,
            "data": self.data,
            "cases": len(self.cases),
            "cases_hash": hashlib.sha256(told.encode()).hexdigest()[:16],
            "mode": self.mode,
            "points": [point for point in self.points if point <= len(self.cases)] if self.mode != "single" else [],
            **({"damage_every": self.damage_every} if self.mode == "single" else {}),
            **({"measured": self.measured, "collapse": self.collapse} if self.mode == "sequential" else {}),
            "seed": self.seed,
            "settings": settings.model_dump(mode="json"),
            "tuned": read_tuned(engine),
        }


class Arena:
    """Runs one plan on an engine that is in its base state; it is so again afterwards."""

    def __init__(
        self,
        engine: TransformersEngine,
        guard: Guard,
        settings: MethodSettings,
        plan: Plan,
        *,
        neutral: Sequence[str],
        text: str,
        text_tokens: int = 4096,
        progress: Progress = lambda what, done, of: None,
    ) -> None:
        """`neutral` are instructions on which KL is measured, `text` is plain text for the perplexity."""
        if engine.state:
            raise StateConflict("The arena needs the base model.", hint="Use a workspace without active changes.")
        self.engine, self.guard, self.settings, self.plan = engine, guard, settings, plan
        self._progress = progress
        ground = json.dumps([list(neutral), text, text_tokens, engine.format.system, guard.probes.hash])
        self._ground = hashlib.sha256(ground.encode()).hexdigest()[:16]
        torch.manual_seed(plan.seed)
        random.seed(plan.seed)
        progress("reading what the model says now", 0, len(plan.cases))
        self._meter = EditMeter(engine, plan.cases)
        self._kl = KLMeter(engine, neutral)
        self._perplexity = PerplexityMeter(engine, text, tokens=text_tokens)

    def run(self, file: Path, *, resume: bool = False) -> Row:
        """Everything that the plan asks for and `file` does not hold yet; what it holds in the end.

        Raises InvalidInput where the file is another run's (other cases, settings, budgets, or other questions and text
        that damage is measured on), or is there and is not to be gone on with, and for an unknown method.
        """
        for name in self.plan.methods:
            self._check(name)
        header = self.plan.header(self.engine, self.settings)
        header |= {"ground": self._ground, "guard": self.guard.settings.model_dump(mode="json")}
        record = Records.open(file, header, resume=resume)
        for edit in self._cases("unedited", len(record.rows("unedited"))):
            record.add("unedited", self._row(edit, self._meter.measure(edit)))
        for name in self.plan.methods:
            if self.plan.mode == "single":
                self._single(name, record)
            else:
                self._many(name, record)
        return record.data

    # -------------------------------------------------------------------------------------------------- one by one

    def _single(self, name: str, record: Records) -> None:
        """Each case on the base model, and the base again."""
        rows = _rows(record, name)
        for edit in self._cases(name, len(rows)):
            measure = len(rows) % self.plan.damage_every == 0
            row = self._row(edit)
            found = self._tried(name, edit, row)
            if found is not None:
                row |= self._cost(found)
                before = self._bytes(found)
                self.engine.become((Active(found),))
                try:
                    row["scores"] = asdict(self._meter.measure(edit))
                    if measure:
                        row |= self._damage()
                finally:
                    self.engine.become(())
                row["undo_exact"] = self._bytes(found) == before
            else:
                row["scores"] = asdict(self._meter.measure(edit))
            rows.append(row)
            record.save()

    def _tried(self, name: str, edit: Edit, row: Row) -> Adjustment | None:
        """What a method proposes, and what the guard says of it.

        One that can fit otherwise is asked again, for a careful proposal, where the guard refuses the first, as a
        judgement would ask it. The second is taken where the guard lets it pass; its seconds count either way.
        """
        with _measured(row):
            found = self._proposed(name, edit, row, ())
        if found is None:
            return None
        row |= self._guarded(edit, found)
        if row["guard"]["passed"] or name == AUTO or not METHODS[name].refits:
            return found
        again: Row = {}
        with _measured(again):
            other = self._proposed(name, edit, again, (), careful=True)
        spent = {"tries": 2, "seconds": row["seconds"] + again["seconds"]}
        if other is not None:
            again |= self._guarded(edit, other)
            if again["guard"]["passed"]:
                row |= again
                found = other
        row |= spent
        return found

    def _guarded(self, edit: Edit, found: Adjustment) -> Row:
        """What the guard says of a proposal."""
        measured = self.guard.measure((Active(found),), leave_out=[edit.prompt], progress=False)
        return {
            "guard": {
                "passed": measured.passed,
                "mean_kl": measured.mean_kl,
                "changed_share": measured.changed_share,
                "perplexity_ratio": measured.perplexity_ratio,
                "reasons": list(measured.reasons),
            }
        }

    # ------------------------------------------------------------------------------------ one after another, at once

    def _many(self, name: str, record: Records) -> None:
        """All cases in one model: each beside those before it, or all of them together."""
        engine, rows = self.engine, _rows(record, name)
        points: list[Row] = record.data.setdefault("points", {}).setdefault(name, [])
        if points and "collapsed" in points[-1]:
            return  # what is done needs none of what was kept to go on with
        kept = _Kept(record.file, name)
        before = engine.fingerprints()
        try:
            state = tuple(Active(each) for each in kept.load(sum(row["outcome"] == "made" for row in rows)))
            engine.become(state)
            self._measured_here(name, rows, points, record)  # where it was stopped while it measured
            together = METHODS[name].together if name in METHODS else None
            if self.plan.mode == "batch" and together is not None:
                if not rows:
                    self._at_once(name, rows, kept)
            else:
                for edit in self._cases(name, len(rows)):
                    if self._collapsed(points):
                        break
                    row = self._row(edit)
                    with _measured(row):
                        found = self._proposed(name, edit, row, self._previous(rows))
                    if found is not None:
                        begun = time.perf_counter()
                        engine.become((*engine.state, Active(found)))
                        row["become_seconds"] = time.perf_counter() - begun
                        row |= self._cost(found, share=False)
                        kept.add(found)
                    rows.append(row)
                    record.save()
                    self._measured_here(name, rows, points, record)
            if len(rows) not in [point["edits"] for point in points]:
                self._point(name, rows, points)
            points[-1]["collapsed"] = self._collapsed(points)
        finally:
            engine.become(())
        points[-1]["undo_exact"] = engine.fingerprints() == before
        record.save()
        kept.clear()

    def _at_once(self, name: str, rows: list[Row], kept: _Kept) -> None:
        together = METHODS[name].together
        assert together is not None
        self._progress(name, 0, len(self.plan.cases))
        first: Row = {}
        try:
            with _measured(first), self.engine.remembering():
                cases = [self._case(name, edit, ()) for edit in self.plan.cases]
                joint = together(self.engine, cases, self._settings_of(name))
                found = sparing(self.engine, joint(range(len(cases))))
        except (NoMendFound, Unsupported) as error:
            rows += [self._row(edit) | {"outcome": "nothing", "why": error.message} for edit in self.plan.cases]
            return
        self.engine.become((Active(found),))
        kept.add(found)
        rows += [self._row(edit) | {"outcome": "made", "seconds": 0.0} for edit in self.plan.cases]
        rows[0] |= first | {"note": found.note}

    def _measured_here(self, name: str, rows: list[Row], points: list[Row], record: Records) -> None:
        """A sequence's point, where the plan has one behind so many edits, unless it was measured before."""
        planned = self.plan.mode == "sequential" and len(rows) in self.plan.points
        if planned and len(rows) not in [point["edits"] for point in points]:
            self._point(name, rows, points)
            record.save()

    def _point(self, name: str, rows: list[Row], points: list[Row]) -> None:
        """Everything so far, or a sample of it, under the weights of now."""
        done: Sequence[int] = range(len(rows))
        if self.plan.mode == "sequential" and self.plan.measured is not None:
            order = list(range(len(self.plan.cases)))
            random.Random(self.plan.seed).shuffle(order)
            done = sorted([index for index in order if index < len(rows)][: self.plan.measured])
        self._progress(f"{name}: measuring {len(done)} of {len(rows)} edits", len(rows), len(self.plan.cases))
        begun = time.perf_counter()
        scores = self._meter.measure_all([self.plan.cases[index] for index in done])
        point: Row = {"edits": len(rows), "made": sum(row["outcome"] == "made" for row in rows), "measured": len(done)}
        point["scores"] = mean_scores([asdict(each) for each in scores])
        point |= self._damage() | {"decode_speed": self._decode_speed(), "seconds": time.perf_counter() - begun}
        points.append(point)

    def _collapsed(self, points: Sequence[Row]) -> bool:
        return bool(points) and not points[-1]["perplexity_ratio"] < self.plan.collapse

    def _previous(self, rows: Sequence[Row]) -> tuple[Answered, ...]:
        """The prompts and new answers of the edits so far."""
        done = zip(self.plan.cases, rows, strict=False)
        return tuple(self._answered(edit) for edit, row in done if row["outcome"] == "made")

    def _answered(self, edit: Edit) -> Answered:
        encode = self.engine.format.encode_text
        if edit.form == "completion":
            return tuple(encode(edit.prompt, special=True)), tuple(encode(" " + edit.new))
        prompt = self.engine.encode([Message("user", edit.prompt)])
        return tuple(prompt), tuple(self.engine.format.encode_continuation(prompt, edit.new))

    # -------------------------------------------------------------------------------------------------- one case

    def _check(self, name: str) -> None:
        if name != AUTO and name not in METHODS:
            raise InvalidInput(f"There is no method {name!r}.", hint=f"Choose all, auto, {', '.join(METHODS)}.")

    def _proposed(
        self, name: str, edit: Edit, row: Row, previous: tuple[Answered, ...], *, careful: bool = False
    ) -> Adjustment | None:
        """What a method proposes on top of the present state; None, and why, where it finds nothing."""
        try:
            with self.engine.remembering():
                case = replace(self._case(name, edit, previous), careful=careful)
                if name == AUTO:
                    limits = Limits([], [case.question], False)
                    climbed = climb(
                        self.engine, self.guard, case, LADDER["fix"], self.settings, limits, Phases(), lambda said: None
                    )
                    best = climbed.chosen or climbed.refused
                    assert best is not None  # climb raises where nothing works
                    found, row["method"] = best.adjustment, best.method
                else:
                    found = sparing(self.engine, METHODS[name].propose(self.engine, case, self._settings_of(name)))
        except (NoMendFound, Unsupported) as error:
            row |= {"outcome": "nothing", "why": error.message}
            return None
        row |= {"outcome": "made", "note": found.note}
        return found

    def _case(self, name: str, edit: Edit, previous: tuple[Answered, ...]) -> Case:
        """The edit as a method is given it. One that only takes answers away is told to take the old one away."""
        case = case_of(self.engine, edit, previous)
        kinds = METHODS[name].kinds if name in METHODS else ("fix",)
        return case if "fix" in kinds else replace(case, kind="bad")

    def _settings_of(self, name: str) -> MethodSettings:
        return settings_for(self.engine, name, self.settings)

    def _cases(self, name: str, done: int) -> Iterator[Edit]:
        for number, edit in enumerate(self.plan.cases[done:], start=done):
            self._progress(name, number, len(self.plan.cases))
            yield edit

    def _row(self, edit: Edit, scores: EditScores | None = None) -> Row:
        return {"case": edit.label} | ({"scores": asdict(scores)} if scores is not None else {})

    def _damage(self) -> Row:
        return {"kl": mean(self._kl.measure()), "perplexity_ratio": self._perplexity.ratio()}

    def _cost(self, found: Adjustment, *, share: bool = True) -> Row:
        if not share:
            return {"sites": len(self.engine.weights.touched((Active(found),)))}
        weights = moved(self.engine, found)
        return {"share": weights.share, "sites": len(weights.sites)}

    def _bytes(self, found: Adjustment) -> list[str]:
        """A hash of every weight that an adjustment touches."""
        engine = self.engine
        views = [engine.sites.weight(site) for site in engine.weights.touched((Active(found),))]
        with engine.gate.step():
            return [hashlib.sha256(raw_bytes(view.parameter).data).hexdigest() for view in views]

    def _decode_speed(self) -> float | None:
        """Tokens a second of greedy decoding, as a share of the base model's; both in turns, for machines are noisy.

        None where a model ends its reply before there is anything to time.
        """
        now = self.engine.state
        base, changed = list[float](), list[float]()
        try:
            for _ in range(_ROUNDS):
                for state, spent in (((), base), (now, changed)):
                    self.engine.become(state)
                    took = self._decode_ms()
                    if took is None:
                        return None
                    spent.append(took)
        finally:
            self.engine.become(now)
        return median(base) / median(changed)

    def _decode_ms(self, tokens: int = 24) -> float | None:
        """Milliseconds a token of greedy decoding, under the state of now; None of a reply of one token."""
        marks = [time.perf_counter()]
        question = [Message("user", "Write a short story about a lighthouse.")]
        for _ in self.engine.generate(question, Sampling(max_tokens=tokens)):
            marks.append(time.perf_counter())
        return 1000 * median(later - earlier for earlier, later in pairwise(marks[1:])) if len(marks) > 2 else None


def case_of(engine: TransformersEngine, edit: Edit, previous: Sequence[Answered] = ()) -> Case:
    """An edit as a method's case: of a completion, or of the answer that the model gives to a question now."""
    if edit.form == "completion":
        return completion_case(engine, edit.prompt, edit.new, subject=edit.subject, was=edit.true, previous=previous)
    messages = [Message("user", edit.prompt)]
    reply = engine.greedy([engine.encode(messages)], _REPLY)[0]
    spoken = [token for token in reply if token not in engine.format.end_tokens]
    return build_case(
        engine,
        messages,
        engine.format.decode(spoken),
        spoken,
        kind="fix",
        wanted=edit.new,
        subject=edit.subject,
        previous=previous,
    )


def mean_scores(rows: Sequence[Row]) -> Row:
    """The mean of every score over those that have it."""
    return {name: mean([row[name] for row in rows]) for name in EditScores.__dataclass_fields__}


def _rows(record: Records, name: str) -> list[Row]:
    """The cases of one method that are done."""
    rows: list[Row] = record.data.setdefault("methods", {}).setdefault(name, [])
    return rows


class _Kept:
    """A sequence's adjustments on disk, so that it can be gone on with."""

    def __init__(self, file: Path, name: str) -> None:
        self._folder = file.with_suffix(".parts") / name
        self._count = 0

    def load(self, count: int) -> list[Adjustment]:
        self._count = count
        return [Adjustment.load(self._folder / str(number)) for number in range(count)]

    def add(self, found: Adjustment) -> None:
        found.save(self._folder / str(self._count))
        self._count += 1

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder.parent.is_dir() and not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()


class _measured:
    """Seconds and peak memory of a block, into a row. Memory is what came on top of what the process held before."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def __enter__(self) -> None:
        _forget_peak()
        self._before, self._begun = _memory("VmRSS"), time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        self._row["seconds"] = time.perf_counter() - self._begun
        peak = _memory("VmHWM")
        if peak is not None and self._before is not None:
            self._row["peak_mb"] = max(0.0, peak - self._before)
        if torch.cuda.is_available():
            self._row["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20


def _forget_peak() -> None:
    """Let the kernel count the process's peak anew, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _memory(name: str) -> float | None:
    """A line of the process's status in MB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


__all__ = ["COLLAPSE", "POINTS", "Arena", "Mode", "Plan", "case_of", "mean_scores"]
