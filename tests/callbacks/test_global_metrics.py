"""GlobalMetrics: where it stands in the list, and what it writes into the logs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from orchestrator import callbacks
from orchestrator.callbacks import EarlyStopping, GlobalMetrics, ReduceLROnPlateau
from orchestrator.runtime import Runtime
from tests.callbacks.models import X, Y, fit, make
from tests.fakes import FakeCommunicator


class Witness(keras.callbacks.Callback):
    """Notes the list it is in, and the logs it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(dict(logs or {}))


def listed(*members: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    return keras.callbacks.CallbackList(list(members), model=make()).callbacks


@pytest.mark.parametrize(
    "make_one",
    [
        EarlyStopping,
        ReduceLROnPlateau,
        lambda: callbacks.ModelCheckpoint("x.keras"),
        lambda: callbacks.CSVLogger("x.csv"),
    ],
)
def test_it_inserts_itself_first(make_one):
    other, ours = Witness(), make_one()
    members = listed(other, ours)
    assert isinstance(members[0], GlobalMetrics)
    assert [m for m in members if m in (other, ours)] == [other, ours]
    assert members[0].model is ours.model


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_the_users_own_is_moved_first(position):
    own, stopper, plateau, other = GlobalMetrics(), EarlyStopping(), ReduceLROnPlateau(), Witness()
    given: list[keras.callbacks.Callback] = [stopper, other, plateau]
    given.insert(position, own)
    members = listed(*given)
    assert members[0] is own
    assert [m for m in members if m in given[:] and m is not own] == [stopper, other, plateau]
    assert sum(isinstance(m, GlobalMetrics) for m in members) == 1


def test_once_only():
    members = listed(EarlyStopping(), Witness(), ReduceLROnPlateau(), EarlyStopping("loss"))
    assert sum(isinstance(m, GlobalMetrics) for m in members) == 1
    assert len([m for m in members if isinstance(m, EarlyStopping)]) == 2


def test_not_where_nobody_needs_it():
    assert not any(isinstance(m, GlobalMetrics) for m in listed(Witness()))


def test_driven_by_hand_there_is_no_list():
    stopper = EarlyStopping()
    stopper.set_model(make())  # and no error


def test_a_callback_list_of_the_users_own_is_not_touched_twice():
    stopper = EarlyStopping(patience=9)
    model = make()
    fit(model, stopper)
    fit(model, stopper)
    members = keras.callbacks.CallbackList([stopper], model=model).callbacks
    assert sum(isinstance(m, GlobalMetrics) for m in members) == 1


def test_one_process_sees_what_keras_says():
    logs = []
    for extra in ([], [GlobalMetrics()]):
        witness = Witness()
        fit(make(), *extra, witness, epochs=2)
        logs.append(witness.seen)
    assert logs[0] == logs[1]
    assert set(logs[0][0]) == {"loss", "accuracy", "val_loss", "val_accuracy"}


def fit_on_two(*members, communicator=None, **options):
    communicator = communicator or FakeCommunicator()
    model = make(run_eagerly=False)
    with Runtime(communicator).use():
        history = fit(model, *members, **options)
    return communicator, history


def test_one_collective_an_epoch():
    communicator, _ = fit_on_two(GlobalMetrics(), EarlyStopping(patience=9), epochs=3)
    assert communicator.calls.count("allreduce") == 3
    assert set(communicator.calls) == {"allreduce", "allgather_object"}
    assert communicator.calls.count("allgather_object") == 1, "the comparison of the first step"


def test_results_come_from_summed_state_and_everyone_sees_them():
    """The other rank saw so many samples, all of them wrong, with no loss."""

    def reduce(flat):
        # training then validation, each: loss total, loss count, accuracy total, accuracy count
        assert flat.size == 8
        return flat + np.array([0, 12, 0, 12, 0, 5, 0, 5])

    witness, plain = Witness(), Witness()
    fit(make(run_eagerly=False), plain)
    communicator = FakeCommunicator(reduce=reduce)
    _, history = fit_on_two(GlobalMetrics(), witness, communicator=communicator)
    expected = {name: value / 2 for name, value in plain.seen[0].items()}
    assert witness.seen[0] == pytest.approx(expected, rel=1e-5)
    assert {k: v[0] for k, v in history.history.items()} == pytest.approx(expected, rel=1e-5)


def test_without_validation():
    communicator, history = fit_on_two(GlobalMetrics(), epochs=2, validation_data=None)
    assert communicator.calls.count("allreduce") == 2
    assert set(history.history) == {"loss", "accuracy"}


def test_validation_every_other_epoch():
    sizes = []
    communicator = FakeCommunicator(reduce=lambda a: sizes.append(a.size) or a * 2)
    witness = Witness()
    fit_on_two(GlobalMetrics(), witness, communicator=communicator, epochs=4, validation_freq=2)
    assert sizes == [4, 8, 4, 8]
    assert ["val_loss" in logs for logs in witness.seen] == [False, True, False, True]


def test_what_a_train_step_returns_is_averaged():
    class Model(keras.Sequential):
        def train_step(self, data):
            return {**super().train_step(data), "norm": keras.ops.convert_to_tensor(3.0)}

    keras.utils.set_random_seed(1)
    model = Model([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    sizes = []

    def reduce(flat):
        sizes.append(flat.size)
        other = flat.copy()
        other[2] = 5.0  # loss total, loss count, norm
        return flat + other

    witness = Witness()
    with Runtime(FakeCommunicator(reduce=reduce)).use():
        model.fit(X, Y, verbose=0, callbacks=[GlobalMetrics(), witness])
    assert sizes == [3]
    assert witness.seen[0]["norm"] == 4.0


def test_evaluate_alone_does_not_communicate():
    communicator = FakeCommunicator()
    model = make(run_eagerly=False)
    with Runtime(communicator).use():
        model.evaluate(X, Y, verbose=0, callbacks=[GlobalMetrics()])
    assert communicator.calls == []
