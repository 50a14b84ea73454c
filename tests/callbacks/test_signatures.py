"""Names, parameters, order and defaults are Keras's; what we add is keyword-only."""

from __future__ import annotations

import ast
import importlib.metadata
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


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint", "ReduceLROnPlateau"])
def test_an_unknown_mode_falls_back_to_auto(name):
    with pytest.warns(UserWarning, match="mode 'unknown' is unknown"):
        callback = getattr(callbacks, name)(*ARGUMENTS.get(name, ()), mode="unknown")
    assert callback.mode == "auto"


def horovods(name: str) -> list[tuple[str, object]]:
    """Parameters and defaults, read from Horovod's source: its library is not to be loaded here."""
    path = "horovod/tensorflow/keras/callbacks.py"
    files = importlib.metadata.files("horovod") or []
    (source,) = [file for file in files if file.as_posix() == path]
    tree = ast.parse(source.read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    (init,) = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    names = [one.arg for one in init.args.args[1:]]
    defaults = [ast.literal_eval(one) for one in init.args.defaults]
    needed = [inspect.Parameter.empty] * (len(names) - len(defaults))
    return list(zip(names, [*needed, *defaults], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "BroadcastGlobalVariablesCallback",
        "LearningRateScheduleCallback",
        "LearningRateWarmupCallback",
        "MetricAverageCallback",
    ],
)
def test_signature_of_horovods(name):
    ours = {p.name: p.default for p in parameters(getattr(callbacks, name))}
    theirs = horovods(name)
    assert list(ours) == [parameter for parameter, _ in theirs]
    for parameter, default in theirs:
        if default is not inspect.Parameter.empty:
            assert ours[parameter] == default, parameter
