"""The states of a process's random generators. Those of a model's layers are variables of it."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random import seed_generator

_KERAS = "global_seed_generator"
_eager = importlib.import_module("tensorflow.python.eager.context")
_stateful = importlib.import_module("tensorflow.python.ops.stateful_random_ops")


def state() -> dict[str, Any]:
    """This process's Python, NumPy, TensorFlow and Keras generators; does not communicate."""
    keras_ = global_state.get_global_attribute(_KERAS)
    generator = _stateful.global_generator
    return {
        "python": _of_python(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "tensorflow_eager": _of_python(_eager_generator().getstate()),
        "tensorflow": None if generator is None else generator.state.numpy(),
        "keras": None if keras_ is None else np.asarray(keras_.state),
    }


def restore(state: dict[str, Any]) -> None:
    """Sets all of them as they were."""
    # First those that are seeded by others where they are not there yet.
    if state["keras"] is not None:
        seed_generator.global_seed_generator().state.assign(state["keras"])
    if state["tensorflow"] is not None:
        tf.random.get_global_generator().state.assign(state["tensorflow"])
    _eager_generator().setstate(_to_python(state["tensorflow_eager"]))
    random.setstate(_to_python(state["python"]))
    np.random.set_state(state["numpy"])


def _eager_generator() -> random.Random:
    """What TensorFlow draws an operation's seed from where none is given outside of graphs."""
    context = _eager.context()
    if not hasattr(context, "_rng"):  # until a seed is set there is none
        tf.random.set_seed(0)
    return context._rng


def _of_python(state: Any) -> dict[str, Any]:
    version, numbers, gauss = state
    return {"version": version, "numbers": np.array(numbers, np.uint32), "gauss": gauss}


def _to_python(state: dict[str, Any]) -> Any:
    return state["version"], tuple(int(n) for n in state["numbers"]), state["gauss"]
