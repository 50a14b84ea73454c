"""`init()` and the `Runtime` it returns: this process's place among the ranks."""

from __future__ import annotations

import contextlib
import math
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import keras
import tensorflow as tf

from orchestrator import (
    agreement,
    backends,
    data,
    fitting,
    gradients,
    mirrored,
    optimizer,
    steps,
    waits,
)
from orchestrator.communicators.base import WIRES, Communicator, Wire
from orchestrator.communicators.single import SingleCommunicator
from orchestrator.config import BACKENDS, SettingError
from orchestrator.deadline import Deadline
from orchestrator.events import Events
from orchestrator.faults import Faults
from orchestrator.flags import Flags
from orchestrator.sources.position import Position
from orchestrator.times import Times

T = TypeVar("T")

_default: Runtime | None = None
_thread = threading.local()


class Runtime:
    """The ranks, and what a Keras script needs from them. Made by `init`.

    Attributes:
        communicator: The collectives, for code of your own.
        backend: `"horovod"`, `"mpi"`, `"mirrored"` or `"single"`.
        seed: The seed every rank's Python, NumPy and TensorFlow generators began with.
        strategy: The `tf.distribute.MirroredStrategy`, or `None`.
        events: Where decisions are recorded; nowhere by default.
        flags: What a rank has to tell the others at the end of a step.
        times: Where this rank's time goes while it trains.
        positions: Where this rank is in what it gave to `shard`, in the order of the calls.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        backend: str | None = None,
        seed: int = 0,
        strategy: tf.distribute.Strategy | None = None,
        gradient_buckets: int = 1,
        gradient_compression: Wire | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.communicator = communicator
        self.backend = backend or communicator.name
        self.seed = seed
        self.strategy = strategy
        self.events = Events()
        self.flags = Flags(alone=communicator.size == 1)
        self.times = Times(waits.of(communicator) or waits.Waits(math.inf))
        self.positions: list[Position] = []
        self._buckets = gradient_buckets
        self._compression: Wire | None = gradient_compression
        self._said: set[str] = set()
        self._deadline = deadline

    @property
    def rank(self) -> int:
        """This process's number, 0 to `size - 1`."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """Number of processes; 1 under MirroredStrategy, whatever the replicas."""
        return self.communicator.size

    @property
    def local_rank(self) -> int:
        """This process's number on its host."""
        return self.communicator.local_rank

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.communicator.rank == 0

    @property
    def faults(self) -> Faults | None:
        """How this rank tells the others that it fails; `None` with one, or not by `init`."""
        return self._deadline.faults if self._deadline else None

    @property
    def replicas(self) -> int:
        """Copies of the model: the ranks, or the strategy's replicas."""
        return self.strategy.num_replicas_in_sync if self.strategy else self.size

    def scope(self) -> AbstractContextManager[Any]:
        """MirroredStrategy's scope, or a context that does nothing; build and compile inside."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def distribute(self, optimizer_: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
        """Makes a Keras optimizer average its gradients over all ranks; returns the same object.

        Each rank counts by its samples in the step, so uneven parts give the gradient of the
        global batch. Needs `broadcast(model)`. Does not communicate itself; each training step
        then makes one grouped collective a bucket.
        """
        return optimizer.distribute(
            optimizer_, self.communicator, self._buckets, self._compression, self.flags, self.times
        )

    def broadcast(self, model: keras.Model) -> None:
        """Gives all ranks rank 0's weights and optimizer state; called by all ranks.

        One message for each 64 MiB. A model not built yet is broadcast at its first step. Also
        readies the model's steps: sample counts for `distribute`, the comparison of weights
        after the first step, XLA off.
        """
        prepared = self.prepare(model)
        if prepared is not None:
            prepared.broadcast()

    def prepare(self, model: keras.Model) -> steps.Steps | None:
        """Readies a model's steps, once; `broadcast` and our callbacks call it.

        Raises:
            RuntimeError: Under MirroredStrategy, the model was built outside `scope()`.
        """
        if self.strategy is not None:
            mirrored.prepare(model, self.strategy)
        return steps.prepare(model, self.communicator, self.say_once, self.times)

    samples = staticmethod(gradients.samples)

    def shard(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        validation_split: float | None = None,
        steps: int | None = None,
    ) -> Any:
        """This rank's part of every global batch; called by all ranks. See `data.shard`.

        Under MirroredStrategy Keras hands the parts to the replicas, and all of it is returned.
        """
        self.positions.append(Position())
        part = data.shard(
            dataset,
            self.communicator,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            validation_split=validation_split,
            steps=steps,
            position=self.positions[-1],
            say=self.say_once,
        )
        return fitting.mark(part)

    def on_root(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its result on all ranks; called by all ranks.

        See `agreement.on_root`.
        """
        return agreement.on_root(self.communicator, function)

    def on_all(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank, where it may fail on one only; called by all ranks.

        See `agreement.on_all`.
        """
        return agreement.on_all(self.communicator, function)

    def reseed(self) -> None:
        """Seeds Python, NumPy and TensorFlow anew, with `seed`; does not communicate."""
        keras.utils.set_random_seed(self.seed)

    def say(self, message: str) -> None:
        """Prints a line, on rank 0 only."""
        if self.is_root:
            print(message, flush=True)

    def say_once(self, message: str) -> None:
        """Prints a line the first time it is given, on rank 0 only."""
        if message not in self._said:
            self._said.add(message)
            self.say(message)

    @contextlib.contextmanager
    def use(self) -> Iterator[Runtime]:
        """Makes this the calling thread's current runtime inside the block."""
        previous = getattr(_thread, "runtime", None)
        _thread.runtime = self
        try:
            yield self
        finally:
            _thread.runtime = previous

    def close(self) -> None:
        """Forgets that `init` was called, so that it can be called again."""
        global _default
        if self._deadline is not None:
            self._deadline.stop()
        if _default is self:
            _default = None


def current() -> Runtime:
    """The runtime of this thread, or of `init`; one of a single process where there is neither."""
    return getattr(_thread, "runtime", None) or _default or Runtime(SingleCommunicator())


def init(
    backend: str = "auto",
    *,
    seed: int | None = None,
    replicas: int | None = None,
    deterministic: bool = False,
    gradient_buckets: int = 1,
    gradient_compression: Wire | None = None,
    timeout: float = 600.0,
) -> Runtime:
    """Joins the ranks: chooses the backend, pins this rank's GPU, seeds; called by all, once.

    Args:
        backend: `"auto"` (default) takes what the launcher says: Horovod under `horovodrun`,
            MPI under `mpiexec`, else MirroredStrategy with more than one GPU, else one process.
        seed: Seeds Python, NumPy and TensorFlow, alike on all ranks. By default rank 0 draws one.
        replicas: For `"mirrored"` only: how many replicas; all GPUs by default, and logical CPU
            devices where there is no GPU.
        deterministic: Makes TensorFlow's operations deterministic (slower). False by default.
        gradient_buckets: Grouped collectives a training step, 1 by default.
        gradient_compression: `"fp16"` or `"bf16"` halves what gradients weigh on the wire, and
            their precision there; `None` by default.
        timeout: Seconds that a rank waits for the others before all say what they do and end; 600
            by default, and three times that until the first step is made.

    Raises:
        SettingError: An unknown backend, one that is not the launcher's, or `replicas` where they
            have no meaning.
        RuntimeError: `init` was called before.
        ImportError: The backend's library is missing.
    """
    global _default
    if _default is not None:
        raise RuntimeError(
            f"orchestrator.init() was called before in this process (backend="
            f"{_default.backend!r}); call it once, and pass the Runtime it returns around."
        )
    _check(backend, gradient_buckets, gradient_compression, timeout)
    gpus = backends.visible_gpus()
    chosen = backends.detect(gpus) if backend == "auto" else backend
    if replicas is not None and (chosen != "mirrored" or replicas < 1):
        raise SettingError(
            f"replicas={replicas} with backend={chosen!r} is not allowed: replicas are for "
            "backend='mirrored', 1 or more."
        )
    communicator, deadline = backends.join(chosen, timeout)
    agreement.on_all(communicator, lambda: backends.pin_gpu(gpus, communicator))
    strategy = backends.mirror(gpus, replicas) if chosen == "mirrored" else None
    drawn = random.SystemRandom().randrange(2**31) if seed is None else seed
    drawn, launch = communicator.broadcast_object((drawn, secrets.token_hex(8)))
    seed = int(drawn)
    keras.utils.set_random_seed(seed)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    _default = Runtime(
        communicator,
        backend=chosen,
        seed=seed,
        strategy=strategy,
        gradient_buckets=gradient_buckets,
        gradient_compression=gradient_compression,
        deadline=deadline,
    )
    if deadline is not None:
        deadline.faults = Faults(communicator, launch)
        backends.abort_on_exception(deadline.faults)
    return _default


def _check(backend: str, buckets: int, compression: str | None, timeout: float) -> None:
    if backend not in BACKENDS:
        raise SettingError(f"backend={backend!r} is unknown. Allowed: {', '.join(BACKENDS)}.")
    if buckets < 1:
        raise SettingError(f"gradient_buckets={buckets} is not allowed: 1 or more.")
    if compression not in (None, *WIRES):
        raise SettingError(
            f"gradient_compression={compression!r} is unknown. Allowed: {', '.join(WIRES)} or None."
        )
    if not 0 < timeout < float("inf"):
        raise SettingError(f"timeout={timeout} is not allowed: seconds, above 0.")
