"""`RemoteMonitor` on many ranks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from orchestrator.callbacks.rank_aware import RankAware


class RemoteMonitor(RankAware, keras.callbacks.RemoteMonitor):
    """Sends each epoch's global logs to a server, from rank 0 alone; Keras's parameters.

    A server that cannot be reached, or does not answer in time, is a warning on rank 0, as in
    Keras; so is a NaN with `send_as_json`, which JSON cannot hold. Any other failure, such as logs
    that are no numbers, is raised on all ranks (one small broadcast an epoch, which waits for the
    server).

    Args:
        root: As Keras's, like all before `timeout`.
        path: Relative to `root`.
        field: Of the form.
        headers: Of the request.
        send_as_json: Whether the body is JSON rather than a form.
        timeout: Seconds to wait for the server; 30 by default. Keras waits for ever.
    """

    def __init__(
        self,
        root: str = "http://localhost:9000",
        path: str = "/publish/epoch/end/",
        field: str = "data",
        headers: Mapping[str, str] | None = None,
        send_as_json: bool = False,
        *,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(root, path, field, headers, send_as_json)
        self._timeout = timeout

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sends, on rank 0."""
        record = {"epoch": epoch, **{name: _plain(value) for name, value in (logs or {}).items()}}
        self._runtime.on_root(lambda: self._send(record))

    def _send(self, record: dict[str, Any]) -> None:
        import requests

        body: dict[str, Any] = (
            {"json": record} if self.send_as_json else {"data": {self.field: json.dumps(record)}}
        )
        try:
            requests.post(
                self.root + self.path, headers=self.headers, timeout=self._timeout, **body
            )
        except requests.exceptions.RequestException:
            warnings.warn(f"Could not reach RemoteMonitor root server at {self.root}", stacklevel=2)


def _plain(value: Any) -> Any:
    """Keras unwraps arrays of one element, and cannot send others; here they are lists."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    return value.item() if value.size == 1 else value.tolist()
