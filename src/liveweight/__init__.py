"""Changes the weights of an open-weight language model while it runs, from the feedback of the person who uses it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel
    from liveweight.reports import Change, Reply, Report
    from liveweight.tracing import diff

__version__ = "0.1.0"

_PUBLIC = {
    "Change": "reports",
    "LiveModel": "live_model",
    "Reply": "reports",
    "Report": "reports",
    "diff": "tracing",
}

__all__ = ["Change", "LiveModel", "Reply", "Report", "__version__", "diff"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: torch takes seconds, and `--help` needs none of it."""
    if name in _PUBLIC:
        return getattr(import_module(f"liveweight.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'liveweight' has no attribute {name!r}")
