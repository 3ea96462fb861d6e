"""The arena's results, where this workspace has some: the methods side by side.

Owns finding the runs' files and showing them. What a figure is the mean of is `evaluation.arena_report`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nicegui import ui

from liveweight.evaluation.arena_report import figure, markdown
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, drawing, table, tag, when_written

_LARGEST = 50_000_000  # bytes of a file that is looked into
_HINT = "liveweight arena --data counterfact --folder FOLDER --methods all --workspace NEW --out {folder}/arena.json"


class ArenaPage:
    """One open page of results."""

    def __init__(self, frame: Frame) -> None:
        """Draw it."""
        self._frame = frame
        with tag("div", "", "stack", "wide"):
            tag("h1", "Arena")
            tag(
                "p",
                "Every way of changing the model, tried on the same cases: does it work, what else does it move?",
                "dim",
            )
            self._runs = tag("div", "", "stack", "wide")
        frame.watch(self._nothing)
        ui.timer(0.0, self._read, once=True)

    async def _nothing(self) -> None:
        """Results do not change with the ledger."""

    async def _read(self) -> None:
        folder = self._frame.service.settings.workspace
        found = await aside(runs, folder)
        with self._runs:
            if not found:
                tag("p", "There are no results in this workspace yet. Make some, on the base model in a new workspace:")
                tag("pre", _HINT.format(folder=folder), "panel", "scroll", tabindex="0")
            for path, data in found:
                _run(path, data)


def runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The arena's files in a workspace and in its folder `arena`, the newest first."""
    found = []
    for path in (*folder.glob("*.json"), *folder.glob("arena/*.json")):
        if path.stat().st_size > _LARGEST:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and {"run", "machine", "methods"} <= data.keys():
            found.append((path, data))
    return sorted(found, key=lambda each: each[0].stat().st_mtime, reverse=True)


def _run(path: Path, data: Mapping[str, Any]) -> None:
    run = data["run"]
    try:
        lines, picture = markdown(data).splitlines(), figure(data)
    except (KeyError, TypeError, ValueError):  # a file of another release, or cut off
        tag("p", f"{path.name} is no run that this release can read.", "dim")
        return
    with tag("section", "", "stack", aria_label=path.name):
        tag("h2", f"{run['data']}, {run['cases']} cases, {run['mode']}")
        tag("p", f"{run['model']}, {path.name}, {when_written(path)}", "dim", "small")
        cells = [_cells(line) for line in lines if line.startswith("|")]
        table(cells[0], cells[2:], f"Results of {path.name}", numbers=range(1, len(cells[0])))
        for line in lines:
            if line and not line.startswith(("|", "Run:")):
                tag("p", line, "dim")
        drawing(picture, f"A drawing of the table of {path.name}")


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
