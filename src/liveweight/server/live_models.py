"""What liveweight's own routes take and give.

Owns the shapes of requests and answers as OpenAPI shows them. What the loop hands back (replies, changes, reports) is
answered as it is; here is what stands around it. Knows nothing of how a request is carried out.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, computed_field, model_validator

from liveweight.adjustments import AnyOp
from liveweight.ledger import ProtectedAnswer
from liveweight.reports import Change, Reply

Text = Annotated[str, Field(max_length=20_000)]
Short = Annotated[str, Field(max_length=200)]
Id = Annotated[str, Field(max_length=64, description="Such as c3.")]
Verdict = Literal["good", "bad", "fix"]
Status = Literal["queued", "running", "done", "failed", "cancelled"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class FeedbackRequest(_Request):
    """What somebody says of a reply."""

    verdict: Verdict = Field(description="good keeps the answer, bad takes it away, fix puts another in its place.")
    wanted: Text | None = Field(default=None, description="The right answer, for fix.")
    reason: Text | None = Field(default=None, description="Why, in the person's own words; it is kept.")
    method: Short | None = Field(default=None, description="The method that looks for the change; auto where left out.")
    preview: bool = Field(default=False, description="Measure what the change would do, and commit nothing.")
    force: bool = Field(default=False, description="Commit it even where it moves more than the guard allows.")
    keep_both: bool = Field(default=False, description="Leave earlier changes on that this one contradicts.")

    @model_validator(mode="after")
    def _wanted_for_fix(self) -> FeedbackRequest:
        if self.verdict == "fix" and not (self.wanted or "").strip():
            raise ValueError("fix needs `wanted`, the right answer")
        if self.verdict != "fix" and self.wanted is not None:
            raise ValueError(f"{self.verdict} takes no `wanted`; say fix to put an answer in its place")
        return self


class LessonRequest(_Request):
    """One record of feedback."""

    prompt: Text
    answer: Text | None = Field(default=None, description="What was answered then; where left out, the model is asked.")
    rating: Literal["good", "bad"] | None = None
    correction: Text | None = None


class LearnRequest(_Request):
    """Many records of feedback, learnt together."""

    lessons: Annotated[list[LessonRequest], Field(min_length=1, max_length=1000)]
    joint: bool = Field(default=True, description="One change for all corrections, else one each.")
    method: Short | None = None
    preview: bool = False
    force: bool = False


class AdjustmentRequest(_Request):
    """What is to be changed: ops in their order."""

    name: Annotated[str, Field(min_length=1, max_length=200, description="As the list of changes shows it.")]
    ops: Annotated[list[AnyOp], Field(min_length=1, max_length=1000)]
    method: Annotated[str, Field(min_length=1, max_length=50, description="What it was made with.")] = "given"
    note: Text = ""


class ApplyRequest(_Request):
    """An adjustment that was made elsewhere."""

    adjustment: AdjustmentRequest
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)] | None = Field(
        default=None, description="A question that it is to answer otherwise; the report shows the answer."
    )
    preview: bool = Field(default=False, description="Measure what it would do, and commit nothing.")
    force: bool = Field(default=False, description="Commit it even where it moves more than the guard allows.")


class StrengthRequest(_Request):
    """How strong a change is to be."""

    strength: Annotated[float, Field(ge=-100, le=100, description="1 is as proposed, 0 the same as off.")]


class OnRequest(_Request):
    """How a change is switched on."""

    keep_both: bool = Field(default=False, description="Leave changes on that this one contradicts.")


class WhyRequest(_Request):
    """What is to be explained."""

    against: Text | None = Field(default=None, description="Compare with this answer; else with the runners-up.")
    top: Annotated[int, Field(ge=1, le=200)] = 20


class ClampRequest(_Request):
    """Neurons to hold at values while the model answers."""

    values: Annotated[str, Field(min_length=1, max_length=4000, description="Such as 20:1114=8 3:12=0.")]
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    max_tokens: Annotated[int, Field(ge=1, le=512)] = 40
    keep: bool = Field(default=False, description="Commit it, if the guard lets it.")
    name: Short = ""
    force: bool = False


class NeuronRequest(_Request):
    """A neuron whose page is wanted."""

    neuron: Annotated[str, Field(pattern=r"^[0-9]{1,4}:[0-9]{1,7}$", description="Layer and number, such as 20:1114.")]
    text: Text | None = Field(default=None, description="The text to look for it in; else the one that ships.")


class NeuronsRequest(_Request):
    """A word to find neurons by."""

    find: Annotated[str, Field(min_length=1, max_length=200)]
    how: Literal["text", "token", "regex"] = "text"
    top: Annotated[int, Field(ge=1, le=500)] = 20


class CompareRequest(_Request):
    """A prompt that two versions of the model are to answer."""

    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]
    versions: Annotated[
        list[Annotated[int, Field(ge=0, le=2**53)] | Literal["now"]],
        Field(min_length=1, max_length=4, description="Lines of the journal (0 is the base), or now."),
    ]


class ReplyView(Reply):
    """A reply with its label."""

    @computed_field  # type: ignore[prop-decorator] # as pydantic says it
    @property
    def label(self) -> str:
        """The id as people read it, such as r12."""
        return f"r{self.id}"


class ChangeView(Change):
    """A change with its label."""

    @computed_field  # type: ignore[prop-decorator] # as pydantic says it
    @property
    def label(self) -> str:
        """The id as people read it, such as c3."""
        return super().label


class ProtectedView(ProtectedAnswer):
    """A protected answer with its label."""

    @computed_field  # type: ignore[prop-decorator] # as pydantic says it
    @property
    def label(self) -> str:
        """The id as people read it, such as p1."""
        return f"p{self.id}"


class JobProgress(_Answer):
    """How far a job is; of 0 where nobody knows how much there is."""

    what: str
    done: int
    of: int


class JobView(_Answer):
    """Long work that was asked for."""

    id: str
    kind: str
    status: Status
    author: str
    request: dict[str, JsonValue]
    progress: JobProgress | None
    result: dict[str, JsonValue] | None
    error: dict[str, JsonValue] | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


class Load(_Answer):
    """What the server is doing."""

    running: int = Field(description="Replies being made.")
    waiting: int = Field(description="Replies that wait for their turn.")
    rows: int = Field(description="Replies that are made together at most.")
    tokens: int = Field(description="Tokens made since the start.")


class StatusView(_Answer):
    """The model, its version, and the load."""

    model: str
    hash: str
    architecture: str
    layers: int
    neurons: int
    parameters: int
    context: int
    dtype: str
    device: str
    version: str
    active: list[str]
    load: Load
    notices: list[str]
    role: Literal["chat", "editor"]


class Strong(_Answer):
    """A change that was on."""

    change: str
    strength: float


class VersionView(_Answer):
    """One state that the weights were in."""

    event: int = Field(description="The line of the journal that brought it; 0 is the base.")
    said: str = Field(description="What was done.")
    at: datetime | None
    on: list[Strong] = Field(description="The changes that were on, with their strengths.")


class VersionAnswer(_Answer):
    """What one version answers."""

    version: int | Literal["now"]
    text: str


class Compared(_Answer):
    """The answers of several versions to one prompt."""

    prompt: str
    answers: list[VersionAnswer]


class Health(_Answer):
    """That the server is up."""

    status: Literal["ok"]
    version: str


def plain_request(request: BaseModel) -> dict[str, Any]:
    """A request as a job keeps it: what was given, and nothing else."""
    return request.model_dump(mode="json", exclude_unset=True)
