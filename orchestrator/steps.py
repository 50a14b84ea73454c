"""What goes around a model's steps: sample counts, empty parts, XLA, the first-step self-test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from orchestrator import optimizer as optimizers
from orchestrator import weights
from orchestrator.communicators.base import Communicator
from orchestrator.config import SettingError


class DivergedError(RuntimeError):
    """The ranks' weights differ after the first training step."""


class Steps:
    """One model's steps on many ranks; made once a model by `prepare`.

    `train_step` and `test_step` are wrapped so that the optimizer learns how many samples are
    behind a step, and so that a rank without samples in a step takes part in its collectives
    and leaves no trace in its own state. The function Keras makes from them compares the ranks'
    weights after its first call.
    """

    def __init__(
        self, model: keras.Model, communicator: Communicator, say: Callable[[str], None]
    ) -> None:
        self._model = model
        self._communicator = communicator
        self._say = say
        self._broadcast_pending = False
        self._broadcast_done = False
        self._make_train_function = model.make_train_function
        model.train_step = _on_own_samples(model, model.train_step, training=True)
        model.test_step = _on_own_samples(model, model.test_step, training=False)
        model.make_train_function = self._make_function
        # Functions Keras traced before this call do not know the wrapped steps.
        model.train_function = None
        model.test_function = None

    def broadcast(self) -> None:
        """Broadcasts rank 0's state now, or at the first step where the model is not built yet."""
        if self._model.built:
            weights.broadcast_model(self._communicator, self._model)
            self._broadcast_done = True
        self._broadcast_pending = not self._model.built

    def _make_function(self, force: bool = False) -> Any:
        model = self._model
        _refuse_sums(model)
        optimizers.settle(model.optimizer, self._communicator)
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
        def first_step(iterator: Any) -> Any:
            if self._broadcast_pending:
                _build(self._model, iterator)
                self.broadcast()
            logs = function(iterator)
            self._model.train_function = function
            self.compare_weights()
            return logs

        return first_step

    def compare_weights(self) -> None:
        """Compares every weight and optimizer variable across ranks; called by all ranks.

        Raises:
            DivergedError: On every rank, if any differs on any.
        """
        model = self._model
        variables = [*model.trainable_variables, *model.optimizer.variables]
        mine = {
            "digests": [(v.path, str(v.shape), weights.digest(v.numpy())) for v in variables],
            "distributed": optimizers.is_distributed(model.optimizer),
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


def _refuse_sums(model: keras.Model) -> None:
    """Gradients are averaged by samples, which is wrong for a loss that is a sum over them."""
    for loss in tf.nest.flatten(model.loss):
        if getattr(loss, "reduction", None) == "sum":
            raise SettingError(
                f"The loss {loss.name!r} has reduction='sum', which is not supported on many "
                "ranks: gradients are averaged by samples. Use 'sum_over_batch_size' (Keras's "
                "default) and multiply the learning rate by the global batch size."
            )


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


def _on_own_samples(
    model: keras.Model, step: Callable[[Any], Any], training: bool
) -> Callable[[Any], Any]:
    @tf.autograph.experimental.do_not_convert
    def wrapped(data: Any) -> Any:
        count, known = _batch_size(data)
        if known or not _is_dense(data):
            with optimizers.samples(count):
                return step(data)
        variables = list(model.metrics_variables)
        if training:
            variables += model.non_trainable_variables
        before = [tf.convert_to_tensor(v) for v in variables]
        stand_in = tf.cond(
            count > 0, lambda: _identity(data), lambda: tf.nest.map_structure(_one_zero, data)
        )
        with optimizers.samples(count):
            logs = step(stand_in)
        tf.cond(count > 0, tf.no_op, lambda: _restore(variables, before))
        return logs

    return wrapped


def _batch_size(data: Any) -> tuple[Any, bool]:
    """The number of samples in a batch (scalar int32), and whether it is known while tracing."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    first = next(leaf for leaf in tf.nest.flatten(x) if leaf is not None)
    static = first.shape[0]
    return (tf.shape(first)[0] if static is None else static), bool(static)


def _is_dense(data: Any) -> bool:
    return all(
        leaf is None
        or (tf.is_tensor(leaf) and not isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)))
        for leaf in tf.nest.flatten(data)
    )


def _identity(data: Any) -> Any:
    return tf.nest.map_structure(lambda leaf: None if leaf is None else tf.identity(leaf), data)


def _one_zero(leaf: Any) -> Any:
    if leaf is None:
        return None
    return tf.zeros(tf.concat([[1], tf.shape(leaf)[1:]], 0), leaf.dtype)


def _restore(variables: list[Any], values: list[tf.Tensor]) -> tf.Operation:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return tf.no_op()


_ATTRIBUTE = "_orchestrator_steps"


def prepare(
    model: keras.Model, communicator: Communicator, say: Callable[[str], None]
) -> Steps | None:
    """Readies a model's steps for many ranks, once a model; does not communicate.

    Args:
        model: Any Keras model; its `train_step`, `test_step` and `make_train_function` are
            wrapped on the instance, its class and its saved files stay as they are.
        communicator: The ranks.
        say: Called with a line for the terminal.

    Returns:
        The model's `Steps`, or `None` with one rank, where nothing needs doing.
    """
    if communicator.size == 1:
        return None
    steps = getattr(model, _ATTRIBUTE, None)
    if steps is None:
        steps = Steps(model, communicator, say)
        object.__setattr__(model, _ATTRIBUTE, steps)
    return steps


def build_without_reading(model: keras.Model) -> None:
    """Makes Keras build a model under a strategy from the data's spec instead of from a batch.

    Keras would open one more pass over the data to look at its first batch. A seeded shuffle
    then gives its second order in the first epoch, and the replicas train on other batches than
    one process does.
    """
    name = "_maybe_symbolic_build"
    if name in vars(model):
        return
    own = getattr(model, name)

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        dataset = getattr(iterator, "_distributed_dataset", None)
        if dataset is None:
            own(iterator=iterator, data_batch=data_batch)
        else:
            own(data_batch=tf.nest.map_structure(_of_one_replica, dataset.element_spec))

    setattr(model, name, build)


def _of_one_replica(spec: Any) -> Any:
    return getattr(spec, "_value_specs", [spec])[0]
