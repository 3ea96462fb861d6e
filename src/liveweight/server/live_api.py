"""liveweight's own routes, under /v1/live: replies, feedback, changes, neurons, the guard, jobs and events.

Owns which verb of `LiveModel` a route calls, and who may call it. What takes longer than a moment is a job. Blocking
work runs in worker threads (these are plain functions). Knows nothing of how anything is carried out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Response
from fastapi.responses import StreamingResponse

from liveweight.errors import InvalidInput
from liveweight.ledger import Event, Feedback, Job, acting_as
from liveweight.reports import Change
from liveweight.server.access import Author, chatter, editor, service_of
from liveweight.server.events import framed
from liveweight.server.live_models import (
    ApplyRequest,
    ChangeView,
    ClampRequest,
    Compared,
    CompareRequest,
    FeedbackRequest,
    JobView,
    LearnRequest,
    Load,
    NeuronRequest,
    NeuronsRequest,
    OnRequest,
    ProtectedView,
    ReplyView,
    Status,
    StatusView,
    StrengthRequest,
    Strong,
    VersionAnswer,
    VersionView,
    WhyRequest,
    plain_request,
)
from liveweight.server.openai_docs import refusals
from liveweight.server.service import Service
from liveweight.tracing import WhyReport
from liveweight.versions import answers, moments

Chatter = Annotated[Author, Depends(chatter)]
Editor = Annotated[Author, Depends(editor)]
Served = Annotated[Service, Depends(service_of)]
ReplyId = Annotated[
    str, Path(max_length=64, description="A reply's id: r12, 12 or a completion's id.", examples=["r1"])
]
ChangeId = Annotated[str, Path(max_length=64, description="A change's id: c3 or 3.", examples=["c1"])]
JobId = Annotated[str, Path(max_length=64, description="A job's id: j5 or 5.", examples=["j1"])]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]
Wait = Annotated[
    float, Query(ge=0, le=60, description="Seconds to wait for the job's end before it is answered as it is.")
]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="The same key with the same request is the same job, however often it is sent.",
    ),
]

_EVENT = {"type": "object", "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {}}}
_BEAT = 15.0  # seconds of silence after which a stream of events says that it is still there


router = APIRouter(prefix="/v1/live", dependencies=[Depends(chatter)], responses=refusals(404))
_JOB: dict[int | str, dict[str, Any]] = {
    200: {"model": JobView, "description": "The job, which has ended."},
    202: {"model": JobView, "description": "The job, which waits or runs; its place is in the header `location`."},
    **refusals(404, 409, 415),
}
_BODY = refusals(404, 415)
_MOVE = refusals(404, 409, 507)
_SET = refusals(404, 409, 415, 507)


# ------------------------------------------------------------------------------------------------------- the model


@router.get("/status", tags=["model"])
def status(service: Served, author: Chatter) -> StatusView:
    """The model, the version of its weights, the changes that are on, and the load."""
    live, batcher = service.live, service.batcher
    info = live.engine.info
    return StatusView(
        model=info.name,
        hash=info.hash,
        architecture=info.architecture,
        layers=info.layers,
        neurons=info.neurons,
        parameters=info.parameters,
        context=info.context,
        dtype=info.dtype,
        device=info.device,
        version=str(live.engine.version),
        active=[change.label for change in live.ledger.changes(info.hash, states=["active"])],
        load=Load(running=batcher.running, waiting=batcher.waiting, rows=batcher.rows, tokens=batcher.tokens),
        notices=list(live.notices),
        role=author.role,
    )


@router.get("/versions", tags=["model"])
def versions(service: Served, limit: Limit = 100) -> list[VersionView]:
    """The states that the weights were in, newest first, and what brought each."""
    found = moments(service.live.history(), service.live.engine.info.hash)
    return [
        VersionView(
            event=moment.event,
            said=moment.said,
            at=moment.at,
            on=[Strong(change=f"c{change}", strength=strength) for change, strength in moment.on],
        )
        for moment in found[::-1][:limit]
    ]


@router.post("/compare", tags=["model"], responses=_BODY)
def compare(
    service: Served,
    request: Annotated[
        CompareRequest,
        Body(openapi_examples={"base": {"value": {"prompt": "Who are you?", "versions": [0, "now"]}}}),
    ],
) -> Compared:
    """Answer a prompt as the model was behind some lines of the journal, and as it is now. Nothing is kept."""
    live = service.live
    known = {moment.event: moment for moment in moments(live.history(), live.engine.info.hash)}
    strange = next((each for each in request.versions if each != "now" and each not in known), None)
    if strange is not None:
        raise InvalidInput(f"No version came with line {strange} of the journal.", hint="GET /v1/live/versions.")
    chosen = [None if each == "now" else known[each] for each in request.versions]
    said = answers(live, request.prompt, chosen)
    told = zip(request.versions, said, strict=True)
    return Compared(prompt=request.prompt, answers=[VersionAnswer(version=each, text=text) for each, text in told])


# ------------------------------------------------------------------------------------------- replies and feedback


@router.get("/replies", tags=["replies"])
def replies(
    service: Served,
    limit: Limit = 50,
    before: Annotated[str | None, Query(max_length=64, description="Replies older than this one.")] = None,
    chat: Annotated[str | None, Query(max_length=64, description="Of this conversation only.")] = None,
) -> list[ReplyView]:
    """What the model answered, newest first."""
    live = service.live
    older = None if before is None else live.reply(before).id
    found = live.ledger.replies(live.engine.info.hash, limit=limit, chat=chat, before=older)
    return [ReplyView(**record.model_dump()) for record in found]


@router.get("/replies/{reply}", tags=["replies"])
def reply(service: Served, reply: ReplyId) -> ReplyView:
    """One reply: its chat, its text, and the versions of the weights that made it."""
    return ReplyView(**service.live.reply(reply).model_dump())


@router.get("/replies/{reply}/feedback", tags=["replies"])
def feedback_of(service: Served, reply: ReplyId) -> list[Feedback]:
    """What was said of a reply, oldest first."""
    return service.live.feedback(reply)


@router.post("/replies/{reply}/feedback", tags=["replies"], status_code=202, responses=_JOB)
def give_feedback(
    service: Served,
    author: Editor,
    answer: Response,
    reply: ReplyId,
    request: Annotated[
        FeedbackRequest,
        Body(
            openapi_examples={
                "bad": {"summary": "Stop saying this.", "value": {"verdict": "bad", "reason": "not true"}},
                "fix": {"summary": "Say this instead.", "value": {"verdict": "fix", "wanted": "Luanda"}},
                "preview": {"summary": "What would it do?", "value": {"verdict": "bad", "preview": True}},
            }
        ),
    ],
    key: Key = None,
    wait: Wait = 0.0,
) -> JobView:
    """Say good, bad or fix of a reply. A job, whose result is the change; with `preview` nothing is committed."""
    judged = service.live.reply(reply)
    return _asked(service, author, answer, "feedback", {"reply": judged.id, **plain_request(request)}, key, wait)


@router.get("/feedback", tags=["replies"])
def feedback(service: Served, limit: Limit = 100) -> list[Feedback]:
    """What was said of all replies, newest first."""
    return service.live.feedback()[::-1][:limit]


@router.get(
    "/feedback/export",
    tags=["replies"],
    response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}, "description": "JSON Lines."}},
)
def export(service: Served) -> StreamingResponse:
    """All feedback as JSON Lines that `liveweight learn` reads: prompt, answer, rating, correction."""

    def lines() -> Iterator[str]:
        for each in service.live.feedback():
            judged = service.live.ledger.reply(each.reply)
            turns = [{"role": turn.role, "content": turn.content} for turn in judged.messages]
            told: dict[str, Any] = {"prompt": judged.question} if len(turns) == 1 else {"messages": turns}
            told |= {"answer": judged.text}
            told |= {"correction": each.wanted or ""} if each.verdict == "fix" else {"rating": each.verdict}
            told |= {"reason": each.reason} if each.reason else {}
            yield json.dumps(told, ensure_ascii=False) + "\n"

    return StreamingResponse(lines(), media_type="application/jsonl")


@router.post("/learn", tags=["replies"], status_code=202, responses=_JOB)
def learn(
    service: Served,
    author: Editor,
    answer: Response,
    request: Annotated[
        LearnRequest,
        Body(
            openapi_examples={
                "one": {"value": {"lessons": [{"prompt": "What is the capital of Angola?", "correction": "Luanda"}]}}
            }
        ),
    ],
    key: Key = None,
    wait: Wait = 0.0,
) -> JobView:
    """Learn from many records of feedback. A job; its result says what became of each."""
    return _asked(service, author, answer, "learn", plain_request(request), key, wait)


@router.get("/protected", tags=["replies"])
def protected(service: Served) -> list[ProtectedView]:
    """The answers that changes must leave as they are."""
    return [ProtectedView(**each.model_dump()) for each in service.live.protected()]


# ----------------------------------------------------------------------------------------------------- changes


@router.get("/changes", tags=["changes"])
def changes(
    service: Served,
    limit: Limit = 100,
    state: Annotated[str | None, Query(max_length=16, description="Of this state only, such as active.")] = None,
) -> list[ChangeView]:
    """The changes, newest first, each with its report."""
    live = service.live
    found = [each for each in live.ledger.changes(live.engine.info.hash) if state is None or each.state == state]
    return [_view(live.change(each.id)) for each in found[::-1][:limit]]  # reports are read of these only


@router.post("/changes", tags=["changes"], status_code=202, responses=_JOB)
def apply(
    service: Served,
    author: Editor,
    answer: Response,
    request: Annotated[
        ApplyRequest,
        Body(
            openapi_examples={
                "quieter": {
                    "summary": "Two neurons that write half as much.",
                    "value": {
                        "adjustment": {
                            "name": "quieter",
                            "ops": [{"kind": "scale_neurons", "layer": 0, "neurons": [1, 2], "factors": [0.5, 0.5]}],
                        },
                        "prompt": "Who are you?",
                    },
                }
            }
        ),
    ],
    key: Key = None,
    wait: Wait = 0.0,
) -> JobView:
    """Commit an adjustment that was made elsewhere, if the guard lets it. A job, whose result is the change."""
    return _asked(service, author, answer, "apply", plain_request(request), key, wait)


@router.get("/changes/{change}", tags=["changes"])
def change(service: Served, change: ChangeId) -> ChangeView:
    """One change with its report."""
    return _view(service.live.change(change))


@router.post("/changes/{change}/off", tags=["changes"], responses=_MOVE)
def off(service: Served, author: Editor, change: ChangeId) -> ChangeView:
    """Switch a change off; `on` brings it back."""
    return _moved(author, lambda: service.live.off(change))


@router.post("/changes/{change}/on", tags=["changes"], responses=_SET)
def on(
    service: Served,
    author: Editor,
    change: ChangeId,
    request: Annotated[OnRequest | None, Body(openapi_examples={"plain": {"value": {}}})] = None,
) -> ChangeView:
    """Switch a change on again."""
    both = request is not None and request.keep_both
    return _moved(author, lambda: service.live.on(change, keep_both=both))


@router.put("/changes/{change}/strength", tags=["changes"], responses=_SET)
def strength(
    service: Served,
    author: Editor,
    change: ChangeId,
    request: Annotated[StrengthRequest, Body(openapi_examples={"half": {"value": {"strength": 0.5}}})],
) -> ChangeView:
    """Weaken or amplify a change."""
    return _moved(author, lambda: service.live.set_strength(change, request.strength))


@router.post("/changes/{change}/undo", tags=["changes"], responses=_MOVE)
def undo(service: Served, author: Editor, change: ChangeId) -> ChangeView:
    """Take a change back for good; what it had replaced comes back on. A protected answer (p3) is let go."""
    return _moved(author, lambda: service.live.undo(change))


@router.post("/undo", tags=["changes"], responses=_MOVE)
def undo_newest(service: Served, author: Editor) -> ChangeView:
    """Take the newest change back that is on or off."""
    return _moved(author, service.live.undo)


# --------------------------------------------------------------------------------------------- looking inside


@router.post(
    "/replies/{reply}/why",
    tags=["inside"],
    responses=refusals(404, 409, 415, 501),
)
def why(
    service: Served,
    reply: ReplyId,
    request: Annotated[WhyRequest | None, Body(openapi_examples={"plain": {"value": {"top": 5}}})] = None,
) -> WhyReport:
    """The neurons that pushed a reply most, and those that pushed against it."""
    asked = request or WhyRequest()
    return service.live.why(reply, against=asked.against, top=asked.top)


@router.post("/neurons", tags=["inside"], status_code=202, responses=_JOB)
def neurons(
    service: Served,
    author: Chatter,
    answer: Response,
    request: Annotated[NeuronsRequest, Body(openapi_examples={"word": {"value": {"find": "a"}}})],
    wait: Wait = 0.0,
) -> JobView:
    """Neurons whose vectors decode into a word. A job: the first search labels every neuron."""
    return _asked(service, author, answer, "neurons", plain_request(request), None, wait)


@router.post("/neuron", tags=["inside"], status_code=202, responses=_JOB)
def neuron(
    service: Served,
    author: Chatter,
    answer: Response,
    request: Annotated[NeuronRequest, Body(openapi_examples={"one": {"value": {"neuron": "0:1"}}})],
    wait: Wait = 0.0,
) -> JobView:
    """One neuron's page: labels, where it is strongest, its neighbours, its clamp curve. A job."""
    return _asked(service, author, answer, "neuron", plain_request(request), None, wait)


