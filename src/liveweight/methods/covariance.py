"""Key statistics: how a layer's neurons fire together over plain text.

Owns C = E[a aᵀ] of the base model, a the neurons' activations (the input of `down`), and its files
`<cache_dir>/covariance/<model hash>-<text hash>-<layer>.safetensors`, each of which appears whole or not at all.
Knows nothing of edits. The text is the one that ships with the package, or the person's own.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liveweight.engines.fingerprints import in_place_of
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoSpace
from liveweight.settings import MethodSettings
from liveweight.tracing.plain_text import plain_text as shipped_text

_LENGTH = 256  # tokens of one sequence
_ROWS = 4  # sequences of one forward pass
_MOST = 32_768  # tokens that are read; the estimate hardly moves beyond half of that
_RIDGE = 0.01  # of the median diagonal entry: directions that the text never showed stay finite


class _DeepEnough(Exception):
    """Ends a forward pass at the deepest layer that is asked for; never leaves this module."""


def covariances(
    engine: TransformersEngine, layers: Sequence[int], settings: MethodSettings, *, progress: bool = True
) -> dict[int, Tensor]:
    """C of each layer, (neurons, neurons) float32 on the CPU, read from the cache or computed in one pass.

    The uncentred second moment over the text's tokens under the base weights, whatever is active now. Progress goes
    to stderr. Raises InvalidInput for a text that cannot be used, Unsupported for a layer of experts, NoSpace.
    """
    text = plain_text(settings)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = engine.loaded.source.cache_dir / "covariance"
    files = {layer: folder / f"{engine.info.hash[:16]}-{digest[:16]}-{layer}.safetensors" for layer in layers}
    found = {layer: _read(file, engine.sites.neurons_of(layer)) for layer, file in files.items()}
    missing = [layer for layer, values in found.items() if values is None]
    if missing:
        for layer, values in _measured(engine, missing, text, progress).items():
            _write(files[layer], values)
            found[layer] = values
    return {layer: values for layer, values in found.items() if values is not None}


def covariance(engine: TransformersEngine, layer: int, settings: MethodSettings, *, progress: bool = True) -> Tensor:
    """`covariances` of one layer."""
    return covariances(engine, [layer], settings, progress=progress)[layer]


def whitened(statistics: Tensor, keys: Tensor) -> Tensor:
    """C⁻¹k for keys (neurons,) or (neurons, n), in float64, with a small ridge."""
    factor = torch.linalg.cholesky(ridged(statistics.to(keys.device, torch.float64)))
    columns = keys.double() if keys.dim() == 2 else keys.double()[:, None]
    solved = torch.cholesky_solve(columns, factor)
    return solved if keys.dim() == 2 else solved[:, 0]


def ridged(statistics: Tensor) -> Tensor:
    """C with a small ridge.

    It is relative to the median of C's diagonal: its mean belongs to the one neuron of a massive activation.
    """
    diagonal = statistics.diagonal()
    floor = diagonal[diagonal > 0].median() if bool((diagonal > 0).any()) else diagonal.new_ones(())
    return statistics + _RIDGE * floor * torch.eye(len(statistics), device=statistics.device, dtype=statistics.dtype)


def plain_text(settings: MethodSettings) -> str:
    """The text that statistics are taken from. Raises InvalidInput naming a file that is missing or no text."""
    path = settings.covariance_text
    if path is None:
        return shipped_text()
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"The text for key statistics, {path}, cannot be read: {error}.",
            hint="Give a file of plain UTF-8 text as methods.covariance_text, or unset it to use ours.",
        ) from error
    if not text.strip():
        raise InvalidInput(
            f"The text for key statistics, {path}, is empty.",
            hint="Give some thousand words of plain text as methods.covariance_text, or unset it to use ours.",
        )
    return text


# ------------------------------------------------------------------------------------------------------ internal


def _measured(engine: TransformersEngine, layers: Sequence[int], text: str, progress: bool) -> dict[int, Tensor]:
    points = {layer: engine.sites.activation(f"layers.{layer}.mlp.neurons") for layer in layers}
    rows = _rows(engine, text)
    *whole, rest = rows  # the rest of the text is shorter, and a batch of its own
    batches = [*(whole[start : start + _ROWS] for start in range(0, len(whole), _ROWS)), [rest]]
    tokens = sum(map(len, rows))
    device = next(engine.model.parameters()).device
    sums = {layer: torch.zeros(point.size, point.size, dtype=torch.float64) for layer, point in points.items()}

    def add(layer: int) -> Callable[[Tensor], None]:
        def keep(values: Tensor) -> None:
            flat = values.reshape(-1, values.shape[-1]).float()
            sums[layer] += (flat.T @ flat).cpu()  # float32 inside a batch, float64 over the batches
            if layer == max(layers):
                raise _DeepEnough

        return keep

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not progress or not console.is_terminal  # a bar in a log file is a blank line
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("Measuring how neurons fire over plain text (once)", total=len(batches))
        for batch in batches:
            # One batch at a time holds the model, so that a chat can go on in between.
            with engine.preview(()), torch.no_grad(), ExitStack() as hooks:
                for layer, point in points.items():
                    hooks.callback(point.on(add(layer)).remove)
                _run_until_deep_enough(engine.model.base_model, torch.tensor(batch, device=device))
            bar.advance(task)
    return {layer: (total / tokens).float() for layer, total in sums.items()}


def _run_until_deep_enough(model: nn.Module, ids: Tensor) -> None:
    try:
        model(input_ids=ids, use_cache=False)
    except _DeepEnough:
        return


def _rows(engine: TransformersEngine, text: str) -> list[list[int]]:
    """The text as rows of equal length, the last one shorter; each begins as the tokenizer begins a text."""
    first, bos = engine.format.encode_text("a", special=True)[0], engine.format.tokenizer.bos_token_id
    start = [first] if first == bos else []
    # A paragraph at a time: a tokenizer complains of a text that is longer than the model's context.
    ids = [token for part in text.splitlines(keepends=True) for token in engine.format.encode_text(part)][:_MOST]
    step = min(_LENGTH, engine.info.context or _LENGTH) - len(start)
    return [start + ids[place : place + step] for place in range(0, len(ids), step)]


def _read(file: Path, neurons: int) -> Tensor | None:
    """What the cache holds; None where there is nothing, or nothing that can be used, so that it is made anew."""
    try:
        found = load_file(file)["covariance"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == (neurons, neurons) and found.dtype == torch.float32 else None


def _write(file: Path, values: Tensor) -> None:
    try:
        with in_place_of(file) as temporary:
            save_file({"covariance": values}, temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"The disk of {file.parent} became full while key statistics were kept.",
                hint="Free some space, or point LIVEWEIGHT_CACHE_DIR at another disk; nothing half-made was kept.",
            ) from error
        raise
