"""Two checkpoints of one architecture: which weights differ, by how much, and what that does to the neurons' labels.

Owns the measures. With W a weight of the first model and W + D the second's: |D|, |D| / |W| and the share of changed
entries; the share of |D|² in D's first r singular values (1 where a low-rank adapter was merged); the largest principal
angle between the leading r singular subspaces of both weights, on the side that reads and on the side that writes
(Björck and Golub 1973, by scipy). Of neurons: the share whose write column still decodes into the same token, and those
that moved most. Knows nothing of adjustments (`two_models.py`) or of how it is shown. Nothing here writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from liveweight.engines.model_source import load, resolve
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.settings import Settings
from liveweight.tracing.capture import Neuron
from liveweight.tracing.model_diff_report import LayerLabels, ModelDiff, NeuronMove, SiteChange
from liveweight.tracing.neuron_labels import NeuronLabel, label_neurons, write_directions
from liveweight.tracing.two_models import TwoModels, leading
from liveweight.tracing.unembedding import decode

MOVED = 10  # neurons that are named
_SITE = re.compile(r"^layers\.(\d+)\.(?:mlp\.experts\.\d+\.)?(.+)$")

Progress = Callable[[str, int, int], None]  # what, done, of how many


def diff(
    a: TransformersEngine | str,
    b: TransformersEngine | str,
    *,
    rank: int = 8,
    labels: bool = True,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> ModelDiff:
    """Compare two models, engines or names (smollm2, a hub id, a folder, a .gguf file); both as bases.

    `rank` is that of the subspaces; `labels` asks for the neurons' tokens too, which takes most of the time. A model
    that is given by name is read through a mapping of its file. Raises InvalidInput where they are not of one shape or
    a rank is below 1, and what finding and loading a model raises.
    """
    if rank < 1:
        raise InvalidInput(f"A rank of {rank} spans nothing.", hint="Give 1 or more.")
    settings = settings or Settings()
    one = _engine(a, settings)
    two = _engine(b, settings.model_copy(update={"revision": None}))  # the revision is the first one's
    pair = TwoModels(one, two)
    changes: list[SiteChange] = []
    moves = _Moves()
    entries = 0
    for number, site in enumerate(pair.sites):
        base, other = pair.both(site)
        entries += base.numel()
        if not torch.equal(base, other):
            changes.append(_measured(site, base, other, rank))
            moves.see(site, base, other)
        if progress is not None:
            progress("Comparing weights", number + 1, len(pair.sites))
    notes = []
    layers: tuple[LayerLabels, ...] = ()
    moved: tuple[NeuronMove, ...] = ()
    if labels and one.sites.experts:
        notes.append("Neurons of models with experts are not labelled.")
    elif labels and changes:
        layers = _labels(pair, {each.site for each in changes}, moves, progress)
        moved = _most_moved(pair, moves, settings.cache_dir)
    if one.sites.tied != two.sites.tied:
        tied, own = (one, two) if one.sites.tied else (two, one)
        notes.append(f"{tied.info.name} has one tensor for embedding and unembedding, {own.info.name} has two.")
    found = ModelDiff(
        a=one.info.name,
        b=two.info.name,
        hash_a=one.info.hash,
        hash_b=two.info.hash,
        architecture=one.info.architecture,
        sites=len(pair.sites),
        entries=entries,
        changed=sum(each.entries for each in changes),
        rank=rank,
        changes=tuple(changes),
        labels=layers,
        moved=moved,
        notes=tuple(notes),
    )
    found.attach(pair)
    return found


# ------------------------------------------------------------------------------------------------------- weights


def _measured(site: str, base: Tensor, other: Tensor, rank: int) -> SiteChange:
    delta = other - base
    norm, before = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (delta, base))
    energy = reads = writes = None
    if base.dim() == 2 and min(base.shape) > 1:
        energy = min(1.0, float(leading(delta, rank)[1].double().pow(2).sum()) / norm**2) if norm else None
        old, new = leading(base, rank), leading(other, rank)
        writes, reads = (_angle(old[side], new[side]) for side in (0, 2))
    numbered = _SITE.match(site)
    changed = int((base != other).sum())
    return SiteChange(
        site=site,
        layer=int(numbered[1]) if numbered else None,
        kind=numbered[2] if numbered else site,
        norm=norm,
        share=norm / before if before else None,
        entries=changed,
        changed=changed / base.numel(),
        energy=energy,
        reads=reads,
        writes=writes,
    )


def _angle(one: Tensor, two: Tensor) -> float:
    """The largest principal angle between the spans of two sets of columns, in degrees."""
    from scipy.linalg import subspace_angles  # slow to import, and needed here only

    return float(torch.rad2deg(torch.tensor(subspace_angles(one.double().numpy(), two.double().numpy())).max()))


def _engine(model: TransformersEngine | str, settings: Settings) -> TransformersEngine:
    if not isinstance(model, str):
        return model
    loaded = load(resolve(model, settings=settings), dtype=settings.dtype, device=settings.device, progress=False)
    return TransformersEngine(loaded, threads=settings.threads, spare_neurons=0)


# -------------------------------------------------------------------------------------------------------- neurons


@dataclass
class _Moves:
    """How far each neuron's vectors moved: squared lengths of what changed and of what was, by layer, (neurons,)."""

    changed: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[int, set[str]] = field(default_factory=dict)

    def see(self, site: str, base: Tensor, other: Tensor) -> None:
        """Take note of a changed weight, if it is a dense MLP's matrix."""
        found = re.fullmatch(r"layers\.(\d+)\.mlp\.(gate|up|down)\.weight", site)
        if found is None:
            return
        layer, along = int(found[1]), 0 if found[2] == "down" else 1
        # Each vector's own relative change: gate, up and down are not of one scale.
        moved = (other - base).pow(2).sum(along) / base.pow(2).sum(along).clamp_min(1e-30)
        self.changed[layer] = self.changed.get(layer, torch.zeros(())) + moved
        self.parts.setdefault(layer, set()).add(found[2])


