"""The background writer: order, bounds, errors, deadlines, and the interpreter's end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from orchestrator.checkpoint.writer import Writer

ROOT = Path(__file__).resolve().parents[2]
LONG = 60  # seconds no test waits, unless it fails


class Gate:
    """A write that says when it has begun, and ends when it is let."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.begun = threading.Event()
        self.let = threading.Event()
        self.error = error
        self.written: list[object] = []

    def __call__(self, buffer: list[object]) -> None:
        self.begun.set()
        assert self.let.wait(LONG)
        if self.error is not None:
            raise self.error
        self.written += buffer


def fill(value: object):
    def into(buffer: list[object]) -> None:
        buffer[:] = [value]

    return into


class Buffers:
    def __init__(self) -> None:
        self.made: list[list[object]] = []

    def __call__(self) -> list[object]:
        self.made.append([])
        return self.made[-1]


def blocked(**options) -> tuple[Writer, Gate, Buffers]:
    """A writer in the midst of its first save."""
    buffers = Buffers()
    writer, gate = Writer(buffers, **options), Gate()
    writer.submit(fill("first"), gate)
    assert gate.begun.wait(LONG)
    return writer, gate, buffers


def test_it_fills_at_once_and_writes_in_order():
    written: list[object] = []
    buffers = Buffers()
    with Writer(buffers) as writer:
        for number in range(100):
            writer.submit(fill(number), written.extend)
    assert written == list(range(100))
    assert len(buffers.made) == 1


def test_it_writes_in_its_own_thread_and_ends_it():
    threads: list[threading.Thread] = []
    with Writer(list) as writer:
        writer.submit(fill(1), lambda _: threads.append(threading.current_thread()))
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not thread.is_alive()


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_waiting_saves_wait_for_a_buffer(in_flight):
    writer, gate, buffers = blocked(in_flight=in_flight)
    for number in range(in_flight - 1):
        writer.submit(fill(number), gate)
    filled: list[object] = []
    with pytest.raises(TimeoutError, match=f"{in_flight} checkpoints? not written in time"):
        writer.submit(filled.append, gate, timeout=0.01)
    assert filled == [], "nothing is copied over what is being written"
    waiting = threading.Thread(target=writer.submit, args=(fill("last"), gate))
    waiting.start()
    gate.let.set()
    waiting.join(LONG)
    writer.close()
    assert gate.written == ["first", *range(in_flight - 1), "last"]
    assert len(buffers.made) == in_flight
    assert writer.replaced == 0


def test_a_newer_save_replaces_the_queued_one():
    writer, gate, buffers = blocked(when_busy="replace")
    for number in range(5):
        writer.submit(fill(number), gate)
    gate.let.set()
    writer.close()
    assert gate.written == ["first", 4]
    assert writer.replaced == 4
    assert len(buffers.made) == 2


def test_with_two_in_flight_the_last_queued_is_replaced():
    writer, gate, buffers = blocked(when_busy="replace", in_flight=2)
    for number in range(5):
        writer.submit(fill(number), gate)
    gate.let.set()
    writer.close()
    assert gate.written == ["first", 0, 4]
    assert len(buffers.made) == 3


def test_an_error_is_raised_once_and_by_its_own_name():
    writer = Writer(list)
    gate = Gate(OSError("disk full"))
    writer.submit(fill(1), gate)
    writer.raise_if_failed()
    gate.let.set()
    with pytest.raises(OSError, match="disk full") as caught:
        writer.submit(fill(2), gate)  # waits for the buffer, and learns of the error
    assert caught.value is gate.error
    written: list[object] = []
    writer.raise_if_failed()
    writer.submit(fill(3), written.extend)
    writer.close()
    assert written == [3]


def test_the_first_error_is_the_one_and_later_saves_are_tried():
    writer, gate, _ = blocked(in_flight=3)
    gate.error = OSError("the first")
    second, written = Gate(OSError("the second")), []
    second.let.set()
    writer.submit(fill(2), second)
    writer.submit(fill(3), written.extend)
    gate.let.set()
    with pytest.raises(OSError, match="the first"):
        writer.close()
    assert written == [3]
    writer.close()


@pytest.mark.parametrize("background", [True, False])
def test_an_error_while_filling_is_the_callers(background):
    def refuse(buffer: list[object]) -> None:
        raise MemoryError("no room")

    written: list[object] = []
    buffers = Buffers()
    with Writer(buffers, background=background) as writer:
        with pytest.raises(MemoryError, match="no room"):
            writer.submit(refuse, written.extend)
        writer.submit(fill(1), written.extend)
    assert written == [1]
    assert len(buffers.made) == 1


