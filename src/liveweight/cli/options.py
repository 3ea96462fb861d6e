"""The options that every verb takes, before or after its name.

Owns their spelling, how they become settings, and the decorator that gives them to a verb. Knows nothing of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from liveweight.settings import Settings

JSON_WISHED = "liveweight.json"  # in the context's notes: where errors look whether a program reads them
_PANEL = "Options of every verb"
_SETTINGS_PANEL = "Settings of the methods"


@dataclass(frozen=True)
class Options:
    """What was given of the common options; None where nothing was."""

    model: str | None = None
    revision: str | None = None
    workspace: Path | None = None
    cache_dir: Path | None = None
    database_url: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    json: bool = False
    verbose: bool = False
    methods: Mapping[str, Any] | None = None  # settings of the methods by name

    def over(self, other: Options) -> Options:
        """These options, and where they say nothing the other ones."""
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        return replace(other, **given)

    def settings(self) -> Settings:
        """The settings with these flags on top. Raises InvalidInput."""
        from liveweight.settings import Settings

        names = [field.name for field in fields(self) if field.name not in ("json", "verbose")]
        return Settings(**{name: getattr(self, name) for name in names if getattr(self, name) is not None})


def _option(kind: Any, *names: str, help: str) -> Any:
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=_PANEL)]


_SPELT: dict[str, Any] = {
    "model": _option(str | None, "--model", "-m", help="smollm2, a hub id, a folder or a .gguf file."),
    "revision": _option(str | None, "--revision", help="The commit, tag or branch of a hub model."),
    "workspace": _option(Path | None, "--workspace", "-w", help="The folder of the ledger."),
    "cache_dir": _option(Path | None, "--cache-dir", help="The folder of what can be computed again."),
    "database_url": _option(str | None, "--database-url", help="The ledger's database, if not SQLite."),
    "device": _option(str | None, "--device", help="auto, cpu, mps, cuda or cuda:N."),
    "dtype": _option(str | None, "--dtype", help="auto, float32, bfloat16 or float16."),
    "threads": _option(int | None, "--threads", help="CPU threads to compute with."),
    "json": _option(bool, "--json", help="Print results, and errors, as JSON."),
    "verbose": _option(bool, "--verbose", "-v", help="Say more on stderr."),
}


def check_keeping(keep: bool, force: bool, preview: bool = False) -> None:
    """Raises BadParameter where --keep, --preview and --force contradict each other."""
    if keep and preview:
        raise typer.BadParameter("Give --keep or --preview, not both.", param_hint="--keep")
    if force and not keep:
        raise typer.BadParameter("--force goes with --keep.", param_hint="--force")


def takes_method_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb an option for each setting of the methods; what was given is in its options. Goes under the other."""
    from liveweight.settings import MethodSettings

    own = inspect.signature(verb, eval_str=True)
    offered = {name: field for name, field in MethodSettings.model_fields.items() if name != "method"}
    added = []
    for name, field in offered.items():
        kinds = [kind for kind in (int, float, Path) if field.annotation in (kind, kind | None)]
        kind = kinds[0] if kinds else str  # a choice among words is checked where settings are
        told = f"{field.description} (default {field.default})" if field.default is not None else field.description
        option = typer.Option(f"--{name.replace('_', '-')}", help=told, rich_help_panel=_SETTINGS_PANEL)
        added.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )

    @wraps(verb)
    def with_settings(options: Options, **given: Any) -> None:
        values = {name: value for name in offered if (value := given.pop(name)) is not None}
        verb(replace(options, methods=values) if values else options, **given)

    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in list(own.parameters.values())[1:]]
    first = next(iter(own.parameters.values()))
    with_settings.__signature__ = own.replace(parameters=[first, *keyword, *added])  # type: ignore[attr-defined]
    del with_settings.__wrapped__
    return with_settings


def takes_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the common options: it gets them as its first argument, merged with those before its name."""
    own = inspect.signature(verb, eval_str=True)
    mine = list(own.parameters.values())[1:]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter(field.name, keyword_only, default=field.default, annotation=_SPELT[field.name])
        for field in fields(Options)
        if field.name in _SPELT
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in mine]

    @wraps(verb)
    def with_options(context: typer.Context, **given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in _SPELT})
        before = context.obj if isinstance(context.obj, Options) else Options()
        options = options.over(before)
        context.meta[JSON_WISHED] = options.json
        verb(options, **given)

    parameters = [context, *keyword, *common]
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    del with_options.__wrapped__  # typer would look through the wrapper at the verb's own annotations
    return with_options
