"""Every exception asyncpipe raises on purpose.

    AsyncPipeError
    ├── Closed               this side closed the thing that was used
    ├── Broken               the other side is gone: died, silent, or cut off
    │   └── StageLost        ... and it was a stage of the pipeline (names it)
    ├── Busy                 a bounded place is full; retry_after_s says when to try again
    ├── Timeout              a deadline passed (also a builtin TimeoutError)
    ├── WireError            bytes that are not a message of this protocol (also a ValueError)
    ├── Refused              the other side understood and said no
    ├── Invalid              a caller's mistake: bad argument, bad file, bad flag (also a ValueError)
    └── RemoteError          the other side's own code failed while handling a message

Errors travel between processes as data (`ErrorData`): a word from the closed list `ErrorCode` and one readable line.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

MAX_ERROR_CHARS = 16_384


class AsyncPipeError(Exception):
    """Base of all errors of this package."""


class Closed(AsyncPipeError):
    """This side closed it."""


class Broken(AsyncPipeError):
    """The peer is gone."""


class StageLost(Broken):
    """A stage of the pipeline died, hung or was cut off; the message names the stage."""


class Busy(AsyncPipeError):
    """A bounded queue is full. `retry_after_s` is a hint in seconds, 0.0 when unknown."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Timeout(AsyncPipeError, TimeoutError):
    """A deadline passed; the message says what was awaited, from whom, for how long."""


class WireError(AsyncPipeError, ValueError):
    """Received bytes are not a valid message."""


class Refused(AsyncPipeError):
    """The peer refused: wrong protocol version, wrong token, unknown actor."""


class Invalid(AsyncPipeError, ValueError):
    """A caller's mistake. The message says what is wrong and what would be right."""


class RemoteError(AsyncPipeError):
    """A handler on the other side raised; the message is its last line."""


class ErrorCode(enum.StrEnum):
    """The closed list of words by which errors travel."""

    CLOSED = "closed"
    BROKEN = "broken"
    STAGE_LOST = "stage_lost"
    BUSY = "busy"
    TIMEOUT = "timeout"
    WIRE = "wire"
    REFUSED = "refused"
    INVALID = "invalid"
    REMOTE = "remote"


class ErrorData(msgspec.Struct, frozen=True):
    """An error as data."""

    code: ErrorCode
    message: Annotated[str, msgspec.Meta(max_length=MAX_ERROR_CHARS)]
    retry_after_s: float = 0.0


_TYPE_OF_CODE: dict[ErrorCode, type[AsyncPipeError]] = {
    ErrorCode.CLOSED: Closed,
    ErrorCode.BROKEN: Broken,
    ErrorCode.STAGE_LOST: StageLost,
    ErrorCode.BUSY: Busy,
    ErrorCode.TIMEOUT: Timeout,
    ErrorCode.WIRE: WireError,
    ErrorCode.REFUSED: Refused,
    ErrorCode.INVALID: Invalid,
    ErrorCode.REMOTE: RemoteError,
}
_CODE_OF_TYPE = {error_type: code for code, error_type in _TYPE_OF_CODE.items()}


def to_data(error: BaseException) -> ErrorData:
    """Describe `error` for the wire; an exception outside the tree becomes `remote` with its type's name."""
    for error_type in type(error).__mro__:
        if code := _CODE_OF_TYPE.get(error_type):
            return ErrorData(code, str(error)[:MAX_ERROR_CHARS], getattr(error, "retry_after_s", 0.0))
    return ErrorData(ErrorCode.REMOTE, f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])


def from_data(data: ErrorData) -> AsyncPipeError:
    """The exception that `data` describes, ready to raise."""
    if data.code is ErrorCode.BUSY:
        return Busy(data.message, retry_after_s=data.retry_after_s)
    return _TYPE_OF_CODE[data.code](data.message)
