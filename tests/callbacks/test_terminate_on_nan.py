"""TerminateOnNaN: Keras's behaviour in one process, and one decision on two ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.runtime import Runtime
from tests.callbacks import ranks
from tests.callbacks.models import X, Y, fit, make
from tests.fakes import Recorder


class Batches(keras.callbacks.Callback):
    """Which hooks were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self.ended = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))

    def on_train_end(self, logs=None):
        self.ended = True


def poisoned(at: int) -> np.ndarray:
    y = Y.copy()
    y[at] = np.nan
    return y


def test_it_ends_at_the_batch():
    seen, model = Batches(), make()
    history = model.fit(
        X,
        poisoned(5),
        batch_size=4,
        shuffle=False,
        epochs=3,
        verbose=0,
        callbacks=[callbacks.TerminateOnNaN(), seen],
    )
    assert seen.seen == [(0, 0), (0, 1)]
    assert seen.ended
    assert len(history.history["loss"]) == 1
    assert np.isnan(history.history["loss"][0])


def test_infinity_counts_too():
    model = make(loss=lambda y, p: keras.ops.mean(p) * np.float32(np.inf))
    seen = Batches()
    fit(model, callbacks.TerminateOnNaN(), seen, epochs=3)
    assert len(seen.seen) == 1


def test_raise_error_leaves_the_others_without_their_end():
    seen, model = Batches(), make()
    with pytest.raises(RuntimeError, match=r"NaN or Inf loss encountered at batch 2\. Loss value"):
        model.fit(
            X,
            poisoned(9),
            batch_size=4,
            shuffle=False,
            epochs=3,
            verbose=0,
            callbacks=[callbacks.TerminateOnNaN(raise_error=True), seen],
        )
    assert not seen.ended


@pytest.mark.parametrize("raise_error", [False, True])
def test_a_good_training_goes_on(raise_error):
    seen = Batches()
    fit(make(), callbacks.TerminateOnNaN(raise_error), seen, epochs=2)
    assert len(seen.seen) == 6


def test_the_next_fit_begins_anew():
    terminate, seen = callbacks.TerminateOnNaN(), Batches()
    bad = make(loss=lambda y, p: keras.ops.mean(p) * np.float32(np.nan))
    fit(bad, terminate)
    fit(make(), terminate, seen, epochs=2)
    assert len(seen.seen) == 6


def test_the_event():
    runtime, recorder = Runtime(SingleCommunicator()), Recorder()
    runtime.events = recorder
    with runtime.use():
        model = make()
        options = {"batch_size": 4, "shuffle": False, "verbose": 0}
        model.fit(X, poisoned(5), callbacks=[callbacks.TerminateOnNaN()], **options)
    (event,) = recorder.events
    assert np.isnan(event.pop("loss"))
    assert event == {"kind": "nan", "epoch": 0, "step": 2, "rank": 0, "batch": 1}


def on_two_ranks(sample, raise_error=False, epochs=3):
    """Where both ranks end when one sample's target is NaN; samples go to the ranks by halves."""

    def rank(runtime):
        recorder = runtime.events = Recorder()
        x, y = ranks.data()
        y[sample] = np.nan
        seen = Batches()
        own = [callbacks.TerminateOnNaN(raise_error), seen]
        error = None
        try:
            ranks.fit(runtime, own, epochs, train=(x, y))
        except RuntimeError as raised:
            error = str(raised)
        return seen.seen, recorder.events, error

    return ranks.run(rank)


@pytest.mark.parametrize(
    ("sample", "rank", "batch", "last"),
    [(0, 0, 0, 1), (6, 1, 1, 2), (14, 1, 3, 3), (12, 0, 3, 3)],
    ids=["first batch", "another rank's", "last batch of the epoch", "last batch, rank 0"],
)
def test_ranks_end_together(sample, rank, batch, last):
    results = on_two_ranks(sample)
    for seen, events, _ in results:
        assert seen == [(0, b) for b in range(last + 1)]
        (event,) = [e for e in events if e["kind"] == "nan"]
        assert (event["epoch"], event["batch"], event["rank"]) == (0, batch, rank)


def test_ranks_raise_together():
    for _, _, error in on_two_ranks(6, raise_error=True):
        assert error is not None
        assert error.startswith("NaN or Inf loss encountered at batch 1 on rank 1.")
