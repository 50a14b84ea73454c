"""TensorBoard on two ranks that are threads; on processes: tests/distributed/ranks."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator import callbacks, evaluate
from orchestrator.agreement import RankError
from orchestrator.config import SettingError
from tests.callbacks import ranks
from tests.callbacks.test_tensorboard import column, files, read


def test_two_ranks_write_global_metrics_once(tmp_path):
    def rank(runtime):
        batches = []
        look = callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: batches.append(logs["loss"])
        )
        board = callbacks.TensorBoard(str(tmp_path / "logs"), update_freq=2)
        return ranks.fit(runtime, [board, look]).history, batches

    (history, first), (_, second) = ranks.run(rank)
    assert len(files(tmp_path / "logs")) == 2
    train, val = read(tmp_path / "logs" / "train"), read(tmp_path / "logs" / "validation")
    assert train["epoch_loss"] == column(history["loss"])
    assert val["epoch_mae"] == column(history["val_mae"])
    evaluation = [value for _, value in val["evaluation_mae_vs_iterations"]]
    assert evaluation == pytest.approx(history["val_mae"])
    due = [(a + b) / 2 for a, b in zip(first, second, strict=True)][1::2]
    assert [step for step, _ in train["batch_loss"]] == [2, 4, 6, 8]
    assert [value for _, value in train["batch_loss"]] == pytest.approx(due)


def test_two_ranks_evaluate(tmp_path):
    def rank(runtime):
        model = ranks.model(runtime)
        x, y = ranks.data(8, 1)
        part = runtime.shard((x, y + np.arange(8, dtype="float32")[:, None]), batch_size=4)
        model.evaluate(part, verbose=0, callbacks=[callbacks.TensorBoard(str(tmp_path))])
        return evaluate(model, part)

    first, second = ranks.run(rank)
    assert first == second
    ((step, value),) = read(tmp_path / "validation")["evaluation_loss_vs_iterations"]
    assert (step, value) == (0, pytest.approx(first["loss"]))


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path):
    (tmp_path / "file").touch()

    def rank(runtime):
        with pytest.raises(SettingError, match="A file is in the way of a folder"):
            ranks.fit(runtime, [callbacks.TensorBoard(str(tmp_path / "file"))])

    ranks.run(rank)


@pytest.mark.parametrize(
    ("hook", "batches"), [("_push_writer", 0), ("_pop_writer", 4), ("_log_epoch_metrics", 4)]
)
def test_what_fails_ends_both_ranks(tmp_path, hook, batches):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def rank(runtime):
        seen = []
        look = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
        board = callbacks.TensorBoard(str(tmp_path / "logs"), update_freq=1)
        if runtime.is_root:
            setattr(board, hook, full)
        with pytest.raises(RankError if runtime.rank else OSError, match="No space left"):
            ranks.fit(runtime, [board, look], epochs=3)
        return seen

    assert ranks.run(rank) == [list(range(batches))] * 2
