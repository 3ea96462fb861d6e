"""What an MLP usually reads, and which of its neurons do least.

Owns, for a layer, the second moment and the mean of the MLP's input over everyday chats (with the base model's own
replies) and plain text, the same where replies begin, each neuron's usual contribution, and how the input at the end of
a question varies with its wording alone. Computed once under the base weights and cached by model and text. An edit
that is to leave everything else alone, and to hold in any wording, is fitted against these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.fingerprints import in_place_of
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.wording import everyday_questions, same_questions
from liveweight.tracing.plain_text import plain_text

_FORMAT = "4"  # of what is kept; another number makes it anew
_REPLY = 14  # tokens of each everyday reply
_BATCH = 40
_PLAIN_TOKENS = 8192
_PLAIN_ROW = 128
_PLAIN_SHARE = 0.2  # weight of plain text beside chats


@dataclass(frozen=True)
class Surroundings:
    """Statistics of one layer."""

    moment: Tensor  # (width, width), E[x xᵀ]
    mean: Tensor  # (width,), E[x]
    usage: Tensor  # (neurons,), E[|a|]·|w_down|
    first_moment: Tensor  # (width, width), E[x xᵀ] where the first token of a reply is chosen
    first_mean: Tensor  # (width,)
    wording: Tensor  # (width, width), covariance at a question's end over the wordings of one question, pooled


def surroundings(
    engine: TransformersEngine, layers: Sequence[int], *, progress: bool = True
) -> dict[int, Surroundings]:
    """The statistics of some layers, from the cache or computed now (about half a minute for a small model)."""
    folder = engine.loaded.source.cache_dir / "surroundings"
    questions = everyday_questions()
    plain = plain_text()
    reworded = same_questions()
    # The same weights may come with another template, or be asked behind another system prompt.
    template = f"{engine.format.tokenizer.chat_template}\n{engine.format.system}"
    told = "\n".join((_FORMAT, template, *questions, *(text for same in reworded for text in same))) + plain
    text_hash = hashlib.sha256(told.encode()).hexdigest()[:12]
    paths = {layer: folder / f"{engine.info.hash[:24]}-{text_hash}-{layer}.safetensors" for layer in layers}
    missing = [layer for layer in layers if not paths[layer].is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            missing = [layer for layer in layers if not paths[layer].is_file()]
            for layer, found in (
                _compute(engine, missing, questions, reworded, plain, progress).items() if missing else ()
            ):
                _save(found, paths[layer])
    return {layer: Surroundings(**load_file(paths[layer])) for layer in layers}


def _save(found: Surroundings, path: Path) -> None:
    with in_place_of(path) as temporary:
        save_file({field.name: getattr(found, field.name).contiguous() for field in fields(found)}, temporary)


def _compute(
    engine: TransformersEngine,
    layers: Sequence[int],
    questions: list[str],
    reworded: list[list[str]],
    plain: str,
    progress: bool,
) -> dict[int, Surroundings]:
    # A context that is too short for a reply, as that of a toy, holds what it can.
    context = engine.info.context or _PLAIN_ROW
    prompts = [engine.encode((Message("user", question),))[: max(1, context - _REPLY)] for question in questions]
    ids = [token for part in plain.split("\n\n") for token in engine.format.encode_text(part + "\n\n")][:_PLAIN_TOKENS]
    lead = prompts[0][:1]
    step = min(_PLAIN_ROW, context - len(lead))
    rows = [lead + ids[start : start + step] for start in range(0, len(ids), step)]
    sums = {layer: _Sums(engine, layer) for layer in layers}
    with (
        Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar,
        engine.preview(()),
    ):
        task = bar.add_task(
            "Reading what the model usually thinks (once)", total=len(prompts) + len(rows) + len(reworded)
        )
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            replies = engine.greedy(batch, _REPLY)
            _read(engine, [p + r for p, r in zip(batch, replies, strict=True)], sums, 1.0, [len(p) for p in batch])
            bar.advance(task, len(batch))
        for start in range(0, len(rows), _BATCH):
            _read(engine, rows[start : start + _BATCH], sums, _PLAIN_SHARE)
            bar.advance(task, len(rows[start : start + _BATCH]))
        for same in reworded:
            prompts = [engine.encode((Message("user", text),))[:context] for text in same]
            for layer, found in sums.items():
                read = engine.read(prompts, [len(prompt) - 1 for prompt in prompts], layer)
                found.same(torch.cat([ends for _, ends in read]))
            bar.advance(task)
    return {layer: found.finish() for layer, found in sums.items()}


class _Sums:
    """Running sums of one layer, for chats and for plain text."""

    def __init__(self, engine: TransformersEngine, layer: int) -> None:
        width, neurons = engine.sites.width, engine.sites.neurons_of(layer)
        down = engine.weights.base(engine.sites.mlp_part(layer, "down"))
        self.norms = down.norm(dim=0)
        self.parts: dict[float, tuple[Tensor, Tensor, Tensor, int]] = {}
        self.empty = (torch.zeros(width, width), torch.zeros(width), torch.zeros(neurons), 0)
        self.first: list[Tensor] = []
        self.apart: list[Tensor] = []

    def add(self, weight: float, x: Tensor, a: Tensor) -> None:
        moment, mean, usage, count = self.parts.get(weight, self.empty)
        x, a = x.float().cpu(), a.float().cpu()
        self.parts[weight] = (moment + x.T @ x, mean + x.sum(0), usage + a.abs().sum(0), count + len(x))

    def same(self, ends: Tensor) -> None:
        """Take one question's wordings, (N, width): how they differ from their mean."""
        ends = ends.float().cpu()
        self.apart.append((ends - ends.mean(0)) * (len(ends) / (len(ends) - 1)) ** 0.5)

    def finish(self) -> Surroundings:
        moment, mean, usage = (torch.zeros_like(each) for each in self.empty[:3])
        for weight, (m, v, u, count) in self.parts.items():
            moment, mean, usage = moment + weight * m / count, mean + weight * v / count, usage + weight * u / count
        first, apart = torch.cat(self.first), torch.cat(self.apart)
        return Surroundings(
            moment=moment,
            mean=mean,
            usage=usage * self.norms.cpu(),
            first_moment=first.T @ first / len(first),
            first_mean=first.mean(0),
            wording=apart.T @ apart / len(apart),
        )


