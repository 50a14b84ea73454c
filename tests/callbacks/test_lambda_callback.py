"""LambdaCallback: Keras's behaviour in one process, global logs on two ranks."""

from __future__ import annotations

import pytest

from orchestrator.callbacks import LambdaCallback
from tests.callbacks import ranks
from tests.callbacks.models import X, fit, make


def test_functions_are_called():
    seen = []
    callback = LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(("epoch begin", epoch)),
        on_epoch_end=lambda epoch, logs: seen.append(("epoch end", sorted(logs))),
        on_train_begin=lambda logs: seen.append("begin"),
        on_train_end=lambda logs: seen.append("end"),
        on_train_batch_begin=lambda batch, logs: seen.append(("batch begin", batch)),
        on_train_batch_end=lambda batch, logs: seen.append(("batch end", batch)),
    )
    fit(make(), callback, validation_data=None)
    batches = [(f"batch {which}", batch) for batch in range(3) for which in ("begin", "end")]
    ends = [("epoch end", ["accuracy", "loss"]), "end"]
    assert seen == ["begin", ("epoch begin", 0), *batches, *ends]


def test_other_hooks_by_their_names():
    seen = []
    callback = LambdaCallback(
        on_test_begin=lambda logs: seen.append("test"),
        on_predict_batch_end=lambda batch, logs: seen.append("predict"),
        note="kept",
    )
    model = make()
    fit(model, callback)
    model.predict(X[:1], verbose=0, callbacks=[callback])
    assert seen == ["test", "predict"]
    assert vars(callback)["note"] == "kept"


def test_without_functions():
    history = fit(make(), LambdaCallback(), epochs=2)
    assert len(history.epoch) == 2


def test_epochs_are_global_and_the_same_on_all_ranks():
    def rank(runtime):
        seen, batches = [], []
        callback = LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(dict(logs)),
            on_train_batch_end=lambda batch, logs: batches.append(logs["loss"]),
        )
        history = ranks.fit(runtime, [callback])
        return seen, history.history, batches

    (first, history, own), (second, _, others) = ranks.run(rank)
    assert first == second
    assert [logs["val_loss"] for logs in first] == history["val_loss"]
    assert own != others
    assert first[0]["loss"] == pytest.approx((own[3] + others[3]) / 2)
