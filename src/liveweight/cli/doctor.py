"""`liveweight doctor`: what this machine, model and workspace are, and what one change costs here."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel


@takes_options
def doctor(options: Options) -> None:
    """Check machine, model and ledger, and measure what one change of the weights costs."""
    started = time.perf_counter()
    with session.opened(options) as live:
        found = _examined(live, time.perf_counter() - started)
    if options.json:
        output.print_json(found)
    else:
        rows = [(name, Text(_shown(value))) for name, value in found.items()]
        output.out().print(output.grid(rows))


def _examined(live: LiveModel, loading: float) -> dict[str, Any]:
    import torch

    from liveweight import __version__

    info, settings = live.engine.info, live.settings
    before = live.fingerprints()
    cost = _one_change(live)
    problems = live.ledger.verify()
    if live.fingerprints() != before:
        problems.append("A change that was taken back left other weights behind.")
    changes = live.changes()
    return {
        "liveweight": __version__,
        "torch": torch.__version__,
        "model": f"{info.name} ({info.architecture}, {info.parameters:,} parameters, {info.hash[:12]})",
        "device": info.device,
        "dtype": info.dtype,
        "threads": torch.get_num_threads(),
        "loaded in": f"{loading:.1f} s",
        "write path": "in place, recomputed in float32 from pristine values",
        "one change": cost,
        "version": str(live.engine.version),
        "workspace": str(settings.workspace),
        "database": live.ledger.place,
        "changes": {state: sum(c.state == state for c in changes) for state in ("active", "off", "undone", "refused")},
        "protected": len(live.protected()),
        "cache": {str(folder.name): _megabytes(folder) for folder in _folders(settings.cache_dir)},
        "problems": [*live.notices, *problems] or "none",
        "notes": list(info.notes) or "none",
    }


def _one_change(live: LiveModel) -> dict[str, str]:
    """Milliseconds to write a rank-one change of one matrix and to take it back; nobody sees a token of it."""
    import torch

    from liveweight.adjustments import Active, Adjustment, LowRank

    engine = live.engine
    layer = engine.info.layers // 2
    site = f"layers.{layer}.mlp.down.weight" if not engine.sites.experts_of(layer) else "lm_head.weight"
    rows, columns = engine.sites.weight(site).read().shape
    op = LowRank(site=site, left=torch.ones(rows, 1), right=torch.full((1, columns), 1e-3))
    trial = Active(Adjustment(name="doctor", method="doctor", ops=(op,)))
    with engine.gate.step():
        marks = [time.perf_counter()]
        with engine.preview((*engine.state, trial)):
            marks.append(time.perf_counter())
        marks.append(time.perf_counter())
    there, back = (1000 * (b - a) for a, b in pairwise(marks))
    return {"site": site, "apply": f"{there:.1f} ms", "undo": f"{back:.1f} ms"}


def _folders(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.glob("*") if folder.is_dir()) if cache.is_dir() else []


def _megabytes(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:.1f} MB"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n".join(str(part) for part in value)
    return str(value)
