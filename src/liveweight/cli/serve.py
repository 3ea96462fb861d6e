"""The verb `serve`: the model behind an API, with the page."""

from __future__ import annotations

from typing import Annotated

import typer

from liveweight.cli import output
from liveweight.cli.options import Options, takes_options


@takes_options
def serve(
    options: Options,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 127.0.0.1 unless set.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port; 8000 unless set, 0 a free one.")] = None,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="Serve the page beside the API.")] = None,
) -> None:
    """Serve the model: an OpenAI-compatible API at /v1, feedback and changes at /v1/live, the page at /.

    Other machines can only reach it once there are keys: see `liveweight keys create`.
    """
    from liveweight.server.running import run

    given = {"host": host, "port": port, "page": page}
    settings = options.settings()
    server = settings.server.model_copy(update={name: value for name, value in given.items() if value is not None})
    page_of = None
    if server.page:
        from liveweight.web import mount

        page_of = mount
    run(
        settings.model_copy(update={"server": server}),
        say=output.say,
        progress=output.progress().is_terminal,
        page=page_of,
    )
