"""What goes around a model's steps: sample counts, empty parts, XLA, the first-step self-test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from orchestrator import (
    additive,
    empty_parts,
    fitting,
    gradients,
    losses,
    statistics,
    waits,
    watch,
    weights,
)
from orchestrator import optimizer as optimizers
from orchestrator.communicators.base import Communicator
from orchestrator.times import Times


class DivergedError(RuntimeError):
    """The ranks' weights differ."""


class Steps:
    """One model's steps on many ranks; made once a model by `prepare`.

    `train_step` and `test_step` are wrapped so that the optimizer learns what is behind a step's
    gradients, and so that a rank without samples in a step takes part in its collectives and
    leaves no trace in its own state. The function Keras makes from them compares the ranks'
    weights after its first call. Before an evaluation moving statistics are brought together.
    """

    def __init__(
        self,
        model: keras.Model,
        communicator: Communicator,
        say: Callable[[str], None],
        times: Times | None = None,
    ) -> None:
        self._model = model
        self._communicator = communicator
        self._say = say
        self._broadcast_pending = False
        self._broadcast_done = False
        self.statistics = statistics.MovingStatistics(model, communicator)
        self._make_train_function = model.make_train_function
        self._make_test_function = model.make_test_function
        losses.count_by_divisor(model, losses.BatchLosses(model, communicator.size).keep)
        self._waits = waits.of(communicator) or waits.Waits(math.inf)
        self._times = times or Times(self._waits)
        fitting.around(model, communicator, say)
        model.train_step = self._on_own_samples(model.train_step, training=True)
        model.test_step = self._on_own_samples(model.test_step, training=False)
        model.make_train_function = self._train_function
        model.make_test_function = self._test_function
        # Functions Keras traced before this call do not know the wrapped steps.
        model.train_function = None
        model.test_function = None

    def broadcast(self) -> None:
        """Broadcasts rank 0's state now, or at the first step where the model is not built yet."""
        if self._model.built:
            weights.broadcast_model(self._communicator, self._model)
            self._broadcast_done = True
        self._broadcast_pending = not self._model.built

    def _on_own_samples(self, step: empty_parts.Step, training: bool) -> empty_parts.Step:
        model = self._model

        @tf.autograph.experimental.do_not_convert
        def wrapped(data: Any) -> Any:
            if training:
                data = self._times.arrived(data)
            count, _ = empty_parts.batch_size(data)
            state = additive.state_variables(model)
            if training:
                statistics.synchronize(model, self._communicator, self._times)
                state += _of_this_rank(model)
                self.statistics.saw(count)
            with gradients.samples(count), watch.step(model, count):
                return empty_parts.run(step, data, state)

        return wrapped

    def _test_function(self, force: bool = False) -> Any:
        """Called by Keras on all ranks, as each evaluation begins."""
        self.statistics.merge()
        return self._make_test_function(force)

    def _train_function(self, force: bool = False) -> Any:
        model = self._model
        for optimizer in weights.optimizers(model):
            optimizers.settle(optimizer)
        if model.jit_compile:
            self._say(
                "XLA compilation of the training step is off: XLA cannot compile the reduction "
                "of gradients between ranks (compile with jit_compile=False to say so yourself)."
            )
            model.jit_compile = False
        if self._broadcast_pending and model.built:
            self.broadcast()
        before = model.train_function
        self._make_train_function(force)
        if model.train_function is not before:
            model.train_function = self._self_testing(model.train_function)
        return model.train_function

    def _self_testing(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        watched, model = self._waits, self._model

        def step(iterator: Any, first: bool = False) -> Any:
            self.statistics.stale = True
            self._times.begin(model.steps_per_execution)
            with watched.on(waits.FIRST_STEP if first else waits.STEP, first=first):
                logs = function(iterator)
            watched.stepped(model.steps_per_execution)
            return logs

        def first_step(iterator: Any) -> Any:
            if self._broadcast_pending:
                _build(self._model, iterator)
                self.broadcast()
            logs = step(iterator, first=True)
            self._model.train_function = step
            self.compare_weights()
            return logs

        return first_step

    def compare_weights(self) -> None:
        """Compares every weight and optimizer variable across ranks; called by all ranks.

        Raises:
            DivergedError: On every rank, if any differs on any.
        """
        used = [o for o in weights.optimizers(self._model) if int(optimizers.calls(o).numpy())]
        mine = {
            "digests": [
                (v.path, str(v.shape), weights.digest(v.numpy()))
                for v in weights.shared_variables(self._model)
            ],
            "distributed": all(optimizers.is_distributed(o) for o in used),
            "broadcast": self._broadcast_done,
        }
        everyone = self._communicator.allgather_object(mine)
        for theirs in zip(*(rank["digests"] for rank in everyone), strict=False):
            differing = [rank for rank, entry in enumerate(theirs) if entry[1:] != theirs[0][1:]]
            if differing:
                raise DivergedError(_explain(theirs[0][0], differing, everyone))
        lengths = [len(rank["digests"]) for rank in everyone]
        if len(set(lengths)) > 1:
            raise DivergedError(
                f"After the first training step the ranks hold different numbers of variables: "
                f"{lengths} (by rank). Every rank must build the same model."
            )


def _of_this_rank(model: keras.Model) -> list[Any]:
    """What a training step changes on one rank alone, such as seeds and moving statistics."""
    shared = {
        id(v)
        for layer in model._flatten_layers()
        if statistics.is_synchronized(layer)
        for v in layer.non_trainable_variables
    }
    return [v for v in model.non_trainable_variables if id(v) not in shared]


def _build(model: keras.Model, iterator: Any) -> None:
    """Builds a model that Keras would build only while it traces the first step."""
    if not hasattr(iterator, "element_spec"):
        raise RuntimeError(
            "This model is not built yet, so rank 0's weights cannot be broadcast before its first "
            "step. Give it a keras.Input, call model.build(shape), or train it with model.fit."
        )
    x, _, _ = keras.utils.unpack_x_y_sample_weight(iterator.element_spec)
    model(tf.nest.map_structure(lambda spec: keras.KerasTensor(spec.shape, spec.dtype.name), x))


def _explain(path: str, differing: list[int], everyone: list[dict[str, Any]]) -> str:
    if not all(rank["distributed"] for rank in everyone):
        cause = (
            "the optimizer is not distributed, so the ranks do not share gradients: compile the "
            "model with optimizer=runtime.distribute(optimizer)"
        )
    elif not all(rank["broadcast"] for rank in everyone):
        cause = (
            "the ranks started from different weights (unseeded initialisers and no broadcast): "
            "call runtime.broadcast(model) before model.fit"
        )
    else:
        cause = (
            "the ranks did not run the same step: look for different data shapes, for a model "
            "or a loss that depends on the rank, or for weights changed outside the optimizer"
        )
    return (
        f"After the first training step the ranks' weights differ: variable {path!r} on rank(s) "
        f"{', '.join(map(str, differing))} is not that of rank 0. The likely cause: {cause}."
    )


_ATTRIBUTE = "_orchestrator_steps"


def prepare(
    model: keras.Model,
    communicator: Communicator,
    say: Callable[[str], None],
    times: Times | None = None,
) -> Steps | None:
    """Readies a model's steps for many ranks, once a model; does not communicate.

    Args:
        model: Any Keras model. Methods are wrapped on the instance: its class and its saved
            files stay as they are.
        communicator: The ranks.
        say: Called with a line for the terminal.
        times: Where the seconds of its training steps are noted.

    Returns:
        The model's `Steps`, or `None` with one rank, where nothing needs doing.
    """
    if communicator.size == 1:
        return None
    steps = getattr(model, _ATTRIBUTE, None)
    if steps is None:
        steps = Steps(model, communicator, say, times)
        object.__setattr__(model, _ATTRIBUTE, steps)
    return steps
