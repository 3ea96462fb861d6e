"""The server as a process: from settings to a port that answers, and to a clean end.

Owns uvicorn's settings, what is checked before anything listens, and the order in which all of it stops: no new
requests, then open replies and subscriptions, then jobs, then the workspace. Knows nothing of routes.
"""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from types import FrameType

import uvicorn

from liveweight.errors import InvalidInput
from liveweight.server.access import require_safe_address
from liveweight.server.app import Mount, create_app
from liveweight.server.keys import Keyring
from liveweight.server.limits import PatientProtocol
from liveweight.server.logs import log_to_stderr
from liveweight.server.service import Service
from liveweight.settings import Settings

_BACKLOG = 2048  # connections that wait to be taken


class Server(uvicorn.Server):
    """uvicorn's server, which lets go of its listeners before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, service: Service, listens: Callable[[], None]) -> None:
        """Serve an application of this service, and call `listens` once it does."""
        super().__init__(config)
        self._service, self._listens = service, listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._listens()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, because a signal came: those who listen to events would never end by themselves.

        A second Ctrl-C does not wait. The signal is not raised again at the end, as uvicorn does: there is more to
        close.
        """
        self._service.events.close()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def run(settings: Settings, *, say: Callable[[str], None], progress: bool = False, page: Mount | None = None) -> None:
    """Serve until a signal ends it, with a page where one is given to mount.

    Raises InvalidInput for an address that cannot be listened on, or may not be without keys, and what opening a model
    and its workspace raises.
    """
    server = settings.server
    with closing(Keyring(settings.workspace, settings.database_url)) as keys:
        require_safe_address(server.host, keys=keys.any())
    log_to_stderr(prompts=server.log_prompts)
    _allow_many_files()
    listening = _bound(server.host, server.port)
    with listening, Service.open(settings, progress=progress) as service:
        app = create_app(service, host=server.host, page=page)
        config = uvicorn.Config(
            app,
            http=_patient(server.request_seconds),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(server.stop_seconds)),
            backlog=_BACKLOG,
            lifespan="on",
        )
        host, port = listening.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        for notice in service.live.notices:
            say(notice)
        told = f"serving {service.live.engine.info.name} at http://{name}:{port} (stop with Ctrl-C)"
        Server(config, service, lambda: say(told)).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket on that address: taken before the model is loaded, so that a taken port is known at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(found[0], found[1])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[4])
    except OSError as error:
        raise InvalidInput(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}.", hint="Choose another --port."
        ) from error
    return listening


def _patient(seconds: float) -> type[PatientProtocol]:
    class Patient(PatientProtocol):
        """Connections of this server."""

    Patient.seconds = seconds
    return Patient


def _allow_many_files() -> None:
    """As many open files, and so connections, as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
