"""The one tree of errors.

Owns what can go wrong in words a user can act on. Knows nothing of where an error is shown: every error carries the
CLI's `exit_code`, the API's `http_status` and a stable machine-readable `code`, and the callers only read them.

    LiveweightError                     exit 1, 500
    ├── InvalidInput (ValueError)       exit 2, 400   a value the caller gave cannot be used
    │   ├── UnknownSite                 exit 2, 404   no such site, layer, neuron, head or expert
    │   ├── UnknownMethod               exit 2, 404
    │   ├── UnknownReply, UnknownChange exit 2, 404   no such id in this ledger
    │   └── UnknownJob                  exit 2, 404
    ├── ModelNotFound (FileNotFoundError) exit 1, 404 no such package, folder, file or hub id
    ├── ModelUnusable                   exit 1, 422   found, but not something that can be loaded
    │   └── UnsupportedArchitecture     exit 1, 422
    ├── Unsupported                     exit 1, 501   this engine or model cannot do that
    ├── NoSpace (OSError)               exit 1, 507
    ├── NoMendFound                     exit 1, 422   no method made the wished answer come
    ├── GuardRefused                    exit 3, 409   it works, but would change too much else
    ├── WorkspaceBusy                   exit 1, 423   another process has this workspace open
    ├── LedgerDamaged                   exit 1, 500   the journal or a blob does not match its hash
    ├── LedgerUnavailable               exit 1, 503   the ledger's database or folder cannot be reached
    ├── WrongModel                      exit 1, 409   the ledger belongs to another checkpoint
    ├── StateConflict                   exit 1, 409   the change is not in a state that allows this
    ├── NoEffect                        exit 1, 409   the change moved nothing that a probe could see
    ├── GenerationCancelled             exit 130, 499 the reply was stopped before its end
    ├── IdempotencyConflict             exit 1, 409   the idempotency key belongs to another request
    ├── QueueFull                       exit 1, 429   too much is waiting already
    ├── RateLimited                     exit 1, 429   this key asks too often
    ├── Unauthorized                    exit 1, 401   no key, or none that is known
    ├── Forbidden                       exit 1, 403   the key's role does not allow that
    ├── TooLarge                        exit 1, 413   the request is longer than the server reads
    ├── Stopping                        exit 1, 503   the server is on its way down
    └── RequestTimeout                  exit 1, 408   the request did not come in time
"""

from __future__ import annotations

from typing import Any, ClassVar


class LiveweightError(Exception):
    """Base of every error that liveweight raises on purpose."""

    code: ClassVar[str] = "liveweight_error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        """`message` names the value; `hint` is the way out; `details` are for machines."""
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """The error as the API and `--json` print it."""
        return {"code": self.code, "message": self.message, "hint": self.hint, **self.details}


class InvalidInput(LiveweightError, ValueError):
    """A value that the caller gave cannot be used."""

    code = "invalid_input"
    exit_code = 2
    http_status = 400


class UnknownSite(InvalidInput):
    """No such site, layer, neuron, head or expert in this model."""

    code = "unknown_site"
    http_status = 404


class UnknownMethod(InvalidInput):
    """No method of that name."""

    code = "unknown_method"
    http_status = 404


class UnknownReply(InvalidInput):
    """No such reply in this ledger."""

    code = "unknown_reply"
    http_status = 404


class UnknownChange(InvalidInput):
    """No such change in this ledger."""

    code = "unknown_change"
    http_status = 404


class UnknownJob(InvalidInput):
    """No such job in this ledger."""

    code = "unknown_job"
    http_status = 404


class ModelNotFound(LiveweightError, FileNotFoundError):
    """The package, folder, file or hub id is not there."""

    code = "model_not_found"
    http_status = 404


class ModelUnusable(LiveweightError):
    """It was found, but it is not something that can be loaded."""

    code = "model_unusable"
    http_status = 422


class UnsupportedArchitecture(ModelUnusable):
    """No site map exists for this architecture."""

    code = "unsupported_architecture"


class Unsupported(LiveweightError):
    """This engine or this model cannot do what was asked."""

    code = "unsupported"
    http_status = 501


class NoSpace(LiveweightError, OSError):
    """The disk is full, or would be."""

    code = "no_space"
    http_status = 507


class NoMendFound(LiveweightError):
    """No method made the wished answer come (or the unwished one go)."""

    code = "no_mend_found"
    http_status = 422


class GuardRefused(LiveweightError):
    """The change works but would move too much else; the report says what."""

    code = "guard_refused"
    exit_code = 3
    http_status = 409


class WorkspaceBusy(LiveweightError):
    """Another process has this workspace open."""

    code = "workspace_busy"
    http_status = 423


class LedgerDamaged(LiveweightError):
    """A record or a blob does not match its hash."""

    code = "ledger_damaged"


class LedgerUnavailable(LiveweightError):
    """The ledger's database or folder cannot be reached, or the connection to it was lost."""

    code = "ledger_unavailable"
    http_status = 503


class WrongModel(LiveweightError):
    """The ledger belongs to another checkpoint than the one loaded."""

    code = "wrong_model"
    http_status = 409


class StateConflict(LiveweightError):
    """The change is not in a state that allows what was asked."""

    code = "state_conflict"
    http_status = 409


class NoEffect(LiveweightError):
    """After the commit, a probe forward saw no difference."""

    code = "no_effect"
    http_status = 409


class Stopping(LiveweightError):
    """The server is on its way down, and takes nothing new."""

    code = "stopping"
    http_status = 503


class GenerationCancelled(LiveweightError):
    """The reply was stopped before its end."""

    code = "cancelled"
    exit_code = 130
    http_status = 499


class IdempotencyConflict(LiveweightError):
    """This author used the idempotency key for another request."""

    code = "idempotency_conflict"
    http_status = 409


class QueueFull(LiveweightError):
    """Too much is waiting already; `details` say after how many seconds to try again."""

    code = "queue_full"
    http_status = 429


class RateLimited(LiveweightError):
    """This key asks more often than it may; `details` say after how many seconds to try again."""

    code = "rate_limited"
    http_status = 429


class Unauthorized(LiveweightError):
    """There is no key with the request, or none that is known."""

    code = "unauthorized"
    http_status = 401


class Forbidden(LiveweightError):
    """The key is known, but its role does not allow what was asked."""

    code = "forbidden"
    http_status = 403


class TooLarge(LiveweightError):
    """The request is longer than the server reads."""

    code = "too_large"
    http_status = 413


class RequestTimeout(LiveweightError):
    """The request did not come in time."""

    code = "request_timeout"
    http_status = 408
