"""TensorBoard on two ranks with its log_dir on real S3 and GCS servers, read back from there."""

from __future__ import annotations

import pytest

from orchestrator import callbacks, storage
from orchestrator.checkpoint.retention import EverySteps
from tests.callbacks import ranks
from tests.callbacks.test_backup_and_restore import Interrupt
from tests.callbacks.test_tensorboard import files, read


def run(url, store, *others):
    """Four steps an epoch on each of two ranks; what each rank's history says."""

    def rank(runtime):
        board = callbacks.TensorBoard(f"{url}/logs", update_freq=2)
        saver = callbacks.StoreCheckpoint(
            str(store), resume=True, save=EverySteps(3), preempt_grace=None
        )
        try:
            return ranks.fit(runtime, [board, *(make() for make in others), saver], 3).history
        except InterruptedError:
            return None
        finally:
            saver.close()
            runtime.on_root(saver._writer.close)

    return ranks.run(rank)


def fetched(url, folder):
    fs, path = storage.resolve(f"{url}/logs")
    fs.get(path, str(folder), recursive=True)
    return {part: read(folder / part) for part in ("train", "validation")}


def test_it_is_read_back_and_continued(url, tmp_path):
    assert run(url, tmp_path / "store", lambda: Interrupt(8)) == [None, None]
    fetched(url, tmp_path / "first")
    history, same = run(url, tmp_path / "store")
    assert history == same
    found = fetched(url, tmp_path / "all")
    train, val = found["train"], found["validation"]
    assert [step for step, _ in train["batch_loss"]] == [2, 4, 6, 8, 10, 12]
    for tag, values in (
        (train["epoch_loss"], history["loss"]),
        (train["epoch_mae"], history["mae"]),
        (val["epoch_mae"], history["val_mae"]),
    ):
        assert tag == [(epoch, pytest.approx(value)) for epoch, value in enumerate(values)]
    assert [step for step, _ in val["evaluation_loss_vs_iterations"]] == [4, 8, 12]
    first, everything = set(files(tmp_path / "first")), set(files(tmp_path / "all"))
    assert len(first) == 2, "one writer"
    assert first < everything
