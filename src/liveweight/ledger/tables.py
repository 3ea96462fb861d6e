"""The tables, as SQLAlchemy's typed mappings.

Owns the shape of what is stored and nothing of what it means: the store writes rows, the migrations make the tables.
Rows never leave this package; callers get the frozen values of `records`.

Text that a person or a model wrote is stored as a JSON string: a model's reply may hold U+0000, which PostgreSQL's
text type refuses, and half a surrogate pair, which UTF-8 refuses.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_OPEN = text("status = 'open'")
_EMPTY = text("''")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite forgets the time zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC before it is written."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """With its time zone after it is read."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """The parent of every table."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ModelRow(Base):
    """A base checkpoint that was loaded with this ledger."""

    __tablename__ = "models"
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String)
    source: Mapped[str] = mapped_column(String)
    architecture: Mapped[str] = mapped_column(String)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ReplyRow(Base):
    """What a model answered, and with which version of its weights."""

    __tablename__ = "replies"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("models.hash"), index=True)
    messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    text: Mapped[str] = mapped_column(JSON)
    token_ids: Mapped[list[int]] = mapped_column(JSON)
    prompt_token_ids: Mapped[list[int]] = mapped_column(JSON)
    version_number: Mapped[int] = mapped_column(Integer)
    version_hash: Mapped[str] = mapped_column(String(64))
    sampling: Mapped[dict[str, Any]] = mapped_column(JSON)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    public_id: Mapped[str | None] = mapped_column(String(64), index=True, unique=True)  # as an API's clients know it
    chat: Mapped[str | None] = mapped_column(String(64), index=True)  # the conversation that it belongs to
    after_id: Mapped[int | None] = mapped_column(ForeignKey("replies.id"))  # the reply that it went on from


class FeedbackRow(Base):
    """What a person said of a reply."""

    __tablename__ = "feedback"
    __table_args__ = (CheckConstraint("verdict IN ('good', 'bad', 'fix')", name="verdict"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    reply_id: Mapped[int] = mapped_column(ForeignKey("replies.id"), index=True)
    verdict: Mapped[str] = mapped_column(String(8))
    wanted: Mapped[str | None] = mapped_column(JSON(none_as_null=True))
    reason: Mapped[str | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)


class ChangeRow(Base):
    """An adjustment in the ledger. Its tensors are in the blob, its place among the active ones is `position`."""

    __tablename__ = "changes"
    __table_args__ = (
        CheckConstraint("state IN ('intended', 'active', 'off', 'undone', 'refused', 'failed')", name="state"),
        UniqueConstraint("model_hash", "position"),
    )
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("models.hash"))
    position: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(8), index=True)
    strength: Mapped[float] = mapped_column(Float(53))
    name: Mapped[str] = mapped_column(JSON)
    method: Mapped[str] = mapped_column(String)
    adjustment_hash: Mapped[str] = mapped_column(String(64))
    adjustment: Mapped[dict[str, Any]] = mapped_column(JSON)
    blob_hash: Mapped[str | None] = mapped_column(String(64), index=True)
    feedback_id: Mapped[int | None] = mapped_column(ForeignKey("feedback.id"))
    question: Mapped[str] = mapped_column(JSON)
    wanted: Mapped[str | None] = mapped_column(JSON(none_as_null=True))
    prompt_hash: Mapped[str] = mapped_column(String(64), index=True)
    key_layer: Mapped[int | None] = mapped_column(Integer)
    key_vector: Mapped[bytes | None] = mapped_column(LargeBinary)  # float32, little endian
    forced: Mapped[bool] = mapped_column(Boolean)
    replaced_by: Mapped[int | None] = mapped_column(ForeignKey("changes.id"))
    reason: Mapped[str] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)
    made_by: Mapped[str] = mapped_column(String, default="", server_default=_EMPTY)  # empty where nobody was named
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)


class ReportRow(Base):
    """What was measured of a change. The newest one counts."""

    __tablename__ = "reports"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    change_id: Mapped[int] = mapped_column(ForeignKey("changes.id"), index=True)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ProtectedRow(Base):
    """An answer that changes must leave as it is."""

    __tablename__ = "protected_answers"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("models.hash"), index=True)
    messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    answer: Mapped[str] = mapped_column(JSON)
    token_ids: Mapped[list[int]] = mapped_column(JSON)
    feedback_id: Mapped[int | None] = mapped_column(ForeignKey("feedback.id"))
    change_id: Mapped[int | None] = mapped_column(ForeignKey("changes.id"))
    active: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ReleaseRow(Base):
    """A change overrules a protected answer, as long as it is on."""

    __tablename__ = "releases"
    protected_id: Mapped[int] = mapped_column(ForeignKey("protected_answers.id"), primary_key=True)
    change_id: Mapped[int] = mapped_column(ForeignKey("changes.id"), primary_key=True)


class IntentRow(Base):
    """What is about to be done to the weights, written before it is done. At most one a model is open."""

    __tablename__ = "intents"
    __table_args__ = (
        CheckConstraint("status IN ('open', 'finished', 'abandoned')", name="status"),
        Index("ix_intents_one_open", "model_hash", unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN),
    )
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model_hash: Mapped[str] = mapped_column(ForeignKey("models.hash"))
    change_id: Mapped[int | None] = mapped_column(ForeignKey("changes.id"))  # the new change, where one is made
    moves: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(10))
    reason: Mapped[str] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    closed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class EventRow(Base):
    """One line of the journal. The database itself refuses to change or delete one."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(32), index=True)
    model_hash: Mapped[str | None] = mapped_column(String(64))
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    made_by: Mapped[str] = mapped_column(String, default="", server_default=_EMPTY)


class JobRow(Base):
    """Longer work that was asked of a server. It stays when it is over: it answers who asks again with the same key."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="status"),
        UniqueConstraint("author", "idempotency_key"),
    )
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(9), index=True)
    author: Mapped[str] = mapped_column(String)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    cancel_asked: Mapped[bool] = mapped_column(Boolean, default=False)
    starts: Mapped[int] = mapped_column(Integer, default=0)  # how often its work was begun
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class KeyRow(Base):
    """A key to a server: who may chat, and who may change the model. The key itself is nowhere, only its hash."""

    __tablename__ = "keys"
    __table_args__ = (CheckConstraint("role IN ('chat', 'editor')", name="role"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), index=True, unique=True)
    role: Mapped[str] = mapped_column(String(8))
    secret_hash: Mapped[str] = mapped_column(String(64), index=True, unique=True)
    shown: Mapped[str] = mapped_column(String(16))  # how it begins
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
