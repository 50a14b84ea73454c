"""A training's state in two files: readable JSON, and HDF5 for its arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np

JSON, ARRAYS = "state.json", "state.h5"
_ARRAY = "$array"


class Packed(NamedTuple):
    """A state as it is written.

    Attributes:
        text: Its JSON, where an array stands as `{"$array": name}`.
        arrays: By name.
    """

    text: str
    arrays: dict[str, np.ndarray]

    def write_json(self, path: str) -> None:
        """Writes `state.json` at a local path."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.text)

    def write_arrays(self, path: str) -> None:
        """Writes `state.h5` at a local path."""
        with h5py.File(path, "w") as file:
            for name, array in self.arrays.items():
                # HDF5 has no such type (bfloat16, float8): its bytes, and its name beside them.
                plain = array if array.dtype.isbuiltin == 1 else array.reshape(-1).view(np.uint8)
                data = file.create_dataset(name, data=plain)
                data.attrs["dtype"] = array.dtype.name
                data.attrs["shape"] = np.array(array.shape, np.int64)


def read(folder: str) -> Packed:
    """The state whose files are in a local folder."""
    with open(os.path.join(folder, JSON), encoding="utf-8") as file:
        text = file.read()
    arrays: dict[str, np.ndarray] = {}

    def take(name: str, data: Any) -> None:
        if isinstance(data, h5py.Dataset):
            dtype, shape = np.dtype(data.attrs["dtype"]), data.attrs["shape"]
            array = np.asarray(data[()])
            array = array if array.dtype == dtype else array.view(dtype)
            arrays[name] = array.reshape(tuple(int(size) for size in shape))

    with h5py.File(os.path.join(folder, ARRAYS), "r") as file:
        file.visititems(take)
    return Packed(text, arrays)


def pack(tree: Mapping[str, Any]) -> Packed:
    """A state as text and arrays, which are not copied.

    Args:
        tree: Of dicts with string keys, lists, strings, numbers, booleans, `None`, and NumPy
            arrays and scalars. Tuples become lists.

    Raises:
        TypeError: There is something else in it.
    """
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            arrays[path] = np.asarray(value)
            return {_ARRAY: path}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise TypeError(f"State at {path or 'its top'}: keys must be strings: {value!r}")
            return {key: plain(item, _join(path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, _join(path, str(index))) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(
            f"State at {path}: {type(value).__name__} cannot be saved. Allowed: dicts with string "
            "keys, lists, strings, numbers, None, NumPy arrays."
        )

    return Packed(json.dumps(plain(tree, ""), indent=1) + "\n", arrays)


def unpack(packed: Packed) -> dict[str, Any]:
    """The state again, its arrays in their places."""

    def filled(value: dict[str, Any]) -> Any:
        if set(value) == {_ARRAY}:
            array = packed.arrays[value[_ARRAY]]
            return array if array.ndim else array[()]
        return value

    return json.loads(packed.text, object_hook=filled)


def _join(path: str, name: str) -> str:
    name = name.replace("/", "|")
    return f"{path}/{name}" if path else name
