"""From rows to records, and the questions asked of the tables.

Owns every query that only reads. Knows nothing of files: blobs are read by the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, aliased

from liveweight.errors import InvalidInput, UnknownReply, WrongModel
from liveweight.ledger.records import (
    Change,
    Conversation,
    Event,
    Feedback,
    IdLetter,
    Intent,
    Job,
    Key,
    KnownModel,
    ProtectedAnswer,
    Record,
    Release,
    Reply,
    parse_id,
    speaking_id,
    unknown_id,
)
from liveweight.ledger.tables import (
    Base,
    ChangeRow,
    EventRow,
    FeedbackRow,
    IntentRow,
    JobRow,
    ModelRow,
    ProtectedRow,
    ReleaseRow,
    ReplyRow,
    ReportRow,
)

_RECORDS: tuple[tuple[type[Base], type[Record]], ...] = (
    (ModelRow, KnownModel),
    (JobRow, Job),
    (ReplyRow, Reply),
    (FeedbackRow, Feedback),
    (ChangeRow, Change),
    (ProtectedRow, ProtectedAnswer),
    (ReleaseRow, Release),
    (IntentRow, Intent),
    (EventRow, Event),
)
_BATCH = 200  # rows held at once while everything is read
_LARGEST = 2**31 - 1  # id that the tables can hold


R = TypeVar("R", bound=Record)
Row = TypeVar("Row", ReplyRow, ChangeRow, ProtectedRow, JobRow)


def to_record(kind: type[R], row: Base) -> R:
    """The frozen value of a row; the column `reply_id` or `model_hash` is the field `reply` or `model`."""
    values: dict[str, Any] = {}
    for name in kind.model_fields:
        column = next(column for column in (name, f"{name}_id", f"{name}_hash") if column in row.__mapper__.columns)
        values[name] = getattr(row, column)
    return kind.model_validate(values)


def find(session: Session, table: type[Row], written: int | str, letter: IdLetter) -> Row:
    """The row of that id. Raises UnknownReply, UnknownChange, UnknownJob or InvalidInput, with the nearest there is."""
    number = parse_id(written, letter)
    row = session.get(table, number) if number <= _LARGEST else None
    if row is None:
        nearest = select(table.id).order_by(func.abs(table.id - min(number, _LARGEST)), table.id).limit(1)
        raise unknown_id(number, letter, session.scalar(nearest))
    return row


def find_reply(session: Session, written: int | str) -> ReplyRow:
    """The reply of that id, or of that public id. Raises UnknownReply."""
    try:
        return find(session, ReplyRow, written, "r")
    except UnknownReply:
        row = _with_public_id(session, written) if isinstance(written, str) else None
        if row is None:
            raise
        return row


def _with_public_id(session: Session, written: str) -> ReplyRow | None:
    try:
        known = speaking_id(written.strip(), "an id")
    except InvalidInput:  # no column may be asked for every text: PostgreSQL refuses U+0000
        return None
    return session.scalar(select(ReplyRow).where(ReplyRow.public_id == known))


def find_change(session: Session, written: int | str, model: str | None = None) -> ChangeRow:
    """The change of that id. Raises UnknownChange, or WrongModel when it belongs to another checkpoint."""
    row = find(session, ChangeRow, written, "c")
    if model is not None and row.model_hash != model:
        other = session.get_one(ModelRow, row.model_hash)
        raise WrongModel(
            f"c{row.id} belongs to {other.name} ({other.hash[:12]}), not to the model that is loaded ({model[:12]}).",
            hint=f"Load {other.source} to use it.",
            change=f"c{row.id}",
            model=other.hash,
        )
    return row


def require_model(session: Session, model: str) -> ModelRow:
    """The row of that model. Raises WrongModel when this ledger has never seen it."""
    row = session.get(ModelRow, model)
    if row is None:
        raise WrongModel(
            f"The model {model[:12]} is not in this ledger.", hint="Register it with ensure_model first.", model=model
        )
    return row


def replies(
    session: Session, model: str | None, limit: int | None, chat: str | None = None, before: int | None = None
) -> list[Reply]:
    """The newest replies first, of one conversation or of all, from behind the reply `before` on."""
    query = select(ReplyRow).order_by(ReplyRow.id.desc()).limit(limit)
    if model is not None:
        query = query.where(ReplyRow.model_hash == model)
    if chat is not None:
        query = query.where(ReplyRow.chat == chat)
    if before is not None:
        query = query.where(ReplyRow.id < before)
    return [to_record(Reply, row) for row in session.scalars(query)]


def chats(session: Session, model: str | None, limit: int | None) -> list[Conversation]:
    """The conversations, the one with the newest reply first."""
    first, newest = func.min(ReplyRow.id), func.max(ReplyRow.id)
    each = select(first.label("first"), newest.label("newest"), func.count().label("count"))
    each = each.where(ReplyRow.chat.is_not(None)).group_by(ReplyRow.chat)
    if model is not None:
        each = each.where(ReplyRow.model_hash == model)
    of = each.order_by(newest.desc()).limit(limit).subquery()
    start, end = aliased(ReplyRow), aliased(ReplyRow)
    query = (
        select(end.chat, start.messages, end.id, end.created_at, of.c.count)
        .join_from(of, start, start.id == of.c.first)
        .join(end, end.id == of.c.newest)
        .order_by(end.id.desc())
    )
    return [
        Conversation(id=chat or "", title=_title(messages), newest=number, at=at, count=count)
        for chat, messages, number, at, count in session.execute(query)
    ]


def _title(messages: Sequence[dict[str, str]]) -> str:
    return next((turn["content"] for turn in messages if turn["role"] == "user"), "")


def changes(session: Session, model: str | None, states: Sequence[str] | None) -> list[ChangeRow]:
    """The changes in ledger order."""
    query = select(ChangeRow).order_by(ChangeRow.model_hash, ChangeRow.position)
    if model is not None:
        query = query.where(ChangeRow.model_hash == model)
    if states is not None:
        query = query.where(ChangeRow.state.in_(states))
    return list(session.scalars(query))


def state_rows(session: Session, model: str, *, intended: bool) -> list[tuple[ChangeRow, float]]:
    """The active changes and their strengths in ledger order; with `intended`, as the open intent will leave them."""
    wished = {row.id: (row.state, row.strength) for row in changes(session, model, None)}
    if intended and (intent := open_intent(session, model)) is not None:
        wished |= {move["change"]: (move["to_state"], move["to_strength"]) for move in intent.moves}
    return [(row, wished[row.id][1]) for row in changes(session, model, None) if wished[row.id][0] == "active"]


def open_intent(session: Session, model: str) -> IntentRow | None:
    """What is being done to this model's weights just now."""
    return session.scalar(select(IntentRow).where(IntentRow.model_hash == model, IntentRow.status == "open"))


