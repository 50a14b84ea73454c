"""The digits example, whose ranks hold still after a step until they are told to go on.

With HOLD a folder or its URL: each rank leaves `at-RANK` there, and waits for `go`.
"""

from __future__ import annotations

import os
import time
from typing import Any

import keras

from launch import digits
from orchestrator import storage
from orchestrator.backends import launched_rank

AT = 27  # steps: no checkpoint is due, and no epoch ends
SECONDS = 120.0


class Hold(keras.callbacks.Callback):
    """Waits in its own code, where no deadline runs."""

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations.numpy()) != AT:
            return
        fs, folder = storage.resolve(os.environ["HOLD"])
        fs.pipe_file(f"{folder}/at-{launched_rank()}", b"")
        end = time.monotonic() + SECONDS
        while not fs.exists(f"{folder}/go") and time.monotonic() < end:
            time.sleep(0.05)


def model(**options: Any) -> keras.Model:
    net = digits.model(**options)
    if "HOLD" in os.environ:
        fit = net.fit

        def held(*args: Any, callbacks: list[Any], **more: Any) -> Any:
            return fit(*args, callbacks=[Hold(), *callbacks], **more)

        net.fit = held
    return net
