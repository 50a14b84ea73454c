"""Keras's weights file as pieces to write one after another: HDF5's structure, then the values.

HDF5 is written here and there in a file, so it can be hashed, zipped or uploaded only once it is
whole. Keras's own code therefore makes the file without its values, on holes, and the values are
put in from where they lie.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.saving import saving_lib

WEIGHTS = "model.weights.h5"  # in a checkpoint, as in a .keras archive
_KINDS = ("Operation", "Layer", "Functional", "Sequential", "Metric", "Optimizer", "Loss")
_KINDS += ("Cross", "Feature")


class Layout:
    """The pieces of one model's `.weights.h5`.

    Attributes:
        pieces: Bytes and arrays (uint8), in the order of the file. The arrays are views of
            buffers, so that the layout stays true when the buffers are filled anew.
        is_lasting: Whether all values are in buffers. Where a layer saves what it works out from
            its variables (merged LoRA weights), that has been written among the bytes.
    """

    def __init__(self, pieces: list[bytes | np.ndarray], *, is_lasting: bool) -> None:
        self.pieces = pieces
        self.is_lasting = is_lasting


def lay_out(model: keras.Model, buffer_of: Callable[[Any], np.ndarray | None]) -> Layout:
    """Has Keras go through the model as for `save_weights`; called inside a `StatelessScope`.

    Args:
        model: Built.
        buffer_of: For what Keras saves, the buffer it is, or `None` if it is not one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layout.h5")
        store = _Store(path, buffer_of)
        try:
            _save_state(model, weights_store=store, assets_store=None)
        finally:
            store.close()
        with open(path, "rb") as file:
            return Layout(list(_pieces(file, store.placed)), is_lasting=store.is_lasting)


def write_assets(model: keras.Model, archive: Any) -> None:
    """Puts what layers keep beside their weights (vocabularies) into a `.keras` archive."""
    store = saving_lib.DiskIOStore("assets", archive=archive, mode="w")
    try:
        _save_state(model, weights_store=None, assets_store=store)
    finally:
        store.close()


def config(model: keras.Model) -> dict[str, str]:
    """The two JSON members of a `.keras` archive, by name."""
    architecture, metadata = saving_lib._serialize_model_as_json(model)
    return {"metadata.json": metadata, "config.json": architecture}


def learn_attributes() -> None:
    """Called in each thread before the `StatelessScope` inside which Keras is to save.

    To see which attributes all optimizers have Keras makes one, and in a `StatelessScope` that is
    an error. Under this name it looks first for what it has seen before.
    """
    for kind in _KINDS:
        name = f"saving_attr_skiplist_{kind}"
        if global_state.get_global_attribute(name) is None:
            global_state.set_global_attribute(name, saving_lib.get_attr_skipset(kind))


def _save_state(model: keras.Model, **stores: Any) -> None:
    saving_lib._save_state(model, inner_path="", visited_saveables=set(), **stores)


class _Store(saving_lib.H5IOStore):
    """Keras's HDF5 file, where a buffer gets a place and nothing is written there."""

    def __init__(self, path: str, buffer_of: Callable[[Any], np.ndarray | None]) -> None:
        super().__init__(path, mode="w")
        self._buffer_of = buffer_of
        self.placed: list[tuple[int, np.ndarray]] = []
        self.is_lasting = True

    def __setitem__(self, key: str, value: Any) -> None:
        buffer = self._buffer_of(value)
        if buffer is None:
            self.is_lasting = False
            super().__setitem__(key, value)
            return
        if not self._h5_entry_initialized:
            self._create_h5_group(self._h5_entry_path)
        group = self._h5_entry_group
        place = _reserve(group, key, buffer)
        if place is not None:
            self.placed.append((place, buffer.reshape(-1).view(np.uint8)))
        if buffer.dtype.name == "bfloat16":
            group[key].attrs["dtype"] = "bfloat16"


def _reserve(group: Any, key: str, array: np.ndarray) -> int | None:
    """Makes a data set with no values; returns where in the file its bytes belong."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(array.dtype, logical=True)
    space = h5py.h5s.create_simple(array.shape) if array.ndim else h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.h5d.create(group.id, key.encode(), kind, space, options).get_offset()


def _pieces(file: Any, placed: list[tuple[int, np.ndarray]]) -> Iterator[bytes | np.ndarray]:
    for place, array in sorted(placed, key=lambda pair: pair[0]):
        if place > file.tell():
            yield file.read(place - file.tell())
        yield array
        file.seek(place + array.nbytes)
    # The file may end with the hole of the last array.
    rest = file.read()
    if rest:
        yield rest
