"""`liveweight doctor`: what this machine, model and workspace are, and what one change costs here."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options
from liveweight.shown import grid, table

if TYPE_CHECKING:
    from liveweight.adjustments import WeightOp
    from liveweight.engines.transformers import TransformersEngine
    from liveweight.live_model import LiveModel
    from liveweight.sites import ModelSites

_REPEATED = 5


@takes_options
def doctor(options: Options) -> None:
    """Check machine, model and ledger, and measure what one change of the weights costs."""
    started = time.perf_counter()
    with session.opened(options) as live:
        found = _examined(live, time.perf_counter() - started)
    if options.json:
        output.print_json(found)
    else:
        rows = [(name, _view(value)) for name, value in found.items()]
        output.out().print(grid(rows))


def _examined(live: LiveModel, loading: float) -> dict[str, Any]:
    import torch

    from liveweight import __version__

    info, settings = live.engine.info, live.settings
    before = live.fingerprints()
    costs = _costs(live)
    problems = live.ledger.verify()
    if live.fingerprints() != before:
        problems.append("A change that was taken back left other weights behind.")
    changes = live.changes()
    return {
        "liveweight": __version__,
        "torch": torch.__version__,
        "model": f"{info.name} ({info.architecture}, {info.parameters:,} parameters, {info.hash[:12]})",
        "device": _device(info.device),
        "dtype": info.dtype,
        "threads": torch.get_num_threads(),
        "loaded in": f"{loading:.1f} s",
        "write path": _write_path(live),
        "one change": costs,
        "version": str(live.engine.version),
        "workspace": str(settings.workspace),
        "database": live.ledger.place,
        "changes": {state: sum(c.state == state for c in changes) for state in ("active", "off", "undone", "refused")},
        "protected": len(live.protected()),
        "cache": {str(folder.name): _megabytes(folder) for folder in _folders(settings.cache_dir)},
        "problems": [*live.notices, *problems] or "none",
        "notes": list(info.notes) or "none",
    }


def _costs(live: LiveModel) -> dict[str, dict[str, float]]:
    """What one change costs to make and to take back, a kind of op; nobody sees a token of it."""
    engine = live.engine
    return {name: _cost(engine, op) for name, op in _examples(engine.sites).items()}


def _examples(sites: ModelSites) -> dict[str, WeightOp]:
    """One change of each kind, in the middle of the model: from a column to a whole matrix, and spare neurons."""
    import torch

    from liveweight.adjustments import Dense, LowRank, ReplaceNeurons, ScaleNeurons

    layer = sites.layers // 2
    expert = 0 if sites.experts_of(layer) else None
    site = sites.mlp_part(layer, "down", expert)
    rows, columns = sites.weight(site).shape
    examples: dict[str, WeightOp] = {
        "a neuron's column": ScaleNeurons(layer=layer, neurons=(0,), factors=torch.tensor([1.01]), expert=expert),
        "rank one": LowRank(site=site, left=torch.ones(rows, 1), right=torch.full((1, columns), 1e-3)),
        "a whole matrix": Dense(site=site, delta=torch.full((rows, columns), 1e-3)),
    }
    grown = next((layer for layer in range(sites.layers) if sites.spare_of(layer)), None)
    if grown is not None:
        neurons = tuple(range(sites.neurons_of(grown), sites.neurons_of(grown) + min(4, sites.spare_of(grown))))
        read, write = torch.full((len(neurons), sites.width), 1e-3), torch.full((sites.width, len(neurons)), 1e-3)
        gate = read if sites.gated else None
        examples[f"{len(neurons)} spare neurons"] = ReplaceNeurons(
            layer=grown, neurons=neurons, up=read, down=write, gate=gate
        )
    return examples


def _cost(engine: TransformersEngine, op: WeightOp) -> dict[str, float]:
    """Medians over some repetitions, the first one not counted: milliseconds, and bytes to the weights' device."""
    from liveweight.adjustments import Active, Adjustment

    trial = Active(Adjustment(name="doctor", method="doctor", ops=(op,)))
    timed: list[list[float]] = []
    with engine.gate.step():
        for _ in range(_REPEATED + 1):
            sent = [engine.weights.travelled]
            marks = [time.perf_counter()]
            with engine.preview((*engine.state, trial)):
                marks.append(time.perf_counter())
                sent.append(engine.weights.travelled)
            marks.append(time.perf_counter())
            sent.append(engine.weights.travelled)
            timed.append([1000 * (b - a) for a, b in pairwise(marks)])
    there, back = (median(each) for each in zip(*timed[1:], strict=True))
    to, fro = (b - a for a, b in pairwise(sent))
    return {"apply_ms": round(there, 3), "undo_ms": round(back, 3), "apply_bytes": to, "undo_bytes": fro}


def _write_path(live: LiveModel) -> str:
    """How a change gets to the weights on this device."""
    recomputed = "recomputed in float32 from pristine values"
    if live.engine.info.device.startswith("cpu"):
        return f"in place in host memory, {recomputed}; the bytes below stay on the host"
    return f"in place on the device, {recomputed} there; indices and values travel, the base's values wait on the host"


def _device(name: str) -> str:
    """The device with its name, where it has one."""
    import torch

    return f"{name} ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else name


def _folders(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.glob("*") if folder.is_dir()) if cache.is_dir() else []


def _megabytes(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:.1f} MB"


def _view(value: Any) -> RenderableType:
    """A value as text; what changes cost as a table."""
    if not (isinstance(value, dict) and all(isinstance(part, dict) for part in value.values())):
        return Text(_shown(value))
    shown = table("", "apply ms>", "undo ms>", "apply bytes>", "undo bytes>")
    for name, cost in value.items():
        times, sizes = (cost["apply_ms"], cost["undo_ms"]), (cost["apply_bytes"], cost["undo_bytes"])
        shown.add_row(name, *(f"{each:.2f}" for each in times), *(f"{each:,}" for each in sizes))
    return shown


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return "\n".join(str(part) for part in value)
    return str(value)
