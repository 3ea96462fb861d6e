"""What the ledger and the jobs know of a conversation, put together for the page.

Owns the tree of a conversation's replies (who went on from whom), and what became of the feedback on each reply. Reads
only, blocks, and knows nothing of how anything is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from liveweight.ledger import Conversation, Job
from liveweight.reports import Change, Reply

if TYPE_CHECKING:
    from liveweight.server.service import Service
    from liveweight.web.board import Board

_CHATS = 100  # that are listed


@dataclass(frozen=True)
class Tree:
    """The replies of one conversation. A reply's `after` is the one that it went on from."""

    replies: Mapping[int, Reply] = field(default_factory=dict)

    @property
    def newest(self) -> int | None:
        """The reply that was given last."""
        return max(self.replies, default=None)

    def path(self, last: int | None) -> list[Reply]:
        """From the first reply to `last`, each going on from the one before."""
        found: list[Reply] = []
        while last is not None and last in self.replies:
            found.append(self.replies[last])
            last = self.replies[last].after
        return found[::-1]

    def siblings(self, reply: int) -> list[int]:
        """The replies that went on from the same one, itself included, oldest first."""
        after = self._parent(self.replies[reply])
        return sorted(other.id for other in self.replies.values() if self._parent(other) == after)

    def children(self, reply: int | None) -> list[int]:
        """The replies that went on from this one, oldest first."""
        return sorted(other.id for other in self.replies.values() if self._parent(other) == reply)

    def end(self, reply: int) -> int:
        """The newest reply that this one led to, itself where nothing follows."""
        while following := self.children(reply):
            reply = following[-1]
        return reply

    def _parent(self, reply: Reply) -> int | None:
        return reply.after if reply.after in self.replies else None


@dataclass(frozen=True)
class Judged:
    """What became of the feedback on a reply."""

    verdict: str | None = None  # of the latest feedback in the ledger
    job: Job | None = None  # the latest on this reply
    change: Change | None = None  # the latest that came of this reply, as it is now
    protected: str | None = None  # the label of the protected answer, where it was called good

    @property
    def running(self) -> bool:
        """Whether work on it is under way."""
        return self.job is not None and not self.job.ended


def tree(service: Service, chat: str) -> Tree:
    """The conversation of that name; empty where there is none."""
    live = service.live
    records = live.ledger.replies(live.engine.info.hash, chat=chat)
    return Tree({record.id: Reply(**record.model_dump()) for record in records})


def chats(service: Service) -> list[Conversation]:
    """The conversations, the one with the newest reply first."""
    return service.live.ledger.chats(service.live.engine.info.hash, limit=_CHATS)


def judged(board: Board, replies: Sequence[Reply]) -> dict[int, Judged]:
    """What became of the feedback on each of these replies."""
    live = board.service.live
    wanted = {reply.id: reply for reply in replies}
    verdicts: dict[int, str] = {}
    of_feedback: dict[int, int] = {}
    for said in live.feedback():
        if said.reply in wanted:
            verdicts[said.reply] = said.verdict
            of_feedback[said.id] = said.reply
    changes: dict[int, int] = {}
    for record in live.ledger.changes(live.engine.info.hash):
        if record.feedback in of_feedback:
            changes[of_feedback[record.feedback]] = record.id
    protected = {
        of_feedback[each.feedback]: each.label
        for each in live.protected()
        if each.feedback in of_feedback and each.change is None
    }
    return {
        number: Judged(
            verdict=verdicts.get(number),
            job=board.feedback_job(reply),
            change=live.change(changes[number]) if number in changes else None,
            protected=protected.get(number),
        )
        for number, reply in wanted.items()
    }


def change_of(result: Mapping[str, Any] | None) -> Change | None:
    """The change that a finished job tells of, a preview included."""
    if not result:
        return None
    told = result.get("change", result)
    return Change.model_validate({name: value for name, value in told.items() if name in Change.model_fields})


def methods_of(changes: Iterable[Change]) -> list[str]:
    """The methods that made some changes, by name."""
    return sorted({change.method for change in changes if change.method})
