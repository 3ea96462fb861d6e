"""The journal of feedback and changes, from which the live weights can be rebuilt."""

from liveweight.ledger.blobs import BlobStore
from liveweight.ledger.records import (
    Change,
    ChangeState,
    Event,
    Feedback,
    IntendedMove,
    Intent,
    Key,
    KnownModel,
    Move,
    Proposal,
    ProtectedAnswer,
    Reply,
    Turn,
    Verdict,
    parse_id,
)
from liveweight.ledger.store import Ledger

__all__ = [
    "BlobStore",
    "Change",
    "ChangeState",
    "Event",
    "Feedback",
    "IntendedMove",
    "Intent",
    "Key",
    "KnownModel",
    "Ledger",
    "Move",
    "Proposal",
    "ProtectedAnswer",
    "Reply",
    "Turn",
    "Verdict",
    "parse_id",
]
