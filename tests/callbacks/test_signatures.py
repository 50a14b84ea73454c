"""Names, parameters, order and defaults are Keras's; what we add is keyword-only."""

from __future__ import annotations

import inspect

import keras
import pytest

from orchestrator import callbacks

OURS = [
    "BackupAndRestore",
    "CSVLogger",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateScheduler",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "RemoteMonitor",
    "SwapEMAWeights",
    "TensorBoard",
    "TerminateOnNaN",
]
ARGUMENTS = {
    "BackupAndRestore": ("x",),
    "CSVLogger": ("x.csv",),
    "LearningRateScheduler": (float,),
    "ModelCheckpoint": ("x.keras",),
}


def parameters(kind: type) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())


@pytest.mark.parametrize("name", OURS)
def test_signature(name):
    theirs = [(p.name, p.default) for p in parameters(getattr(keras.callbacks, name))]
    ours = parameters(getattr(callbacks, name))
    shared = [p for p in ours if p.name in dict(theirs)]
    assert [(p.name, p.default) for p in shared] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in ours if p not in shared)


@pytest.mark.parametrize("name", OURS)
def test_isinstance_of_keras(name):
    callback = getattr(callbacks, name)(*ARGUMENTS.get(name, ()))
    assert isinstance(callback, getattr(keras.callbacks, name))


@pytest.mark.parametrize("name", OURS)
def test_attributes_are_keras(name):
    """Whoever reads `stopper.best` or `plateau.wait` finds what Keras keeps there."""
    arguments = ARGUMENTS.get(name, ())
    theirs = vars(getattr(keras.callbacks, name)(*arguments))
    ours = vars(getattr(callbacks, name)(*arguments))
    assert {k: ours[k] for k in theirs} == theirs


BESIDE_KERAS = [
    "BroadcastGlobalVariables",
    "BroadcastGlobalVariablesCallback",
    "ConsistencyGuard",
    "GlobalMetrics",
    "LearningRateScheduleCallback",
    "LearningRateWarmup",
    "LearningRateWarmupCallback",
    "MetricAverage",
    "MetricAverageCallback",
    "RankAware",
    "RankZero",
    "StoreCheckpoint",
    "Stragglers",
    "scaled_learning_rate",
]


def test_all_is_the_public_list():
    assert sorted(callbacks.__all__) == sorted([*OURS, *BESIDE_KERAS])


def test_none_of_keras_is_missing():
    """But those that `fit` adds itself, and Orbax's, whose checkpoints are those of a store."""
    theirs = {name for name, kind in vars(keras.callbacks).items() if isinstance(kind, type)}
    added = {"Callback", "CallbackList", "History", "ProgbarLogger"}
    assert theirs - added - set(OURS) <= {"OrbaxCheckpoint"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: callbacks.ReduceLROnPlateau(factor=1.0), "factor >= 1.0"),
        (lambda: callbacks.ModelCheckpoint("x.txt"), "must end in `.keras`"),
        (lambda: callbacks.ModelCheckpoint("x.keras", save_weights_only=True), r"\.weights\.h5"),
        (lambda: callbacks.ModelCheckpoint("x.keras", save_freq="often"), "save_freq"),
    ],
)
def test_bad_arguments_are_refused_as_keras_does(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_an_unknown_mode_falls_back_to_auto(name):
    with pytest.warns(UserWarning, match="mode 'unknown' is unknown"):
        callback = getattr(callbacks, name)(*ARGUMENTS.get(name, ()), mode="unknown")
    assert callback.mode == "auto"
