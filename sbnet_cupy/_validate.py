"""Checks of what callers pass. Each raises an error that names the argument, what was expected and what came.

Everything but memory overlap depends only on an array's :class:`Spec`, so calls that look alike are checked once: the
functions that do it are cached by their callers.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ._geometry import BlockGrid

#: Steps that NumPy's solver may take to tell whether two interleaved views share an element.
_OVERLAP_WORK = 10_000

_ADDABLE = frozenset(
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128".split()
)

_INT32 = np.dtype(np.int32)


class Spec(NamedTuple):
    """What an array is, apart from its contents and where exactly it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    #: Address modulo 16, the widest word of a kernel.
    misalignment: int
    #: Number of the device, or -1 for the host.
    device: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other, in C order."""
        dense = Spec.contiguous(self.shape, self.dtype, self.device).strides
        return self.size == 0 or all(n == 1 or s == d for n, s, d in zip(self.shape, self.strides, dense))

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: np.dtype[Any], device: int) -> Spec:
        """That of a new array."""
        strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(shape, strides, dtype, 0, device)


def spec_of(array: Any) -> Spec:
    """The :class:`Spec` of a NumPy or CuPy array."""
    return Spec(*look_at(array))


#: The fields of a Spec, as a plain tuple.
Look = tuple[tuple[int, ...], tuple[int, ...], np.dtype[Any], int, int]


def look_at(array: Any) -> Look:
    """The fields of an array's :class:`Spec`: what calls are cached by, since to make the Spec takes as long again."""
    if isinstance(array, np.ndarray):
        return array.shape, array.strides, array.dtype, 0, -1
    data = array.data
    address = data.ptr
    # An empty array has no memory, and so lies on every device.
    return array.shape, array.strides, array.dtype, address % 16, data.device_id if address else -1


def array_namespace(arrays: dict[str, Any], out: Any = None) -> ModuleType:
    """``numpy`` or ``cupy``, whichever all `arrays`, and `out` if it is given, belong to.

    CuPy is looked for among the imported modules: without it, nobody can hold one of its arrays.
    """
    cupy: Any = sys.modules.get("cupy")
    on_device = getattr(cupy, "ndarray", ())
    kind = None if out is None else type(out)
    for array in arrays.values():
        if type(array) is not kind:
            if kind is not None:
                break
            kind = type(array)
    else:
        if kind is np.ndarray:
            return np
        if kind is on_device:
            return cupy  # type: ignore[no-any-return]
    # Subclasses, or an error.
    first = ""
    namespace: Any = None
    for name, array in (arrays if out is None else {**arrays, "out": out}).items():
        if isinstance(array, np.ndarray):
            own: Any = np
        elif isinstance(array, on_device):
            own = cupy
        else:
            raise TypeError(f"{name}: expected a NumPy or CuPy array, got {_type_name(array)}")
        if namespace is None:
            first, namespace = name, own
        elif own is not namespace:
            raise TypeError(f"{name}: expected a {namespace.__name__} array like {first}, got {_type_name(array)}")
    return namespace  # type: ignore[no-any-return]


def current_device(xp: ModuleType) -> int:
    """Number of the device on which work would run, or -1 for the host."""
    return -1 if xp is np else xp.cuda.runtime.getDevice()


def check_place(name: str, spec: Spec, device: int) -> None:
    """Raise unless kernels on `device` can reach each element at a multiple of its size."""
    if spec.device == -1:
        return
    if spec.device != device:
        raise ValueError(f"{name}: expected an array on the current device {device}, got one on device {spec.device}")
    unit = spec.itemsize
    if spec.misalignment % unit or any(s % unit for s in spec.strides):
        raise ValueError(
            f"{name}: expected an address and strides that are multiples of {unit} bytes, got an address of "
            f"{spec.misalignment} modulo 16 and strides {spec.strides}"
        )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_image(name: str, spec: Spec) -> None:
    """Raise unless it is a tensor of numbers or bools with the axes N, H, W, C."""
    if len(spec.shape) != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, H, W, C), got shape {spec.shape}")
    if spec.dtype.kind not in "biufc" and spec.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a numeric or bool dtype, got {spec.dtype}")


def check_addable(name: str, spec: Spec) -> None:
    """Raise unless blocks of this dtype can be added."""
    if spec.dtype.name not in _ADDABLE:
        raise TypeError(
            f"{name}: expected a dtype that add=True can sum (integers, float16, bfloat16, float32, "
            f"float64, complex64, complex128), got {spec.dtype}"
        )


def check_mask(name: str, spec: Spec) -> None:
    """Raise unless it is a mask: bool, integer or floating, with the axes N, H, W and perhaps one channel."""
    if spec.dtype.kind not in "biuf" and spec.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a bool, integer or floating dtype, got {spec.dtype}")
    if len(spec.shape) != 3 and not (len(spec.shape) == 4 and spec.shape[3] == 1):
        raise ValueError(f"{name}: expected shape (N, H, W) or (N, H, W, 1), got {spec.shape}")


