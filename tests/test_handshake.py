"""What differs between ranks is found before they train, and named with who has it."""

from __future__ import annotations

import importlib

import keras
import tensorflow as tf

from orchestrator import handshake
from orchestrator.config import SettingError, Settings
from tests.distributed import threads
from tests.fakes import FakeCommunicator


def settings(**train: int) -> Settings:
    tree = {
        "run": {"dir": "x"},
        "train": {"epochs": 3, "global_batch_size": 8, **train},
        "data": {"factory": "mine:data"},
        "model": {"factory": "mine:model"},
    }
    return Settings.model_validate(tree)


def net(units: int = 2) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, name="out")], name="net")
    model.compile(keras.optimizers.SGD(), "mse")
    return model


def refusals(*facts: dict) -> list[str]:
    """What each rank says."""

    def rank(communicator):
        try:
            handshake.agree(communicator, facts[communicator.rank])
        except SettingError as error:
            return str(error)
        return ""

    return threads.run(len(facts), rank)


def test_alike():
    facts = [handshake.of_programs(settings()) for _ in range(2)]
    assert refusals(*facts) == ["", ""]
    communicator = FakeCommunicator()
    handshake.agree(communicator, facts[0])
    assert communicator.calls == ["allgather_object"], "one small message"
    alone = FakeCommunicator(0, 1)
    handshake.agree(alone, facts[0])
    assert alone.calls == []


def test_settings():
    one, two = handshake.of_programs(settings()), handshake.of_programs(settings(epochs=4))
    said = refusals(one, two, one, one)
    assert len(set(said)) == 1, "all ranks say the same"
    assert "\n  train.epochs: 3 on ranks 0, 2, 3; 4 on rank 1\n" in said[0]
    assert said[0].count("\n") == 2


def test_versions():
    ours = handshake.of_programs(settings())
    assert ours["TensorFlow"] == tf.__version__
    said = refusals(ours, {**ours, "Keras": "3.14.0", "Python": "3.12.1"})[0]
    assert f"Keras: {keras.__version__} on rank 0; 3.14.0 on rank 1" in said
    assert "Python: 3.11" in said


def test_code(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("def data(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("theirs")
    before = handshake.of_code(theirs.data, len)
    assert list(before) == ["the source of theirs"]
    (tmp_path / "theirs.py").write_text("def data(): return 2\n")
    after = handshake.of_code(theirs.data)
    assert "the source of theirs: sha256 " in refusals(before, after)[0]


def test_models_callbacks_and_steps():
    data = tf.data.Dataset.range(10).batch(3)
    ours = handshake.of_training(net(), [keras.callbacks.EarlyStopping()], data)
    assert ours["steps of an epoch"] == "4"
    assert (
        "the model: number 1 is net/out/kernel (3, 2) float32 on rank 0; net/out/kernel (3, 4)"
        in (
            refusals(ours, handshake.of_training(net(4), [keras.callbacks.EarlyStopping()], data))[
                0
            ]
        )
    )
    said = refusals(ours, handshake.of_training(net(), [], data.take(2)))[0]
    assert "the callbacks: number 1 is EarlyStopping on rank 0; nothing on rank 1" in said
    assert "steps of an epoch: 4 on rank 0; 2 on rank 1" in said
    endless = handshake.of_training(net(), [], data.repeat())
    assert "steps of an epoch" not in endless
    assert "steps of an epoch: 4 on rank 0; nothing on rank 1" in refusals(ours, endless)[0]


def test_many_ranks_are_not_all_listed():
    values = {f"{i}": "a" for i in range(20)}
    said = handshake._by_value([*values.values(), "b"])
    assert said == "a on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more; b on rank 20"
