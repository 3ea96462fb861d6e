"""The routes that OpenAI's clients call: chats, completions, models.

Owns how a request becomes streams of the service and how these become an answer, also where the client goes away or a
stream fails on its way. Knows nothing of models and ledgers, and nothing of the form of requests, answers and errors.
"""

from __future__ import annotations

import logging
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from liveweight.conversation import ReplyStream
from liveweight.engines.batching import TokenStream
from liveweight.errors import GenerationCancelled, InvalidInput, LiveweightError, ModelNotFound
from liveweight.server.access import Author, chatter
from liveweight.server.openai_bodies import Body, ChatBody, CompletionBody, as_event
from liveweight.server.openai_docs import CHAT_BODY, COMPLETION_BODY, MODEL_ID, answers, refusals
from liveweight.server.openai_errors import answer_to
from liveweight.server.openai_logprobs import Spelling
from liveweight.server.openai_models import ChatCompletion, Completion, ModelCard, ModelList
from liveweight.server.openai_requests import ChatRequest, CompletionRequest
from liveweight.server.openai_streams import Running, Workers, running
from liveweight.server.service import Service

_log = logging.getLogger(__name__)
_SPARE_THREADS = 16  # more than the streams that a service lets in, so that it is the service that says "full"

R = TypeVar("R", bound=BaseModel)
S = TypeVar("S", ReplyStream, TokenStream)


class Served:
    """What the routes need of one application: its service, and what is made once and kept."""

    def __init__(self, service: Service) -> None:
        """Serve this service's model."""
        self.service = service
        self.workers = Workers(service.settings.server.rows + service.settings.server.waiting + _SPARE_THREADS)
        self.spelling = Spelling(service.live.engine.format)
        self.since = int(time.time())

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.service.live.engine.info.name

    def require(self, model: str) -> None:
        """Raises ModelNotFound for another model than the one that is served."""
        if model not in (self.name, self.service.settings.model):
            raise ModelNotFound(f"The model {model!r:.200} is not served here.", hint=f"This is {self.name}.")


async def served(request: Request) -> Served:
    """What the application of a request serves."""
    state = request.app.state
    if not hasattr(state, "openai"):
        state.openai = Served(state.service)
    found: Served = state.openai
    return found


Chatter = Annotated[Author, Depends(chatter)]
ServedModel = Annotated[Served, Depends(served)]

router = APIRouter(prefix="/v1", tags=["OpenAI"])


# ------------------------------------------------------------------------------------------------------- routes


@router.post(
    "/chat/completions", response_model=ChatCompletion, responses=answers("The answer."), openapi_extra=CHAT_BODY
)
async def chat_completions(request: Request, author: Chatter, served: ServedModel) -> Response:
    """Answer a chat. The answer is remembered: feedback under `/v1/live` can name it by its id."""
    asked = await _read(request, ChatRequest)
    served.require(asked.model)
    _require_room(asked.choices, served)
    ids = [f"chatcmpl-{secrets.token_hex(12)}" for _ in range(asked.choices)]
    messages = [message.as_message() for message in asked.messages]
    begins = [
        partial(
            served.service.stream,
            messages,
            sampling=served.service.live.sampling(**asked.sampling(place), top_logprobs=asked.likeliest),
            author=author.name,
            public_id=id,
        )
        for place, id in enumerate(ids)
    ]
    return _ChatAnswer(begins, asked, ids, served)


@router.post("/completions", response_model=Completion, responses=answers("The text."), openapi_extra=COMPLETION_BODY)
async def completions(request: Request, author: Chatter, served: ServedModel) -> Response:
    """Go on from a text, without a chat template. Nothing of it is remembered."""
    asked = await _read(request, CompletionRequest)
    served.require(asked.model)
    _require_room(len(asked.prompts) * asked.choices, served)
    samplings = [
        served.service.live.sampling(**asked.sampling(place), top_logprobs=asked.likeliest)
        for place in range(asked.choices)
    ]
    begins = [
        partial(served.service.complete, prompt, sampling=sampling, author=author.name)
        for prompt in asked.prompts
        for sampling in samplings
    ]
    id = f"cmpl-{secrets.token_hex(12)}"
    return _CompletionAnswer(begins, asked, [id] * len(begins), served)


@router.get("/models", response_model=ModelList, responses=refusals())
async def models(author: Chatter, served: ServedModel) -> dict[str, Any]:
    """The models that can be asked: the one that is served."""
    return {"object": "list", "data": [_card(served)]}


@router.get("/models/{id:path}", response_model=ModelCard, responses=refusals(404), openapi_extra=MODEL_ID)
async def model(request: Request, author: Chatter, served: ServedModel) -> dict[str, Any]:
    """One model by its name."""
    served.require(request.path_params["id"])
    return _card(served)


