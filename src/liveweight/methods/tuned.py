"""What tuning found: the settings that a method works best with on one model.

Owns their file, `<cache_dir>/tuned/<model hash>.json`, and which of them count: what a person set always does, what was
tuned comes next, the defaults last. Knows nothing of how they were found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from liveweight.engines.fingerprints import write_atomically
from liveweight.engines.transformers import TransformersEngine
from liveweight.settings import MethodSettings


def tuned_file(engine: TransformersEngine) -> Path:
    """Where this model's settings are kept."""
    return engine.loaded.source.cache_dir / "tuned" / f"{engine.info.hash[:24]}.json"


def read_tuned(engine: TransformersEngine) -> dict[str, dict[str, Any]]:
    """Settings by method; none where nothing was tuned, or where the file cannot be used."""
    try:
        found = json.loads(tuned_file(engine).read_text(encoding="utf-8"))
        return {str(name): dict(each["settings"]) for name, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep_tuned(engine: TransformersEngine, method: str, settings: Mapping[str, Any], told: Mapping[str, Any]) -> Path:
    """Remember one method's settings, with what they reached; the file."""
    file = tuned_file(engine)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    found[method] = {"settings": dict(settings), **told}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found, indent=1))
    return file


def settings_for(engine: TransformersEngine, method: str, settings: MethodSettings) -> MethodSettings:
    """The settings for one method: what was tuned for it on this model where the person set nothing."""
    own = read_tuned(engine).get(method, {})
    free = {name: value for name, value in own.items() if name not in settings.model_fields_set}
    if not free:
        return settings
    try:
        return MethodSettings.model_validate({**settings.model_dump(exclude_unset=True), **free})
    except ValidationError:  # written by another version of the program
        return settings
