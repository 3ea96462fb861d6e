"""What was said: the models, what they answered, and what people said of it.

Owns replies, conversations and feedback of an open ledger. Knows nothing of changes, but that a model must not lose its
own by becoming another checkpoint under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from liveweight.errors import InvalidInput, WrongModel
from liveweight.ledger import moves, once, reading
from liveweight.ledger.access import Access
from liveweight.ledger.actor import actor
from liveweight.ledger.records import (
    Conversation,
    Feedback,
    KnownModel,
    Reply,
    Turnlike,
    Verdict,
    plain,
    speaking_id,
    turns_as_json,
)
from liveweight.ledger.tables import FeedbackRow, ModelRow, ReplyRow

Id = int | str  # 3 or "r3"


class Talk(Access):
    """The part of a ledger that remembers what was said."""

    def ensure_model(
        self, hash: str, name: str, source: str, architecture: str, *, other_checkpoint: bool = False
    ) -> KnownModel:
        """Register a base model; each one has its own list of changes.

        Raises WrongModel when the same source was another checkpoint before and changes made for that one are active:
        they would seem lost. `other_checkpoint` starts a list of its own all the same.
        """
        with self._write() as session:
            row = session.get(ModelRow, hash)
            if row is None:
                if not other_checkpoint:
                    _refuse_lost_changes(session, hash, {source, name})  # a folder once went by its name alone
                row = ModelRow(hash=hash, name=name, source=source, architecture=architecture)
                session.add(row)
                moves.note(session, "model", hash[:12], hash, {"name": name, "source": source})
                session.flush()
            return reading.to_record(KnownModel, row)

    def models(self) -> list[KnownModel]:
        """Every base model that this ledger has seen, oldest first."""
        with self._read() as session:
            rows = session.scalars(select(ModelRow).order_by(ModelRow.created_at, ModelRow.hash))
            return [reading.to_record(KnownModel, row) for row in rows]

    def add_reply(
        self,
        model: str,
        messages: Sequence[Turnlike | Mapping[str, str]],
        text: str,
        *,
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int],
        version_number: int,
        version_hash: str,
        sampling: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        public_id: str | None = None,
        chat: str | None = None,
        after: Id | None = None,
    ) -> Reply:
        """Remember what a model answered, and with which version of its weights.

        `public_id` is how an API's clients will name it, `chat` its conversation, `after` the reply that it went on
        from. Raises WrongModel, UnknownReply, InvalidInput for a public id that is taken or no id.
        """
        if public_id is not None:
            _require_public(public_id)
        if chat is not None:
            speaking_id(chat, "the id of a conversation")
        with self._write() as session:
            reading.require_model(session, model)
            if public_id is not None and session.scalar(select(ReplyRow.id).where(ReplyRow.public_id == public_id)):
                raise InvalidInput(f"There is a reply {public_id} already.", hint="Each one has an id of its own.")
            row = ReplyRow(
                model_hash=model,
                messages=turns_as_json(messages),
                text=text,
                token_ids=list(token_ids),
                prompt_token_ids=list(prompt_token_ids),
                version_number=version_number,
                version_hash=version_hash,
                sampling=plain(sampling or {}),
                details=plain(details or {}),
                public_id=public_id,
                chat=chat,
                after_id=None if after is None else reading.find_reply(session, after).id,
            )
            session.add(row)
            session.flush()
            moves.note(session, "reply", f"r{row.id}", model, {"version": version_number})
            return reading.to_record(Reply, row)

    def reply(self, reply: Id) -> Reply:
        """The reply of that id: 12, "r12", or its public id. Raises UnknownReply."""
        with self._read() as session:
            return reading.to_record(Reply, reading.find_reply(session, reply))

    def last_reply(self, model: str | None = None) -> Reply | None:
        """The newest reply, of one model or of any."""
        return next(iter(self.replies(model, limit=1)), None)

    def replies(
        self,
        model: str | None = None,
        *,
        limit: int | None = None,
        chat: str | None = None,
        before: int | None = None,
    ) -> list[Reply]:
        """The replies, newest first; of one conversation where `chat` is given.

        With `limit` they come in pages: `before` is the last id of the page before.
        """
        with self._read() as session:
            return reading.replies(session, model, limit, chat, before)

    def chats(self, model: str | None = None, *, limit: int | None = None) -> list[Conversation]:
        """The conversations, the one with the newest reply first."""
        with self._read() as session:
            return reading.chats(session, model, limit)

    def add_feedback(
        self, reply: Id, verdict: Verdict, *, wanted: str | None = None, reason: str | None = None
    ) -> Feedback:
        """Record what a person said of a reply. Raises UnknownReply, InvalidInput for another verdict."""
        if verdict not in ("good", "bad", "fix"):
            raise InvalidInput(f"{verdict!r} is not a verdict.", hint="Use good, bad or fix.")
        with self._write() as session:
            judged = reading.find_reply(session, reply)
            known = once.feedback(session, judged.id, verdict, wanted, reason)
            if known is not None:
                return reading.to_record(Feedback, known)
            row = FeedbackRow(reply_id=judged.id, verdict=verdict, wanted=wanted, reason=reason, job_id=actor().job)
            session.add(row)
            session.flush()
            what = {"feedback": row.id, "verdict": verdict, "wanted": wanted, "reason": reason}
            moves.note(session, "feedback", f"r{judged.id}", judged.model_hash, what)
            return reading.to_record(Feedback, row)

    def feedback(self, reply: Id | None = None) -> list[Feedback]:
        """What was said of one reply or of all, oldest first."""
        with self._read() as session:
            query = select(FeedbackRow).order_by(FeedbackRow.id)
            if reply is not None:
                query = query.where(FeedbackRow.reply_id == reading.find_reply(session, reply).id)
            return [reading.to_record(Feedback, row) for row in session.scalars(query)]


def _require_public(written: str) -> None:
    """Raises InvalidInput for what cannot be a public id, or would be taken for one of the ledger's own."""
    if re.fullmatch(r"r?[0-9]+", speaking_id(written, "a public id"), re.IGNORECASE):
        raise InvalidInput(f"{written!r} looks like an id of the ledger's own.", hint="Use one such as chatcmpl-3f2a.")


def _refuse_lost_changes(session: Session, hash: str, sources: Collection[str]) -> None:
    for other in session.scalars(select(ModelRow).where(ModelRow.source.in_(sources), ModelRow.hash != hash)):
        active = reading.changes(session, other.hash, ("active",))
        if active:
            raise WrongModel(
                f"{other.source} is now another checkpoint ({hash[:12]}) than the one that {len(active)} active"
                f" change(s) of this workspace were made for ({other.hash[:12]}).",
                hint="Load that checkpoint again, or choose another workspace.",
                model=other.hash,
            )
