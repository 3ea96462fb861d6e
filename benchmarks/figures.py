"""From measured cases to the table of docs/benchmarks.md.

Owns every figure's arithmetic and its target. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

Row = dict[str, Any]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    target: str
    value: str
    reached: bool | None  # None: there is nothing to reach


def table(data: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = [
        *single(data.get("single", [])),
        *against_lora(data.get("single", []), data.get("lora", [])),
        *together(data.get("all", [])),
        *bad(data.get("bad", [])),
    ]
    run = ", ".join(f"{name} {value}" for name, value in {**data["run"], **data["machine"]}.items())
    head = ["| what | to reach | measured | |", "|---|---|---|---|"]
    marks = {True: "yes", False: "**no**", None: ""}
    body = [f"| {line.what} | {line.target} | {line.value} | {marks[line.reached]} |" for line in lines]
    return "\n".join([*head, *body, "", f"Run: {run}."])


def single(rows: Sequence[Row]) -> list[Line]:
    """Each fix alone."""
    if not rows:
        return []
    held, unseen = ([each for row in rows for each in row[name]] for name in ("held_out", "unseen"))
    # A change that was refused did no damage, and must not dilute that of the others.
    done = [row for row in rows if row["state"] == "active"]
    neighbours = sum(row["neighbours"] for row in done)
    unchanged, right = (sum(row[name] for row in done) for name in ("unchanged", "still_right"))
    measured = [row for row in done if "kl" in row]
    failed = [f"{row['question']} ({row['state']})" for row in rows if row["state"] != "active"]
    by_method: dict[str, int] = {}
    for row in rows:
        by_method[row.get("method") or "none"] = by_method.get(row.get("method") or "none", 0) + 1
    lines = [
        share("`fix`, one at a time: right answer to the question asked", [row["right"] for row in rows], 0.98),
        share("the same in 4 wordings that no method sees", held, 0.85),
        share("the same in 4 more, by somebody who had not seen the methods", unseen, None),
        share_of("answers to the neighbours unchanged", unchanged, neighbours, 0.99),
        share_of("answers to the neighbours still right", right, neighbours, None),
    ]
    if measured:
        kl = sum(row["kl"] for row in measured) / len(measured)
        ratio = sum(row["perplexity"] for row in measured) / len(measured)
        where = f"mean of {len(measured)} cases"
        lines += [
            Line(f"mean KL on 100 instructions, nats a token ({where})", "≤ 0.01", f"{kl:.5f}", kl <= 0.01),
            Line("its largest in one case", "", f"{max(row['kl'] for row in measured):.5f}", None),
            Line(f"perplexity ratio on plain text ({where})", "≤ 1.005", f"{ratio:.5f}", ratio <= 1.005),
        ]
    if done:
        propose, wall = (median(row[name] for row in done) for name in ("propose", "wall"))
        lines += [
            Line("seconds to the proposed change, median of committed fixes", "≤ 3", f"{propose:.2f}", propose <= 3),
            Line(
                "seconds with the full guard and commit, median of committed fixes", "≤ 10", f"{wall:.2f}", wall <= 10
            ),
        ]
    walls = [row["wall"] for row in rows]
    lines.append(
        Line("the same, refused cases too: median / slowest", "", f"{median(walls):.2f} / {max(walls):.2f}", None)
    )
    methods = ", ".join(f"{name} {count}" for name, count in sorted(by_method.items(), key=lambda pair: -pair[1]))
    lines.append(Line("methods that `auto` chose", "", methods, None))
    if failed:
        lines.append(Line("not changed", "", "; ".join(failed), None))
    return lines


def against_lora(rows: Sequence[Row], loras: Sequence[Row]) -> list[Line]:
    """The same cases, by us and by PEFT's LoRA."""
    if not loras:
        return []
    questions = {row["question"] for row in loras}
    ours = [row for row in rows if row["question"] in questions]
    seconds = median(row["seconds"] for row in loras)
    right, held = [row["right"] for row in loras], [each for row in loras for each in row["held_out"]]
    said = f"{seconds:.2f} s; asked {percent(right)}; in other wordings {percent(held)}"
    contexts = "/".join(str(number) for number in sorted({row["contexts"] for row in loras}))
    lines = [Line(f"PEFT LoRA, {len(loras)} cases, {contexts} contexts each", "", said, None)]
    if all("neighbours" in row for row in loras):
        for name, what in (("unchanged", "unchanged"), ("still_right", "still right")):
            counts = (sum(row[name] for row in loras), sum(row["neighbours"] for row in loras))
            lines.append(share_of(f"answers to the neighbours {what} by LoRA", *counts, None))
    timed = [row["propose"] for row in ours if row["state"] == "active"]
    if timed:
        mine = median(timed)
        asked, others = [row["right"] for row in ours], [each for row in ours for each in row["held_out"]]
        said = f"{mine:.2f} s; asked {percent(asked)}; in other wordings {percent(others)}"
        # Both run every case on the same questions, so that shares compare as means.
        as_right = all(
            sum(own) / len(own) >= sum(other) / len(other) for own, other in ((asked, right), (others, held))
        )
        lines += [
            Line(f"our proposal, {len(ours)} of the same cases", "", said, None),
            Line(
                "our seconds / LoRA's, as right or better",
                "≤ 0.5",
                f"{mine / seconds:.2f}",
                mine <= seconds / 2 and as_right,
            ),
        ]
    return lines