def check_like(name: str, spec: Spec, dtype: np.dtype[Any], shape: tuple[int, ...], axes: str, like: str = "x") -> None:
    """Raise unless it has `dtype`, the one of the argument `like`, and `shape`, whose axes are `axes`."""
    if spec.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} like {like}, got {spec.dtype}")
    if spec.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} ({axes}), got {spec.shape}")


def check_indices(bin_counts: Spec, active_block_indices: Spec) -> None:
    """Raise unless the two arrays are of the form that ``reduce_mask`` returns."""
    for name, spec in (("bin_counts", bin_counts), ("active_block_indices", active_block_indices)):
        if spec.dtype != _INT32:
            raise TypeError(f"{name}: expected dtype int32, got {spec.dtype}")
    if bin_counts.shape != (1,):
        raise ValueError(f"bin_counts: expected shape (1,), got {bin_counts.shape}")
    if len(active_block_indices.shape) != 2 or active_block_indices.shape[1] != 3:
        raise ValueError(f"active_block_indices: expected shape (M, 3), got {active_block_indices.shape}")


def stack_shape(rows: int, channels: int, grid: BlockGrid, transpose: bool) -> tuple[int, ...]:
    """Shape of the block stack of `rows` blocks."""
    return (rows, channels, *grid.bsize) if transpose else (rows, *grid.bsize, channels)


def stack_axes(transpose: bool) -> str:
    """What the axes of the block stack are."""
    return "M, C, height, width" if transpose else "M, height, width, C"


class Reach(NamedTuple):
    """The bytes that an array's elements lie in, counted from its address."""

    low: int
    high: int


@functools.lru_cache(maxsize=4096)
def reach_of(spec: Spec) -> Reach:
    """The :class:`Reach` of an array."""
    if spec.size == 0:
        return Reach(0, 0)
    spans = [stride * (length - 1) for stride, length in zip(spec.strides, spec.shape)]
    return Reach(sum(span for span in spans if span < 0), sum(span for span in spans if span > 0) + spec.itemsize)


@functools.lru_cache(maxsize=4096)
def output_reach(name: str, spec: Spec) -> Reach:
    """The :class:`Reach` of an array to write to. Raise unless each element has an address of its own."""
    reach = spec.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(spec.strides, spec.shape) if n > 1 and spec.size):
        if stride < reach:  # an axis that steps less than the axes inside it span
            raise ValueError(
                f"{name}: expected an array whose elements lie apart, got shape {spec.shape} with strides "
                f"{spec.strides}"
            )
        reach += stride * (length - 1)
    return reach_of(spec)


def check_separate(name: str, array: Any, reach: Reach, inputs: dict[str, Any], reaches: Sequence[Reach]) -> None:
    """Raise unless `array` can be written and shares no element with `inputs`. What they reach is known already."""
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        start, starts = address_of(array), [address_of(value) for value in inputs.values()]
    else:
        start, starts = array.data.ptr, [value.data.ptr for value in inputs.values()]
    low, high = start + reach[0], start + reach[1]
    for other, begin, (other_low, other_high) in zip(inputs, starts, reaches):
        if begin + other_low < high and begin + other_high > low and _share_memory(array, inputs[other]):
            raise ValueError(f"{name}: expected memory of its own, got an array that overlaps {other}")


def address_of(array: Any) -> int:
    """Address of an array's element (0, 0, ...), on the host or on the device."""
    address: int = array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr
    return address


def byte_bounds(array: Any) -> tuple[int, int]:
    """Addresses of the first byte of an array and behind its last, on the host or on the device."""
    start, reach = address_of(array), reach_of(spec_of(array))
    return start + reach.low, start + reach.high


def same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays are the same elements in the same places."""
    if a is b:
        return True
    alike = (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)
    return alike and byte_bounds(a) == byte_bounds(b)


def _share_memory(a: Any, b: Any) -> bool:
    """Whether an element of `a` lies in one of `b`; undecided cases count as yes. Reads no element."""
    if a.size == 0 or b.size == 0:
        return False
    try:
        return np.shares_memory(_address_view(a), _address_view(b), max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _address_view(array: Any) -> np.ndarray[Any, Any]:
    """A NumPy array with the address and strides of `array`, for arithmetic on them alone."""
    address = address_of(array)

    class _Addresses:
        __array_interface__ = {
            "version": 3,
            "data": (address, True),
            "typestr": f"|V{array.itemsize}",
            "shape": array.shape,
            "strides": array.strides,
        }

    return np.asarray(_Addresses())
