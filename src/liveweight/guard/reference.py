"""What the base model does with the probes, computed once and kept on disk by model and probes.

Owns the rows that are forced (each probe, a chat with the base's own greedy answer), what left the base's final norm
there, and what the base gives a layer, so that a changed model need only be run from its first changed layer up; and
how rows are run together. Compares nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveweight.engines.fingerprints import in_place_of
from liveweight.engines.replay import packed_paths, packed_prompts, run_whole
from liveweight.engines.transformers import TransformersEngine
from liveweight.guard.probe_set import Probe, ProbeSet

_TOKENS = 1000  # of one batch's sequences together, of which chats share a third
_CHATS = 48  # probes that are asked at once


@dataclass(frozen=True)
class Row:
    """One sequence to be forced: `start` is where what is measured begins."""

    text: str
    tokens: tuple[int, ...]
    start: int
    probe: Probe | None = None  # None for a protected answer

    @property
    def id(self) -> str:
        """The probe's name; empty for a protected answer."""
        return self.probe.id if self.probe else ""

    @property
    def is_chat(self) -> bool:
        """Whether an answer to a probe's question is measured."""
        return self.probe is not None and self.probe.is_chat

    def asks(self, question: str) -> bool:
        """Whether the probe asks this."""
        return self.probe is not None and self.probe.asks(question)


class Reference:
    """The base model on one set of probes, with `tokens` of its answer to each chat."""

    def __init__(self, engine: TransformersEngine, probes: ProbeSet, tokens: int, cache_dir: Path) -> None:
        """Nothing is computed yet."""
        self.engine, self.probes, self.tokens = engine, probes, tokens
        self._cache_dir = cache_dir
        self._rows: list[Row] | None = None
        self._final: list[Tensor] = []
        self._inputs: dict[int, list[Tensor]] = {}  # layer -> a row: (all T, width)

    @cached_property
    def folder(self) -> Path:
        """Where it is kept: by the model, and by what is asked of it, as tokens.

        The same weights may come with another tokenizer, template or system prompt.
        """
        asked = [self._given[probe.id] for probe in (*self.probes.chats, *self.probes.texts)]
        told = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        info = self.engine.info
        name = f"{info.hash[:20]}-{info.dtype}-{self.probes.hash[:12]}-{told}-{self.tokens}"
        return self._cache_dir / "guard" / name

    @cached_property
    def _given(self) -> dict[str, tuple[int, ...]]:
        """What the model is given of each probe, by its id: a chat up to its answer, or a text."""
        encode_text = self.engine.format.encode_text
        return {
            probe.id: tuple(
                self.engine.encode(probe.messages) if probe.is_chat else encode_text(probe.text, special=True)
            )
            for probe in self.probes
        }

    def rows(self, progress: bool) -> list[Row]:
        """The probes in their order, with the base's own answers."""
        if self._rows is None:
            path = self.folder / "reference.safetensors"
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / ".lock"):
                    if not path.is_file():
                        self._make(path, progress)
            stored = load_file(path)
            self._rows = [self._row(probe, stored[f"{probe.id}.answer"].tolist()) for probe in self.probes]
            self._final = [stored[f"{probe.id}.final"] for probe in self.probes]
        return self._rows

    def final(self, index: int) -> Tensor:
        """(T, width): what left the base's final norm at a row's measured positions. Called once there are rows."""
        return self._final[index]

    def inputs(self, layer: int, progress: bool) -> list[Tensor]:
        """Each row's input to a layer under the base, (all T, width), from disk or computed now; nothing below 0."""
        rows = self.rows(progress)
        if layer < 0:
            return [torch.empty(0)] * len(rows)
        if layer not in self._inputs:
            path = self.folder / f"inputs-{layer}.safetensors"
            if not path.is_file():
                with FileLock(self.folder / ".lock"):
                    if not path.is_file():
                        self._make_inputs(layer, rows, path, progress)
            stored = load_file(path)
            self._inputs[layer] = [stored[row.id] for row in rows]
        return self._inputs[layer]

    def _row(self, probe: Probe, answer: list[int]) -> Row:
        given = self._given[probe.id]
        if not probe.is_chat:
            return Row(probe.text, given, 1, probe)
        return Row(probe.question, (*given, *answer), len(given), probe)

    def _make(self, path: Path, progress: bool) -> None:
        engine = self.engine
        stored: dict[str, Tensor] = {}
        chats = sorted(self.probes.chats, key=lambda probe: len(self._given[probe.id]))
        with (
            Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
            engine.preview(()),
        ):
            task = bar.add_task("Asking the base model every probe (once)", total=2 * len(self.probes))
            rows = [self._row(probe, []) for probe in self.probes.texts]
            for start in range(0, len(chats), _CHATS):
                batch = chats[start : start + _CHATS]
                replies = engine.greedy([self._given[probe.id] for probe in batch], self.tokens)
                rows += [self._row(probe, reply) for probe, reply in zip(batch, replies, strict=True)]
                bar.advance(task, len(batch))
            for some in batches(list(range(len(rows))), rows):
                with torch.inference_mode():
                    found = run_measured(engine, [rows[i] for i in some], -1, None)
                for i, hidden in zip(some, found, strict=True):
                    stored[f"{rows[i].id}.final"] = hidden.float().cpu().clone()
                    stored[f"{rows[i].id}.answer"] = torch.tensor(rows[i].tokens[rows[i].start :], dtype=torch.int64)
                bar.advance(task, len(some))
        save(stored, path)

    def _make_inputs(self, layer: int, rows: list[Row], path: Path, progress: bool) -> None:
        engine, stored = self.engine, {}
        with (
            Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
            engine.preview(()),
            torch.inference_mode(),
        ):
            task = bar.add_task(f"Running the probes up to layer {layer} (once)", total=len(rows))
            for batch in batches(list(range(len(rows))), rows):
                _, kept = run_whole(engine.model, engine.sites, [rows[i].tokens for i in batch], keep=layer)
                stored.update({rows[i].id: found.cpu() for i, found in zip(batch, kept, strict=True)})
                bar.advance(task, len(batch))
        save(stored, path)


