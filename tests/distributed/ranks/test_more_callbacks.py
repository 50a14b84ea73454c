"""What one rank finds, or rank 0 alone is told, all ranks act on after the same step."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.agreement import RankError
from orchestrator.checkpoint.retention import EverySteps
from orchestrator.checkpoint.store import CheckpointStore
from tests.distributed import problems
from tests.distributed.rank_plugin import three
from tests.fakes import Recorder


class Batches(keras.callbacks.Callback):
    """The batches done."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))


def fit_line(runtime, targets, ours, epochs=3, optimizer=None):
    """Steps of two samples a rank."""
    model = problems.line()
    optimizer = runtime.distribute(optimizer or keras.optimizers.SGD(0.05))
    model.compile(optimizer, "mse")
    runtime.broadcast(model)
    part = runtime.shard(problems.points(targets), batch_size=2 * runtime.size)
    model.fit(part, epochs=epochs, verbose=0, callbacks=ours)
    return model


@pytest.mark.parametrize("accumulate", [None, 3], ids=["", "accumulated"])
@pytest.mark.parametrize("batch", [1, 4], ids=["within", "last"])
def test_a_nan_on_the_last_rank_ends_all(runtime, communicator, batch, accumulate, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(runtime, "events", recorder)
    targets = np.ones(5 * 2 * runtime.size)
    targets[(batch + 1) * 2 * runtime.size - 1] = np.nan
    seen = Batches()
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulate)
    fit_line(runtime, targets, [callbacks.TerminateOnNaN(), seen], optimizer=optimizer)
    last = min(batch + (runtime.size > 1), 4)
    ends = communicator.allgather_object(seen.seen)
    assert ends == [[(0, b) for b in range(last + 1)]] * runtime.size
    found = communicator.allgather_object(
        [(e["kind"], e["epoch"], e["batch"], e["rank"]) for e in recorder.events]
    )
    assert found == [[("nan", 0, batch, runtime.size - 1)]] * runtime.size


@three
def test_a_nan_raises_on_all(runtime):
    targets = np.ones(5 * 2 * runtime.size)
    targets[3] = np.nan  # rank 1 of the first batch
    with pytest.raises(RuntimeError, match="NaN or Inf loss encountered at batch 0 on rank 1"):
        fit_line(runtime, targets, [callbacks.TerminateOnNaN(raise_error=True)])


@pytest.mark.parametrize("poisoned", [3, 4], ids=["within", "last"])
def test_a_nan_goes_back_to_the_checkpoint(
    runtime, communicator, poisoned, shared_path, monkeypatch, capfd
):
    """Against the same worked out by hand: every target is 1, so that each step is known."""
    recorder = Recorder()
    monkeypatch.setattr(runtime, "events", recorder)
    targets = np.ones(5 * 2 * runtime.size)
    targets[(poisoned + 1) * 2 * runtime.size - 1] = np.nan
    url = str(shared_path / "store")
    own = [
        callbacks.TerminateOnNaN(rollbacks=2),
        callbacks.StoreCheckpoint(url, save=EverySteps(2), background=False),
    ]
    model = fit_line(runtime, targets, own, epochs=4)
    weight, rate, saved = 0.0, 0.05, 0.0
    kept: list[int] = []
    found: list[int] = []
    known_at = min(poisoned + (runtime.size > 1), 4)
    for step in range(1, 1 + 2 * 5 + known_at + 1):
        batch = (step - 1) % 5
        weight = np.nan if batch == poisoned else weight - rate * 2 * (weight - 1)
        # After the last batch it is known as the epoch ends, when a save for that batch is over.
        if step % 2 == 0 and np.isfinite(weight) and batch != 4:
            saved, kept = weight, [*kept, step]
        if batch == known_at and len(found) < 2:
            found.append(kept[-1])
            weight, rate = saved, rate / 2
        if step % 2 == 0 and step not in kept and np.isfinite(weight):
            saved, kept = weight, [*kept, step]
    restored = [e.get("restored") for e in recorder.events if e["kind"] == "nan"]
    assert restored == [*found, None], "twice back, and then it ends"
    assert [s.step for s in CheckpointStore(url).list()] == kept, "no NaN is saved"
    weights = communicator.allgather_object(float(model.get_weights()[0][0, 0]))
    np.testing.assert_allclose(weights, [weight] * runtime.size, rtol=1e-6)
    rates = communicator.allgather_object(float(model.optimizer.learning_rate.numpy()))
    np.testing.assert_allclose(rates, [rate] * runtime.size, rtol=1e-6)
    said = capfd.readouterr().out
    assert said.count("Invalid loss, back to the weights of step") == 2 * runtime.is_root
    assert said.count("Invalid loss, terminating training") == 1 * runtime.is_root


@three
def test_warm_up_and_a_schedule(runtime, communicator):
    rates: list[float] = []
    look = callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(
            float(look.model.optimizer.learning_rate.numpy())
        )
    )
    own = [
        callbacks.LearningRateWarmup(2),
        callbacks.LearningRateScheduler(lambda epoch, lr: lr if epoch < 3 else lr / 2),
        callbacks.ConsistencyGuard(1),
        look,
    ]
    fit_line(
        runtime,
        np.linspace(-1, 1, 8 * runtime.size),
        own,
        epochs=4,
        optimizer=keras.optimizers.SGD(0.01, 0.9),
    )
    size = runtime.size
    warmed = [0.01 * (1 + (size - 1) * b / 8) for b in range(8)]
    assert rates == pytest.approx(warmed + [0.01 * size] * 4 + [0.005 * size] * 4)
    assert communicator.allgather_object(rates) == [rates] * size


@three
def test_a_callback_of_rank_0_that_fails_ends_all(runtime):
    class Failing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise OSError("the tracking server is gone")

    seen = Batches()
    with pytest.raises(OSError if runtime.is_root else RankError, match="server is gone"):
        fit_line(runtime, np.ones(30), [callbacks.RankZero(Failing()), seen])
    assert len({epoch for epoch, _ in seen.seen}) == 1