@router.post("/clamp", tags=["inside"], status_code=202, responses=_JOB)
def clamp(
    service: Served,
    author: Editor,
    answer: Response,
    request: Annotated[
        ClampRequest,
        Body(openapi_examples={"one": {"value": {"values": "0:1=2", "prompt": "Who are you?", "max_tokens": 8}}}),
    ],
    key: Key = None,
    wait: Wait = 0.0,
) -> JobView:
    """Answer a prompt with neurons held at values, and without. A job; with `keep` it is committed."""
    return _asked(service, author, answer, "clamp", plain_request(request), key, wait)


@router.post("/guard", tags=["inside"], status_code=202, responses=_JOB)
def guard(service: Served, author: Editor, answer: Response, wait: Wait = 0.0) -> JobView:
    """Measure how far the model as it is now is from its base. A job."""
    return _asked(service, author, answer, "guard", {}, None, wait)


# ------------------------------------------------------------------------------------------------ jobs and events


@router.get("/jobs", tags=["jobs"])
def jobs(
    service: Served,
    limit: Limit = 50,
    status: Annotated[Status | None, Query(description="Of this status only.")] = None,
) -> list[JobView]:
    """Long work that was asked for, newest first."""
    return [_job(each) for each in service.jobs.list(limit=limit, status=status)]


