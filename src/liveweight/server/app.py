"""The application: all routes, and what stands around every one of them.

Owns the order of the middleware, the routes that say how the server is, and the document that describes everything.
Knows nothing of how an answer is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from liveweight import __version__
from liveweight.server import live_api, openai_api
from liveweight.server.access import chatter, service_of
from liveweight.server.errors import handle_errors
from liveweight.server.limits import Bodies, Origins
from liveweight.server.live_models import Health
from liveweight.server.logs import Requests
from liveweight.server.metrics import CONTENT_TYPE, Metrics
from liveweight.server.openai_docs import refusals
from liveweight.server.service import Service

_THREADS = 128  # routes that may block at once: most of them wait for a job
_TOLD = """
A language model that changes while it runs. `/v1` is what OpenAI's clients call; `/v1/live` is feedback, and the
changes that it makes. Every answer has an `x-request-id`; every error is
`{"error": {"message", "type", "param", "code", "hint", "details"}}`.
"""


Mount = Callable[[FastAPI, Service], None]


def create_app(service: Service, *, host: str = "127.0.0.1", page: Mount | None = None) -> FastAPI:
    """The application of a service that listens on `host`, with a page where one is given to mount.

    The service stays its caller's to close.
    """
    settings = service.settings.server

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        yield

    app = FastAPI(
        lifespan=lifespan,
        title="liveweight",
        version=__version__,
        description=_TOLD,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    metrics = Metrics(service)
    handle_errors(app)
    app.include_router(openai_api.router)
    app.include_router(live_api.router)
    _describe(app, metrics)
    # The last one added is the first that a request meets.
    app.add_middleware(Bodies, most=settings.max_body_bytes, seconds=settings.request_seconds)
    app.add_middleware(Origins, host=host, allowed=settings.origins, names=settings.names)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["authorization", "content-type", "idempotency-key", "last-event-id", "x-request-id"],
            expose_headers=["x-request-id", "retry-after", "location"],
        )
    app.add_middleware(Requests, metrics=metrics)
    if page is not None:
        page(app, service)
    return app


def _describe(app: FastAPI, metrics: Metrics) -> None:
    """The routes that say how the server is, and what it can do."""
    known = [Depends(chatter)]

    @app.get("/healthz", tags=["server"])
    async def healthz() -> Health:
        """That the server is up. Needs no key."""
        return Health(status="ok", version=__version__)

    @app.get(
        "/metrics",
        tags=["server"],
        dependencies=known,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals()},
    )
    def figures() -> Response:
        """What was counted, as Prometheus reads it."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/openapi.json", include_in_schema=False, dependencies=known)
    async def document(service: Annotated[Service, Depends(service_of)]) -> JSONResponse:
        told = app.openapi()
        for path in ("/v1/chat/completions", "/v1/completions"):
            asked = told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            # Another one is a 404.
            asked["properties"]["model"]["enum"] = sorted({service.live.engine.info.name, service.settings.model})
        return JSONResponse(told)
