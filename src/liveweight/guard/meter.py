"""Measures what a change moves besides what it is meant to move.

Owns the comparison of two states on the probes and the protected answers: whole sequences, teacher-forced on the base's
own answers (see reference.py), only through the layers from the first changed one up. Proposes nothing, and knows no
method.

A greedy answer changes exactly where, forced along the old answer, the likeliest token is another one; so no probe
is ever generated anew to see whether its answer changed. What a change does not reach needs no more running: where,
behind the last layer that it changes, all of a probe's tokens are as they were, the probe shows what it showed before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from liveweight.adjustments import State, first_layer, last_layer, state_hash
from liveweight.engines.base import ScoreItem
from liveweight.engines.replay import run_whole
from liveweight.engines.transformers import TransformersEngine
from liveweight.guard.budget import ChangedAnswer, GuardReport, budget_of, over_budget
from liveweight.guard.probe_set import ProbeSet, load_probes
from liveweight.guard.reference import Reference, Row, batches, run_measured, run_rows, save
from liveweight.settings import GuardSettings

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
        self._reference = Reference(engine, self.probes, settings.tokens, cache_dir)
        self._streams: dict[tuple[str, int], dict[int, Tensor]] = {}  # state hash, layer -> row -> (all T, width)
        self._protected_inputs: dict[
            tuple[int, tuple[int, ...]], Tensor
        ] = {}  # layer, tokens -> (T, width), the base's
        self._protected_seen: dict[str, dict[tuple[int, ...], _Seen]] = {}  # state hash -> tokens -> what they showed
        self._seen: dict[str, dict[str, _Seen]] = {}  # state hash -> probe id -> what it showed

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
        rows = self._reference.rows(progress)
        chosen = [
            i
            for i, row in enumerate(rows)
            if (only is None or row.text in only) and not any(row.asks(question) for question in leave_out)
        ]
        return self._compare(after, chosen, protected, progress, facts, before)

    def screen(self, after: State, question: str, *, protected: Sequence[ProtectedItem] = ()) -> GuardReport:
        """The same on the few probes that are most like `question`: quick, for use inside a search."""
        rows = self._reference.rows(False)
        near = {probe.id for probe in self.probes.screen(question, self.settings.screen_items)}
        chosen = [i for i, row in enumerate(rows) if row.id in near]
        return self._compare(after, chosen, protected[-8:], False)

    def references(self, *, progress: bool = True) -> list[ScoreItem]:
        """The chats with the base model's own greedy answers: what KL is measured on, for those who calibrate by it."""
        rows = [row for row in self._reference.rows(progress) if row.is_chat]
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
        rows = self._reference.rows(progress)
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

    def _answer(self, seen: _Seen, row: Row) -> tuple[int, ...]:
        """The greedy answer as far as it is known: up to and with the first token that leaves the reference."""
        reference = row.tokens[row.start :]
        for index, (said, meant) in enumerate(zip(seen.argmax, reference, strict=True)):
            if said != meant:
                return seen.argmax[: index + 1]
        return seen.argmax

    def _changed(self, row: Row, before: _Seen, after: _Seen) -> ChangedAnswer:
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
        rows = self._reference.rows(progress)
        key = state_hash(state)
        known = self._known(key)
        missing = [i for i in chosen if rows[i].id not in known]
        if missing:
            layer = self._first_changed((), state)
            given: Mapping[int, Tensor] = dict(enumerate(self._reference.inputs(layer, progress)))
            behind = self._behind(beside, state) if beside is not None else None
            if beside is not None and behind is not None:
                before, given = (self._streams_at(each, behind, missing, progress) for each in (beside, state))
                shown = self._known(state_hash(beside))
                known.update({rows[i].id: shown[rows[i].id] for i in missing if not _moved(before[i], given[i])})
                missing, layer = [i for i in missing if rows[i].id not in known], behind
            with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
                task = bar.add_task("Measuring what else would change", total=len(missing))
                for batch in batches(missing, rows):
                    with self.engine.preview(state), torch.inference_mode():
                        some = [rows[i] for i in batch]
                        final = run_measured(self.engine, some, layer, [given[i] for i in batch])
                        judged = self._judge(some, final, [self._reference.final(i) for i in batch])
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
            return dict(enumerate(self._reference.inputs(layer, progress)))
        key = (state_hash(state), layer)
        found = self._streams.pop(key, {})
        self._streams = {**dict(list(self._streams.items())[1 - _STREAMS :]), key: found}
        rows, inputs = self._reference.rows(progress), self._reference.inputs(first, progress)
        for batch in batches([i for i in chosen if i not in found], rows):
            with self.engine.preview(state), torch.inference_mode():
                some = [rows[i] for i in batch]
                streams = run_rows(self.engine, some, first, [inputs[i] for i in batch], until=layer)
            found.update(zip(batch, streams, strict=True))
        return found

    def _judge(self, rows: Sequence[Row], finals: Sequence[Tensor], bases: Sequence[Tensor | None]) -> list[_Seen]:
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
        engine = self.engine
        own = {engine.sites.canonical("lm_head.weight"), "lm_head.bias"}
        unembed = engine.base_unembed if own & set(engine.weights.touched(engine.weights.state)) else engine.unembed
        return unembed(hidden).float().log_softmax(-1)

    def _broken(self, now: State, after: State, protected: Sequence[ProtectedItem]) -> list[ChangedAnswer]:
        """Protected answers that are said otherwise after the change, and not as they are to be said."""
        if not protected:
            return []
        rows = [Row(item.label, (*item.prompt, *item.answer), len(item.prompt)) for item in protected]
        layer = min(self._first_changed((), state) for state in (now, after))
        seen = [self._forced(state, rows, layer) for state in (now, after)]
        return [
            self._changed(row, old, new)
            for row, old, new in zip(rows, *seen, strict=True)
            if self._answer(old, row) != self._answer(new, row) and new.argmax != row.tokens[row.start :]
        ]

    def _forced(self, state: State, rows: Sequence[Row], layer: int) -> list[_Seen]:
        """What protected answers show in a state that differs from the base from `layer` on; each is run once."""
        key = state_hash(state)
        # The state before a change is the one that was proposed last, or one of the few that were tried for it.
        known = self._protected_seen.pop(key, {})
        self._protected_seen = {**dict(list(self._protected_seen.items())[-4:]), key: known}
        missing = [i for i, row in enumerate(rows) if row.tokens not in known]
        unread = [i for i in missing if (layer, rows[i].tokens) not in self._protected_inputs] if layer >= 0 else []
        for batch in batches(unread, rows):
            tokens = [rows[i].tokens for i in batch]
            with self.engine.preview(()), torch.inference_mode():
                _, kept = run_whole(self.engine.model, self.engine.sites, tokens, keep=layer)
            self._protected_inputs |= {(layer, row): found for row, found in zip(tokens, kept, strict=True)}
        for batch in batches(missing, rows):
            some = [rows[i] for i in batch]
            inputs = [self._protected_inputs[layer, row.tokens] for row in some] if layer >= 0 else None
            with self.engine.preview(state), torch.inference_mode():
                judged = self._judge(some, run_measured(self.engine, some, layer, inputs), [None] * len(some))
            known |= {row.tokens: found for row, found in zip(some, judged, strict=True)}
        return [known[row.tokens] for row in rows]

    def _first_changed(self, before: State, after: State) -> int:
        """The first layer that has to be run again: -1 for all, the last one where only the unembedding differs."""
        found = first_layer(self.engine.weights, before, after)
        return self.engine.sites.layers - 1 if found is None else min(found, self.engine.sites.layers - 1)

    def _known(self, key: str) -> dict[str, _Seen]:
        """What a state showed before, in this process or an earlier one."""
        if key not in self._seen:
            found: dict[str, _Seen] = {}
            path = self._reference.folder / "states" / f"{key[:32]}.safetensors"
            with suppress(FileNotFoundError, SafetensorError):  # what cannot be read is looked at anew
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
        folder = self._reference.folder / "states"
        folder.mkdir(parents=True, exist_ok=True)
        save(stored, folder / f"{key[:32]}.safetensors")
        # Only the latest few states are ever asked for again.
        with suppress(FileNotFoundError):  # another process tidies up, too
            for old in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-16]:
                old.unlink()


def _moved(before: Tensor, after: Tensor) -> bool:
    """Whether any of a row's tokens, (T, width), is another one than rounding makes it."""
    before = before.to(after)
    return bool(((after - before).norm(dim=-1) > _UNREACHED * before.norm(dim=-1)).any())


def _divergence(kl: Tensor) -> float:
    """The mean KL of some tokens (T,); what is no number is as far as anything can be."""
    mean = float(kl.mean())
    return max(mean, 0.0) if math.isfinite(mean) else math.inf