def top_tokens(engine: TransformersEngine, layer: int, neurons: list[int]) -> Tensor:
    """The token that each neuron's write column decodes into, (n,): the first of its label."""
    return decode(engine, write_directions(engine, layer, neurons)).ids[:, 0]


def _labels(pair: TwoModels, changed: set[str], moves: _Moves, progress: Progress | None) -> tuple[LayerLabels, ...]:
    """The layers whose neurons may write other tokens, and how many still write the same."""
    sites = pair.a.sites
    everywhere = bool({"lm_head.weight", "embed.weight" if sites.tied else "", "final_norm.weight"} & changed)
    found: list[LayerLabels] = []
    for layer in range(sites.layers):
        count, norm = sites.neurons_of(layer), sites.write_norm(layer)
        down = f"layers.{layer}.mlp.down.weight"
        if everywhere or (norm is not None and norm.site in changed):
            neurons = list(range(count))
        elif down in changed:
            old_down, new_down = pair.both(down)  # (width, neurons)
            neurons = (old_down != new_down).any(dim=0).nonzero()[:, 0].tolist()
        else:
            neurons = []
        if neurons or layer in moves.changed:
            old, new = (top_tokens(engine, layer, neurons) if neurons else None for engine in (pair.a, pair.b))
            lost = int((old != new).sum()) if old is not None and new is not None else 0
            found.append(LayerLabels(layer=layer, neurons=count, looked_at=len(neurons), kept=1.0 - lost / count))
        if progress is not None:
            progress("Comparing labels", layer + 1, sites.layers)
    return tuple(found)


def _most_moved(pair: TwoModels, moves: _Moves, cache_dir: Path) -> tuple[NeuronMove, ...]:
    """The neurons whose vectors moved most, by the root of the summed squared relative changes."""
    ranked: list[tuple[float, Neuron]] = []
    for layer, moved in moves.changed.items():
        values, places = moved.sqrt().topk(min(MOVED, len(moved)))
        ranked += [(value, (layer, place)) for value, place in zip(values.tolist(), places.tolist(), strict=True)]
    ranked = sorted([each for each in ranked if each[0] > 0], key=lambda each: (-each[0], each[1]))[:MOVED]
    neurons = [neuron for _, neuron in ranked]
    old, new = (_labelled(engine, neurons, cache_dir) for engine in (pair.a, pair.b))
    return tuple(
        NeuronMove(
            layer=neuron[0],
            neuron=neuron[1],
            moved=value,
            parts=tuple(sorted(moves.parts[neuron[0]])),
            before=old[neuron].text(),
            after=new[neuron].text(),
            kept=old[neuron].promotes.top[0].id == new[neuron].promotes.top[0].id,
        )
        for value, neuron in ranked
    )


def _labelled(engine: TransformersEngine, neurons: list[Neuron], cache_dir: Path) -> dict[Neuron, NeuronLabel]:
    return label_neurons(engine, neurons, cache_dir=cache_dir) if neurons else {}
