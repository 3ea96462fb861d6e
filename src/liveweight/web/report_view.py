"""A change's report in plain words: before and after, what else would change, the neurons, the cost.

Owns the wording for somebody who has never heard of neurons, with the exact figures beside it. Knows nothing of where
a report is shown.
"""

from __future__ import annotations

from liveweight.guard import GuardReport
from liveweight.reports import Report
from liveweight.shown import short
from liveweight.web.parts import counted, pill, side_by_side, table, tag

_NEURONS = 8
_ANSWERS = 6
_FIGURES = (
    ("mean_kl", "Average shift of other answers", "{:.4f} nats"),
    ("p95_kl", "Shift of the most moved twentieth", "{:.4f} nats"),
    ("worst_kl", "Largest shift of a single one", "{:.3f} nats"),
    ("changed_share", "Other answers that change", "{:.1%}"),
    ("perplexity_ratio", "Surprise at ordinary text (1 is as before)", "{:.4f}"),
)


def report_view(report: Report, neurons: int, *, done: bool = False) -> None:
    """The whole report, of a change that would be made or, where it is `done`, of one that was.

    The model came with so many `neurons` a layer: those behind them are new.
    """
    tag("p", report.question, "dim")
    side_by_side(("Before", report.before), ("After", report.after))
    if report.method is None:
        tag("p", report.note)
    for old in report.replaced:
        tag("p", f"This replaces {old.change}: “{short(old.question, 80)}” → “{short(old.wanted or 'not that', 60)}”.")
    for old in report.kept:
        tag("p", f"{old.change} says otherwise and stays on beside it.")
    if report.released:
        tag("p", f"No longer protected: {', '.join(report.released)}, the same question.")
    if report.guard is not None:
        guard_view(report.guard, "What else changed" if done else "What else would change")
    if report.neurons:
        _neurons(report, neurons)
    _cost(report, "was" if done else "would be")


def guard_view(guard: GuardReport, title: str) -> None:
    """What moves besides what is meant to, against what may."""
    with tag("section", "", "stack", aria_label=title):
        with tag("div", "", "row"):
            tag("h3", title)
            pill("within the budget", "good") if guard.passed else pill("over the budget", "bad")
        asked = f"Measured on {counted(guard.items, 'other question')}"
        if guard.protected:
            asked += f" and {counted(guard.protected, 'protected answer')}"
        changed = len(guard.changed) + len(guard.protected_changed)
        told = f"{counted(changed, 'of them gets', 'of them get')} another answer" if changed else "all answers stay"
        tag("p", f"{asked}: {told}.")
        for reason in guard.reasons:
            tag("p", f"{reason[0].upper()}{reason[1:]}.", "strong")
        answers = (*guard.protected_changed, *guard.changed)[:_ANSWERS]
        if answers:
            rows = [(short(each.text, 90), short(each.before, 60), short(each.after, 60)) for each in answers]
            table(("Question", "Answer before", "Answer after"), rows, "Other answers that change")
        with tag("details"):
            tag("summary", "The figures")
            rows = []
            for name, words, form in _FIGURES:
                limit = guard.budget.get(name)
                most = "" if limit is None else form.format(limit)
                rows.append((words, form.format(getattr(guard, name)), most))
            table(("What", "Measured", "At most"), rows, "Figures of the guard", numbers=(1, 2))
            tag("p", "A nat is the unit of surprise; 0 means that nothing moved.", "dim", "small")


def _neurons(report: Report, neurons: int) -> None:
    with tag("section", "", "stack", aria_label="Neurons that are changed"):
        tag("h3", "Neurons that are changed")
        tag(
            "p",
            "A neuron is one of the model's small detectors. Its label is the words that it makes likelier, as far as"
            " they can be read off: a hint, not its meaning.",
            "dim",
            "small",
        )
        with tag("div", "", "scroll", tabindex="0", role="region", aria_label="Neurons"), tag("table"):
            with tag("thead"), tag("tr"):
                for name in ("Neuron", "Makes likelier", "Changed by"):
                    tag("th", name, "number" if name == "Changed by" else "", scope="col")
            with tag("tbody"):
                for each in report.neurons[:_NEURONS]:
                    with tag("tr"):
                        with tag("td"):
                            name = f"{each.layer}:{each.neuron}"
                            if each.neuron < neurons:
                                tag("a", name, href=f"/neurons?neuron={name}", aria_label=f"Neuron {name}")
                            else:
                                tag("span", f"{name}, new")
                        tag("td", each.label or "no label", "" if each.label else "dim")
                        tag("td", f"{each.effect:+.3f}", "number")


def _cost(report: Report, rewritten: str) -> None:
    with tag("section", "", "stack", aria_label="Cost"):
        tag("h3", "Cost")
        if report.weights is not None:
            moved = report.weights
            tag(
                "p",
                f"{counted(moved.entries, 'number')} of the model ({moved.share:.3%}) {rewritten} rewritten;"
                f" {moved.survived:.0%} of the change survives rounding.",
            )
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.seconds.items())
        tag("p", f"It took {report.total_seconds:.1f} s ({spent}).")
        if report.method is not None:
            forced = ", forced over the budget" if report.forced else ""
            tag("p", f"Method: {report.method}{forced}. {report.note}".strip(), "dim")
        tried = [each for each in report.tried if each.outcome != "chosen"]
        if tried:
            with tag("details"):
                tag("summary", f"Also tried: {', '.join(each.method for each in tried)}")
                for each in tried:
                    tag("p", f"{each.method}, {each.seconds:.1f} s: {each.why}", "dim")
