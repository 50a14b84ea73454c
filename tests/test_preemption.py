"""Notices that a process hears: signals, a file, a URL; and the deadline they set."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator import SettingError, callbacks
from orchestrator.preemption import (
    EXIT_CODE,
    SAME_NOTICE_SECONDS,
    Preempted,
    Watch,
    check_notice,
    is_there,
)

ROOT = Path(__file__).resolve().parents[1]


def test_uncaught_it_ends_with_75():
    with pytest.raises(SystemExit) as caught:
        raise Preempted("told so", epoch=1, step=2)
    assert caught.value.code == EXIT_CODE == 75
    assert str(caught.value) == "told so"


class Process:
    """A process of its own that watches, and waits as a rank does: in one long call into C."""

    def __init__(self, grace: float, then: str = "") -> None:
        code = f"""
            import sys, time, threading
            from orchestrator.preemption import Watch
            def heard(what):
                print("heard", what, flush=True)
                {then or "pass"}
            with Watch(heard, grace={grace}) as watch:
                print("ready", flush=True)
                lock = threading.Lock(); lock.acquire(); lock.acquire(timeout=20)
            """
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        output, _ = self._process.communicate(timeout=20)
        return self._process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_while_the_main_thread_waits(number):
    process = Process(grace=0.5)
    process.send(number)
    assert process.line() == f"heard {number.name}"
    began = time.monotonic()
    code, output = process.end()
    assert code == 128 + number
    assert time.monotonic() - began < 5
    assert output == f"Ended at once: {number.name} 0.5 s ago, and no checkpoint committed since.\n"


def test_a_second_signal_ends_it_at_once():
    process = Process(grace=60)
    process.send(signal.SIGUSR1)
    assert process.line() == "heard SIGUSR1"
    process.send(signal.SIGTERM)  # the same notice, by another way
    time.sleep(SAME_NOTICE_SECONDS + 0.2)
    process.send(signal.SIGTERM)
    code, output = process.end()
    assert code == 128 + signal.SIGTERM
    assert "a second signal, SIGTERM" in output


def test_once_committed_signals_mean_nothing_and_the_end_is_75():
    process = Process(grace=1.0, then="watch.committed()")
    process.send(signal.SIGTERM)
    assert process.line() == "heard SIGTERM"
    process.send(signal.SIGTERM)
    process.send(signal.SIGUSR1)
    assert process.end() == (75, "")


def test_handlers_are_put_back():
    for number in (signal.SIGTERM, signal.SIGUSR1):  # whatever an interrupted fit has left
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Watch(lambda what: None, grace=60):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_file(tmp_path):
    heard = threading.Event()
    notice = tmp_path / "notice"
    with Watch(lambda what: heard.set(), grace=60, notice=str(notice), every=0.02):
        assert not heard.wait(0.2)
        notice.touch()
        assert heard.wait(5)


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as the metadata servers of the clouds do."""

    answers: ClassVar[dict[str, tuple[int, str]]] = {}
    asked: ClassVar[list[tuple[str, str, Any]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers))
        code, text = self.answers.get(self.path, (404, "no such thing"))
        if self.path == "/guarded" and "X-aws-ec2-metadata-token" not in self.headers:
            code, text = 401, ""
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    do_PUT = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def url():
    Metadata.answers.clear()
    Metadata.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, "TRUE"), True),
        ((200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'), True),
        ((200, "FALSE\n"), False),
        ((200, "NONE"), False),
        ((200, ""), False),
        ((404, "not found"), False),
        ((500, "sorry"), False),
    ],
)
def test_what_a_metadata_server_answers(url, answer, expected):
    Metadata.answers["/preempted"] = answer
    assert is_there(f"{url}/preempted") is expected
    assert Metadata.asked[0][2]["Metadata-Flavor"] == "Google"


def test_a_token_is_fetched_where_one_is_wanted(url):
    Metadata.answers.update({"/guarded": (200, "now"), "/latest/api/token": (200, "a token")})
    assert is_there(f"{url}/guarded")
    assert [(verb, path) for verb, path, _ in Metadata.asked] == [
        ("GET", "/guarded"),
        ("PUT", "/latest/api/token"),
        ("GET", "/guarded"),
    ]
    assert Metadata.asked[2][2]["X-aws-ec2-metadata-token"] == "a token"


def test_a_client_s_own_error_is_no_answer(monkeypatch):
    class Hiccup(Exception):
        pass

    def exists(self, path):
        raise Hiccup

    monkeypatch.setattr(MemoryFileSystem, "exists", exists)
    assert not is_there("memory://notices/one")


def test_a_notice_nobody_can_look_at():
    check_notice("http://metadata.example/preempted")
    check_notice("/some/file")
    with pytest.raises(SettingError, match="nonesuch://x/y"):
        check_notice("nonesuch://x/y")
    with pytest.raises(SettingError, match="nonesuch://x/y"):
        callbacks.StoreCheckpoint("memory://store", preempt_notice="nonesuch://x/y")


def test_nobody_there():
    assert not is_there("http://127.0.0.1:9/preempted")
    assert not is_there("nonesuch://x/y")
    assert is_there(os.devnull)
