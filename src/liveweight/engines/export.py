"""The model in a state, written as a checkpoint that transformers loads.

Owns the folder: config, tokenizer and safetensors, in the model's own dtype, without the spare neurons that only a live
model has. It appears by one rename, so that it is whole or not there. Knows nothing of what a state is for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from liveweight.adjustments import State, effective
from liveweight.engines.gguf_cache import disk_full_is_said
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.sites.spare_neurons import without_spare_neurons


def empty_folder(folder: Path | str) -> Path:
    """The absolute path of a folder that is empty or does not exist. Raises InvalidInput for any other."""
    target = Path(folder).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidInput(f"{target} is not empty.", hint="Give a folder that is empty or does not exist yet.")
    return target


def export(engine: TransformersEngine, folder: Path | str, state: State | None = None) -> Path:
    """Write the model in `state` (None: the present one) to `folder`, which must be empty or not exist; its path.

    Raises InvalidInput where the folder holds something, Unsupported where the state acts while the model runs or holds
    new neurons, which no plain checkpoint can say, and NoSpace.
    """
    target = empty_folder(folder)
    wished = engine.state if state is None else state
    for active in effective(wished):
        if active.adjustment.activation_ops:
            raise Unsupported(
                f"{active.adjustment.name!r} acts while the model runs ({active.adjustment.activation_ops[0].kind}), "
                "and a checkpoint holds weights only.",
                hint="Switch it off, or fold it into the weights first.",
            )
    if spare := [site for site in engine.weights.touched(wished) if ".mlp.spare." in site]:
        raise Unsupported(
            f"The state holds new neurons at {spare[0]}, and a plain checkpoint has no room for them.",
            hint="Switch the change that made them off, or make it by another method.",
        )
    with disk_full_is_said(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            with engine.preview(wished), torch.no_grad():
                tensors = without_spare_neurons(engine.sites)
                with _no_bars():
                    engine.model.save_pretrained(made, state_dict=tensors)
            engine.format.tokenizer.save_pretrained(made)
            made.chmod(0o755)  # a temporary folder is for its maker alone
            made.replace(target)  # an empty folder in its place is taken over
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return target


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars: stderr may be for a program."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
