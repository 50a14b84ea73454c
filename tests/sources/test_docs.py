"""The code of docs/data.md runs as it stands, on two ranks, and gives every sample once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import orchestrator
from tests.distributed import threads
from tests.sources.parts import batches, put_together

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COUNT = 200


def write_files(x, y):
    """The files that the code names, where the test runs."""
    np.save("images.npy", x)
    for file in range(2):
        rows = slice(file * 100, (file + 1) * 100)
        np.savez(f"train-{file}.npz", x=x[rows], y=y[rows])
        with tf.io.TFRecordWriter(f"train-{file}.tfrecord") as writer:
            for floats, label in zip(x[rows], y[rows], strict=True):
                feature = {
                    "x": tf.train.Feature(float_list=tf.train.FloatList(value=floats)),
                    "y": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                features = tf.train.Features(feature=feature)
                writer.write(tf.train.Example(features=features).SerializeToString())


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y = np.arange(COUNT)
    x = np.repeat(y[:, None], 64, axis=1).astype("float32")
    write_files(x, y)

    def run(runtime) -> Any:
        names = {"runtime": runtime, "orchestrator": orchestrator, "x": x, "y": y}
        names |= {"np": np, "tf": tf, "keras": keras}
        exec(code, names)
        return names["train"], names.get("validation")

    ranks = threads.run_with_runtime(2, run)
    seen = []
    for which in (0, 1) if ranks[0][1] is not None else (0,):
        for features, labels in put_together([batches(rank[which]) for rank in ranks]):
            np.testing.assert_array_equal(features[:, 0], labels)
            seen += labels.tolist()
    assert sorted(seen) == list(range(COUNT))


def test_there_is_code():
    assert len(BLOCKS) == 8
