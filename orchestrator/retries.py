"""Which storage errors pass by themselves, and trying again until they have.

No client library is imported: an error is known by its type's name, its status or its code.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.jitter import APART

T = TypeVar("T")

# GCS answers 404 or 410 to a part of a resumable upload whose session is over: the answer to the
# last part got lost, or the service dropped it. The upload is to be begun anew
# (https://cloud.google.com/storage/docs/json_api/v1/status-codes).
_STATUS = {408, 410, 425, 429, 500, 502, 503, 504, 509}
_SESSION = "upload_id="  # in the URL that gcsfs's FileNotFoundError names
_CODES = {
    "InternalError", "OperationAborted", "RequestTimeout", "RequestTimeTooSkewed",
    "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "ConditionalRequestConflict", "TooManyRequests", "BadDigest", "IncompleteBody",
    "NoSuchUpload",  # the answer to a part or a completion got lost, or someone pruned: begin anew
}  # fmt: skip
_ERRNO = {
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE,
    errno.ETIMEDOUT, errno.ESTALE,
}  # fmt: skip
# Base classes of botocore, aiohttp, requests, urllib3, google-auth, gcsfs and fsspec.
_TYPES = {
    "HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError",
    "ServerDisconnectedError", "IncompleteRead", "ProtocolError", "ResponseParserError",
    "ChunkedEncodingError", "Timeout", "FSTimeoutError", "TransportError", "ChecksumError",
    "ResponseStreamingError", "IncompleteReadError",
}  # fmt: skip
_PERMANENT = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS,
}  # fmt: skip


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def code(error: BaseException) -> str | None:
    """S3's error code, such as `NoSuchBucket` or `PreconditionFailed`; `None` without one."""
    for one in chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", "")) or None
    return None


def status(error: BaseException) -> int | None:
    """The HTTP status that a server answered with; `None` where it did not get so far."""
    for one in chain(error):
        response: Any = getattr(one, "response", None)
        found: Any = getattr(one, "code", None) or getattr(one, "status", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int | str) and str(found).isdigit():
            return int(found)
    return None


def transient(error: BaseException) -> bool:
    """Whether the same operation may succeed later: 5xx, throttling, resets, time-outs."""
    found = status(error)
    if found is not None and found >= 300:
        return found in _STATUS or code(error) in _CODES
    if code(error) in _CODES:
        return True
    for one in chain(error):
        number = getattr(one, "errno", None)
        if number in _PERMANENT:
            return False
        if isinstance(one, ConnectionError | TimeoutError) or number in _ERRNO:
            return True
        if isinstance(one, FileNotFoundError) and _SESSION in str(one):
            return True
        if any(kind.__name__ in _TYPES for kind in type(one).__mro__):
            return True
    return False


@dataclass(frozen=True)
class Retry:
    """Does an operation again after transient errors, waiting longer each time.

    The waits are drawn between half of `first * 2**n`, capped, and the whole of it ("equal jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Attributes:
        budget: Seconds from the first error until it gives up, after three tries at least. What
            an upload took before it first failed does not count.
        first: The first wait in seconds.
        cap: The longest wait in seconds.
        clock: Seconds from any origin.
        sleep: Waits so many seconds.
        draw: A number in `[0, 1)`.
    """

    budget: float = 60.0
    first: float = 0.5
    cap: float = 8.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = APART.random

    def __post_init__(self) -> None:
        if self.budget < 0 or self.first <= 0 or self.cap < self.first:
            raise ValueError(
                f"Retry(budget={self.budget!r}, first={self.first!r}, cap={self.cap!r}) is not "
                "allowed: budget must be at least 0, first above 0 and cap not below first."
            )

    def __call__(self, what: str, operation: Callable[[], T]) -> T:
        """The result of `operation`.

        Args:
            what: Named in the log, such as `uploading s3://bucket/file`.
            operation: May be called several times.

        Raises:
            Exception: The operation's own: at once if it is permanent, else when time is up.
        """
        tries, started = 0, 0.0
        while True:
            try:
                return operation()
            except Exception as error:
                tries += 1
                started = started if tries > 1 else self.clock()
                wait = min(self.cap, self.first * 2 ** min(tries - 1, 30))
                wait *= 0.5 + 0.5 * self.draw()
                spent = self.clock() - started
                log = logging.getLogger(__name__)
                if not transient(error):
                    raise
                if self.budget == 0 or (tries >= 3 and spent + wait > self.budget):
                    log.error("%s failed %d times in %.0f s: %r", what, tries, spent, error)
                    raise
                log.warning(
                    "%s failed (%r); try %d follows in %.1f s", what, error, tries + 1, wait
                )
            self.sleep(wait)
