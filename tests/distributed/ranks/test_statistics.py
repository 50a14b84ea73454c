"""Statistics that layers keep, seeds, and the guard against replicas that drift apart."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import orchestrator
from orchestrator import callbacks, statistics
from orchestrator.runtime import Runtime
from orchestrator.steps import DivergedError
from tests.distributed import problems
from tests.distributed.rank_plugin import once, several


def normalised(runtime, *, synchronized=False, momentum=0.5, frozen=False):
    start = [keras.initializers.GlorotUniform(seed=seed) for seed in (1, 2)]
    norm = keras.layers.BatchNormalization(momentum=momentum, synchronized=synchronized)
    norm.trainable = not frozen
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, kernel_initializer=start[0]),
            norm,
            keras.layers.ReLU(),
            keras.layers.Dense(10, "softmax", kernel_initializer=start[1]),
        ]
    )
    model.compile(
        runtime.distribute(keras.optimizers.SGD(0.1, momentum=0.9)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def moving(model) -> list[np.ndarray]:
    return [v.numpy() for v in statistics.moving(model)]


class Kept(keras.callbacks.Callback):
    """The moving statistics when an epoch ends on this rank, and as a validation begins."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[list[np.ndarray]] = []
        self.merged: list[list[np.ndarray]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.last = moving(self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        self.own.append(self.last)
        self.merged.append(moving(self.model))


@several
def test_moving_statistics_are_merged_before_each_validation(runtime, communicator, note):
    counting: Any = problems.Counting(communicator)
    x, y = problems.digits(65)  # 64 and 1: all ranks but the first see less
    with Runtime(counting).use() as counted:
        model = normalised(counted)
        counted.broadcast(model)
        kept = Kept()
        part = counted.shard((x, y), batch_size=64)
        validation = counted.shard(problems.digits(50, 200), batch_size=64)
        counting.calls.clear()
        model.fit(
            part,
            validation_data=validation,
            epochs=2,
            verbose=0,
            callbacks=[kept, callbacks.GlobalMetrics()],
        )
    assert counting.calls.count("allreduce") == 2 * 2, "statistics and metrics, each epoch"
    seen = float(sum(len(batch[0]) for batch in part))
    everyone = communicator.allgather_object((seen, kept.own))
    total = sum(count for count, _ in everyone)
    assert total == len(x)
    for epoch in range(2):
        weighted = [[count * w.astype("float64") for w in own[epoch]] for count, own in everyone]
        expected = [np.sum(parts, 0) / total for parts in zip(*weighted, strict=True)]
        difference = problems.worst(kept.merged[epoch], expected)
        note("moving statistics after the merge", difference)
        assert difference <= 1e-6
        assert problems.worst(kept.own[epoch], kept.merged[epoch]) > 1e-4
    assert len(set(communicator.allgather_object(tuple(problems.bits(moving(model)))))) == 1


@once
def test_what_is_saved_holds_the_merged_statistics(runtime, communicator, shared_path):
    model = normalised(runtime)
    runtime.broadcast(model)
    path = str(shared_path / "{epoch}.keras")
    save = callbacks.ModelCheckpoint(path, save_freq=1)
    model.fit(
        runtime.shard(problems.digits(128), batch_size=64), verbose=0, callbacks=[save], epochs=1
    )
    communicator.barrier()
    saved = keras.models.load_model(shared_path / "1.keras")
    assert problems.bits(moving(saved)) == problems.bits(moving(model))
    assert len(set(communicator.allgather_object(tuple(problems.bits(moving(model)))))) == 1


@once
def test_a_script_without_our_callbacks_validates_alike(runtime, communicator):
    model = normalised(runtime)
    runtime.broadcast(model)
    data = problems.digits(128)
    model.fit(runtime.shard(data, batch_size=64), verbose=0)
    own = tuple(problems.bits(moving(model)))
    assert len(set(communicator.allgather_object(own))) == runtime.size
    x, y = problems.digits(40, 300)
    results = orchestrator.evaluate(model, runtime.shard((x, y), batch_size=16))
    assert len(set(communicator.allgather_object(tuple(problems.bits(moving(model)))))) == 1
    whole = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    np.testing.assert_allclose(results["loss"], whole["loss"], rtol=1e-6)
    assert results["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-7)


@once
def test_frozen_statistics_travel_nowhere(runtime, communicator):
    counting: Any = problems.Counting(communicator)
    with Runtime(counting).use() as counted:
        model = normalised(counted, frozen=True)
        counted.broadcast(model)
        counting.calls.clear()
        model.fit(
            counted.shard(problems.digits(96), batch_size=32),
            validation_data=counted.shard(problems.digits(20, 99), batch_size=32),
            verbose=0,
        )
    assert counting.calls.count("allreduce") == 0


def trained(runtime, count, masked=False):
    model = sequence(runtime) if masked else normalised(runtime, synchronized=True, momentum=0.9)
    runtime.broadcast(model)
    data = padded(count) if masked else problems.digits(count)
    model.fit(runtime.shard(data, batch_size=16), epochs=3, verbose=0)
    return [w.astype("float64") for w in model.get_weights()]


def padded(count):
    generator = np.random.default_rng(1)
    x = generator.standard_normal((count, 5, 3)).astype("float32")
    x[np.arange(5) >= generator.integers(1, 6, (count, 1))] = 0
    return x, generator.standard_normal((count, 5, 1)).astype("float32")


def sequence(runtime):
    start = keras.initializers.GlorotUniform(seed=1)
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            keras.layers.Masking(),
            keras.layers.BatchNormalization(synchronized=True, momentum=0.9),
            keras.layers.Dense(1, kernel_initializer=start),
        ]
    )
    model.compile(runtime.distribute(keras.optimizers.SGD(0.1)), "mse")
    return model


# 53 = 3 x 16 + 5, and 49 = 3 x 16 + 1, where the other ranks' parts are empty.
@once
@pytest.mark.parametrize(("count", "masked"), [(53, False), (49, False), (53, True)])
def test_synchronized_batch_normalization_is_that_of_one_process(
    runtime, communicator, note, count, masked
):
    ours = trained(runtime, count, masked)
    assert len(set(communicator.allgather_object(tuple(problems.bits(ours))))) == 1
    theirs = trained(problems.alone(), count, masked) if runtime.is_root else 0
    worst = problems.worst(ours, communicator.broadcast_object(theirs))
    note(f"weights, synchronized statistics{', masked' * masked}", worst)
    assert worst <= 5e-6


def augmented(runtime):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.RandomFlip(seed=3),
            keras.layers.RandomTranslation(0.3, 0.3),
            keras.layers.GaussianNoise(0.3),
            keras.layers.Dropout(0.5),
        ]
    )
    model.compile(runtime.distribute(keras.optimizers.SGD()), "mse")
    return model


