"""The engine that runs a model with transformers and torch.

Owns one loaded model: the state its weights and hooks are in, the gate before them, and what can be asked of it
(tokens, scores, traces, replays). Knows nothing of why a state is wished for, of ledgers or of people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from liveweight.adjustments import ActivationState, Active, State, WeightState, state_hash
from liveweight.engines.base import Message, ModelInfo, Objective, Sampling, Score, ScoreItem, Token, Trace, Version
from liveweight.engines.chat_format import ChatFormat
from liveweight.engines.decoding import Decoder, DirectDecoder, chunks, decoder
from liveweight.engines.gate import PATIENCE, Gate, GateMode
from liveweight.engines.generation import Generation
from liveweight.engines.model_source import LoadedModel
from liveweight.engines.prefix_tree import PrefixTree
from liveweight.engines.replay import Replay, full_cache, record, unembed, unembed_by, unembed_tokens
from liveweight.errors import InvalidInput
from liveweight.interrupts import uninterrupted
from liveweight.sites import SPARE, model_sites, patchable_layers, with_spare_neurons

_ROWS = 64  # sequences of one scoring batch
_POSITIONS = 64  # positions whose logits are looked at together
_REMEMBERED = 4096  # tokens of one state that are kept while remembering


class TransformersEngine:
    """Runs one model and makes it be the state it is told. Safe to use from several threads."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        gate: GateMode = "refresh",
        patience: float = PATIENCE,
        system: str | None = None,
        threads: int | None = None,
        spare_neurons: int = SPARE,
    ) -> None:
        """Take the model, grown by some spare neurons, as the base. `system` is the system prompt of chats without one.

        `spare_neurons` are the new ones of each patchable layer; see `sites/spare_neurons.py`.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = loaded.model
        self.loaded = loaded
        self.sites = with_spare_neurons(model_sites(loaded.model), spare_neurons)
        self.format = ChatFormat(loaded.tokenizer, loaded.model, system)
        self.gate = Gate(gate, patience)
        self.weights = WeightState(self.sites)
        self.activations = ActivationState(self.sites)
        self._state: State = ()
        self._previewed: tuple[int, State] | None = None  # the thread that previews, and what
        self._trees: dict[str, PrefixTree] | None = None  # state -> what was run under it, while remembering
        self._said: dict[tuple[str, tuple[int, ...]], list[int]] = {}  # state, prompt -> its greedy answer, likewise
        self._info = self._describe()
        self._version = Version(0, self.version_hash(()))
        self._numbers = {self._version.hash: 0}  # a state that comes back has its number back
        self.of_base: dict[Hashable, Any] = {}
        """What was read of the base and need not be read again, by whoever read it: true whatever the state is."""
        self.guesses: dict[tuple[int, ...], tuple[int, ...]] = {}
        """What was answered last to a prompt, whatever the state was then: a guess, which one pass confirms or not."""

    # --------------------------------------------------------------------------------------------------- state

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self._info

    @property
    def version(self) -> Version:
        """Which state the weights are in."""
        return self._version

    @property
    def state(self) -> State:
        """The state that the model is in; inside a preview, to the thread that previews, the one that is previewed."""
        previewed = self._previewed
        return previewed[1] if previewed is not None and previewed[0] == get_ident() else self._state

    def become(self, state: State) -> Version:
        """Make the model be `state`: between two steps, all or nothing. Raises as WeightState.become does."""
        with self.gate.change():
            self._move(state)
            self._state = state
            digest = self.version_hash(state)
            self._version = Version(self._numbers.setdefault(digest, len(self._numbers)), digest)
            return self._version

    def holds(self, state: State) -> bool:
        """Whether the model is in that state already, weights and hooks."""
        held = self._state, self.weights.state, self.activations.state
        return self.weights.whole and all(each == state for each in held)

    @contextmanager
    def preview(self, state: State) -> Iterator[None]:
        """Be `state` inside the block; no other step runs meanwhile, and the version does not change.

        A preview within a preview goes back to the outer one.
        """
        with self.gate.step():
            outer = self._previewed
            try:
                self._move(state)
                self._previewed = get_ident(), state
                yield
            finally:
                with uninterrupted():
                    self._previewed = outer
                    self._move(self.state)

    def check(self, state: State) -> None:
        """Raises as `become` would where an op does not fit this model, touching nothing."""
        self.weights.check(state)
        self.activations.check(state)

    def survival(self, active: Active) -> float:
        """The share of an adjustment's changed entries that survive rounding to the model's dtype."""
        with self.gate.step():
            return self.weights.survival(active)

    def fingerprints(self) -> dict[str, str]:
        """sha256 of every tensor's bytes as they are now, by parameter name."""
        with self.gate.step():
            return {
                name: hashlib.sha256(raw_bytes(parameter).data).hexdigest()
                for name, parameter in self.model.named_parameters()
            }

    def _move(self, state: State) -> None:
        self.activations.check(state)
        self.weights.become(state)
        self.activations.become(state)

    def version_hash(self, state: State) -> str:
        """The hash of the version that `become(state)` would give."""
        return hashlib.sha256(f"{self.loaded.hash}:{state_hash(state)}".encode()).hexdigest()

    def _describe(self) -> ModelInfo:
        model, sites, config = self.model, self.sites, self.model.config
        parameter = next(model.parameters())
        return ModelInfo(
            name=self.loaded.source.name,
            source=str(self.loaded.source),
            hash=self.loaded.hash,
            architecture=sites.architecture,
            layers=sites.layers,
            width=sites.width,
            neurons=sites.neurons,
            heads=sites.heads,
            vocabulary=sites.vocabulary,
            parameters=sites.parameters,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            tied_embeddings=sites.tied,
            experts=sites.experts,
            chat_template=self.format.has_template,
            gradients=True,
            context=int(getattr(config, "max_position_embeddings", 0) or 0),
            notes=sites.notes,
        )

    # ------------------------------------------------------------------------------------------------ tokens

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """A chat as the tokens that the model answers to."""
        return self.format.encode(messages)

    def generate(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, watch: Sequence[str] = ()
    ) -> Iterator[Token]:
        """Answer a chat, token by token; see `continue_from`."""
        return self.continue_from(self.encode(messages), sampling, watch=watch)

    def continue_from(
        self, prompt: Sequence[int], sampling: Sampling | None = None, *, watch: Sequence[str] = ()
    ) -> Iterator[Token]:
        """Continue a prompt given as tokens.

        When the weights change on the way, the cache of keys and values is filled anew (`refresh`) or the change waits
        (`drain`). `watch` names activation sites whose value at each step comes with the token. Closing the iterator
        stops the generation. Raises InvalidInput for a prompt that is too long.
        """
        sampling = sampling or Sampling()
        generation = Generation(self.format, prompt, sampling, self._info.context)
        points = [self.sites.activation(site) for site in watch]
        return self._tokens(generation, [point.site for point in points])

    def _tokens(self, generation: Generation, watch: list[str]) -> Iterator[Token]:
        ids = generation.ids
        running: Decoder | None = None
        version, fed = self._version, 0
        self.gate.begin_generation()
        try:
            while not generation.over:
                with self.gate.step(), self.activations.prompt(generation.prompt_length), torch.inference_mode():
                    if running is None or version != self._version:
                        running = self.decoder(watch)
                        version, fed = self._version, 0
                    piece = chunks(ids[fed:])[0]
                    values: dict[str, Tensor] = {}
                    logits = self._feed(running, piece, watch, values, seeded=generation.sampling.seed is not None)
                    fed += len(piece)
                    if fed < len(ids):
                        continue
                    token = generation.draw(logits, version, values)
                yield token
                if token.finish:
                    return
        finally:
            self.gate.end_generation()

    def decoder(self, watch: Sequence[str] = ()) -> Decoder:
        """A decoder of a new sequence under the weights of now, for whoever holds the gate and will `watch` sites."""
        direct = not self.activations.hooks and all(site.endswith(".mlp.neurons") for site in watch)
        return decoder(self.model, self.sites, direct=direct)

    def _feed(
        self, running: Decoder, piece: Sequence[int], watch: list[str], values: dict[str, Tensor], *, seeded: bool
    ) -> Tensor:
        if not watch:
            if seeded and isinstance(running, DirectDecoder) and running.begun and len(piece) == 1:
                return DirectDecoder.feed_together([running], piece)[0]
            return running.feed(piece)
        with ExitStack() as hooks:
            for site in watch:
                # The direct way calls no module when it decodes, and leaves its neurons behind instead.
                handle = self.sites.activation(site).on(
                    lambda value, site=site: values.__setitem__(site, value[0, -1].detach())  # type: ignore[misc]
                )
                hooks.callback(handle.remove)
            logits = running.feed(piece)
        if isinstance(running, DirectDecoder) and len(piece) == 1 and running.neurons:
            for site in watch:
                layer = int(site.split(".")[1])
                values[site] = running.neurons[layer][: self.sites.neurons_of(layer)]
        return logits

    @cached_property
    def _places(self) -> int | None:
        """How many positions the model has learnt; None where it can be asked for any."""
        site = "positions.weight"
        return len(self.sites.weight(site).parameter) if self.sites.has_weight(site) else None

    def _fits(self, longest: int) -> None:
        """Raises InvalidInput for more tokens in a row than the model has positions."""
        if self._places is not None and longest > self._places:
            raise InvalidInput(
                f"The text has {longest} tokens, and the model has {self._places} positions.",
                hint="Shorten the chat, or begin a new one.",
                tokens=longest,
                context=self._places,
            )

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Each prompt's greedy continuation of at most `tokens` tokens, ended by its end token; all in one batch.

        Where the model has too few positions for the longest prompt's, all of them end there. Raises InvalidInput for a
        prompt that fills them all.
        """
        longest = max(map(len, prompts), default=0)
        self._fits(longest + 1)
        if self._places is not None:
            tokens = min(tokens, self._places - longest)
        with self.gate.step():  # else another thread's preview might begin or end between the look and the run
            if self._trees is None:
                return self._greedy(prompts, tokens)
            state, known = state_hash(self.weights.state), self._said
            keys = [(state, tuple(prompt)) for prompt in prompts]
            missing = [key for key in dict.fromkeys(keys) if key not in known or not self._ends(known[key], tokens)]
            rows = self._greedy([prompt for _, prompt in missing], tokens) if missing else []
            known.update(zip(missing, rows, strict=True))
            return [known[key][:tokens] for key in keys]

    def _ends(self, row: Sequence[int], tokens: int) -> bool:
        """Whether a greedy continuation is known for so many tokens."""
        return len(row) >= tokens or (bool(row) and row[-1] in self.format.end_tokens)

    def _greedy(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        device, made = self.model.device, []
        ends = torch.tensor(sorted(self.format.end_tokens), device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        with self.gate.step(), self.activations.prompt([len(p) for p in prompts]), torch.inference_mode():
            cache, seen, hidden = self._read(prompts)
            positions = seen.sum(1, keepdim=True) - 1
            while True:
                ids = self.unembed(hidden).argmax(-1, keepdim=True)
                made.append(ids)
                done |= torch.isin(ids[:, 0], ends)
                if len(made) == tokens or bool(done.all()):
                    break
                seen = torch.cat((seen, seen.new_ones(len(prompts), 1)), dim=1)
                positions = positions + 1
                output = self.model.base_model(
                    input_ids=ids, past_key_values=cache, attention_mask=seen, position_ids=positions
                )
                hidden = output.last_hidden_state[:, -1]
        rows = torch.cat(made, dim=1).tolist()
        return [_until_end(row, self.format.end_tokens) for row in rows]

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor, Tensor]:
        """A filled cache of prompts padded on the left, what of it counts (B, T), and the last tokens' (B, width)."""
        cache, device = full_cache(), self.model.device
        tree = self._tree()
        if tree is not None:
            paths = tree.extend(prompts)
            past, real = tree.past(paths)
            for layer, (keys, values) in enumerate(past):
                cache.update(keys, values, layer)
            return cache, torch.tensor(real, device=device), tree.final[[path[-1] for path in paths]]
        longest, pad = max(map(len, prompts)), self.format.pad_token
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids, past_key_values=cache, attention_mask=seen, position_ids=positions
        )
        # The last column is made contiguous: a strided one would make the product copy the whole matrix.
        return cache, seen, output.last_hidden_state[:, -1].contiguous()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the block nothing is run twice: scores, greedy answers and recordings share what they have in common.

        By state, so that a preview does no harm. Whoever changes the model behind the engine's back (own hooks, own
        writes) must ask nothing of it inside such a block.
        """
        before, self._trees = self._trees, {} if self._trees is None else self._trees
        try:
            yield
        finally:
            self._trees = before
            if before is None:
                self._said = {}  # not cleared: another thread may be looking things up

    def _tree(self) -> PrefixTree | None:
        """The tree to run in now; None while a hook is on the model, for hooks count positions."""
        if self.activations.hooks:
            return None
        key = state_hash(self.weights.state)
        trees = self._trees  # as it is now: another thread may leave its block meanwhile
        tree = None if trees is None else trees.get(key)
        if tree is None or len(tree) > _REMEMBERED:
            tree = PrefixTree(self.model, self.sites, patchable_layers(self.sites.layers))
            if trees is not None:
                trees[key] = tree
        return tree

    # --------------------------------------------------------------------------------------------- measuring

    def score(self, items: Sequence[ScoreItem]) -> list[Score]:
        """Teacher-forced log-probabilities of continuations, in batches of like length."""
        for item in items:
            if len(item.prompt) < 2 or not item.continuation:
                raise InvalidInput(
                    "A scored item needs a prompt of two tokens or more and a continuation.",
                    hint="Score a chat, or put a beginning-of-text token first.",
                )
        found: dict[int, Score] = {}
        order = sorted(range(len(items)), key=lambda i: len(items[i].prompt) + len(items[i].continuation))
        for start in range(0, len(order), _ROWS):
            batch = order[start : start + _ROWS]
            found.update(zip(batch, self._scores([items[i] for i in batch]), strict=True))
        return [found[index] for index in range(len(items))]

    def _scores(self, items: Sequence[ScoreItem]) -> list[Score]:
        rows = [[*item.prompt, *item.continuation] for item in items]
        self._fits(max(map(len, rows), default=0))
        starts = [len(item.prompt) - 1 for item in items]
        lengths = [len(item.continuation) for item in items]
        with self.gate.step(), torch.inference_mode():
            tree = self._tree()
            if tree is not None:
                paths = [path[start:-1] for path, start in zip(tree.extend(rows), starts, strict=True)]
                nodes, index = torch.unique(torch.tensor([n for path in paths for n in path]), return_inverse=True)
                finals = tree.final[nodes.to(tree.final.device)]
            else:
                replay = self.record(rows, starts)
                finals = torch.cat([replay.final[row, :length] for row, length in enumerate(lengths)])
                index = torch.arange(len(finals))
            tokens = torch.tensor([token for item in items for token in item.continuation])
            logprobs, argmax = self._logprobs(finals, index.to(finals.device), tokens.to(finals.device))
        parts = (torch.split(each, lengths) for each in (tokens, logprobs.cpu(), argmax.cpu()[index]))
        return [Score(*part) for part in zip(*parts, strict=True)]

    def _logprobs(self, finals: Tensor, index: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of `tokens` (M,) behind the rows `index` (M,) of `finals` (N, width); and every row's likeliest token (N,).

        A few rows at a time: their logits are memory that is used again, not asked for.
        """
        logprobs, argmax = finals.new_empty(len(index), dtype=torch.float32), index.new_empty(len(finals))
        for start in range(0, len(finals), _POSITIONS):
            logits = self.unembed(finals[start : start + _POSITIONS]).float()
            argmax[start : start + _POSITIONS] = logits.argmax(-1)
            here = ((index >= start) & (index < start + _POSITIONS)).nonzero()[:, 0]
            own = index[here] - start
            logprobs[here] = logits[own, tokens[here]] - logits.logsumexp(-1)[own]
        return logprobs, argmax

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Before each token of an answer and behind it: (T + 1, vocabulary), float32. Equal weights give equal bits."""
        self._fits(len(prompt) + len(answer))
        with self.gate.step(), self.activations.prompt(len(prompt)), torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
            final = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            return self.unembed(final[len(prompt) - 1 :]).float().cpu()

    def read(self, rows: Sequence[Sequence[int]], starts: Sequence[int], layer: int) -> list[tuple[Tensor, Tensor]]:
        """Of each row from its position `starts` on: what left the final norm and what a dense MLP read, (T, width)."""
        if not rows:
            return []
        with self.gate.step(), torch.no_grad():
            tree = self._tree()
            if tree is not None and layer in tree.mlp_inputs:
                paths = [path[start:] for path, start in zip(tree.extend(rows), starts, strict=True)]
                return [(tree.final[path], tree.mlp_inputs[layer][path]) for path in paths]
            replay = self.record(rows, starts, mlp_inputs=[layer])
            inputs = replay.mlp_inputs[layer]
            return [(replay.final[row, :size], inputs[row, :size]) for row, size in enumerate(replay.lengths())]

    def record(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        layers: Sequence[int] = (),
        neurons: Sequence[int] = (),
        mlp_inputs: Sequence[int] = (),
        final: bool = True,
        packed: bool = False,
        prompts: Sequence[int] | None = None,
    ) -> Replay:
        """Run a batch once under the present weights, keeping what trials need; see `replay.record`.

        `prompts` are how many tokens of each row are its prompt; unset, all up to the suffix's first one.
        """
        self._fits(max(map(len, rows), default=0))
        told = partial(self.activations.prompt, [start + 1 for start in starts] if prompts is None else list(prompts))
        with self.gate.step(), told(), torch.no_grad():
            replay = record(
                self.model,
                self.sites,
                rows,
                starts,
                layers=layers,
                neurons=neurons,
                mlp_inputs=mlp_inputs,
                final=final,
                tree=self._tree(),
                pad=self.format.pad_token,
                packed=packed,
            )
        replay.around = told
        return replay

    def unembed(self, final: Tensor) -> Tensor:
        """Logits (…, vocabulary) of what leaves the final norm (…, width)."""
        return unembed(self.model, self.sites, final)

    def base_unembed(self, final: Tensor) -> Tensor:
        """As `unembed` under the base's own unembedding, whatever is active."""
        table, bias = (
            self.weights.base(name).to(final) if self.sites.has_weight(name) else None
            for name in ("lm_head.weight", "lm_head.bias")
        )
        assert table is not None  # every model has an unembedding
        return unembed_by(self.model, final, table, bias)

    def unembed_tokens(self, final: Tensor, tokens: Tensor) -> Tensor:
        """Logits (N, k) of some tokens (N, k) behind what leaves the final norm (N, width)."""
        return unembed_tokens(self.model, self.sites, final, tokens)

    def leads(self, final: Tensor, tokens: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nats by which each token (N,) leads the best other one behind `final` (N, width), and that other token (N,).

        Below zero it trails. `among` (N, k) names the others to look at; else all are. Differentiable in `final`,
        without a gradient as large as the vocabulary.
        """
        with torch.no_grad():
            if among is None:
                other = self.rivals(final, tokens, 1)[:, 0]
            else:
                logits = self.unembed_tokens(final, among).masked_fill(among == tokens[:, None], float("-inf"))
                other = among.gather(1, logits.argmax(1, keepdim=True))[:, 0]
        pair = self.unembed_tokens(final, torch.stack((tokens, other), dim=1)).float()
        return pair[:, 0] - pair[:, 1], other

    def rivals(self, final: Tensor, tokens: Tensor, count: int) -> Tensor:
        """The likeliest others (N, count) than each token (N,) behind `final` (N, width)."""
        with torch.no_grad():
            return self.unembed(final).scatter_(1, tokens[:, None], float("-inf")).topk(count).indices

    def trace(
        self,
        tokens: Sequence[int],
        sites: Sequence[str],
        gradient_of: Objective | None = None,
        *,
        prompt: int | None = None,
    ) -> Trace:
        """Read sites on one forward pass and, with an objective, its gradient at them on one backward pass.

        With an objective, `tokens` is the prompt, the answer is appended, and the margin is summed at the answer's
        positions: of the answer over `against` where the two part, else of each of its tokens over the runner-up.
        Values and gradients are (T, size) over all tokens, answer included. `prompt` says how many of the tokens are
        the prompt, for steering that tells it from the answer; unset, all of them are. Weights, hooks and random state
        are left as they were. Raises UnknownSite.
        """
        ids = [*tokens, *(gradient_of.answer if gradient_of else ())]
        if not tokens:
            raise InvalidInput("There is nothing to trace.", hint="Give some tokens.")
        points = [self.sites.activation(site) for site in sites]
        kept: dict[str, Tensor] = {}

        def keep(site: str, value: Tensor) -> Tensor | None:
            if gradient_of is None:
                kept[site] = value
                return None
            if not value.requires_grad:
                value = value.detach().requires_grad_()  # the first site on the way: gradients stop below it
            value.retain_grad()
            kept[site] = value
            return value

        until = self.activations.prompt(len(tokens) if prompt is None else prompt)
        with self.gate.step(), until, torch.set_grad_enabled(gradient_of is not None), ExitStack() as hooks:
            for point in points:
                handle = point.on(lambda value, site=point.site: keep(site, value))  # type: ignore[misc]
                hooks.callback(handle.remove)
            device = self.model.device
            output = self.model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            gradients: dict[str, Tensor] = {}
            value = None
            if gradient_of is not None:
                margin = self._margin(output.last_hidden_state[0], len(tokens), gradient_of)
                margin.backward()  # type: ignore[no-untyped-call]
                value = float(margin.detach())
                gradients = {
                    site: _only_row(found.grad if found.grad is not None else torch.zeros_like(found))
                    for site, found in kept.items()
                }
            values: Mapping[str, Tensor] = {site: _only_row(found.detach()) for site, found in kept.items()}
        return Trace(tuple(ids), values, gradients, value, self._version)

    def _margin(self, final: Tensor, prompt: int, objective: Objective) -> Tensor:
        answer, against = objective.answer, objective.against
        if not answer:
            raise InvalidInput("The objective has no answer.", hint="Give the answer's tokens.")
        final = final[prompt - 1 : prompt - 1 + len(answer)]
        if not against:
            return self.leads(final, torch.tensor(answer, device=final.device))[0].sum()
        apart = next((i for i, (a, b) in enumerate(zip(answer, against, strict=False)) if a != b), None)
        if apart is None:
            raise InvalidInput(
                "The two answers begin alike, so there is no margin between them.", hint="Give two different answers."
            )
        pair = torch.tensor([[answer[apart], against[apart]]], device=final.device)
        logits = self.unembed_tokens(final[apart : apart + 1], pair).float()[0]
        return logits[0] - logits[1]


def _only_row(values: Tensor) -> Tensor:
    """(T, size) in float32 on the CPU, of a batch of one; a router's logits have no batch."""
    return (values[0] if values.dim() == 3 else values).float().cpu()


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, (n,) uint8, without a copy where it is contiguous on the CPU."""
    found: NDArray[np.uint8] = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return found


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def load_engine(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    gate: GateMode = "refresh",
    system: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> TransformersEngine:
    """Find, load and wrap a model by name. Raises ModelNotFound, ModelUnusable or UnsupportedArchitecture."""
    from liveweight.engines.model_source import load, resolve

    source = resolve(name, revision=revision)
    loaded = load(source, dtype=dtype, device=device, progress=progress)
    return TransformersEngine(loaded, gate=gate, system=system, threads=threads)
