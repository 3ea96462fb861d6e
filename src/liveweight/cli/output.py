"""What is shown: results on stdout, progress and errors on stderr, as text for people or JSON for programs.

Owns consoles, bars and the views of changes, made for 80 columns. Knows nothing of how results come about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from liveweight.shown import grid, short, table

if TYPE_CHECKING:
    from pathlib import Path

    from plotly.graph_objects import Figure

    from liveweight.cli.options import Options
    from liveweight.errors import LiveweightError
    from liveweight.reports import Change, Report

_SITES = 8  # that a report names
_STATES = {"active": "green", "off": "yellow", "undone": "dim", "refused": "red", "failed": "red", "preview": "cyan"}


class Drawn(Protocol):
    """A result that has a picture."""

    def picture(self) -> Figure:
        """What is drawn."""
        ...


def out() -> Console:
    """The console of results. Made when used, so that a redirected stdout is found."""
    return Console(file=sys.stdout, highlight=False)


def progress() -> Console:
    """The console of progress and errors."""
    return Console(file=sys.stderr, highlight=False)


def bar(*, quiet: bool) -> Progress:
    """A bar of longer work on stderr with the time left; none where a program reads, or where stderr is a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = progress()
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")
    sys.stdout.flush()


def draw(result: Drawn, path: Path | None, shown: dict[str, Any], options: Options) -> None:
    """Write a result's picture where `path` is given; with --json print `shown`, with the files among it."""
    if path is not None:
        from liveweight import pictures

        written = pictures.save(result.picture(), path)
        shown["pictures"] = [str(each) for each in written]
        if not options.json:
            say(f"drawn: {', '.join(map(str, written))}")
    if options.json:
        print_json(shown)


def say(sentence: str) -> None:
    """One step of longer work."""
    progress().print(Text(f"· {sentence}", style="dim"))


def print_error(error: LiveweightError, *, as_json: bool) -> None:
    """What went wrong and the way out."""
    if as_json:
        sys.stderr.write(json.dumps(error.as_dict(), ensure_ascii=False, default=str) + "\n")
        return
    console = progress()
    console.print(Text(error.message, style="bold red"))
    if error.hint:
        console.print(Text(error.hint))


def state_text(change: Change) -> Text:
    """A change's state in its colour."""
    return Text(change.state, style=_STATES.get(change.state, ""))


def print_change(change: Change, *, as_json: bool) -> None:
    """A change with its whole report."""
    if as_json:
        print_json(change.as_dict())
        return
    title = Text.assemble((change.label, "bold"), " ", state_text(change))
    if change.strength != 1.0:
        title.append(f" at strength {change.strength:g}")
    if change.forced:
        title.append(" (forced)", style="yellow")
    body = report_view(change.report) if change.report is not None else Text(change.name)
    subtitle = Text(f"undo with: liveweight undo {change.label}", "dim") if change.state == "active" else None
    out().print(Panel(body, title=title, title_align="left", subtitle=subtitle, subtitle_align="right"))


def report_view(report: Report) -> RenderableType:
    """Before and after, what was moved, the guard, the cost."""
    rows: list[tuple[str, RenderableType]] = [("question", Text(report.question))]
    if report.wanted is not None:
        rows.append(("wanted", Text(report.wanted)))
    if report.reason:
        rows.append(("reason", Text(report.reason)))
    rows.append(("before", Text(report.before, style="red" if report.verdict in ("fix", "bad") else "")))
    rows.append(("after", Text(report.after, style="green")))
    rows.append(("method", Text(f"{report.method}. {report.note}" if report.method else report.note)))
    if report.weights is not None:
        moved = report.weights
        sites = ", ".join(moved.sites[:_SITES]) or "no site"
        if len(moved.sites) > _SITES:
            sites += f" and {len(moved.sites) - _SITES} more"
        told = f"{moved.entries:,} changed ({moved.share:.3%}), {moved.survived:.1%} of the change survived rounding"
        rows.append(("weights", Text(f"{told}: {sites}")))
    if report.neurons:
        named = Text()
        for each in report.neurons[:5]:
            named.append(f"L{each.layer}/{each.neuron}", style="bold")
            named.append(f" {each.effect:+.2f}  {each.label}\n")
        named.rstrip()
        rows.append(("neurons", named))
    if report.guard is not None:
        rows.append(("guard", guard_view(report)))
    for name, others in (("replaces", report.replaced), ("beside", report.kept)):
        rows += [(name, Text(f"{old.change}: {old.question} → {old.wanted or 'not that'}")) for old in others]
    if report.released:
        rows.append(("released", Text(f"{', '.join(report.released)}: no longer protected")))
    tried = [attempt for attempt in report.tried if attempt.outcome != "chosen"]
    for attempt in tried:
        rows.append(("tried", Text(f"{attempt.method}: {attempt.why}", style="dim")))
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    rows.append(("seconds", Text(f"{report.total_seconds:.1f} ({spent})")))
    return grid(rows)


def guard_view(report: Report) -> RenderableType:
    """The guard's figures against their budget."""
    guard = report.guard
    assert guard is not None
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


def changes_view(changes: Sequence[Change]) -> RenderableType:
    """All changes, one a line."""
    if not changes:
        return Text("No changes yet.")
    shown = table("id", "state", "strength>", "method", "question", "wanted")
    for change in changes:
        wanted = change.wanted or {"bad": "(not that)", "good": "(keep)"}.get(change.verdict, "")
        state = state_text(change)
        if change.replaced_by:
            state.append(f" by {change.replaced_by}", style="dim")
        shown.add_row(
            Text(change.label, "bold"),
            state,
            f"{change.strength:g}",
            change.method or "",
            Text(short(change.question, 36)),
            Text(short(wanted, 18)),
        )
    return shown