def together(runs: Sequence[Row]) -> list[Line]:
    """Every fix in one model."""
    if not runs:
        return []
    run = runs[-1]
    ratio = run["perplexity"]
    equal = run["tensors_equal"] == run["tensors"]
    return [
        share(f"all {len(run['right'])} fixes in one model: still right", run["right"], 0.95),
        share("the same in 4 wordings that no method sees", run["held_out"], None),
        share("the same in 4 more, by somebody who had not seen the methods", run["unseen"], None),
        share_of("neighbours unchanged", run["unchanged"], run["neighbours"], 0.97),
        share_of("neighbours still right", run["still_right"], run["neighbours"], None),
        Line("mean KL on 100 instructions, nats a token", "", f"{run['kl']:.5f}", None),
        Line("perplexity ratio on plain text", "≤ 1.03", f"{ratio:.5f}", ratio <= 1.03),
        share("`good` answers still the same after the fixes", run["goods_same"], 1.0),
        Line(
            f"undo of all {run['undone']} changes in random order: tensors whose sha256 is the base's",
            "100 %",
            f"{run['tensors_equal']} of {run['tensors']}",
            equal,
        ),
    ]


def bad(rows: Sequence[Row]) -> list[Line]:
    """Judged bad, without a right answer."""
    if not rows:
        return []
    # Other wordings may get another answer by themselves: where nothing was changed, nothing counts as reached.
    given = [[each and row["state"] == "active" for each in row["another"]] for row in rows]
    before_others = [each for row in rows for each in row["another_before"][1:]]
    babble = [each for row in rows for each in row["babble"]]
    before = [each for row in rows for each in row["babble_before"]]
    fluencies = [median(each for row in rows for each in row[name]) for name in ("fluency", "fluency_before")]
    return [
        share("`bad`: another answer to the question asked", [each[0] for each in given], 0.90),
        share("and in 3 wordings too", [each for row in given for each in row[1:]], 0.90),
        share("another than the rejected answer in those wordings before", before_others, None),
        Line("babble among these replies", "≤ 2 %", percent(babble), sum(babble) <= 0.02 * len(babble)),
        Line("babble before, same questions", "", percent(before), None),
        Line("fluency, median, after / before", "", f"{fluencies[0]:.0f} / {fluencies[1]:.0f}", None),
    ]


def share(what: str, held: Iterable[bool], target: float | None) -> Line:
    """A line of a share of verdicts."""
    verdicts = list(held)
    return share_of(what, sum(verdicts), len(verdicts), target)


def share_of(what: str, count: int, total: int, target: float | None) -> Line:
    """A line of a share of a count."""
    reached = None if target is None else total > 0 and count >= target * total
    return Line(
        what, "" if target is None else f"≥ {target:.0%}", f"{count / max(total, 1):.1%} ({count} of {total})", reached
    )


def percent(verdicts: Sequence[bool]) -> str:
    """A share in words."""
    return f"{sum(verdicts) / max(len(verdicts), 1):.1%} ({sum(verdicts)} of {len(verdicts)})"
