"""MirroredStrategy made exact: uneven replicas weighted, gradients clipped as one, empty parts."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from orchestrator import additive, empty_parts, gradients, losses
from orchestrator.config import SettingError

_ATTRIBUTE = "_orchestrator_mirrored"


def prepare(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Readies a model built under `strategy`, once; does not communicate.

    Raises:
        RuntimeError: The model was built outside `scope()`.
    """
    if model.distribute_strategy is not strategy:
        raise RuntimeError(
            "backend='mirrored' trains a model on all replicas only where it is built and "
            "compiled inside `with runtime.scope():`; this one was built outside it."
        )
    if getattr(model, _ATTRIBUTE, False):
        return
    object.__setattr__(model, _ATTRIBUTE, True)
    _build_without_reading(model)
    losses.count_by_divisor(model, _of_all_replicas)
    model.train_step = _on_a_replica(model, model.train_step)
    model.test_step = _on_a_replica(model, model.test_step)
    model.train_function = model.test_function = None


def _on_a_replica(model: keras.Model, step: empty_parts.Step) -> empty_parts.Step:
    @tf.autograph.experimental.do_not_convert
    def wrapped(data: Any) -> Any:
        if model.optimizer is not None:
            _reduce_first(model.optimizer)
        count, _ = empty_parts.batch_size(data)
        with gradients.samples(count):
            # Each replica has metric state of its own; other variables may not be set here.
            return empty_parts.run(step, data, additive.state_variables(model))

    return wrapped


def _of_all_replicas(loss: tf.Tensor, said: gradients.Behind) -> tf.Tensor:
    """The global batch's loss as a value, and as a gradient this replica's share of it.

    Keras gives each replica the same share, 1 of `replicas`, whatever its samples. One small
    message between the replicas, in this process.
    """
    context = tf.distribute.get_replica_context()
    replicas = tf.cast(context.num_replicas_in_sync, loss.dtype)
    if said.summed:
        share, value = loss, context.all_reduce(tf.distribute.ReduceOp.SUM, loss) / replicas
    else:
        count = tf.cast(said.count, loss.dtype)
        own = tf.stack([tf.math.multiply_no_nan(loss, count), count])
        total, counts = tf.unstack(context.all_reduce(tf.distribute.ReduceOp.SUM, own))
        share = tf.math.multiply_no_nan(loss, tf.math.divide_no_nan(count * replicas, counts))
        value = tf.math.divide_no_nan(total, counts)
    return share + tf.stop_gradient(value - share)


def _reduce_first(optimizer: Any) -> None:
    """Sums gradients over the replicas before the optimizer sees them, instead of within it.

    Keras clips each replica's gradient by itself, and looks for non-finite ones on the first
    replica alone; both are meant for the global batch's.
    """
    if "apply" in vars(optimizer):
        return
    innermost = getattr(optimizer, "inner_optimizer", optimizer)
    supported = tf.__internal__.distribute.strategy_supports_no_merge_call()
    if innermost.gradient_accumulation_steps and not supported:
        raise SettingError(
            f"gradient_accumulation_steps={innermost.gradient_accumulation_steps} does not work "
            "under MirroredStrategy on these devices, in Keras itself: its conditional update "
            "meets other replicas. Start ranks with horovodrun or mpiexec, or raise the batch size."
        )
    own = optimizer.apply

    def apply(grads: Any, trainable_variables: Any = None) -> None:
        grads = list(grads)
        places = [i for i, grad in enumerate(grads) if grad is not None]
        context = tf.distribute.get_replica_context()
        if context is not None and places:
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, [grads[i] for i in places])
            for i, grad in zip(places, total, strict=True):
                grads[i] = grad
        own(grads, trainable_variables)

    optimizer.apply = apply
    innermost._all_reduce_sum_gradients = list


def _build_without_reading(model: keras.Model) -> None:
    """Makes Keras build a model under a strategy from the data's spec instead of from a batch.

    Keras would open one more pass over the data to look at its first batch. A seeded shuffle
    then gives its second order in the first epoch, and the replicas train on other batches than
    one process does.
    """
    own = model._maybe_symbolic_build

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        dataset = getattr(iterator, "_distributed_dataset", None)
        if dataset is None:
            own(iterator=iterator, data_batch=data_batch)
        else:
            own(data_batch=tf.nest.map_structure(_of_one_replica, dataset.element_spec))

    model._maybe_symbolic_build = build


def _of_one_replica(spec: Any) -> Any:
    return getattr(spec, "_value_specs", [spec])[0]
