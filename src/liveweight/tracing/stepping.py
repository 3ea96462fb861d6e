"""A debugger for one forward pass: stop at a site, look, change what is there, go on, keep what was done.

Owns one run over one prompt. Each edit is an op with absolute positions, and each look runs the forward pass again up
to the site where the run stands, with those ops as a preview. So a run is a function of the state it began in and of
its edits, nothing stays in the model between two calls, and what was done is an adjustment already. Knows nothing of
guards, ledgers or of how a view is shown. Logit lens: nostalgebraist (2020), "interpreting GPT: the logit lens".

    with live.step("What is the capital of Angola?") as run:
        run.until("layers.5.resid")
        print(run.look())
        run.scale(0.0, positions=-1, indices=17)
        print(run.finish())
        live.apply(run.adjustment("without dimension 17"), prompt=run.question)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from liveweight.adjustments import Ablate, ActivationOp, Active, Adjustment, Affine, Clamp, State, Steer
from liveweight.engines.base import Sampling
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, StateConflict
from liveweight.tracing.neuron_labels import TokenGuess, label_neurons

NEXT = 10  # tokens of the next-token distribution that are told
LENS = 5  # tokens of each position's logit lens
_ROWS = 64  # positions whose logits are in memory at once

Places = int | Sequence[int] | None  # None is all of them


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Value):
    """One number of the tensor that a run stands at."""

    position: int
    token: str
    index: int
    value: float
    label: str  # of a neuron: the tokens that it promotes at this sign; empty elsewhere


class LensRow(_Value):
    """What the model would say behind one token, were the site its last one."""

    position: int
    token: str
    top: tuple[TokenGuess, ...]


class View(_Value):
    """What stands at a site, with the edits that were made so far."""

    site: str
    shape: tuple[int, int]  # (T, size)
    tokens: tuple[str, ...]  # (T,)
    norms: tuple[float, ...]  # (T,) Euclidean
    largest: tuple[Entry, ...]  # by size, largest first
    lens: tuple[LensRow, ...]  # of the residual stream; empty elsewhere


class Ending(_Value):
    """The next token's distribution at the prompt's end, without the edits and with them."""

    before: tuple[TokenGuess, ...]
    after: tuple[TokenGuess, ...]
    kl: float  # nats, of the distribution after from that before


@dataclass(frozen=True)
class Edit:
    """One thing that was done."""

    said: str
    op: ActivationOp

    @property
    def site(self) -> str:
        """Where it was done."""
        return (
            f"layers.{self.op.layer}.mlp.neurons" if isinstance(self.op, Clamp) else str(getattr(self.op, "site", ""))
        )


class _Reached(Exception):
    """The forward pass came by the site where it was to stop."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class Run:
    """One forward pass over a prompt, held at a site. Closed in the end of its `with` block."""

    def __init__(
        self, engine: TransformersEngine, tokens: Sequence[int], *, question: str = "", cache_dir: Path | None = None
    ) -> None:
        """`tokens` are the whole prompt. `question` names it; `cache_dir` is where neuron labels are kept."""
        if not tokens:
            raise InvalidInput("There is nothing to step through.", hint="Give some text.")
        self.tokens = tuple(tokens)
        self.question = question
        self.sites = tuple(engine.sites.activation_names())
        """Where a run can stop, in the order in which the forward pass comes by."""
        self._engine, self._cache_dir = engine, cache_dir
        self._base: State = engine.state
        self._edits: list[Edit] = []
        self._at: int | None = None  # in `sites`
        self._values: dict[str, Tensor] = {}  # site -> what stands there with the present edits; one at most
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the run. Its edits, and the adjustment that they make, can still be had."""
        self._open = False
        self._values.clear()

    # ------------------------------------------------------------------------------------------------- going on

    @property
    def site(self) -> str:
        """Where the run stands. Raises StateConflict before the first stop."""
        if self._at is None:
            raise StateConflict("The run has not stopped anywhere yet.", hint="Go on with until(site) or next().")
        return self.sites[self._at]

    @property
    def stopped(self) -> bool:
        """Whether the run stands at a site."""
        return self._at is not None

    def until(self, site: str) -> Self:
        """Go on to a site. Raises UnknownSite, Unsupported, and StateConflict where the run is past it already."""
        self._require_open()
        self._engine.sites.activation(site)
        place = self.sites.index(site)
        if self._at is not None and place < self._at:
            raise StateConflict(
                f"The run stands at {self.site}, and {site} is behind it.",
                hint="Go back with restart(), which keeps the edits, or begin a new run.",
            )
        self._at = place
        return self

    def next(self) -> Self:
        """Go on to the next layer's resid, then to final.resid. Raises StateConflict behind that."""
        start = 0 if self._at is None else self._at + 1
        ahead = [site for site in self.sites[start:] if site.endswith("resid")]
        if not ahead:
            raise StateConflict("The run stands at final.resid, the last site.", hint="End it with finish().")
        return self.until(ahead[0])

    def restart(self) -> Self:
        """Go back before the first site. The edits stay."""
        self._require_open()
        self._at = None
        return self

    # ------------------------------------------------------------------------------------------------- looking

    @property
    def value(self) -> Tensor:
        """What stands here, with the edits: (T, size), float32 on the CPU. A copy."""
        self._require_open()
        if self.site not in self._values:
            self._values = {self.site: self._read(self.site)}
        return self._values[self.site].clone()

    def look(self, top: int = 10, position: int | None = None) -> View:
        """Shape, norms and the `top` largest entries; of the residual stream the logit lens, of neurons their labels.

        `position` restricts entries and lens to one token; negative ones count from the end.
        """
        if top < 1:
            raise InvalidInput(f"{top} entries cannot be shown.", hint="Give top=1 or more.")
        value = self.value
        rows = range(len(self.tokens)) if position is None else self._positions(position) or ()
        chosen = value[list(rows)]  # (n, size)
        size = value.shape[1]
        order = chosen.abs().flatten().sort(descending=True, stable=True).indices[:top].tolist()
        places = [(rows[place // size], place % size) for place in order]
        labels = self._labels([(index, float(value[row, index])) for row, index in places])
        text = [str(self._engine.format.tokenizer.decode([token])) for token in self.tokens]
        return View(
            site=self.site,
            shape=(len(self.tokens), size),
            tokens=tuple(text),
            norms=tuple(value.norm(dim=1).tolist()),
            largest=tuple(
                Entry(position=row, token=text[row], index=index, value=float(value[row, index]), label=label)
                for (row, index), label in zip(places, labels, strict=True)
            ),
            lens=tuple(
                LensRow(position=row, token=text[row], top=top_tokens)
                for row, top_tokens in zip(rows, self._lens(chosen), strict=False)
            ),
        )

    def _labels(self, neurons: Sequence[tuple[int, float]]) -> list[str]:
        """The tokens that each neuron (its number and activation) promotes; empty where this is no site of neurons."""
        if not self.site.endswith(".mlp.neurons") or self._engine.sites.experts:
            return [""] * len(neurons)
        layer = int(self.site.split(".")[1])
        pairs = [(layer, neuron) for neuron, _ in neurons]
        found = label_neurons(self._engine, pairs, cache_dir=self._cache_dir)
        return [found[layer, neuron].text(negative=value < 0) for neuron, value in neurons]

    def _lens(self, rows: Tensor) -> list[tuple[TokenGuess, ...]]:
        """Of what stands in the residual stream (n, width), through the final norm and the unembedding."""
        engine = self._engine
        if self.site != "embed" and not self.site.endswith("resid"):
            return []
        found: list[tuple[TokenGuess, ...]] = []
        with engine.preview(self.state), torch.inference_mode():
            parameter = engine.sites.weight("lm_head.weight").parameter
            for start in range(0, len(rows), _ROWS):
                part = rows[start : start + _ROWS].to(parameter.device, parameter.dtype)
                if self.site != "final.resid":  # `forward` itself: the norm's hooks are for the model's own calls
                    part = engine.sites.final_norm.forward(part)
                logprobs = engine.unembed(part).float().log_softmax(-1).cpu()
                found += [_likeliest(engine, each, LENS) for each in logprobs]
        return found

    # ------------------------------------------------------------------------------------------------- changing

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What was done, in order."""
        return tuple(self._edits)

    @property
    def state(self) -> State:
        """The state that the run began in, and the edits."""
        ops = tuple(edit.op for edit in self._edits)
        return (*self._base, Active(Adjustment(name="step", method="step", ops=ops))) if ops else self._base

    def set(self, value: float | Tensor, positions: Places = None, indices: Places = None) -> Self:
        """Put a value (or one for each index) here; the entries then hold it exactly.

        `positions` count the prompt's tokens and `indices` the entries of one; negative ones count from the end, None
        is all, of positions those of what is generated too. Raises InvalidInput for what is not there.
        """
        return self._affine("set to", positions, indices, factors=0.0, shifts=value)

    def scale(self, factor: float | Tensor, positions: Places = None, indices: Places = None) -> Self:
        """Multiply what stands here by a factor (or by one for each index). Places as in `set`."""
        return self._affine("scaled by", positions, indices, factors=factor, shifts=0.0)

    def add(self, value: float | Tensor, positions: Places = None, indices: Places = None) -> Self:
        """Add a number, or a vector (one for each index; (size,) without indices). Places as in `set`."""
        if isinstance(value, Tensor) and indices is None:
            chosen = self._positions(positions)
            op = Steer(site=self.site, vector=value, positions=chosen)
            return self._did(op, f"a vector of norm {float(value.norm()):.3g} added {_where(chosen, None)}")
        return self._affine("added", positions, indices, factors=1.0, shifts=value)

    def clamp(self, values: Mapping[int, float]) -> Self:
        """Hold neurons at values, at every position. Raises InvalidInput unless the run stands at a layer's neurons."""
        if not self.site.endswith(".mlp.neurons"):
            raise InvalidInput(f"{self.site} holds no neurons to clamp.", hint="Stop at a layer's mlp.neurons, or set.")
        op = Clamp(layer=int(self.site.split(".")[1]), neurons=tuple(values), values=torch.tensor([*values.values()]))
        return self._did(op, f"{', '.join(f'neuron {n} held at {v:g}' for n, v in values.items())}, everywhere")

    def ablate(self, direction: Tensor) -> Self:
        """Project a direction (size,) out of what stands here, at every position."""
        return self._did(Ablate(site=self.site, direction=direction), "a direction projected out, everywhere")

    def undo(self) -> Edit:
        """Take the last edit back. Raises StateConflict where there is none."""
        self._require_open()
        if not self._edits:
            raise StateConflict("There is no edit to take back.", hint="Nothing was changed in this run yet.")
        self._values.clear()
        return self._edits.pop()

    def adjustment(self, name: str = "") -> Adjustment:
        """What was done, as an adjustment for `LiveModel.apply`. Raises StateConflict where nothing was."""
        if not self._edits:
            raise StateConflict("Nothing was changed in this run, so there is nothing to keep.", hint="Edit something.")
        done = "; ".join(f"{edit.site}: {edit.said}" for edit in self._edits)
        return Adjustment(
            name=name or f"step: {self.question}".removesuffix(": "),
            method="step",
            ops=tuple(edit.op for edit in self._edits),
            note=f"Kept from a stepped run: {done}.",
        )

    def _affine(
        self, did: str, positions: Places, indices: Places, *, factors: float | Tensor, shifts: float | Tensor
    ) -> Self:
        chosen = self._positions(positions)
        size = self._engine.sites.activation(self.site).size
        places = range(size) if indices is None else _within(indices, size, f"entry of {self.site}")
        value = shifts if did != "scaled by" else factors
        if isinstance(value, Tensor) and value.shape != (len(places),):
            raise InvalidInput(
                f"{len(places)} entries need as many values, not {tuple(value.shape)}.", hint="Or give one number."
            )
        op = Affine(
            site=self.site,
            indices=torch.tensor(places),
            factors=torch.as_tensor(factors, dtype=torch.float32).expand(len(places)),
            shifts=torch.as_tensor(shifts, dtype=torch.float32).expand(len(places)),
            positions=chosen,
        )
        told = f"{len(value)} values" if isinstance(value, Tensor) else f"{value:g}"
        return self._did(op, f"{did} {told} {_where(chosen, None if indices is None else tuple(places))}")

    def _did(self, op: ActivationOp, said: str) -> Self:
        """Remember an edit, once it is known to fit the model."""
        self._require_open()
        self._engine.activations.check((Active(Adjustment(name="step", method="step", ops=(op,))),))
        self._edits.append(Edit(said, op))
        self._values.clear()
        return self

    def _positions(self, places: Places) -> tuple[int, ...] | None:
        return None if places is None else _within(places, len(self.tokens), "token of the prompt")

    # ------------------------------------------------------------------------------------------------- ending

    def finish(self, top: int = NEXT) -> Ending:
        """Run to the end: the likeliest next tokens, without the edits and with them."""
        self._require_open()
        before, after = self._last(self._base), self._last(self.state)
        kl = float((before.exp() * (before - after)).sum().clamp_min(0.0))
        return Ending(before=_likeliest(self._engine, before, top), after=_likeliest(self._engine, after, top), kl=kl)

    def generate(self, max_tokens: int = 40, *, edited: bool = True) -> str:
        """The greedy continuation with the edits (without them, unless `edited`)."""
        self._require_open()
        with self._engine.preview(self.state if edited else self._base):
            sampling = Sampling(max_tokens=max_tokens)
            return "".join(token.text for token in self._engine.continue_from(self.tokens, sampling)).strip()

    # ------------------------------------------------------------------------------------------------- inside

    def _read(self, site: str) -> Tensor:
        """What stands at a site under the edits (T, size); what comes behind it is not run."""
        engine = self._engine
        point = engine.sites.activation(site)

        def stop(value: Tensor) -> None:
            raise _Reached(value)

        with engine.preview(self.state), engine.activations.prompt(len(self.tokens)), torch.no_grad():
            handle = point.on(stop)  # behind the edits' own hooks
            try:
                ids = torch.tensor([self.tokens], device=engine.model.device)
                engine.model.base_model(input_ids=ids, use_cache=False)
            except _Reached as reached:
                return reached.value.reshape(-1, point.size).float().cpu()
            finally:
                handle.remove()
        raise AssertionError(f"the forward pass does not come by {site}")

    def _last(self, state: State) -> Tensor:
        """Log-probabilities (vocabulary,) of the next token under a state."""
        engine = self._engine
        with engine.preview(state), torch.no_grad():
            final = engine.trace(self.tokens, ["final.resid"]).values["final.resid"][-1]
            parameter = engine.sites.weight("lm_head.weight").parameter
            return engine.unembed(final.to(parameter.device, parameter.dtype)).float().log_softmax(-1).cpu()

    def _require_open(self) -> None:
        if not self._open:
            raise StateConflict("This run is over.", hint="Begin a new one; its edits can still be read.")


def _likeliest(engine: TransformersEngine, logprobs: Tensor, count: int) -> tuple[TokenGuess, ...]:
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    decode = engine.format.tokenizer.decode
    pairs = zip(tokens.tolist(), values.exp().tolist(), strict=True)
    return tuple(TokenGuess(id=token, text=str(decode([token])), probability=p) for token, p in pairs)


def _within(places: int | Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Places from 0 on, negative ones counted from the end. Raises InvalidInput naming the first that is not there."""
    given = (places,) if isinstance(places, int) else tuple(places)
    for place in given:
        if not -count <= place < count:
            raise InvalidInput(f"There is no {what} {place}.", hint=f"They are 0 to {count - 1}, and -1 is the last.")
    return tuple(place % count for place in given)


def _where(positions: tuple[int, ...] | None, indices: tuple[int, ...] | None) -> str:
    at = "at every token" if positions is None else f"at token {', '.join(map(str, positions))}"
    return at if indices is None else f"in entry {', '.join(map(str, indices))} {at}"
