"""`liveweight models`: what can be loaded, and what this workspace has changed."""

from __future__ import annotations

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options
from liveweight.shown import table


@takes_options
def models(options: Options) -> None:
    """List the models that this workspace knows, and the embedded one."""
    from importlib.util import find_spec

    from liveweight.engines.model_source import EMBEDDED, EMBEDDED_PACKAGE

    with session.reading(options) as ledger:
        known = [
            {
                "name": model.name,
                "source": model.source,
                "architecture": model.architecture,
                "hash": model.hash,
                "active": len(ledger.changes(model.hash, states=["active"])),
                "changes": len(ledger.changes(model.hash)),
            }
            for model in ledger.models()
        ]
    installed = find_spec(EMBEDDED_PACKAGE) is not None
    if options.json:
        output.print_json({"embedded": {"name": EMBEDDED, "installed": installed}, "known": known})
        return
    shown = table("model", "architecture", "hash", "active>", "changes>")
    for model in known:
        cells = [str(model[name]) for name in ("name", "architecture", "hash", "active", "changes")]
        shown.add_row(*cells[:2], cells[2][:12], *cells[3:])
    if not any(model["name"] == EMBEDDED for model in known):
        shown.add_row(EMBEDDED, "llama", "embedded" if installed else "not installed", "0", "0")
    output.out().print(shown)
    output.out().print("--model also takes a hub id (owner/name), a folder or a .gguf file.")
