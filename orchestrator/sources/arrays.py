"""Arrays of one length in any nesting: in memory, of pandas, or on disk and read by rows."""

from __future__ import annotations

import functools
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from orchestrator.sources.base import in_order, read_by_python, runs


class Arrays:
    """A `Source` of arrays.

    What is in memory (NumPy, tensors, pandas) becomes tensors, of which a rank copies its own
    rows. `np.memmap`, and what has `shape`, `dtype` and slices by rows without being in memory
    (`h5py.Dataset`, a zarr array), is left where it is: a rank reads its own rows.

    Args:
        data: Arrays in any nesting of tuples, lists and dicts. pandas as Keras takes it: a
            DataFrame is one array of all its columns, a Series has the shape `(samples, 1)`, and
            their floats become `keras.config.floatx()`.

    Raises:
        ValueError: The arrays differ in length, or something is none.
    """

    note: str | None = None

    def __init__(self, data: Any) -> None:
        self._data = tf.nest.map_structure(_array, data)
        self._leaves = tf.nest.flatten(self._data)
        shapes = [tuple(leaf.shape) for leaf in self._leaves]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                "shard() takes a tf.data.Dataset, or arrays that all have as many samples; got "
                f"shapes {shapes}."
            )
        self._length = shapes[0][0]
        self._on_disk = [leaf for leaf in self._leaves if _is_on_disk(leaf)]
        self._specs = [
            tf.TensorSpec((None, *leaf.shape[1:]), np.dtype(leaf.dtype)) for leaf in self._on_disk
        ]
        with tf.device("CPU:0"):  # where datasets run; a GPU would get a copy of everything
            self._tensors = [
                None if _is_on_disk(leaf) else tf.convert_to_tensor(leaf) for leaf in self._leaves
            ]

    def __len__(self) -> int:
        return self._length

    def describe(self) -> str:
        """One sample's dtypes and shapes."""
        return ", ".join(
            f"{np.dtype(getattr(leaf.dtype, 'as_numpy_dtype', leaf.dtype))}{tuple(leaf.shape[1:])}"
            for leaf in self._leaves
        )

    def rows(self, indices: tf.Tensor) -> Any:
        """The samples at `indices`, stacked."""
        read = iter(read_by_python(self._read, self._specs, indices) if self._on_disk else [])
        rows = [next(read) if t is None else tf.gather(t, indices) for t in self._tensors]
        return tf.nest.pack_sequence_as(self._data, rows)

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        return [in_order(functools.partial(_read_runs, array), indices) for array in self._on_disk]


def _array(leaf: Any) -> Any:
    """One array as it is kept: pandas and Python numbers become NumPy, the rest stays."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(leaf, pandas.DataFrame | pandas.Series):
        return _of_pandas(leaf)
    return leaf if tf.is_tensor(leaf) or _is_on_disk(leaf) else np.asarray(leaf)


def _of_pandas(table: Any) -> np.ndarray:
    array = table.to_numpy()
    if array.dtype == object and not all(isinstance(value, str) for value in array.flat):
        raise ValueError(
            f"shard() got a pandas {type(table).__name__} that has no one dtype "
            f"({table.dtypes if array.ndim == 1 else dict(table.dtypes)}). Convert it, or pass "
            "dict(frame) for one array a column."
        )
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(keras.config.floatx(), copy=False)
    return array[:, None] if array.ndim == 1 else array


def _is_on_disk(leaf: Any) -> bool:
    if isinstance(leaf, np.memmap):
        return True
    # What lies in memory (NumPy, JAX, PyTorch) speaks DLPack; what is read by rows does not.
    return (
        all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))
        and not hasattr(leaf, "__dlpack__")
        and not isinstance(leaf, np.generic)
        and not tf.is_tensor(leaf)
        and not type(leaf).__module__.startswith("pandas.")
    )


def _read_runs(array: Any, indices: np.ndarray) -> np.ndarray:
    pieces = [np.asarray(array[begin:end]) for begin, end in runs(indices)]
    return np.concatenate(pieces or [np.empty((0, *array.shape[1:]), array.dtype)])
