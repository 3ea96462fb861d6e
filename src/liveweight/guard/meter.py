"""Measures what a change moves besides what it is meant to move.

Owns the reference (the base model's greedy continuations of the probes and what left its final norm there), its cache
on disk by model and probe hash, and the measuring: whole sequences, teacher-forced on the reference's tokens, only
through the layers from the first changed one up. Proposes nothing, and knows no method.

A greedy answer changes exactly where, forced along the old answer, the likeliest token is another one; so no probe
is ever generated anew to see whether its answer changed. What a change does not reach needs no more running: where,
behind the last layer that it changes, all of a probe's tokens are as they were, the probe shows what it showed before.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveweight.adjustments import State, first_layer, last_layer, state_hash
from liveweight.engines.base import ScoreItem
from liveweight.engines.replay import packed_paths, packed_prompts, run_whole
from liveweight.engines.transformers import TransformersEngine
from liveweight.guard.budget import ChangedAnswer, GuardReport, budget_of, over_budget
from liveweight.guard.probe_set import Probe, ProbeSet, load_probes
from liveweight.settings import GuardSettings

_TOKENS = 1000  # of one batch's sequences together, of which chats share a third
_CHATS = 48  # probes that are asked at once
_UNREACHED = 1e-5  # of a token's norm in the residual stream: as far as the order of a sum may move it
_STREAMS = 2  # states whose residual streams are kept
_POSITIONS = 64  # positions whose whole distributions are compared at once: memory that is used again, not asked for


@dataclass(frozen=True)
class ProtectedItem:
    """An answer that must stay: its name, and the tokens of prompt and answer."""

    label: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
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


@dataclass(frozen=True)
class _Seen:
    """What one row showed in one state."""

    kl: float  # mean over the row's measured positions, from the base; 0 for a protected answer
    nll: float  # summed, of the row's own tokens
    argmax: tuple[int, ...]  # the likeliest token at each measured position


class Guard:
    """Compares states of one engine on a probe set."""

    def __init__(
        self, engine: TransformersEngine, settings: GuardSettings, cache_dir: Path, probes: ProbeSet | None = None
    ) -> None:
        """Nothing is measured yet. Raises InvalidInput for a bad probe file."""
        self.engine = engine
        self.settings = settings
        self.probes = probes if probes is not None else load_probes(settings.probe_file)
        self._cache_dir = cache_dir
        self._rows: list[_Row] | None = None
        self._final: list[Tensor] = []  # a row: (T, width), what left the base's final norm at the measured positions
        self._inputs: dict[int, list[Tensor]] = {}  # layer -> a row: (all T, width)
        self._streams: dict[tuple[str, int], dict[int, Tensor]] = {}  # state hash, layer -> row -> (all T, width)
        self._protected_inputs: dict[
            tuple[int, tuple[int, ...]], Tensor
        ] = {}  # layer, tokens -> (T, width), the base's
        self._protected_seen: dict[str, dict[tuple[int, ...], _Seen]] = {}  # state hash -> tokens -> what they showed
        self._seen: dict[str, dict[str, _Seen]] = {}  # state hash -> probe id -> what it showed

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

    @cached_property
    def _folder(self) -> Path:
        """Where the base's references are kept: by the model, and by what is asked of it, as tokens.

        The same weights may come with another tokenizer, template or system prompt.
        """
        asked = [self._given[probe.id] for probe in (*self.probes.chats, *self.probes.texts)]
        told = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        info, tokens = self.engine.info, self.settings.tokens
        name = f"{info.hash[:20]}-{info.dtype}-{self.probes.hash[:12]}-{told}-{tokens}"
        return self._cache_dir / "guard" / name

    def measure(
        self,
        after: State,
        *,
        protected: Sequence[ProtectedItem] = (),
        leave_out: Sequence[str] = (),
        facts: int = 1,
        only: Sequence[str] | None = None,
        before: State | None = None,
        progress: bool = True,
    ) -> GuardReport:
        """Compare `after` with `before`, the engine's present state unless told, on every probe and protected answer.

        Probes that ask one of the questions in `leave_out` are left out: they are what the change is about; with
        `only`, all but those with one of its texts are. `facts` is how many the change brings at once.
        """
        rows = self._reference(progress)
        chosen = [
            i
            for i, row in enumerate(rows)
            if (only is None or row.text in only) and not any(row.asks(question) for question in leave_out)
        ]
        return self._compare(after, chosen, protected, progress, facts, before)

    def screen(self, after: State, question: str, *, protected: Sequence[ProtectedItem] = ()) -> GuardReport:
        """The same on the few probes that are most like `question`: quick, for use inside a search."""
        rows = self._reference(False)
        near = {probe.id for probe in self.probes.screen(question, self.settings.screen_items)}
        chosen = [i for i, row in enumerate(rows) if row.id in near]
        return self._compare(after, chosen, protected[-8:], False)

    def references(self, *, progress: bool = True) -> list[ScoreItem]:
        """The chats with the base model's own greedy answers: what KL is measured on, for those who calibrate by it."""
        rows = [row for row in self._reference(progress) if row.is_chat]
        return [ScoreItem(row.tokens[: row.start], row.tokens[row.start :]) for row in rows]

    # ------------------------------------------------------------------------------------------------ comparing

    def _compare(
        self,
        after: State,
        chosen: list[int],
        protected: Sequence[ProtectedItem],
        progress: bool,
        facts: int = 1,
        before: State | None = None,
    ) -> GuardReport:
        begun = time.perf_counter()
        now = self.engine.state if before is None else before
        rows = self._reference(progress)
        before_seen = self._look(now, chosen, progress)
        after_seen = self._look(after, chosen, progress, beside=now)
        chats = [i for i in chosen if rows[i].is_chat]
        texts = [i for i in chosen if i not in set(chats)]
        added = torch.tensor([max(0.0, after_seen[i].kl - before_seen[i].kl) for i in chats] or [0.0])
        worst = int(added.argmax())
        changed = [
            self._changed(rows[i], before_seen[i], after_seen[i])
            for i in chats
            if self._answer(before_seen[i], rows[i]) != self._answer(after_seen[i], rows[i])
        ]
        tokens = sum(len(rows[i].tokens) - rows[i].start for i in texts)
        nll = sum(after_seen[i].nll - before_seen[i].nll for i in texts)
        broken = self._broken(now, after, protected)
        figures = {
            "mean_kl": float(added.mean()),
            "p95_kl": float(added.quantile(0.95)),
            "worst_kl": float(added.max()),
            "changed_share": len(changed) / max(len(chats), 1),
            "perplexity_ratio": float(torch.tensor(nll / max(tokens, 1)).exp()),
        }
        budget = budget_of(self.settings, facts)
        return GuardReport(
            items=len(chosen),
            tokens=self.settings.tokens,
            worst_text=rows[chats[worst]].text if chats else "",
            total_mean_kl=float(torch.tensor([after_seen[i].kl for i in chats] or [0.0]).mean()),
            changed=tuple(changed),
            protected=len(protected),
            protected_changed=tuple(broken),
            seconds=time.perf_counter() - begun,
            budget=budget,
            reasons=over_budget(figures, budget, len(broken)),
            too_far=tuple(
                rows[i].text for i, kl in zip(chats, added.tolist(), strict=False) if kl > budget["worst_kl"]
            ),
            **figures,
        )

    def _answer(self, seen: _Seen, row: _Row) -> tuple[int, ...]:
        """The greedy answer as far as it is known: up to and with the first token that leaves the reference."""
        reference = row.tokens[row.start :]
        for index, (said, meant) in enumerate(zip(seen.argmax, reference, strict=True)):
            if said != meant:
                return seen.argmax[: index + 1]
        return seen.argmax

    def _changed(self, row: _Row, before: _Seen, after: _Seen) -> ChangedAnswer:
        decode = self.engine.format.decode
        return ChangedAnswer(
            text=row.text, before=decode(self._answer(before, row)), after=decode(self._answer(after, row)) + " …"
        )

    def _look(
        self, state: State, chosen: list[int], progress: bool, *, beside: State | None = None
    ) -> dict[int, _Seen]:
        """What the chosen rows show in a state, from what was seen already where it was.

        `beside` is a state in which all of them were seen: how `state` differs from it may not reach every row.
        """
        rows = self._reference(progress)
        key = state_hash(state)
        known = self._known(key)
        missing = [i for i in chosen if rows[i].id not in known]
        if missing:
            layer = self._first_changed((), state)
            given: Mapping[int, Tensor] = dict(enumerate(self._inputs_of(layer, progress)))
            behind = self._behind(beside, state) if beside is not None else None
            if beside is not None and behind is not None:
                before, given = (self._streams_at(each, behind, missing, progress) for each in (beside, state))
                shown = self._known(state_hash(beside))
                known.update({rows[i].id: shown[rows[i].id] for i in missing if not _moved(before[i], given[i])})
                missing, layer = [i for i in missing if rows[i].id not in known], behind
            with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
                task = bar.add_task("Measuring what else would change", total=len(missing))
                for batch in _batches(missing, rows):
                    with self.engine.preview(state), torch.inference_mode():
                        some = [rows[i] for i in batch]
                        final = list(self._run(some, layer, [given[i] for i in batch]))
                        judged = self._judge(some, final, [self._final[i] for i in batch])
                        known.update({row.id: seen for row, seen in zip(some, judged, strict=True)})
                    bar.advance(task, len(batch))
            self._remember(key, known)
        return {i: known[rows[i].id] for i in chosen}

    def _behind(self, before: State, after: State) -> int | None:
        """The layer behind the last one in which two states differ, where it pays to look there at what is reached."""
        layers, last = self.engine.sites.layers, last_layer(self.engine.weights, before, after)
        starts = {state_hash(each): self._first_changed((), each) for each in (before, after)}
        if last is None or last + 1 >= layers or min(starts.values()) < 0:
            return None
        behind = last + 1
        work = sum(max(0, behind - start) for key, start in starts.items() if (key, behind) not in self._streams)
        return behind if 2 * work <= layers - starts[state_hash(after)] else None

    def _streams_at(self, state: State, layer: int, chosen: list[int], progress: bool) -> Mapping[int, Tensor]:
        """Each chosen row's input to a layer in a state, (all T, width)."""
        first = self._first_changed((), state)
        if first >= layer:
            return dict(enumerate(self._inputs_of(layer, progress)))
        key = (state_hash(state), layer)
        found = self._streams.pop(key, {})
        self._streams = {**dict(list(self._streams.items())[1 - _STREAMS :]), key: found}
        rows, inputs = self._reference(progress), self._inputs_of(first, progress)
        for batch in _batches([i for i in chosen if i not in found], rows):
            with self.engine.preview(state), torch.inference_mode():
                streams = self._whole([rows[i] for i in batch], first, [inputs[i] for i in batch], until=layer)
            found.update(zip(batch, streams, strict=True))
        return found

    def _judge(self, rows: Sequence[_Row], finals: Sequence[Tensor], bases: Sequence[Tensor | None]) -> list[_Seen]:
        """Compare what left the final norm, a row (T, width), with the base's; called inside a preview.

        All rows' positions go through the unembedding together: row by row, the table would be read for a few
        positions at a time.
        """
        lengths = [len(final) for final in finals]
        hidden = torch.cat(list(finals))
        target = torch.tensor([token for row in rows for token in row.tokens[row.start :]], device=hidden.device)
        chats = [row.is_chat and base is not None for row, base in zip(rows, bases, strict=True)]
        compared = torch.tensor([chat for chat, length in zip(chats, lengths, strict=True) for _ in range(length)])
        old_hidden = torch.cat([h if base is None else base.to(h) for h, base in zip(finals, bases, strict=True)])
        kl, nll, said = torch.zeros(len(hidden)), torch.zeros(len(hidden)), torch.zeros(len(hidden), dtype=torch.int64)
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            live = self.engine.unembed(hidden[part]).float().log_softmax(-1)
            nll[part] = -live.gather(1, target[part, None])[:, 0].cpu()
            said[part] = live.argmax(-1).cpu()
            if bool(compared[part].any()):
                old = self._base_logprobs(old_hidden[part])
                torch.sub(old, live, out=live)
                kl[part] = torch.linalg.vecdot(old.exp_(), live).cpu() * compared[part]
        kls, nlls, saids = (torch.split(each, lengths) for each in (kl, nll, said))
        return [
            _Seen(_divergence(k), float(n.sum()), tuple(a.tolist())) for k, n, a in zip(kls, nlls, saids, strict=True)
        ]

    def _base_logprobs(self, hidden: Tensor) -> Tensor:
        """(T, vocabulary) log-probabilities under the base's own unembedding, whatever is active."""
        sites = self.engine.sites
        touched = self.engine.weights.touched(self.engine.weights.state)
        if sites.canonical("lm_head.weight") not in touched:
            return self.engine.unembed(hidden).float().log_softmax(-1)
        table = self.engine.weights.base("lm_head.weight").to(hidden.device)
        return (hidden.float() @ table.T).log_softmax(-1)

    def _broken(self, now: State, after: State, protected: Sequence[ProtectedItem]) -> list[ChangedAnswer]:
        """Protected answers that hold now and would not hold after the change."""
        if not protected:
            return []
        rows = [_Row(item.label, (*item.prompt, *item.answer), len(item.prompt)) for item in protected]
        layer = min(self._first_changed((), state) for state in (now, after))
        seen = [self._forced(state, rows, layer) for state in (now, after)]
        return [
            self._changed(row, old, new)
            for row, old, new in zip(rows, *seen, strict=True)
            if self._answer(old, row) != self._answer(new, row)
        ]

    def _forced(self, state: State, rows: Sequence[_Row], layer: int) -> list[_Seen]:
        """What protected answers show in a state that differs from the base from `layer` on; each is run once."""
        key = state_hash(state)
        # The state before a change is the one that was proposed last, or one of the few that were tried for it.
        known = self._protected_seen.pop(key, {})
        self._protected_seen = {**dict(list(self._protected_seen.items())[-4:]), key: known}
        missing = [i for i, row in enumerate(rows) if row.tokens not in known]
        unread = [i for i in missing if (layer, rows[i].tokens) not in self._protected_inputs] if layer >= 0 else []
        for batch in _batches(unread, rows):
            tokens = [rows[i].tokens for i in batch]
            with self.engine.preview(()), torch.inference_mode():
                _, kept = run_whole(self.engine.model, self.engine.sites, tokens, keep=layer)
            self._protected_inputs |= {(layer, row): found for row, found in zip(tokens, kept, strict=True)}
        for batch in _batches(missing, rows):
            some = [rows[i] for i in batch]
            inputs = [self._protected_inputs[layer, row.tokens] for row in some] if layer >= 0 else None
            with self.engine.preview(state), torch.inference_mode():
                judged = self._judge(some, list(self._run(some, layer, inputs)), [None] * len(some))
            known |= {row.tokens: found for row, found in zip(some, judged, strict=True)}
        return [known[row.tokens] for row in rows]

    def _run(self, rows: list[_Row], layer: int, inputs: list[Tensor] | None) -> Iterator[Tensor]:
        """(T, width) of each row at the positions that predict what is measured. Called inside a preview."""
        for row, own in zip(rows, self._whole(rows, layer, inputs), strict=True):
            yield own[row.start - 1 : -1]

    def _whole(
        self, rows: list[_Row], layer: int, inputs: list[Tensor] | None, until: int | None = None
    ) -> list[Tensor]:
        """(all T, width) of each row behind the final norm, or as the layer `until` is given it."""
        tokens = [row.tokens for row in rows]
        prompts = packed_prompts(packed_paths(self.engine.model, tokens), [row.start for row in rows])
        given = inputs if layer >= 0 else None
        with self.engine.activations.prompt(prompts):
            found, _ = run_whole(
                self.engine.model, self.engine.sites, tokens, layer=max(layer, 0), inputs=given, until=until
            )
        return found

    def _first_changed(self, before: State, after: State) -> int:
        """The first layer that has to be run again: -1 for all, the last one where only the unembedding differs."""
        found = first_layer(self.engine.weights, before, after)
        return self.engine.sites.layers - 1 if found is None else min(found, self.engine.sites.layers - 1)

    # ------------------------------------------------------------------------------------------------ reference

    def _reference(self, progress: bool) -> list[_Row]:
        """The probes with the base's own continuations, computed once for a model and a probe set."""
        if self._rows is None:
            path = self._folder / "reference.safetensors"
            if not path.is_file():
                self._folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self._folder / ".lock"):
                    if not path.is_file():
                        self._make_reference(path, progress)
            stored = load_file(path)
            self._rows = [self._row(probe, stored[f"{probe.id}.answer"].tolist()) for probe in self.probes]
            self._final = [stored[f"{probe.id}.final"] for probe in self.probes]
        return self._rows

    def _row(self, probe: Probe, answer: list[int]) -> _Row:
        given = self._given[probe.id]
        if not probe.is_chat:
            return _Row(probe.text, given, 1, probe)
        return _Row(probe.question, (*given, *answer), len(given), probe)

    def _make_reference(self, path: Path, progress: bool) -> None:
        engine, tokens = self.engine, self.settings.tokens
        stored: dict[str, Tensor] = {}
        chats = sorted(self.probes.chats, key=lambda probe: len(self._given[probe.id]))
        with (
            Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
            engine.preview(()),
        ):
            task = bar.add_task("Asking the base model every probe (once)", total=2 * len(self.probes))
            rows: list[_Row] = [self._row(probe, []) for probe in self.probes.texts]
            for start in range(0, len(chats), _CHATS):
                batch = chats[start : start + _CHATS]
                replies = engine.greedy([self._given[probe.id] for probe in batch], tokens)
                rows += [self._row(probe, reply) for probe, reply in zip(batch, replies, strict=True)]
                bar.advance(task, len(batch))
            for some in _batches(list(range(len(rows))), rows):
                with torch.inference_mode():
                    found = list(self._run([rows[i] for i in some], -1, None))
                for i, hidden in zip(some, found, strict=True):
                    row = rows[i]
                    stored[f"{row.id}.final"] = hidden.float().cpu().clone()
                    stored[f"{row.id}.answer"] = torch.tensor(row.tokens[row.start :], dtype=torch.int64)
                bar.advance(task, len(some))
        _save(stored, path)

    def _inputs_of(self, layer: int, progress: bool) -> list[Tensor]:
        """Each row's input to a layer under the base, from disk or computed now."""
        rows = self._reference(progress)
        if layer < 0:
            return [torch.empty(0)] * len(rows)
        if layer not in self._inputs:
            path = self._folder / f"inputs-{layer}.safetensors"
            if not path.is_file():
                with FileLock(self._folder / ".lock"):
                    if not path.is_file():
                        self._make_inputs(layer, rows, path, progress)
            stored = load_file(path)
            self._inputs[layer] = [stored[row.id] for row in rows]
        return self._inputs[layer]

    def _make_inputs(self, layer: int, rows: list[_Row], path: Path, progress: bool) -> None:
        engine, stored = self.engine, {}
        with (
            Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
            engine.preview(()),
            torch.inference_mode(),
        ):
            task = bar.add_task(f"Running the probes up to layer {layer} (once)", total=len(rows))
            for batch in _batches(list(range(len(rows))), rows):
                _, kept = run_whole(
                    engine.model,
                    engine.sites,
                    [rows[i].tokens for i in batch],
                    keep=layer,
                )
                stored.update({rows[i].id: found.cpu() for i, found in zip(batch, kept, strict=True)})
                bar.advance(task, len(batch))
        _save(stored, path)

    def _known(self, key: str) -> dict[str, _Seen]:
        """What a state showed before, in this process or an earlier one."""
        if key not in self._seen:
            found: dict[str, _Seen] = {}
            path = self._folder / "states" / f"{key[:32]}.safetensors"
            if path.is_file():
                stored = load_file(path)
                for probe in self.probes:
                    if f"{probe.id}.figures" in stored:
                        kl, nll = stored[f"{probe.id}.figures"].tolist()
                        found[probe.id] = _Seen(kl, nll, tuple(stored[f"{probe.id}.argmax"].tolist()))
            self._seen[key] = found
        return self._seen[key]

    def _remember(self, key: str, known: dict[str, _Seen]) -> None:
        stored: dict[str, Tensor] = {}
        for name, seen in known.items():
            stored[f"{name}.figures"] = torch.tensor([seen.kl, seen.nll], dtype=torch.float64)
            stored[f"{name}.argmax"] = torch.tensor(seen.argmax, dtype=torch.int64)
        folder = self._folder / "states"
        folder.mkdir(parents=True, exist_ok=True)
        _save(stored, folder / f"{key[:32]}.safetensors")
        # Only the latest few states are ever asked for again.
        for old in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-16]:
            old.unlink(missing_ok=True)


def _moved(before: Tensor, after: Tensor) -> bool:
    """Whether any of a row's tokens, (T, width), is another one than rounding makes it."""
    before = before.to(after)
    return bool(((after - before).norm(dim=-1) > _UNREACHED * before.norm(dim=-1)).any())


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(f".{torch.initial_seed() % 10_000}.partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)


def _divergence(kl: Tensor) -> float:
    """The mean KL of some tokens (T,); what is no number is as far as anything can be."""
    mean = float(kl.mean())
    return max(mean, 0.0) if math.isfinite(mean) else math.inf


def _batches(chosen: list[int], rows: Sequence[_Row]) -> Iterator[list[int]]:
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
