"""Checks of what callers pass. Each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from ._geometry import BlockGrid

#: Steps that NumPy's solver may take to tell whether two interleaved views share an element.
_OVERLAP_WORK = 10_000

_ADDABLE = frozenset(
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128".split()
)


def array_namespace(*, out: Any = None, **arrays: Any) -> ModuleType:
    """``numpy`` or ``cupy``, whichever all `arrays`, and `out` if it is given, belong to.

    CuPy is looked for among the imported modules: without it, nobody can hold one of its arrays.
    """
    if out is not None:
        arrays["out"] = out
    cupy = sys.modules.get("cupy")
    on_device = getattr(cupy, "ndarray", ())
    first = ""
    namespace: Any = None  # a module; Any, since modules have no types of their own
    for name, array in arrays.items():
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
    if namespace is cupy:
        current = cupy.cuda.runtime.getDevice()
        for name, array in arrays.items():
            _check_on_device(name, array, current)
    return namespace  # type: ignore[no-any-return]


def _check_on_device(name: str, array: Any, current: int) -> None:
    if array.size == 0:
        return
    if array.data.device_id != current:
        raise ValueError(
            f"{name}: expected an array on the current device {current}, got one on device {array.data.device_id}"
        )
    # Kernels move whole elements, each at a multiple of its size.
    unit = array.itemsize
    if array.data.ptr % unit or any(s % unit for s in array.strides):
        raise ValueError(
            f"{name}: expected an address and strides that are multiples of {unit} bytes, got address "
            f"{array.data.ptr:#x} and strides {array.strides}"
        )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_rank(name: str, array: Any, axes: str) -> None:
    """Raise unless `array` has the dimensions that `axes` lists, for instance ``"N, H, W, C"``."""
    count = axes.count(",") + 1
    if array.ndim != count:
        raise ValueError(f"{name}: expected {count} dimensions ({axes}), got shape {array.shape}")


def check_numeric(name: str, array: Any) -> None:
    """Raise unless the dtype of `array` is a number or bool."""
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a numeric or bool dtype, got {array.dtype}")


def check_addable(name: str, array: Any) -> None:
    """Raise unless blocks of this dtype can be added."""
    if array.dtype.name not in _ADDABLE:
        raise TypeError(
            f"{name}: expected a dtype that add=True can sum (integers, float16, bfloat16, float32, "
            f"float64, complex64, complex128), got {array.dtype}"
        )


def check_mask_dtype(name: str, array: Any) -> None:
    """Raise unless `array` is bool, integer or floating."""
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a bool, integer or floating dtype, got {array.dtype}")


def check_same_dtype(name: str, array: Any, dtype: np.dtype[Any], other: str) -> None:
    """Raise unless `array` has `dtype`, the one of argument `other`."""
    if array.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} like {other}, got {array.dtype}")


def check_indices(bin_counts: Any, active_block_indices: Any) -> None:
    """Raise unless the two arrays are of the form that ``reduce_mask`` returns."""
    for name, array in (("bin_counts", bin_counts), ("active_block_indices", active_block_indices)):
        if array.dtype != np.int32:
            raise TypeError(f"{name}: expected dtype int32, got {array.dtype}")
    if bin_counts.shape != (1,):
        raise ValueError(f"bin_counts: expected shape (1,), got {bin_counts.shape}")
    if active_block_indices.ndim != 2 or active_block_indices.shape[1] != 3:
        raise ValueError(f"active_block_indices: expected shape (M, 3), got {active_block_indices.shape}")


def stack_shape(rows: int, channels: int, grid: BlockGrid, transpose: bool) -> tuple[int, ...]:
    """Shape of the block stack of `rows` blocks."""
    return (rows, channels, *grid.bsize) if transpose else (rows, *grid.bsize, channels)


def check_shape(name: str, array: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Raise unless `array` has `shape`; `meaning` says what its axes are."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} ({meaning}), got {array.shape}")


def check_output(name: str, array: Any, **inputs: Any) -> None:
    """Raise unless `array` can be written: not read-only, no element twice, nothing shared with `inputs`."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if _repeats_elements(array):
        raise ValueError(
            f"{name}: expected an array whose elements lie apart, got shape {array.shape} with strides {array.strides}"
        )
    for other, value in inputs.items():
        if _share_memory(array, value):
            raise ValueError(f"{name}: expected memory of its own, got an array that overlaps {other}")


def _repeats_elements(array: Any) -> bool:
    """Whether two elements may lie at one address: some axis steps less than the axes inside it span."""
    if array.size == 0 or array.flags.c_contiguous:
        return False
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape) if n > 1):
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False


def _share_memory(a: Any, b: Any) -> bool:
    """Whether an element of `a` lies in one of `b`; undecided cases count as yes. Reads no element."""
    if a.size == 0 or b.size == 0:
        return False
    a_low, a_high = _byte_bounds(a)
    b_low, b_high = _byte_bounds(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    try:
        return np.shares_memory(_address_view(a), _address_view(b), max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def address(array: Any) -> int:
    """Address of the first element, on the host or on the device."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


def _byte_bounds(array: Any) -> tuple[int, int]:
    steps = [s * (n - 1) for s, n in zip(array.strides, array.shape)]
    low = address(array) + sum(s for s in steps if s < 0)
    high = address(array) + sum(s for s in steps if s > 0) + array.itemsize
    return low, high


def _address_view(array: Any) -> np.ndarray[Any, Any]:
    """A NumPy array with the address and strides of `array`, for arithmetic on them alone."""

    class _Addresses:
        __array_interface__ = {
            "version": 3,
            "data": (address(array), True),
            "typestr": f"|V{array.itemsize}",
            "shape": array.shape,
            "strides": array.strides,
        }

    return np.asarray(_Addresses())
