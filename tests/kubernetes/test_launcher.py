"""The launcher pod: it waits for the workers' ssh servers, then becomes the command."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading

import pytest

from . import pods


@contextlib.contextmanager
def server(greeting: bytes, port: int = 0):
    """Greets each that connects."""
    with socket.create_server(("127.0.0.1", port)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(greeting)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        # Closing alone would leave accept() waiting.
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two on one address\n127.0.0.1 slots=2\n\nlocalhost:2\n")
    return path


def launcher(hostfile, port, *command, timeout="20"):
    words = ["--hostfile", hostfile, "--port", str(port), "--timeout", timeout, "--", *command]
    return pods.running(sys.executable, pods.SCRIPTS / "launcher.py", *words)


def test_becomes_the_command_with_its_code(hostfile):
    command = pods.python("import os, sys; print('pid', os.getpid()); sys.exit(75)", "--", "-np")
    with server(b"SSH-2.0-test\r\n") as port, launcher(hostfile, port, *command) as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
        assert process.returncode == 75
        assert said == f"pid {process.pid}\n"


def test_waits_for_a_worker_that_comes_back(hostfile):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with launcher(hostfile, port, "echo", "started") as process:
        assert process.stdout is not None
        assert "waiting up to 20 s for 2 of 2 hosts" in process.stdout.readline()
        with server(b"SSH-2.0-test\r\n", port):
            said, _ = process.communicate(timeout=pods.DEADLINE)
    assert (process.returncode, said) == (0, "started\n")


def test_an_open_port_is_not_enough(hostfile):
    with server(b"HTTP") as port, launcher(hostfile, port, "true", timeout="0.2") as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 1
    assert f"no ssh server on port {port} of 127.0.0.1, localhost within 0.2 s" in said


def test_can_be_ended_while_it_waits(hostfile):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with launcher(hostfile, port, "true") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 143


def test_wrong_calls(tmp_path, hostfile):
    with launcher(tmp_path / "none", 1, "true") as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 2
    assert "cannot be read" in said
    with launcher(hostfile, 1) as process:
        said, _ = process.communicate(timeout=pods.DEADLINE)
    assert process.returncode == 2
    assert "names 2 hosts, the command 0 words" in said