@once
def test_augmentation_differs_by_rank_and_repeats_with_the_seed(runtime, communicator):
    image = np.arange(64, dtype="float32").reshape(1, 8, 8, 1)

    def drawn(seed):
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model = augmented(runtime)
        runtime.broadcast(model)
        return [np.asarray(model(image, training=True)) for _ in range(2)]

    first, again, other = drawn(5), drawn(5), drawn(6)
    assert problems.bits(first) == problems.bits(again)
    assert problems.bits(first) != problems.bits(other)
    everyone = communicator.allgather_object(tuple(problems.bits(first)))
    assert len(set(everyone)) == runtime.size


class Flip(keras.callbacks.Callback):
    """Flips the lowest bit of one weight on one rank, after one batch."""

    def __init__(self, mine: bool, at: int) -> None:
        super().__init__()
        self._mine, self._at = mine, at

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._mine and batch == self._at:
            kernel = self.model.trainable_variables[0]
            bits = kernel.numpy().copy()
            bits.view(np.int32).reshape(-1)[100] ^= 1
            kernel.assign(bits)


@several
@pytest.mark.parametrize("check_freq", ["epoch", pytest.param(2, marks=once)])
def test_the_guard_finds_one_flipped_bit(runtime, communicator, check_freq):
    model = problems.mlp(16)
    model.compile(
        runtime.distribute(keras.optimizers.Adam(1e-2)), "sparse_categorical_crossentropy"
    )
    runtime.broadcast(model)
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    with pytest.raises(DivergedError) as caught:
        model.fit(
            runtime.shard(problems.digits(320), batch_size=64),
            epochs=2,
            verbose=0,
            callbacks=[
                count,
                Flip(runtime.rank == runtime.size - 1, at=2),
                callbacks.ConsistencyGuard(check_freq),
            ],
        )
    assert len(steps) == (5 if check_freq == "epoch" else 4), "the first check after the flip"
    messages = communicator.allgather_object(str(caught.value))
    assert len(set(messages)) == 1
    assert model.trainable_variables[0].path in messages[0]
    assert f"rank(s) {runtime.size - 1} " in messages[0]
