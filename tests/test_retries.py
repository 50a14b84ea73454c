"""Which errors pass by themselves, and how often and how long something is tried."""

from __future__ import annotations

import errno
import importlib
import logging
import os
from typing import Any, cast

import pytest

from orchestrator.retries import Retry, code, status, transient


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def client_error(name: str, http: int) -> Exception:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": name}, "ResponseMetadata": {"HTTPStatusCode": http}}
    return ClientError(cast(Any, answer), "PutObject")


def google(http: int) -> Exception:
    # As orchestrator.storage has it; gcsfs reads it once, on import.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from gcsfs.retry import HttpError

    return HttpError({"code": http, "message": "no"})


def from_library(module: str, name: str, *arguments, **named) -> Exception:
    return getattr(importlib.import_module(module), name)(*arguments, **named)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (ConnectionRefusedError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, "no route"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (OSError(errno.EIO, "disk"), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (ValueError("bad"), False),
        (caused(OSError(errno.ENOSPC, "full"), ConnectionResetError()), False),
        (client_error("SlowDown", 503), True),
        (client_error("InternalError", 500), True),
        (client_error("503", 503), True),
        (client_error("RequestTimeout", 400), True),
        (client_error("ConditionalRequestConflict", 409), True),
        (client_error("NoSuchUpload", 404), True),
        (client_error("AccessDenied", 403), False),
        (client_error("NoSuchBucket", 404), False),
        (client_error("PreconditionFailed", 412), False),
        (caused(OSError(errno.EBUSY, "x"), client_error("SlowDown", 503)), True),
        (caused(PermissionError(), client_error("AccessDenied", 403)), False),
        (google(503), True),
        (google(429), True),
        (google(403), False),
        (google(412), False),
        (from_library("aiohttp", "ServerDisconnectedError"), True),
        (from_library("aiohttp", "ClientPayloadError"), True),
        (from_library("requests.exceptions", "ProxyError"), True),
        (from_library("requests.exceptions", "ReadTimeout"), True),
        (from_library("fsspec.exceptions", "FSTimeoutError"), True),
        (from_library("botocore.exceptions", "EndpointConnectionError", endpoint_url="x"), True),
        (from_library("botocore.exceptions", "ReadTimeoutError", endpoint_url="x"), True),
        (from_library("botocore.exceptions", "NoCredentialsError"), False),
        (from_library("google.auth.exceptions", "TransportError", "x"), True),
    ],
    ids=repr,
)
def test_transient(error, passes):
    assert transient(error) is passes


def test_code_and_status():
    error = caused(OSError(errno.EINVAL, "x"), client_error("PreconditionFailed", 412))
    assert (code(error), status(error)) == ("PreconditionFailed", 412)
    assert (code(OSError()), status(OSError())) == (None, None)
    assert status(google(429)) == 429


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def retry(self, **settings) -> Retry:
        settings = {"draw": lambda: 1.0, **settings}
        return Retry(clock=lambda: self.now, sleep=self.sleep, **settings)


class Failing:
    """An operation that fails some times, and then says after how many calls it did not."""

    def __init__(
        self, times: int, error: Exception, clock: Clock | None = None, seconds: float = 0.0
    ) -> None:
        self._times, self._error, self._clock, self._seconds = times, error, clock, seconds
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self._clock is not None:
            self._clock.now += self._seconds
        if self.calls <= self._times:
            raise self._error
        return f"after {self.calls}"


def test_waits_double_up_to_a_cap():
    clock = Clock()
    retry = clock.retry(budget=1000, first=1, cap=5)
    assert retry("x", Failing(5, ConnectionResetError())) == "after 6"
    assert clock.slept == [1, 2, 4, 5, 5]


def test_jitter_takes_up_to_half():
    clock = Clock()
    draws = iter([0.0, 0.5])
    retry = clock.retry(budget=1000, first=1, cap=5, draw=lambda: next(draws))
    retry("x", Failing(2, ConnectionResetError()))
    assert clock.slept == [0.5, 1.5]


def test_a_permanent_error_is_raised_at_once():
    clock = Clock()
    operation = Failing(9, PermissionError("no"))
    with pytest.raises(PermissionError):
        clock.retry()("x", operation)
    assert operation.calls == 1
    assert clock.slept == []


def test_the_budget_ends_it(caplog):
    clock = Clock()
    operation = Failing(99, ConnectionResetError("cut"))
    with pytest.raises(ConnectionResetError), caplog.at_level(logging.WARNING):
        clock.retry(budget=10, first=1, cap=4)("uploading a", operation)
    assert clock.slept == [1, 2, 4]  # another 4 would end after the 10
    assert operation.calls == 4
    assert "uploading a failed (ConnectionResetError('cut')); try 2 follows in 1.0 s" in caplog.text
    assert "uploading a failed 4 times in 7 s" in caplog.text


def test_a_long_upload_is_tried_three_times_whatever_it_took():
    clock = Clock()
    operation = Failing(2, ConnectionResetError(), clock, seconds=3600)
    assert clock.retry(budget=10)("x", operation) == "after 3"
    operation = Failing(3, ConnectionResetError(), clock, seconds=3600)
    with pytest.raises(ConnectionResetError):
        clock.retry(budget=10)("x", operation)


def test_no_budget_is_one_try():
    operation = Failing(9, ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        Retry(budget=0)("x", operation)
    assert operation.calls == 1


def test_an_interrupt_is_not_retried():
    def operation() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Clock().retry()("x", operation)


@pytest.mark.parametrize("wrong", [{"budget": -1}, {"first": 0}, {"first": 9, "cap": 8}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match="is not allowed"):
        Retry(**wrong)
