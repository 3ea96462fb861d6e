"""What the loop hands back: replies, changes, and the report of a change.

Owns these values, their form as JSON, as plain text and on a terminal or in a notebook. Knows nothing of how they came
to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from liveweight import ledger
from liveweight.engines.base import Message
from liveweight.guard import GuardReport
from liveweight.ledger import Turn
from liveweight.shown import Shown, grid, short

State = Literal["active", "off", "undone", "refused", "failed", "intended", "preview", "protected"]
Kind = Literal["fix", "bad", "good"]
Verb = Literal["fix", "bad", "good", "apply", "learn"]  # what a change came from: a judgement, an adjustment, many


_SITES = 8  # that a report names
_STATES = {"active": "green", "off": "yellow", "undone": "dim", "refused": "red", "failed": "red", "preview": "cyan"}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reply(ledger.Reply):
    """What the model answered: text, tokens, the chat before it, and the versions of the weights that made it."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The reply's token ids, the one that ended it included."""
        return self.token_ids

    @property
    def versions(self) -> tuple[str, ...]:
        """Every version of the weights that chose a token of it, in order; more than one says it spans a change."""
        return tuple(self.details.get("versions", ()))

    @property
    def finish(self) -> str:
        """How it ended: stop, length or cancelled."""
        return str(self.details.get("finish", ""))

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The chat before the reply, as an engine takes it."""
        return tuple(Message(turn.role, turn.content) for turn in self.messages)

    @property
    def history(self) -> tuple[Turn, ...]:
        """The chat with the reply in it: where the next turn goes on."""
        return (*self.messages, Turn(role="assistant", content=self.text))

    def __str__(self) -> str:
        return self.text


class Attempt(_Value):
    """One rung of the ladder: what a method came to."""

    method: str
    outcome: Literal["nothing", "fails", "refused", "chosen"]
    why: str  # one sentence
    seconds: float


class TouchedNeuron(_Value):
    """A neuron that a change acts on."""

    layer: int
    neuron: int
    effect: float  # how much: a factor minus one, or the size of what is added to its weights
    label: str  # the tokens that it promotes, or empty where labels are not to be had


class Replaced(_Value):
    """An earlier change that this one contradicts."""

    change: str
    question: str
    wanted: str | None


class WeightsMoved(_Value):
    """How much of the model a change rewrites."""

    sites: tuple[str, ...]
    entries: int  # that differ from before
    share: float  # of all of the model's weights
    survived: float  # share of the intended entries that are still different once rounded to the model's dtype


class Report(_Value, Shown):
    """Everything measured of one change: before and after, neurons, guard, cost.

    Where no reply was judged, `question` is what was asked to see the difference.
    """

    verdict: Verb
    question: str
    wanted: str | None
    reason: str | None = None
    before: str
    after: str
    works: bool  # the wished answer comes (or stays, or the judged one has gone)
    method: str | None  # None: no weight was changed
    name: str = ""
    note: str = ""
    tried: tuple[Attempt, ...] = ()
    neurons: tuple[TouchedNeuron, ...] = ()
    weights: WeightsMoved | None = None
    guard: GuardReport | None = None
    forced: bool = False
    margin: float | None = None  # nats, of a good answer: its thinnest token over the runner-up
    replaced: tuple[Replaced, ...] = ()  # switched off by this change
    kept: tuple[Replaced, ...] = ()  # contradicted, and left active because both were to be kept
    released: tuple[str, ...] = ()  # protected answers to the same question, which it overrules
    version_before: str = ""
    version_after: str = ""
    seconds: Mapping[str, float] = Field(default_factory=dict)  # by phase

    def __rich__(self) -> RenderableType:
        """Before and after, what was moved, the guard, the cost."""
        rows: list[tuple[str, RenderableType]] = [("question", Text(self.question))]
        if self.wanted is not None:
            rows.append(("wanted", Text(self.wanted)))
        if self.reason:
            rows.append(("reason", Text(self.reason)))
        rows.append(("before", Text(self.before, style="red" if self.verdict in ("fix", "bad") else "")))
        rows.append(("after", Text(self.after, style="green")))
        rows.append(("method", Text(f"{self.method}. {self.note}" if self.method else self.note)))
        if self.weights is not None:
            moved = self.weights
            sites = ", ".join(moved.sites[:_SITES]) or "no site"
            if len(moved.sites) > _SITES:
                sites += f" and {len(moved.sites) - _SITES} more"
            survived = f"{moved.survived:.1%} of the change survived rounding"
            told = f"{moved.entries:,} changed ({moved.share:.3%}), {survived}"
            rows.append(("weights", Text(f"{told}: {sites}")))
        if self.neurons:
            named = Text()
            for each in self.neurons[:5]:
                named.append(f"L{each.layer}/{each.neuron}", style="bold")
                named.append(f" {each.effect:+.2f}  {each.label}\n")
            named.rstrip()
            rows.append(("neurons", named))
        if self.guard is not None:
            rows.append(("guard", _guard_view(self.guard)))
        for name, others in (("replaces", self.replaced), ("beside", self.kept)):
            rows += [(name, Text(f"{old.change}: {old.question} → {old.wanted or 'not that'}")) for old in others]
        if self.released:
            rows.append(("released", Text(f"{', '.join(self.released)}: no longer protected")))
        tried = [attempt for attempt in self.tried if attempt.outcome != "chosen"]
        for attempt in tried:
            rows.append(("tried", Text(f"{attempt.method}: {attempt.why}", style="dim")))
        spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        rows.append(("seconds", Text(f"{self.total_seconds:.1f} ({spent})")))
        return grid(rows)

    @property
    def total_seconds(self) -> float:
        """What the whole judgement took."""
        return sum(self.seconds.values())

    def lines(self) -> list[str]:
        """The report in plain sentences, one a line."""
        said = [f"{self.verdict}: {self.question}", f"  before: {_one_line(self.before)}"]
        said.append(f"  after:  {_one_line(self.after)}")
        if self.method is None:
            said.append("  No weight was changed.")
        else:
            said.append(f"  method: {self.method}{' (forced)' if self.forced else ''}. {self.note}".rstrip())
        if self.weights is not None:
            moved = self.weights
            said.append(
                f"  weights: {moved.entries:,} entries ({moved.share:.3%}) at {', '.join(moved.sites) or 'no site'};"
                f" {moved.survived:.1%} of the change survived rounding"
            )
        if self.neurons:
            named = ", ".join(f"L{n.layer}/{n.neuron} {n.label}".rstrip() for n in self.neurons[:5])
            said.append(f"  neurons: {named}")
        if self.guard is not None:
            said.append(f"  guard: {guard_line(self.guard)}")
            said += [f"    {reason}" for reason in self.guard.reasons]
        said += [f"  replaces {each.change} ({each.question} -> {each.wanted})" for each in self.replaced]
        said += [f"  kept beside {each.change} ({each.question} -> {each.wanted})" for each in self.kept]
        said.append("  cost: " + ", ".join(f"{phase} {spent:.2f} s" for phase, spent in self.seconds.items()))
        return said

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Change(_Value, Shown):
    """One judgement, or one adjustment that was given, and what it did to the model.

    A preview, and a good answer that only got protected, have no id.
    """

    id: int | None
    state: State
    strength: float = 1.0
    verdict: Verb
    method: str | None
    name: str
    question: str
    wanted: str | None
    adjustment_hash: str | None = None
    position: int | None = None
    replaced_by: str | None = None
    forced: bool = False
    reason: str = ""  # why it failed or was refused
    protected: str | None = None  # the protected answer that came with it
    created_at: datetime | None = None
    made_by: str = ""  # empty where nobody was named
    report: Report | None = None

    @property
    def label(self) -> str:
        """The id as people read it; `p3` for an answer that was only protected."""
        return f"c{self.id}" if self.id is not None else (self.protected or "preview")

    def __str__(self) -> str:
        return f"{self.label} {self.state} at {self.strength:g}: {self.name}"

    def state_text(self) -> Text:
        """Its state in its colour."""
        return Text(self.state, style=_STATES.get(self.state, ""))

    def __rich__(self) -> RenderableType:
        """The change with its whole report."""
        title = Text.assemble((self.label, "bold"), " ", self.state_text())
        if self.strength != 1.0:
            title.append(f" at strength {self.strength:g}")
        if self.forced:
            title.append(" (forced)", style="yellow")
        body = Text(self.name) if self.report is None else self.report
        subtitle = Text(f"undo with: liveweight undo {self.label}", "dim") if self.state == "active" else None
        return Panel(body, title=title, title_align="left", subtitle=subtitle, subtitle_align="right")

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"label": self.label, **self.model_dump(mode="json")}

    @classmethod
    def of(cls, record: ledger.Change, told: Mapping[str, Any], protected: str | None = None) -> Change:
        """The ledger's record of a change with its report."""
        report = Report.model_validate(told) if told else None
        return cls(
            id=record.id,
            state=record.state,
            strength=record.strength,
            verdict=report.verdict if report is not None else "fix",
            method=record.method,
            name=record.name,
            question=record.question,
            wanted=record.wanted,
            adjustment_hash=record.adjustment_hash,
            position=record.position,
            replaced_by=None if record.replaced_by is None else f"c{record.replaced_by}",
            forced=record.forced,
            reason=record.reason,
            protected=protected,
            created_at=record.created_at,
            made_by=record.made_by,
            report=report,
        )


