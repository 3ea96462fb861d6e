"""From an arena's file to its table and its picture.

Owns every figure's arithmetic: what a row of the table is the mean of. Knows nothing of models and of running.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from liveweight.evaluation.arena import Row, mean_scores
from liveweight.evaluation.edit_metrics import harmonic, mean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNEDITED = "unedited"
GUARDED = "under the guard"
_ROW, _TITLE = 270, 120  # pixels of a row of a sequence's pictures, and of what stands above them

# What a column is called, the figure that it shows, and how many per cent a hundred of it is.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("ES", "efficacy", "share"),
    ("PS", "paraphrase", "share"),
    ("NS", "neighbourhood", "share"),
    ("S", "harmonic", "share"),
    ("accuracy", "accuracy", "share"),
    ("rephrased", "accuracy_paraphrase", "share"),
    ("chat", "chat", "share"),
    ("chat, rephrased", "chat_paraphrase", "share"),
    ("kept", "kept", "share"),
    ("fluency", "fluency", "whole"),
    ("KL", "kl", "small"),
    ("perplexity ratio", "perplexity_ratio", "small"),
    ("decode speed", "decode_speed", "ratio"),
    ("weights", "share", "per mille"),
    ("seconds", "seconds", "seconds"),
    ("peak MB", "peak_mb", "whole"),
    ("undo", "undo_exact", "all"),
)


def summary(data: Mapping[str, Any]) -> list[Row]:
    """The figures of the unedited model and of each method: alone and under the guard, or at each point of a run."""
    base = [row["scores"] for row in data.get("unedited", [])]
    rows = [_scored({"method": UNEDITED, "cases": len(base), "made": None}, mean_scores(base))] if base else []
    for name, cases in data.get("methods", {}).items():
        if data["run"]["mode"] == "single":
            if cases:
                rows += [_of_cases(name, cases), _under_guard(name, cases, base)]
        else:
            rows += [_of_point(name, point, cases) for point in data.get("points", {}).get(name, [])]
    return rows


def markdown(data: Mapping[str, Any]) -> str:
    """The run as a Markdown table, with a sentence on what found nothing, what collapsed, and what it ran on."""
    rows = summary(data)
    shown = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    head = ["method", *(["edits"] if data["run"]["mode"] != "single" else []), "made", *(name for name, _, _ in shown)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        made = "" if row["made"] is None else f"{row['made']} of {row['cases']}"
        first = [row["method"], *([str(row["cases"])] if data["run"]["mode"] != "single" else []), made]
        lines.append(f"| {' | '.join([*first, *(_written(row.get(key), how) for _, key, how in shown)])} |")
    told = {**data["run"], **data["machine"]}
    run = ", ".join(f"{name} {value}" for name, value in told.items() if name not in ("settings", "guard"))
    return "\n".join([*lines, "", *_nothing_found(data), f"Run: {run}."])


def figure(data: Mapping[str, Any]) -> Figure:
    """Single edits: success against what it cost the neighbours. Sequences: every score against the number of edits."""
    return _sequence(data) if data["run"]["mode"] == "sequential" else _map(data)


# --------------------------------------------------------------------------------------------------------- rows


def _scored(row: Row, scores: Mapping[str, Any]) -> Row:
    row |= scores
    row["harmonic"] = harmonic(*(scores[name] for name in ("efficacy", "paraphrase", "neighbourhood")))
    return row


def _of_cases(name: str, cases: Sequence[Row]) -> Row:
    made = [case for case in cases if case["outcome"] == "made"]
    row: Row = {"method": name, "cases": len(cases), "made": len(made)}
    _scored(row, mean_scores([case["scores"] for case in cases]))
    return row | _costs(made)


def _under_guard(name: str, cases: Sequence[Row], base: Sequence[Row]) -> Row:
    """What the guard refused leaves the model as it was."""
    passed = [case["outcome"] == "made" and case["guard"]["passed"] for case in cases]
    scores = [case["scores"] if fine else old for case, fine, old in zip(cases, passed, base, strict=False)]
    row: Row = {"method": f"{name}, {GUARDED}", "cases": len(cases), "made": sum(passed)}
    _scored(row, mean_scores(scores))
    return row | _costs([case for case, fine in zip(cases, passed, strict=True) if fine])


def _costs(made: Sequence[Row]) -> Row:
    found: Row = {key: mean([case.get(key) for case in made]) for key in ("kl", "perplexity_ratio", "share", "peak_mb")}
    found["seconds"] = median(case["seconds"] for case in made) if made else None
    found["undo_exact"] = all(case["undo_exact"] for case in made) if made else None
    return found


def _of_point(name: str, point: Row, cases: Sequence[Row]) -> Row:
    so_far = [case for case in cases[: point["edits"]] if case["outcome"] == "made"]
    row: Row = {"method": name, "cases": point["edits"], "made": point["made"]}
    _scored(row, point["scores"])
    row |= {key: point.get(key) for key in ("kl", "perplexity_ratio", "decode_speed", "undo_exact")}
    row["seconds"] = mean([case["seconds"] for case in so_far])
    row["peak_mb"] = max((case["peak_mb"] for case in so_far if case.get("peak_mb") is not None), default=None)
    return row


def _nothing_found(data: Mapping[str, Any]) -> list[str]:
    found = []
    for name, points in data.get("points", {}).items():
        if points and points[-1].get("collapsed"):
            ratio, edits = points[-1]["perplexity_ratio"], points[-1]["edits"]
            found += [f"{name} collapsed by edit {edits} ({ratio:,.0f} times the perplexity): not gone on with.", ""]
    for name, cases in data.get("methods", {}).items():
        failed = [case for case in cases if case["outcome"] != "made"]
        if failed:
            found += [f"{name} found nothing in {len(failed)} of {len(cases)} cases; the first: {failed[0]['why']}", ""]
    return found


def _written(value: Any, how: str) -> str:
    if value is None:
        return ""
    if how == "all":
        return "exact" if value else "**not exact**"
    forms = {"share": 100 * value, "per mille": 1000 * value}
    digits = {"share": 1, "whole": 0, "small": 4, "ratio": 2, "per mille": 2, "seconds": 2}[how]
    return f"{forms.get(how, value):,.{digits}f}" + (" ‰" if how == "per mille" else "")


# ------------------------------------------------------------------------------------------------------ pictures


def _map(data: Mapping[str, Any]) -> Figure:
    import plotly.graph_objects as go

    rows = [row for row in summary(data) if GUARDED not in row["method"]]
    spared = "neighbourhood" if any(row["neighbourhood"] is not None for row in rows) else "kept"
    title = {"neighbourhood": "NS: neighbours that stay (%)", "kept": "neighbours' answers that stay (%)"}[spared]
    figure = go.Figure()
    for row in rows:
        figure.add_scatter(
            x=[_percent(row[spared])],
            y=[_percent(row["chat"])],
            name=row["method"],
            mode="markers",
            marker={"size": 12},
        )
    figure.update_layout(
        template="plotly_white",
        title=f"{data['run']['data']}, {data['run']['cases']} cases, {data['run']['mode']}, {data['run']['model']}",
        xaxis_title=title,
        yaxis_title="said in free generation (%)",
    )
    return figure


def _sequence(data: Mapping[str, Any]) -> Figure:
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    shown = [
        ("efficacy", "ES (%)"),
        ("paraphrase", "PS (%)"),
        ("neighbourhood", "NS (%)"),
        ("chat", "said in free generation (%)"),
        ("perplexity_ratio", "perplexity ratio"),
        ("fluency", "fluency"),
    ]
    rows = summary(data)
    shown = [each for each in shown if any(row.get(each[0]) is not None for row in rows)]
    deep = (len(shown) + 1) // 2
    figure = make_subplots(rows=deep, cols=2, subplot_titles=[title for _, title in shown])
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != UNEDITED))
    colours = qualitative.Dark24
    for place, (key, title) in enumerate(shown):
        for number, name in enumerate(names):
            own = [row for row in rows if row["method"] == name and row.get(key) is not None]
            figure.add_scatter(
                x=[row["cases"] for row in own],
                y=[_percent(row[key]) if title.endswith("(%)") else row[key] for row in own],
                name=name,
                legendgroup=name,
                showlegend=place == 0,
                mode="lines+markers",
                line={"color": colours[number % len(colours)]},
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
        log = {"type": "log"} if key == "perplexity_ratio" else {}
        figure.update_yaxes(**log, row=place // 2 + 1, col=place % 2 + 1)
    points = sorted({row["cases"] for row in rows if row["method"] != UNEDITED})
    figure.update_xaxes(type="log", tickvals=points, ticktext=[str(point) for point in points], title_text="edits")
    run = data["run"]
    figure.update_layout(
        template="plotly_white",
        title=f"{run['data']}, one edit after another, {run['model']}",
        height=_ROW * deep + _TITLE,
        legend={"tracegroupgap": 0},
    )
    return figure


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