def test_an_error_while_making_a_buffer_is_the_callers():
    answers = iter([MemoryError("no room"), None])
    written: list[object] = []

    def make() -> list[object]:
        error = next(answers)
        if error is not None:
            raise error
        return []

    with Writer(make) as writer:
        with pytest.raises(MemoryError, match="no room"):
            writer.submit(fill(1), written.extend)
        writer.submit(fill(2), written.extend)
    assert written == [2]


def test_in_the_foreground():
    threads: list[object] = []
    buffers = Buffers()
    writer = Writer(buffers, background=False, in_flight=3, when_busy="replace")
    for _ in range(3):
        writer.submit(fill(1), lambda _: threads.append(threading.current_thread()))
    assert threads == 3 * [threading.current_thread()]
    assert len(buffers.made) == 1
    gate = Gate(OSError("disk full"))
    gate.let.set()
    with pytest.raises(OSError, match="disk full"):
        writer.submit(fill(1), gate)
    writer.raise_if_failed()
    writer.close()


@pytest.mark.parametrize(("when_busy", "number"), [("wait", 2), ("replace", 3)])
def test_prepare_makes_all_buffers(when_busy, number):
    buffers = Buffers()
    with Writer(buffers, in_flight=2, when_busy=when_busy) as writer:
        writer.prepare()
        writer.prepare()
        assert len(buffers.made) == number
        for value in range(9):
            writer.submit(fill(value), list)
    assert len(buffers.made) == number


def test_close_says_what_it_waits_for():
    lines: list[str] = []
    gate = Gate()

    def say(line: str) -> None:
        lines.append(line)
        gate.let.set()

    writer = Writer(list, in_flight=2, say=say)
    writer.submit(fill(1), gate)
    writer.submit(fill(2), gate)
    writer.close(LONG, every=0.01)
    assert lines[0] == ("Waiting for 2 checkpoints to be written, 0 s of at most 60 s so far")
    assert gate.written == [1, 2]


def test_close_has_a_deadline():
    writer, gate, _ = blocked(in_flight=2)
    written: list[object] = []
    writer.submit(fill("queued"), written.extend)
    with pytest.raises(TimeoutError, match=r"2 checkpoints not written within 0\.01 s"):
        writer.close(0.01)
    gate.let.set()
    assert writer._thread is not None
    writer._thread.join(LONG)
    assert not writer._thread.is_alive()
    assert written == [], "nothing begins after the deadline"
    assert gate.written == ["first"], "what had begun may end"
    writer.close()


def test_closed_is_closed():
    writer = Writer(list)
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(fill(1), list)


def save_and_fail(write) -> None:
    with Writer(list) as writer:
        writer.submit(fill(1), write)
        raise ZeroDivisionError


def test_an_exception_in_the_block_still_writes():
    written: list[object] = []
    with pytest.raises(ZeroDivisionError):
        save_and_fail(written.extend)
    assert written == [1]


def test_an_exception_in_the_block_goes_before_the_writers():
    gate = Gate(OSError("disk full"))
    gate.let.set()
    with pytest.raises(ZeroDivisionError) as caught:
        save_and_fail(gate)
    assert caught.value.__notes__ == ["Checkpoints failed as well: OSError('disk full')"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"in_flight": 0}, "in_flight=0"), ({"when_busy": "drop"}, "when_busy='drop'")],
)
def test_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Writer(list, **options)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG,
    )


EXIT = """
    import sys, threading
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from orchestrator.checkpoint.writer import Writer

    begun, ending = threading.Event(), threading.Event()

    def write(buffer):
        begun.set()
        ending.wait()
        with ThreadPoolExecutor(1) as pool:  # as s3fs does
            pool.submit(Path(sys.argv[1]).write_text, buffer[0]).result()

    writer = Writer(lambda: [])
    writer.submit(lambda buffer: buffer.append("whole"), write)
    begun.wait()
    threading._register_atexit(ending.set)  # registered last, called first
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError('mine')", 1)]
)
def test_the_end_of_the_interpreter_writes_what_is_on_its_way(tmp_path, end, code):
    result = run(EXIT.format(end=end), tmp_path / "file")
    assert result.returncode == code, result.stderr
    assert (tmp_path / "file").read_text() == "whole"


def test_the_end_of_the_interpreter_has_a_deadline_and_says_so():
    script = """
        import threading
        from orchestrator.checkpoint.writer import Writer

        writer = Writer(list, timeout=0.1)
        writer.submit(list, lambda buffer: threading.Event().wait())
    """
    result = run(script)
    assert result.returncode == 0
    assert "TimeoutError: 1 checkpoint not written within 0.1 s" in result.stderr


def test_the_end_of_the_interpreter_shows_a_failure():
    script = """
        from orchestrator.checkpoint.writer import Writer

        def write(buffer):
            raise OSError("disk full")

        Writer(list).submit(list, write)
    """
    assert "OSError: disk full" in run(script).stderr
