"""The journal of feedback and changes, from which the live weights can be rebuilt."""

from liveweight.ledger.actor import acting_as
from liveweight.ledger.blobs import BlobStore
from liveweight.ledger.records import (
    ApiKey,
    Change,
    ChangeState,
    Conversation,
    Event,
    Feedback,
    IntendedMove,
    Intent,
    Job,
    JobStatus,
    Key,
    KnownModel,
    Move,
    Proposal,
    ProtectedAnswer,
    Reply,
    Role,
    Turn,
    Verdict,
    parse_id,
)
from liveweight.ledger.store import Ledger

__all__ = [
    "ApiKey",
    "BlobStore",
    "Change",
    "ChangeState",
    "Conversation",
    "Event",
    "Feedback",
    "IntendedMove",
    "Intent",
    "Job",
    "JobStatus",
    "Key",
    "KnownModel",
    "Ledger",
    "Move",
    "Proposal",
    "ProtectedAnswer",
    "Reply",
    "Role",
    "Turn",
    "Verdict",
    "acting_as",
    "parse_id",
]