def _require_room(answers: int, served: Served) -> None:
    """Raises InvalidInput for more answers than this server takes at once, which no waiting would make possible."""
    most = served.service.batcher.capacity
    if answers > most:
        raise InvalidInput(
            f"{answers} answers are asked for at once, and this server takes {most}.",
            hint="Ask for fewer (n), or give fewer prompts.",
        )


def _card(served: Served) -> dict[str, Any]:
    engine = served.service.live.engine
    facts = {"version": str(engine.version), "context": engine.info.context, "hash": engine.info.hash}
    told = {"id": served.name, "object": "model", "created": served.since, "owned_by": "liveweight"}
    return told | {"liveweight": facts}


async def _read(request: Request, kind: type[R]) -> R:
    """The body of a request. Raises HTTPException, RequestValidationError."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise HTTPException(415, "The body must be JSON, with the header `content-type: application/json`.")
    try:
        return kind.model_validate_json(await request.body())
    except ClientDisconnect:
        raise _gone() from None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from error


def _gone() -> GenerationCancelled:
    return GenerationCancelled("The client went away.")


# ------------------------------------------------------------------------------------------------------- answers


class _Answer(Response, Generic[S]):
    """Begins the streams of a request when it is sent, and ends them when it is sent or nobody waits for it."""

    form: ClassVar[type[Body]]
    param: ClassVar[str]  # what is wrong where the service refuses the input
    remembered: ClassVar[bool]

    def __init__(
        self,
        begins: Sequence[Callable[[], S]],
        asked: ChatRequest | CompletionRequest,
        ids: Sequence[str],
        served: Served,
    ) -> None:
        """One choice for each stream. Nothing is begun yet."""
        self._begins: Sequence[Callable[[], S]] = begins
        self._workers, self._choices = served.workers, asked.choices
        self._body = self.form(
            ids,
            served.name,
            served.spelling,
            likeliest=asked.likeliest,
            usage_in_stream=asked.usage_in_stream,
            remembered=self.remembered,
        )
        self._streams = bool(asked.stream)
        self._begun = False
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream" if self._streams else "application/json"
        # A proxy that collected the events would make a stream of them no longer.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"} if self._streams else None)

    @abstractmethod
    def prompt_tokens(self, streams: Sequence[S]) -> int:
        """How many tokens were read, each prompt counted once."""

    @abstractmethod
    def reply(self, stream: S) -> str | None:
        """The id in the ledger of what a stream said."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. What fails before anything is sent is raised; later it is the stream's last event."""
        try:
            async with running(self._begins, receive, self._workers) as found:
                await (self._send_chunks if self._streams else self._send_whole)(found, send)
        except ClientDisconnect:
            if not self._begun:
                raise _gone() from None
        except Exception as error:
            if isinstance(error, InvalidInput):
                error.details.setdefault("param", self.param)
            if not self._begun:
                raise
            if not isinstance(error, LiveweightError):
                _log.error("a stream failed", exc_info=error, extra={"request": scope.get("state", {}).get("id", "")})
            await self._send(as_event(answer_to(error)[1]), send)

    async def _send_whole(self, found: Running[S], send: Send) -> None:
        open = len(found.streams)
        while open:
            for index, event in await found.events():
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    open -= 1
                    self._body.complete(index, self.reply(found.streams[index]))
                else:
                    self._body.collect(index, event)
        whole = self._body.whole(self.prompt_tokens(found.streams))
        self.headers["content-length"] = str(len(whole))
        await self._send(whole, send)

    async def _send_chunks(self, found: Running[S], send: Send) -> None:
        open = len(found.streams)
        prompt_tokens = self.prompt_tokens(found.streams)
        while open:
            chunks: list[bytes] = []
            for index, event in await found.events():
                if isinstance(event, Exception):
                    if chunks and self._begun:
                        await self._send(b"".join(chunks), send, more=True)
                    raise event
                if event is None:
                    open -= 1
                    reply = self.reply(found.streams[index])
                    chunks.append(self._body.over(index, reply, prompt_tokens, last=open == 0))
                else:
                    chunks.append(self._body.chunk(index, event))
            told = b"".join(chunks)
            if told:
                await self._send(told, send, more=open > 0)

    async def _send(self, told: bytes, send: Send, *, more: bool = False) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": told, "more_body": more})


class _ChatAnswer(_Answer[ReplyStream]):
    form, param, remembered = ChatBody, "messages", True

    def prompt_tokens(self, streams: Sequence[ReplyStream]) -> int:
        return streams[0].prompt_tokens

    def reply(self, stream: ReplyStream) -> str | None:
        return stream.reply.label


class _CompletionAnswer(_Answer[TokenStream]):
    form, param, remembered = CompletionBody, "prompt", False

    def prompt_tokens(self, streams: Sequence[TokenStream]) -> int:
        return sum(stream.generation.prompt_length for stream in streams[:: self._choices])

    def reply(self, stream: TokenStream) -> str | None:
        return None