def run_rows(
    engine: TransformersEngine,
    rows: Sequence[Row],
    layer: int,
    inputs: Sequence[Tensor] | None,
    until: int | None = None,
) -> Sequence[Tensor]:
    """(all T, width) of each row behind the final norm, or as the layer `until` is given it; run inside a preview.

    From `layer` on, whose inputs these are; below 0 from the beginning.
    """
    tokens = [row.tokens for row in rows]
    prompts = packed_prompts(packed_paths(engine.model, tokens), [row.start for row in rows])
    given = inputs if layer >= 0 else None
    with engine.activations.prompt(prompts):
        found, _ = run_whole(engine.model, engine.sites, tokens, layer=max(layer, 0), inputs=given, until=until)
    return found


def run_measured(
    engine: TransformersEngine, rows: Sequence[Row], layer: int, inputs: Sequence[Tensor] | None
) -> list[Tensor]:
    """What `run_rows` finds at the positions that predict what is measured, (T, width) a row."""
    every = run_rows(engine, rows, layer, inputs)
    return [own[row.start - 1 : -1] for row, own in zip(rows, every, strict=True)]


def batches(chosen: list[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """The chosen rows in batches of so many tokens, chats together."""
    order = sorted(chosen, key=lambda i: (rows[i].is_chat, rows[i].tokens))
    batch: list[int] = []
    tokens = 0
    for i in order:
        if batch and tokens + len(rows[i].tokens) > _TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(rows[i].tokens)
    if batch:
        yield batch


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Written beside and then moved, so that a file is whole or not there, whoever else writes it."""
    with in_place_of(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
