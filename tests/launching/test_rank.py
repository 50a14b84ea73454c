"""What a rank's small process does by itself; with a launcher: test_launch.py."""

from __future__ import annotations

import socket

from orchestrator.launching.rank import keep_alive


def test_a_launcher_that_vanished_is_noticed_within_half_a_minute():
    """Idle, by probes; and with something sent that never arrived, for which there are none."""
    with socket.socket() as connection:
        keep_alive(connection)
        options = {
            name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        }
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    probed = options["TCP_KEEPIDLE"] + options["TCP_KEEPINTVL"] * options["TCP_KEEPCNT"]
    assert (probed, options["TCP_USER_TIMEOUT"]) == (30, 30_000)
