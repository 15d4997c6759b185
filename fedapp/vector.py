"""Weights as one flat vector, and what a Flower Array holds."""

import io
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedapp.codec import Layout, Slot
from fedapp.codec.layers import size
from fedapp.errors import DecodeError


class Held(Array):
    """An array of which this process has what its bytes say: they are made when somebody asks for them.

    It never comes from outside: what was read from bytes is an `Array`, as this one is once it was pickled.
    value: what they say; size: how many they are.
    """

    def __init__(
        self,
        like: tuple[str, tuple[int, ...], str],
        value: NDArray[Any],
        size: int,
        make: Callable[[], bytes],
    ) -> None:
        self.dtype, self.shape, self.stype = like
        self.value, self.size, self._make = value, size, make
        self._made: bytes | None = None

    @property
    def data(self) -> bytes:  # type: ignore[override]
        if self._made is None:
            self._made = self._make()
        return self._made

    def numpy(self) -> NDArray[Any]:
        return self.value

    def __reduce__(self) -> tuple[type[Array], tuple[object, ...]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def layout_of(arrays: ArrayRecord) -> Layout:
    """The floating-point arrays of a model, in order; integer buffers are no part of an update."""
    floats = ((n, tuple(a.shape)) for n, a in arrays.items() if np.issubdtype(a.dtype, np.floating))
    return Layout.of(floats)


def buffers_of(arrays: ArrayRecord, layout: Layout) -> dict[str, Array]:
    """The other arrays, which count batches and the like."""
    floats = {slot.name for slot in layout.slots}
    return {name: array for name, array in arrays.items() if name not in floats}


def ravel(arrays: ArrayRecord, layout: Layout) -> NDArray[np.float32]:
    """Float32 (size,): the arrays of the layout, end to end."""
    flat = np.empty(layout.size, np.float32)
    for slot in layout.slots:
        found = values_in(arrays, slot)
        flat[slot.offset : slot.offset + len(found)] = found
    return flat


def values_in(arrays: ArrayRecord, slot: Slot) -> NDArray[Any]:
    """The array of a slot, flat and not copied. Raises DecodeError where its shape is another."""
    found = values(arrays[slot.name])
    if found.shape != slot.shape:
        raise DecodeError(f"{slot.name} has shape {found.shape}, the model {slot.shape}")
    return found.reshape(-1)


def unravel(flat: NDArray[Any], layout: Layout, like: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays back from the vector, each in the dtype that it has in `like`."""
    return {
        slot.name: flat[slot.offset : slot.offset + size(slot)]
        .reshape(slot.shape)
        .astype(like[slot.name].dtype)
        for slot in layout.slots
    }


def update_of(received: ArrayRecord, trained: ArrayRecord) -> NDArray[np.float32]:
    """Trained minus received, float32 (size,)."""
    layout = layout_of(received)
    update = np.empty(layout.size, np.float32)
    with np.errstate(invalid="ignore"):  # of infinities: the caller looks at what comes out
        for slot in layout.slots:
            start, end = values_in(received, slot), values_in(trained, slot)
            np.subtract(end, start, out=update[slot.offset : slot.offset + len(start)], dtype=np.float32)
    return update


def values(array: Array) -> NDArray[Any]:
    """What `array.numpy()` returns, read-only and without a copy; for arrays that this program has made.

    A file of numpy's ends with the values, so its header need not be parsed again.
    """
    if isinstance(array, Held):
        return array.value
    dtype, count = np.dtype(array.dtype), prod(array.shape)
    if b"'fortran_order': False" not in array.data[:128]:
        return array.numpy()
    found = np.frombuffer(array.data, dtype, count, len(array.data) - count * dtype.itemsize)
    return found.reshape(array.shape)


def arrays_in(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays of a record by name, in order."""
    return {name: values(array) for name, array in record.items()}


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """The record that these arrays make."""
    return record_with({name: array_of(array) for name, array in arrays.items()})


class Reply(ArrayRecord):
    """The arrays of one of many replies, for a strategy of Flower's."""

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[NDArray[Any]]:
        """As Flower's, which collects garbage after each reply whose arrays it takes out, 10 ms and more."""
        return super().to_numpy_ndarrays() if keep_input else [self.pop(name).numpy() for name in list(self)]


def record_with(arrays: Mapping[str, Array]) -> ArrayRecord:
    """The record that holds these very arrays, which `ArrayRecord(arrays)` would make anew."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def array_of(array: NDArray[Any]) -> Array:
    """What `Array(array)` makes, in row-major order: the same bytes, which are copied once."""
    array = np.asarray(array, order="C")
    header = _header(array.dtype.str, array.shape)
    return Array(str(array.dtype), array.shape, SType.NUMPY, b"".join((header, array.data)))


def held(array: NDArray[Any]) -> Held:
    """The same while the array stays as it is, and nothing is copied unless somebody asks for the bytes."""
    value = np.asarray(array).view()
    value.flags.writeable = False
    size = len(_header(value.dtype.str, value.shape)) + value.nbytes
    return Held((str(value.dtype), value.shape, SType.NUMPY), value, size, lambda: array_of(value).data)


def size_in(array: Array) -> int:
    """How many bytes an array has."""
    return array.size if isinstance(array, Held) else len(array.data)


@lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What a file of numpy's says before the values."""
    file = io.BytesIO()
    form = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, form)
    return file.getvalue()
