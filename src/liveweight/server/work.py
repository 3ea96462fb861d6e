"""What jobs do: judgements, lessons, measurements, in the words of `LiveModel`.

Owns one function for each kind of job, from a request as it was sent to a result as it is answered. Knows nothing of
queues and of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from liveweight.adjustments import Adjustment
from liveweight.live_model import LiveModel
from liveweight.server.jobs import JobContext
from liveweight.server.live_models import ApplyRequest

Request = dict[str, Any]
Work = Callable[[JobContext, Request], dict[str, Any]]


def kinds(live: LiveModel, current: ContextVar[JobContext | None]) -> Mapping[str, Work]:
    """The work of every kind; while it runs, its job is the `current` one, to which the model says its steps."""

    def told(function: Callable[[LiveModel, JobContext, Request], dict[str, Any]]) -> Work:
        def work(context: JobContext, request: Request) -> dict[str, Any]:
            token = current.set(context)
            try:
                return function(live, context, request)
            finally:
                current.reset(token)

        return work

    return {
        "feedback": told(_feedback),
        "learn": told(_learn),
        "apply": told(_apply),
        "guard": told(_guard),
        "clamp": told(_clamp),
        "neuron": told(_neuron),
        "neurons": told(_neurons),
    }


def _feedback(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """One judgement of a reply."""
    given = ((name, request.get(name)) for name in ("method", "preview", "force", "keep_both"))
    options: dict[str, Any] = {name: value for name, value in given if value is not None}
    if request["verdict"] == "fix":
        change = live.fix(request["reply"], request["wanted"], request.get("reason"), **options)
    else:
        judge = live.bad if request["verdict"] == "bad" else live.good
        change = judge(request["reply"], request.get("reason"), **options)
    return {"change": change.as_dict()}


def _learn(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """Many records of feedback."""
    options = {name: request[name] for name in ("joint", "method", "preview", "force") if request.get(name) is not None}
    lessons = live.learn(request["lessons"], **options, progress=context.progress)
    return {"lessons": lessons.model_dump(mode="json")}


def _apply(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """An adjustment that was made elsewhere."""
    asked = ApplyRequest.model_validate(request)
    adjustment = Adjustment(**dict(asked.adjustment))
    change = live.apply(adjustment, prompt=asked.prompt, preview=asked.preview, force=asked.force)
    return {"change": change.as_dict()}


def _guard(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """How far the model as it is now is from its base."""
    return {"guard": live.measured().model_dump(mode="json")}


def _clamp(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """An answer with neurons held at values, and, where it is to stay, the change."""
    values, prompt = request["values"], request["prompt"]
    found = live.clamp(values, prompt, max_tokens=request.get("max_tokens", 40)).model_dump(mode="json")
    if not request.get("keep"):
        return {"clamped": found}
    adjustment = live.clamping(values, request.get("name") or "")
    change = live.apply(adjustment, prompt=prompt, force=bool(request.get("force")))
    return {"clamped": found, "change": change.as_dict()}


def _neuron(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """One neuron's page."""
    counted = _counted(context, "reading text")
    return {"neuron": live.neuron(request["neuron"], request.get("text"), progress=counted).model_dump(mode="json")}


def _neurons(live: LiveModel, context: JobContext, request: Request) -> dict[str, Any]:
    """Neurons whose vectors decode into a word."""
    counted = _counted(context, "labelling neurons")
    found = live.neurons(request["find"], how=request.get("how", "text"), top=request.get("top", 20), progress=counted)
    return {"neurons": found.model_dump(mode="json")}


def _counted(context: JobContext, what: str) -> Callable[[int, int], None]:
    return lambda done, of: context.progress(what, done, of)