def guard_line(guard: GuardReport) -> str:
    """The guard's figures in one line."""
    verdict = "within budget" if guard.passed else "over budget"
    return (
        f"{verdict}: mean KL {guard.mean_kl:.4f}, p95 {guard.p95_kl:.4f}, worst {guard.worst_kl:.3f} nats;"
        f" {guard.changed_share:.1%} of {guard.items} answers changed; perplexity x {guard.perplexity_ratio:.4f}"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _guard_view(guard: GuardReport) -> RenderableType:
    """The guard's figures against their budget."""
    verdict = Text("within budget", style="green") if guard.passed else Text("over budget", style="bold red")
    verdict.append(f", {guard.items} probes and {guard.protected} protected answers", style="not bold default")
    shown = Table.grid(padding=(0, 1))
    for name, found in (
        ("mean_kl", f"{guard.mean_kl:.5f}"),
        ("p95_kl", f"{guard.p95_kl:.5f}"),
        ("worst_kl", f"{guard.worst_kl:.4f}"),
        ("changed_share", f"{guard.changed_share:.2%}"),
        ("perplexity_ratio", f"{guard.perplexity_ratio:.5f}"),
    ):
        limit = guard.budget.get(name)
        budget = "" if limit is None else f"of {limit:.0%}" if name == "changed_share" else f"of {limit:g}"
        value = getattr(guard, name)
        style = "red" if limit is not None and value > limit else ""
        shown.add_row(Text(name.replace("_", " ").replace("kl", "KL")), Text(found, style=style), Text(budget, "dim"))
    parts: list[RenderableType] = [verdict, shown]
    for answer in (*guard.protected_changed, *guard.changed)[:3]:
        moved = f"{short(answer.before, 30)} → {short(answer.after, 30)}"
        parts.append(Text(f"{short(answer.text, 40)}: {moved}", "dim"))
    return Group(*parts)