@router.get("/jobs/{job}", tags=["jobs"])
def job(service: Served, job: JobId, wait: Wait = 0.0) -> JobView:
    """One job, with its result once it is done."""
    found = service.jobs.get(job)
    return _job(service.jobs.wait(found.id, wait) if wait else found)


@router.post("/jobs/{job}/cancel", tags=["jobs"], responses=refusals(404, 409))
def cancel(service: Served, author: Chatter, job: JobId) -> JobView:
    """Stop a job. What it had not committed is as if it had never begun; one that has ended stays as it is."""
    found = service.jobs.get(job)
    if found.author != author.name:
        editor(author)
    return _job(service.jobs.cancel(found.id))


@router.get("/history", tags=["jobs"])
def history(
    service: Served,
    after: Annotated[int, Query(ge=0, le=2**53, description="Behind the line of this id.")] = 0,
    limit: Limit = 100,
) -> list[Event]:
    """The journal: what was said and done, oldest first."""
    return service.live.ledger.events(after=after, limit=limit)


@router.get(
    "/events",
    tags=["jobs"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}, "description": "Events."}},
)
async def events(
    service: Served,
    last: Annotated[
        int | None,
        Header(alias="Last-Event-ID", ge=0, le=2**53, description="Go on behind this line of the journal."),
    ] = None,
) -> StreamingResponse:
    """The journal as server-sent events, as it is written."""

    async def told() -> AsyncIterator[bytes]:
        yield b": listening\n\n"
        async for event in service.events.or_silence(last, seconds=_BEAT):
            yield framed(event)

    return StreamingResponse(told(), media_type="text/event-stream", headers={"cache-control": "no-store"})


# --------------------------------------------------------------------------------------------------- within


def _asked(
    service: Service, author: Author, answer: Response, kind: str, request: dict[str, Any], key: str | None, wait: float
) -> JobView:
    """Submit a job, and wait a little for its end."""
    found = service.jobs.submit(kind, request, author=author.name, idempotency_key=key)
    if wait:
        found = service.jobs.wait(found.id, wait)
    answer.headers["location"] = f"/v1/live/jobs/{found.label}"
    if found.ended:
        answer.status_code = 200
    return _job(found)


def _job(job: Job) -> JobView:
    names = [name for name in JobView.model_fields if name != "id"]
    return JobView.model_validate({"id": job.label, **{name: getattr(job, name) for name in names}})


def _moved(author: Author, move: Callable[[], Change]) -> ChangeView:
    with acting_as(author.name):
        return _view(move())


def _view(change: Change) -> ChangeView:
    return ChangeView(**{name: getattr(change, name) for name in Change.model_fields})


__all__ = ["router"]
