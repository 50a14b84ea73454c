"""RankZero: another's callback on rank 0 alone; what it does there all ranks know."""

from __future__ import annotations

import functools
from typing import Any, cast

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from orchestrator.config import SettingError
from tests.callbacks import ranks
from tests.callbacks.models import X, fit, make
from tests.fakes import Recorder

HOOKS = [
    f"on_{which}"
    for which in (
        *("train_begin", "train_end", "epoch_begin", "epoch_end"),
        *("train_batch_begin", "train_batch_end", "test_begin", "test_end"),
        *("test_batch_begin", "test_batch_end", "predict_begin", "predict_end"),
        *("predict_batch_begin", "predict_batch_end"),
    )
]


def recording(fails: str | None = None, stops: str | None = None) -> Any:
    """A callback with every hook, that notes them with their logs."""

    class Notes(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, dict[str, Any]]] = []

        def names(self) -> list[str]:
            return [name for name, _ in self.seen]

    def hook(name: str) -> Any:
        def call(self: Any, *arguments: Any, logs: Any = None) -> None:
            logs = arguments[-1] if isinstance(arguments[-1], dict) else logs
            self.seen.append((name, dict(logs or {})))
            if logs is not None:
                logs["mine"] = 1.0
            if name == fails:
                raise OSError("the tracking server is gone")
            if name == stops:
                self.model.stop_training = True

        return call

    for name in HOOKS:
        setattr(Notes, name, hook(name))
    return Notes()


def test_one_process_calls_every_hook():
    plain, wrapped, model = recording(), recording(), make()
    zero = callbacks.RankZero(wrapped)
    fit(model, zero, plain, epochs=2)
    model.evaluate(X, X[:, :1], verbose=0, callbacks=[zero, plain])
    model.predict(X, verbose=0, callbacks=[zero, plain])
    assert wrapped.names() == plain.names()
    assert set(wrapped.names()) == set(HOOKS)
    assert wrapped.model is model
    assert wrapped.params == plain.params
    assert zero.callback is wrapped


def test_only_rank_0_calls_it_and_with_global_metrics():
    def rank(runtime):
        notes = recording()
        history = ranks.fit(runtime, [callbacks.RankZero(notes)])
        return notes.seen, history.history

    (seen, history), (others, same) = ranks.run(rank)
    assert others == []
    assert history == same
    assert "mine" not in history
    ends = [logs for name, logs in seen if name == "on_epoch_end"]
    assert [logs["val_loss"] for logs in ends] == history["val_loss"]
    tests = [logs["loss"] for name, logs in seen if name == "on_test_end"]
    assert tests == pytest.approx(history["val_loss"])


def test_it_can_be_made_on_rank_0_alone():
    made = []

    def make_one():
        made.append(recording())
        return made[-1]

    def rank(runtime):
        zero = callbacks.RankZero(make_one)
        ranks.fit(runtime, [zero])
        ranks.fit(runtime, [zero])
        return zero.callback

    first, second = ranks.run(rank)
    assert made == [first]
    assert second is None
    assert first.names().count("on_train_end") == 2


@pytest.mark.parametrize(
    ("hook", "batches"),
    [
        ("on_train_begin", 0),
        ("on_epoch_begin", 4),
        ("on_train_batch_begin", 4),
        ("on_train_batch_end", 4),
        ("on_test_begin", 4),
        ("on_test_end", 4),
        ("on_epoch_end", 4),
        ("on_train_end", 8),
    ],
)
def test_an_error_ends_both_ranks(hook, batches):
    def rank(runtime):
        count = []
        look = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: count.append(batch))
        wrapped = recording(fails=hook)
        with pytest.raises(RankError if runtime.rank else OSError, match="tracking server is gone"):
            ranks.fit(runtime, [look, callbacks.RankZero(wrapped)])
        assert wrapped.names().count(hook) == (0 if runtime.rank else 1)
        return len(count)

    assert ranks.run(rank) == [batches, batches]


@pytest.mark.parametrize("hook", ["on_test_end", "on_predict_batch_end"])
def test_an_error_outside_of_training_is_raised_as_well(hook):
    def rank(runtime):
        zero = callbacks.RankZero(recording(fails=hook))
        model, (x, y) = ranks.model(runtime), ranks.data(4)
        use = model.predict if "predict" in hook else functools.partial(model.evaluate, y=y)
        with pytest.raises(RankError if runtime.rank else OSError, match="tracking server is gone"):
            use(x, verbose=0, callbacks=[zero])

    ranks.run(rank)


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_batch_end", "on_epoch_end"])
def test_that_it_stops_training_is_heard_by_all(hook):
    def rank(runtime):
        recorder = runtime.events = Recorder()
        zero = callbacks.RankZero(recording(stops=hook))
        history = ranks.fit(runtime, [zero], epochs=5)
        return len(history.epoch), recorder.kinds()

    assert ranks.run(rank) == [(1, ["stop"])] * 2


def test_its_state_goes_with_the_trainings(tmp_path):
    class Counting(keras.callbacks.Callback):
        count = 0

        def on_epoch_end(self, epoch, logs=None):
            self.count += 1

        def get_state(self):
            return {"count": self.count, "array": np.arange(2)}

        def set_state(self, state):
            self.count = state["count"]

    def run(epochs):
        def rank(runtime):
            counting = Counting()
            saver = callbacks.StoreCheckpoint(str(tmp_path), resume=True, preempt_grace=None)
            ranks.fit(runtime, [callbacks.RankZero(counting), saver], epochs=epochs)
            return counting.count

        return ranks.run(rank)

    assert run(2) == [2, 0]
    assert run(5) == [5, 0]


@pytest.mark.parametrize("wrong", [None, 3, keras.callbacks.History], ids=str)
def test_what_is_no_callback(wrong):
    with pytest.raises(SettingError, match="give it a Keras callback, or a function"):
        callbacks.RankZero(wrong)
    with pytest.raises(SettingError, match="which is no Keras callback"):
        fit(make(), callbacks.RankZero(cast(Any, lambda: wrong)))
