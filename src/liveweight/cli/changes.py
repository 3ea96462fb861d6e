"""`liveweight changes`, `show` and `protected`: what the ledger holds.

No model is loaded, and a running chat is not disturbed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from liveweight.cli import output, session
from liveweight.cli.options import Options, takes_options


@takes_options
def changes(
    options: Options,
    all_models: Annotated[bool, typer.Option("--all", help="Of every model, not only the chosen one.")] = False,
) -> None:
    """List every change with its state and strength."""
    from liveweight.reports import Change

    with session.reading(options) as ledger:
        model = None if all_models else session.model_hash(ledger, options.settings())
        records = ledger.changes(None if all_models else model or "")
        found = [Change.of(record, ledger.report(record.id)) for record in records]
    if options.json:
        output.print_json([change.as_dict() for change in found])
    else:
        output.out().print(output.changes_view(found))


@takes_options
def show(options: Options, change: Annotated[str, typer.Argument(metavar="ID", help="Such as c3.")]) -> None:
    """Show a change and its whole report."""
    from liveweight.reports import Change

    with session.reading(options) as ledger:
        record = ledger.change(change)
        found = Change.of(record, ledger.report(record.id))
    output.print_change(found, as_json=options.json)


@takes_options
def protected(options: Options) -> None:
    """List the answers that changes must leave as they are; `undo p3` lets one go."""
    with session.reading(options) as ledger:
        found = ledger.protected(session.model_hash(ledger, options.settings()) or "")
    if options.json:
        output.print_json([{"label": each.label, **each.model_dump(mode="json")} for each in found])
    else:
        output.out().print(output.protected_view(found))
