"""A model's state copied to host memory, and written from there in Keras's own formats."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import keras
import numpy as np
import tensorflow as tf

from orchestrator.checkpoint import layout
from orchestrator.checkpoint.stream import HashedFile
from orchestrator.weights import optimizers


class Snapshot:
    """A copy of all that `model.save` writes, in buffers made once and used again.

    `copy` holds up training for one memory copy; `write_weights` and `write_model` then run in
    any thread while the model trains on, and give what Keras would have written at the time of
    the copy. They read no variable of the model, but `write_model` its configuration: apart from
    values in variables (the learning rate is one) it is as at the time of writing.

    One thread at a time: no `copy` while a file is written. Does not communicate.

    Args:
        model: Built. Its variables may be more later on (an optimizer's): the next copy sees it.

    Raises:
        ValueError: The model is not built.
    """

    def __init__(self, model: keras.Model) -> None:
        if not model.built:
            raise ValueError(
                f"Snapshot() takes a built model, and {model.name!r} is not yet: call it on some "
                "data, or model.build(input_shape), first."
            )
        self._model = model
        self._buffers = _Buffers()
        self._known: list[Any] = []
        self._layout = layout.Layout([], is_lasting=False)
        self._is_filled = False
        self._prepare()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory the buffers take."""
        return sum(buffer.nbytes for _, buffer in self._buffers.held.values())

    def copy(self, instead: Sequence[tuple[Any, np.ndarray]] = ()) -> None:
        """Copies the model's variables as they are now; from a device, through host memory.

        Args:
            instead: Variables with values that are to be written for theirs.
        """
        current = _variables(self._model)
        if len(current) != len(self._known) or any(
            a is not b for a, b in zip(current, self._known, strict=True)
        ):
            self._prepare()
        self._is_filled = False
        for tensor, (_, buffer) in zip(self._read(), self._buffers.held.values(), strict=True):
            _copy(tensor, buffer)
        for variable, value in instead:
            if id(variable) in self._buffers.held:
                np.copyto(self._buffers.held[id(variable)][1], value)
        self._is_filled = True

    def not_finite(self) -> str | None:
        """The path of the first trainable variable whose copy holds a NaN or an infinity."""
        for variable in self._model.trainable_variables:
            _, copied = self._buffers.held.get(id(variable), (variable, np.zeros(0)))
            if not np.isfinite(copied).all():
                return variable.path
        return None

    def write_weights(self, path: str) -> str:
        """Writes what `model.save_weights` would have, and syncs it to the disk.

        Args:
            path: A local path ending in `.weights.h5`; a file there is overwritten.

        Returns:
            The file's SHA-256, 64 hexadecimal digits.

        Raises:
            OSError: As the filesystem says; a partial file may be left.
            RuntimeError: Nothing was copied, or the model was changed since.
        """
        _check_ending(path, ".weights.h5")
        pieces = self._pieces()
        with HashedFile(path) as file:
            for piece in pieces:
                file.write(piece)
        return file.digest

    def write_model(self, path: str) -> str:
        """Writes what `model.save` would have, to a path ending in `.keras`; as `write_weights`."""
        _check_ending(path, ".keras")
        pieces = self._pieces()
        with (
            HashedFile(path) as file,
            self._buffers,
            zipfile.ZipFile(cast(IO[bytes], file), "w") as archive,
        ):
            for name, text in layout.config(self._model).items():
                archive.writestr(name, text)
            with archive.open(layout.WEIGHTS, "w", force_zip64=True) as member:
                for piece in pieces:
                    member.write(cast(bytes, piece))
            layout.write_assets(self._model, archive)
        return file.digest

    def _pieces(self) -> list[bytes | np.ndarray]:
        if not self._is_filled:
            raise RuntimeError("There is nothing to write: Snapshot.copy() has not ended well yet.")
        if self._layout.is_lasting:
            return self._layout.pieces
        with self._buffers:
            return layout.lay_out(self._model, self._buffers.of).pieces

    def _prepare(self) -> None:
        """Makes a buffer for every variable that Keras reads in saving, and lays out the file."""
        self._is_filled = False
        self._known = _variables(self._model)
        with self._buffers.growing():
            self._layout = layout.lay_out(self._model, self._buffers.of)
        variables = [variable for variable, _ in self._buffers.held.values()]
        # One call for all of them, and no copy: a tensor shares its variable's memory for as long
        # as nobody assigns. Read one by one, small variables cost more than their copying.
        self._read = tf.function(
            lambda: [tf.convert_to_tensor(variable) for variable in variables], autograph=False
        )
        self._read()


def _variables(model: keras.Model) -> list[Any]:
    return [*model.variables, *(v for optimizer in optimizers(model) for v in optimizer.variables)]


def _check_ending(path: str, ending: str) -> None:
    if not path.endswith(ending):
        raise ValueError(f"path={path!r} must end in {ending!r}: Keras goes by it in loading.")


def _copy(tensor: Any, buffer: np.ndarray) -> None:
    # NumPy has no such type of its own (bfloat16, float8) and Python no letter for it.
    if buffer.dtype.isbuiltin != 1:
        plain = {1: tf.uint8, 2: tf.uint16}[buffer.dtype.itemsize]
        tensor, buffer = tf.bitcast(tensor, plain), buffer.view(plain.as_numpy_dtype)
    # Tensor.numpy() would copy; the tensor's own memory is read here.
    np.copyto(buffer, np.asarray(memoryview(tensor)))


class _Buffer(np.ndarray):
    """Stands for a variable's tensor while Keras saves.

    Attributes:
        is_whole: Whether this is a variable's own buffer, and not worked out from one.
    """

    is_whole = False

    def numpy(self) -> _Buffer:
        return self


class _Buffers(keras.StatelessScope):
    """Inside it, in this thread alone, Keras reads buffers in place of variables.

    Attributes:
        held: Each variable with its buffer, by the variable's id.
    """

    def __init__(self) -> None:
        super().__init__(initialize_variables=False)
        self.held: dict[int, tuple[Any, _Buffer]] = {}
        self._before: dict[int, tuple[Any, _Buffer]] | None = None

    def __enter__(self) -> _Buffers:
        layout.learn_attributes()
        super().__enter__()
        return self

    @contextlib.contextmanager
    def growing(self) -> Iterator[None]:
        """As the scope itself; what is read inside gets a buffer, and what is not loses its own."""
        self._before, self.held = self.held, {}
        try:
            with self:
                yield
        finally:
            self._before = None

    def get_current_value(self, variable: Any) -> _Buffer:
        """What Keras asks for a variable's value."""
        if id(variable) not in self.held:
            self.held[id(variable)] = variable, self._new(variable)
        return self.held[id(variable)][1]

    def of(self, value: Any) -> _Buffer | None:
        """The buffer that something Keras saves is, or `None` where it is worked out."""
        value = value.value if isinstance(value, keras.Variable) else value
        return value if isinstance(value, _Buffer) and value.is_whole else None

    def _new(self, variable: Any) -> _Buffer:
        if self._before is None:
            raise RuntimeError(
                f"The model has changed since it was copied: {variable.path} is new. Wait for the "
                "checkpoint before compiling it anew or adding layers."
            )
        if id(variable) in self._before:
            return self._before[id(variable)][1]
        buffer = np.empty(tuple(variable.shape), np.dtype(variable.dtype)).view(_Buffer)
        buffer.fill(0)  # else the first copy would wait for memory pages
        buffer.is_whole = True
        return buffer