def _read(
    engine: TransformersEngine,
    rows: list[list[int]],
    sums: dict[int, _Sums],
    weight: float,
    prompts: Sequence[int] = (),
) -> None:
    """Add every token of some rows; the first is left out, for it holds no text and its values are giants.

    `prompts` are the prompts' lengths in tokens, where replies follow them.
    """
    longest, pad = max(map(len, rows)), engine.format.pad_token
    kept: dict[int, Tensor] = {}
    neurons: dict[int, Tensor] = {}
    device = engine.model.device
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    real = torch.tensor([[0] + [1] * (len(row) - 1) + [0] * (longest - len(row)) for row in rows]).bool()
    with engine.gate.step(), torch.inference_mode(), ExitStack() as hooks:
        for layer in sums:
            reader = engine.sites.weight(engine.sites.mlp_part(layer, "up")).module
            handle = reader.register_forward_pre_hook(lambda _, args, layer=layer: kept.__setitem__(layer, args[0]))
            hooks.callback(handle.remove)
            point = engine.sites.activation(f"layers.{layer}.mlp.neurons")
            handle = point.on(lambda value, layer=layer: neurons.__setitem__(layer, value))  # type: ignore[misc]
            hooks.callback(handle.remove)
        engine.model.base_model(input_ids=ids, use_cache=False)
    for layer, found in sums.items():
        found.add(weight, kept[layer][real.to(kept[layer].device)], neurons[layer][real.to(neurons[layer].device)])
        for row, length in enumerate(prompts):
            found.first.append(kept[layer][row, length - 1 : length].float().cpu())