def report(session: Session, change: int) -> dict[str, Any]:
    """The newest report of a change; empty where none was given."""
    query = select(ReportRow.report).where(ReportRow.change_id == change).order_by(ReportRow.id.desc()).limit(1)
    return session.scalar(query) or {}


def protected(session: Session, model: str, *, everything: bool, released: bool = False) -> list[ProtectedAnswer]:
    """The protected answers in force; with `released`, those too that a change overrules which is on.

    An answer that a change brought is in force only while the change is active.
    """
    query = select(ProtectedRow).where(ProtectedRow.model_hash == model).order_by(ProtectedRow.id)
    if not everything:
        query = query.outerjoin(ChangeRow, ProtectedRow.change_id == ChangeRow.id).where(
            ProtectedRow.active, or_(ProtectedRow.change_id.is_(None), ChangeRow.state == "active")
        )
    if not everything and not released:
        other = aliased(ChangeRow)
        overruled = select(ReleaseRow.protected_id).join(other, ReleaseRow.change_id == other.id)
        query = query.where(ProtectedRow.id.not_in(overruled.where(other.state == "active")))
    return [to_record(ProtectedAnswer, row) for row in session.scalars(query)]


def key_bytes(key: Key | None) -> bytes | None:
    """A key's vector as the table keeps it: float32, little endian."""
    if key is None:
        return None
    return bytes(key.vector.detach().to("cpu", torch.float32).reshape(-1).numpy().astype("<f4").tobytes())


def key_of(row: ChangeRow) -> Key | None:
    """The key that was recorded with a change."""
    if row.key_layer is None or row.key_vector is None:
        return None
    return Key(row.key_layer, torch.frombuffer(bytearray(row.key_vector), dtype=torch.float32))


def conflicts(
    session: Session, model: str, prompt_hash: str, key: Key | None, wanted: str | None, threshold: float
) -> list[ChangeRow]:
    """The active changes on the same prompt, or on a question that the same layer reads alike, but not as `wanted`."""
    wish = None if wanted is None else wanted.strip().casefold()

    def differs(row: ChangeRow) -> bool:
        return wish is None or row.wanted is None or row.wanted.strip().casefold() != wish

    def alike(row: ChangeRow) -> bool:
        return row.prompt_hash == prompt_hash or (key is not None and _cosine(key, key_of(row)) > threshold)

    return [row for row in changes(session, model, ("active",)) if alike(row) and differs(row)]


def _cosine(one: Key, other: Key | None) -> float:
    """Cosine of two keys of one layer; -1 where they cannot be compared."""
    if other is None or one.layer != other.layer or one.vector.numel() != other.vector.numel():
        return -1.0
    left, right = one.vector.detach().cpu().double().reshape(-1), other.vector.double()
    lengths = float(left.norm() * right.norm())
    return float(left @ right) / lengths if lengths > 0 else -1.0


def events(session: Session, after: int | None, subject: str | None, limit: int | None) -> list[Event]:
    """The journal from the line behind `after` on, oldest first."""
    query = select(EventRow).order_by(EventRow.id).limit(limit)
    if after is not None:
        query = query.where(EventRow.id > after)
    if subject is not None:
        query = query.where(EventRow.subject == subject)
    return [to_record(Event, row) for row in session.scalars(query)]


def everything(session: Session) -> Iterator[dict[str, Any]]:
    """Every record as JSON takes it, with the name of its table, and every report; in an order that can be replayed."""
    for table, kind in _RECORDS:
        query = select(table).order_by(*table.__table__.primary_key).execution_options(yield_per=_BATCH)
        for row in session.scalars(query):
            yield {"table": table.__tablename__, **to_record(kind, row).model_dump(mode="json")}
            if isinstance(row, ChangeRow):
                yield {"table": ReportRow.__tablename__, "change": row.id, "report": report(session, row.id)}
