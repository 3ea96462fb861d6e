"""The command line: one verb a command, the same words as the library's.

Owns the program itself: which verbs there are, how errors become exit codes (0 done, 1 failed, 2 usage, 3 the guard
refused, 130 interrupted), and nothing else. Heavy imports happen inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from liveweight.cli import (
    arena,
    ask,
    changes,
    chat,
    clamp,
    contrast,
    demo,
    diff,
    doctor,
    features,
    judge,
    keys,
    learn,
    massive,
    models,
    neuron,
    neurons,
    output,
    quantize,
    serve,
    sparsity,
    steer,
    step,
    super_weights,
    switch,
    tune,
    why,
)
from liveweight.cli.options import JSON_WISHED, Options
from liveweight.errors import LiveweightError

INTERRUPTED = 130
_OBJECTS = 100_000  # that are new, before it is looked which of them are garbage

_EPILOG = "Exit codes: 0 done, 1 failed, 2 usage, 3 the guard refused, 130 interrupted."


class Verbs(TyperGroup):
    """The verbs, with every error as its exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run; what the user could not know is never a traceback."""
        words = list(sys.argv[1:] if args is None else args)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # so that what is no UTF-8 is refused where it is used
        as_json = "--json" in words
        if as_json and extra.get("standalone_mode", True):
            return self._main_for_programs(words, *rest, **extra)
        return super().main(args, *rest, **extra)

    def _main_for_programs(self, words: list[str], *rest: Any, **extra: Any) -> Any:
        """With --json a usage error is JSON too."""
        try:
            code = super().main(words, *rest, **(extra | {"standalone_mode": False}))
        except typer.Abort:
            sys.exit(INTERRUPTED)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the mark of a usage error, whichever click typer carries
                raise
            told = {"code": "usage", "message": error.format_message(), "hint": "See --help."}
            sys.stderr.write(json.dumps(told, ensure_ascii=False) + "\n")
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; its error is printed and becomes the exit code."""
        try:
            return super().invoke(ctx)
        except LiveweightError as error:
            output.print_error(error, as_json=bool(ctx.meta.get(JSON_WISHED)))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            output.progress().print("Interrupted. Ledger and weights agree; what was committed before stays.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None


app = typer.Typer(
    name="liveweight",
    cls=Verbs,
    help="Change a language model's weights while it runs, from your feedback, and take any change back.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from liveweight import __version__

        print(f"liveweight {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", "-m", help="smollm2, a hub id, a folder or a .gguf.")] = None,
    workspace: Annotated[str | None, typer.Option("--workspace", "-w", help="The folder of the ledger.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results, and errors, as JSON.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Change a language model's weights while it runs, from your feedback, and take any change back."""
    from pathlib import Path

    context.meta[JSON_WISHED] = as_json
    context.obj = Options(model=model, workspace=Path(workspace) if workspace else None, json=as_json)


for _verb in (
    demo.demo,
    chat.chat,
    ask.ask,
    judge.fix,
    judge.bad,
    judge.good,
    why.why,
    neurons.neurons,
    neuron.neuron,
    clamp.clamp,
    step.step,
    contrast.contrast,
    steer.steer,
    massive.massive,
    sparsity.sparsity,
    quantize.quantize,
    features.features,
    diff.diff,
    changes.changes,
    changes.show,
    changes.protected,
    switch.undo,
    switch.off,
    switch.on,
    switch.strength,
    switch.fold,
    models.models,
    doctor.doctor,
    serve.serve,
    learn.learn,
    arena.arena,
    tune.tune,
):
    app.command()(_verb)
app.command("super-weights")(super_weights.super_weights)
app.add_typer(keys.keys, name="keys")


def main() -> None:
    """The program `liveweight`."""
    # Importing torch and transformers makes millions of objects that stay: looking through them for garbage again and
    # again was a sixth of the time.
    gc.set_threshold(_OBJECTS, 20, 20)
    app()
